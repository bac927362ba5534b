"""`trainer train`: config, engine, exit code; also the dry run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from trainer.commands.arguments import print_table, words_while_loading
from trainer.config import ConfigLoader, LoadedConfig, find_config_file
from trainer.config.flags import ParsedFlags, parse_flags
from trainer.config.loader import RESOLVED_NAME, is_of_run
from trainer.core.early_checks import check_early, check_folder_early
from trainer.counts import counted
from trainer.errors import EXIT_COMPLETED, ConfigError, ResumeError
from trainer.job import run_job
from trainer.monitoring.resuming import ALLOW_CODE, named_code
from trainer.views.terminal import DisplayKind, create_display


def run(argv: list[str], *, prog: str = "trainer train") -> int:
    """Train as the command line says."""
    flags = parse_flags(argv, prog=prog)
    loaded = load_config(flags)
    display_name = loaded.config.monitoring.display
    if loaded.file is not None and display_name not in ("quiet", "json"):
        print(f"config file: {loaded.file}")
    check_early(loaded.config)
    check_folder_early(loaded.config)
    if flags.dry_run:
        return _dry_run(loaded)
    # Everything from here on needs torch, which takes seconds to load; mistakes are told before.
    with words_while_loading(display_name):
        import trainer.core.engine  # noqa: F401  (what run_job needs)
    from trainer.core.faults import leave, let_the_end_be_told, tell_failure
    from trainer.core.run import is_main_process

    is_several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if is_several:
        let_the_end_be_told()
    result = run_job(loaded.config, origins=loaded.origins)
    # A stop is told by the main process.
    is_mine = result.state == "failed" and not result.is_told_elsewhere
    if not is_main_process() and is_mine:
        tell_failure(result.error_message)
    return result.exit_code if result.success or not is_several else leave(result.exit_code)


def load_config(flags: ParsedFlags) -> LoadedConfig:
    """Merge the sources; `--resume` without a config file starts from the run's own config."""
    file = flags.config_file
    if file is None and flags.values.get("output.resume"):
        output = flags.values.get("output.output_dir", "outputs")
        own = Path(str(output)) / RESOLVED_NAME
        file = own if own.is_file() else None
    file = file or find_config_file(flags, Path.cwd())
    if (
        flags.values.get("output.resume")
        and file is None
        and not flags.values.get("data.dataset_path")
    ):
        raise ResumeError(
            f"--resume: {output} holds no run, so there is nothing to resume. Give the --output of "
            "the run, or leave --resume out."
        )
    loaded = ConfigLoader.load(file, os.environ, flags)
    if "monitoring.notify" in loaded.left_out:
        print(
            f"warning: {file}: monitoring.notify in the config of a run is not used, so nobody is "
            "told how this run ends; give --monitoring.notify again to change that",
            file=sys.stderr,
        )
    if not flags.allow_code:
        _refuse_code_of_runs(loaded)
    return loaded


def _refuse_code_of_runs(loaded: LoadedConfig) -> None:
    """The record of a run may be somebody else's.

    Raises:
        ConfigError: the config in the folder of a run names code, and nobody said that it may.
    """
    file = loaded.file
    if file is None or not is_of_run(file):
        return
    for key, code in named_code(loaded.config.model_dump()).items():
        if loaded.origins[key].startswith("file "):
            raise ConfigError(
                f"{file}: {key} names code ({code}), and this file was written by a run; give "
                f"{ALLOW_CODE} if you know that code, or give the value yourself (--{key})."
            )


def _dry_run(loaded: LoadedConfig) -> int:
    display = loaded.config.monitoring.display
    with words_while_loading(display):
        from trainer.core.engine import TrainerEngine
        from trainer.core.run import is_main_process
        from trainer.models.bf16_speed import measure_bf16

    if not is_main_process():  # one process says it for all
        return EXIT_COMPLETED
    kind: DisplayKind = display if display in ("json", "quiet") else "plain"
    found = TrainerEngine(observers=[create_display(kind)]).dry_run(loaded.config)
    hyper = found.config.hyperparams
    bf16 = measure_bf16(*found.block_sizes) if found.device.type == "cpu" else None
    resolved = Path(found.config.output.output_dir) / RESOLVED_NAME
    if display == "json":
        told = {**found.as_json(), "bf16": bf16.as_json() if bf16 is not None else None}
        print(json.dumps({"event": "DryRun", **told, "config": str(resolved)}))
        return EXIT_COMPLETED
    world = found.strategy.num_processes
    rows = hyper.batch_size * hyper.gradient_accumulation * world
    each = f" on each of {world} processes" if world > 1 else ""
    lines: Sequence[tuple[str, str]] = [
        ("processes", str(found.strategy)),
        ("precision", found.precision.reason),
        *([("bf16", bf16.words)] if bf16 is not None else []),
        ("attention", found.attention),
        *found.memory.lines(),
        ("fits", found.fit.words()),
        *(("" if nth else "modes", words) for nth, words in enumerate(found.mode_lines())),
        *([("shards", found.shard_words())] if found.shards else []),
        (
            "steps",
            f"{found.num_steps:,} of {counted(rows, 'row')} ({counted(hyper.batch_size, 'row')} x "
            f"{counted(hyper.gradient_accumulation, 'forward pass', 'forward passes')}{each})",
        ),
        ("config", str(resolved)),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    for label, text in lines:
        table.add_row(f"  {label}", Text(text))
    print_table(table)
    if found.warning is not None:
        print(f"warning: {found.warning}")
    print("dry run: nothing was trained")
    return EXIT_COMPLETED
