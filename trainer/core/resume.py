"""By which rules a run trains, what must be equal for it to be continued, and what may change."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trainer import __version__
from trainer.config.schema import TrainerConfig
from trainer.core.checkpoint import (
    RUN_STATE_FILE,
    HashFiles,
    Manifest,
    find_latest_checkpoint,
    hash_files,
    load_named_checkpoint,
)
from trainer.counts import counted
from trainer.errors import ResumeError
from trainer.monitoring.processes import num_processes

# ---- SEMANTICS: which rules a run trains by, so that it is continued by no others
#
# The number rises when the same config, rows and seed would train otherwise than before: rates,
# ids, order, split, golden answers. It stands in run.json and in the manifest of every checkpoint;
# one without it is of number 1. Reading a run (monitor, report, chat, export) needs no number.


SEMANTICS = 2
"""Of runs that this version begins."""

KEY = "semantics"

CHANGES: dict[int, tuple[str, ...]] = {
    2: (
        "rates of the warm-up",
        "order of rows",
        "which turns and tokens of a row are trained",
        "split by prompt",
        "arguments of tool calls",
        "golden answers",
        "sampled previews",
        "packing with flash attention",
        "router loss in bf16",
        "date that templates print",
        "weights of final_model with early stopping",
    ),
}
"""Number -> what it does otherwise than the number before, in words that follow "the"."""

ADAPTER_FILE = "adapter_config.json"


def semantics_of(record: dict[str, Any]) -> int:
    """The number of a run.json or of a checkpoint's metadata; 1 where there is none."""
    return int(record.get(KEY, 1))


def check_semantics(metadata: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to continue a run that was begun under other rules.

    Args:
        metadata: of the checkpoint's manifest.
        checkpoint: its folder, `RUN/checkpoints/step-N`.
    Raises:
        ResumeError: one line that names what changed and what can be done.
    """
    number = semantics_of(metadata)
    if number == SEMANTICS:
        return
    version = metadata.get("versions", {}).get("trainer")
    makers = f"the version that made it ({version})" if version else "the version that made it"
    if number > SEMANTICS:
        raise ResumeError(
            f"--resume {checkpoint}: made by a newer version (semantics {number}; this one trains "
            f"by {SEMANTICS}). Resume it with {makers}."
        )
    changes = [words for n in range(number + 1, SEMANTICS + 1) for words in CHANGES[n]]
    raise ResumeError(
        f"--resume {checkpoint}: begun under older rules (semantics {number}, now {SEMANTICS}), "
        f"and since then these changed: {', '.join(changes)}. Train on from its weights in a new "
        f"--output with {_weights_of(checkpoint)}, start anew, or resume it with {makers}."
    )


def _weights_of(checkpoint: Path) -> str:
    """How to begin a new run from a checkpoint's weights."""
    if (checkpoint / ADAPTER_FILE).is_file():
        run = checkpoint.parent.parent
        return f"`trainer export {run} --merge` and --model {run / 'merged_model'}"
    return f"--model {checkpoint}"


PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
    "pydantic",
    "bitsandbytes",
    "torchao",
)


def package_versions() -> dict[str, Any]:
    """Of everything whose version can change what a training step computes."""
    return {
        "trainer": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def environment_manifest(device: torch.device) -> dict[str, Any]:
    """The machine and software of a run on `device`, without names of people or variables.

    Only a run on a GPU asks for the names of GPUs: asking makes CUDA start, or fail.
    """
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    return {
        **package_versions(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(num_gpus)],
        "cuda": torch.version.cuda,
        "world_size": num_processes(),
        "git": _git(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that this process was started in; None outside of one."""

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "is_dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


# ---- what must be equal for a run to be continued bit for bit, and what may change


LATEST = "latest"

FREE_SECTIONS = frozenset({"monitoring", "output", "locked", "distributed"})
"""May change freely: they say what is written or who computes it, not what is trained."""

FREE_KEYS = frozenset(
    {
        "environment.deterministic",
        "environment.device",
        "environment.num_threads",
        "environment.num_workers",
        "environment.offline",
        "hyperparams.auto_batch_size",
        "hyperparams.num_epochs",
        "hyperparams.max_steps",
        "hyperparams.early_stopping_metric",
        "hyperparams.early_stopping_patience",
        "hyperparams.early_stopping_min_delta",
        "hyperparams.compile",
        "data.dataset_path",
        "data.validation_path",
        "data.max_rows",
        "data.cache",
        "data.cache_dir",
    }
)
"""May change: paths, because the rows themselves are compared; lengths of the run, recorded."""


SCHEDULE_KEYS = frozenset(
    {
        "hyperparams.learning_rate",
        "hyperparams.lr_scheduler",
        "hyperparams.warmup_steps",
    }
)
"""May be changed on purpose (output.allow_changes): the rates of the steps that are left."""

LENGTH_KEYS = frozenset({"hyperparams.max_steps", "hyperparams.num_epochs"})


def is_of_schedule(change: str) -> bool:
    """Whether a change, in the words of `check_resumable`, moves the rates that are left."""
    return change.split(":")[0] in SCHEDULE_KEYS | LENGTH_KEYS


STREAM = "stream"
"""In the state of a run: where its stream of rows stands."""

HISTORY = "changes"
"""In run.json and in a checkpoint's metadata: each resume that changed something."""


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint and what it says about its run."""

    path: Path
    step: int
    metadata: dict[str, Any]
    run_state: dict[str, Any]
    num_processes: int = 1
    """Of those that made it."""
    problems: tuple[str, ...] = ()
    """Newer checkpoints that were passed over, and why."""

    def history(self, changes: Sequence[str]) -> list[dict[str, Any]]:
        """The changes of the run up to here, and those that are made now, each with its step."""
        before = list(self.metadata.get(HISTORY, []))
        return [*before, {"step": self.step, "changes": list(changes)}] if changes else before

    @property
    def date(self) -> dt.date | None:
        """The date in the run's prompts, which a resume must not change."""
        recorded = self.metadata.get("date")
        return dt.date.fromisoformat(recorded) if recorded else None


def find_resume_point(wanted: str, root: Path, hashing: HashFiles = hash_files) -> ResumePoint:
    """Find and verify the checkpoint to continue from.

    Args:
        wanted: `latest`, or the folder of one checkpoint.
        root: the run's `checkpoints/`.
        hashing: as of `verify_checkpoint`.
    Raises:
        ResumeError: nothing to resume, the named checkpoint is broken, or its run was begun
            under other rules than this version's.
    """
    problems: list[str] = []
    if wanted == LATEST:
        path, manifest, problems = find_latest_checkpoint(root, hashing)
    else:
        path = Path(wanted)
        manifest = load_named_checkpoint(path, hashing)
    check_semantics(manifest.metadata, path)
    run_state = json.loads((path / RUN_STATE_FILE).read_text())
    return ResumePoint(
        path,
        manifest.step,
        manifest.metadata,
        run_state,
        num_processes=_processes_of(manifest),
        problems=tuple(problems),
    )


def _processes_of(manifest: Manifest) -> int:
    """How many processes made a checkpoint; each has left its random state."""
    states = sum(name.startswith("rng_state") for name in manifest.files)
    return int(manifest.metadata.get("world_size", max(states, 1)))


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys of a two-level config dict."""
    return {
        f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()
    }


def check_resumable(
    point: ResumePoint,
    config: TrainerConfig,
    fingerprint: str,
    num_steps: int,
    num_processes: int = 1,
) -> list[str]:
    """Compare a checkpoint's record with the run that wants to continue it.

    Args:
        point: its metadata has `config`, `data_fingerprint` and `versions`.
        config: of the run, resolved.
        fingerprint: of the encoded training rows.
        num_steps: optimizer steps of the whole run.
        num_processes: of the run.
    Returns:
        Allowed changes in words, to be told and recorded.
    Raises:
        ResumeError: a value that decides the training differs, or the rows do, or the run is
            shorter than what is done already.
    """
    metadata = point.metadata
    # A checkpoint of an older version lacks newer keys; it did what their defaults say.
    defaults = flat(TrainerConfig().model_dump(mode="json"))
    before = {**defaults, **flat(metadata["config"])}
    now = flat(config.model_dump(mode="json"))
    changed = {
        key: f"{key}: {before.get(key)!r} -> {value!r}"
        for key, value in now.items()
        if before.get(key) != value and key.split(".")[0] not in FREE_SECTIONS
    }
    world = point.num_processes
    rows = _rows_of_step(before, world)
    is_same_step = rows == _rows_of_step(now, num_processes)
    if num_processes != world:
        changed[PROCESSES] = (
            f"processes: {world} -> {num_processes} (dropout and other random numbers are drawn "
            "otherwise)"
        )
        if not is_same_step:
            raise ResumeError(_other_step(before, now, world, num_processes))
    free = FREE_KEYS | {PROCESSES}
    if is_same_step:
        free |= CUT_KEYS
    if config.output.allow_changes:
        free |= SCHEDULE_KEYS
    refused = {key: text for key, text in changed.items() if key not in free}
    if refused:
        raise ResumeError(
            "--resume continues a run as it was, and these values differ from the checkpoint's: "
            f"{'; '.join(refused.values())}. {_way_out(refused)}"
        )
    if metadata["data_fingerprint"] != fingerprint:
        raise ResumeError(
            "--resume: the training rows are not those of the checkpoint (content, order or "
            "tokenizer changed). Restore the data file, or start a new run in another --output."
        )
    if num_steps < point.step:
        raise ResumeError(
            f"--resume: {counted(point.step, 'step is', 'steps are')} done already, but this run "
            f"is set to {num_steps} in "
            "total. "
            "Raise hyperparams.max_steps or num_epochs, or name an older checkpoint: --resume "
            "STEP_DIR."
        )
    return [*changed.values(), *_version_changes(metadata.get("versions", {}))]


def _way_out(refused: Iterable[str]) -> str:
    """What can be done about values that differ."""
    schedule = [key for key in refused if key in SCHEDULE_KEYS]
    others = [key for key in refused if key not in SCHEDULE_KEYS]
    advice = "Set them back, or start a new run in another --output."
    if not schedule:
        return advice
    on_purpose = f"--allow-changes changes {', '.join(schedule)} from here on"
    if not others:
        return f"To do that on purpose: {on_purpose}. Else: {advice}"
    return f"{advice} ({on_purpose}, and none of the others.)"


PROCESSES = "processes"

CUT_KEYS = frozenset({"hyperparams.batch_size", "hyperparams.gradient_accumulation"})
"""How the rows of an optimizer step are cut: it changes rounding, and dropout."""


def _rows_of_step(values: dict[str, Any], num_processes: int) -> int:
    """Of one optimizer step, on all processes."""
    batch, accumulation = (int(values[key]) for key in sorted(CUT_KEYS))
    return batch * accumulation * num_processes


def _other_step(before: dict[str, Any], now: dict[str, Any], world: int, processes: int) -> str:
    """That the rows of an optimizer step differ, and the values that would keep them."""

    def cut(values: dict[str, Any], processes: int) -> str:
        batch, accumulation = (values[key] for key in sorted(CUT_KEYS))
        return (
            f"{_rows_of_step(values, processes)} ({processes} processes x batch_size {batch} x "
            f"gradient_accumulation {accumulation})"
        )

    rows = _rows_of_step(before, world)
    if rows % processes:
        fitting = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        advice = f"Start a number of processes that divides {rows}: {fitting}"
    else:
        share, batch = rows // processes, int(now["hyperparams.batch_size"])
        batch = max(n for n in range(1, share + 1) if share % n == 0 and n <= batch)
        advice = (
            f"With {processes} processes give --batch-size {batch} --gradient-accumulation "
            f"{share // batch}"
        )
    return (
        "--resume trains each optimizer step on as many rows as before: the checkpoint has "
        f"{cut(before, world)}, this run {cut(now, processes)}. {advice}, or start a new run in "
        "another --output."
    )


def _version_changes(before: dict[str, Any]) -> list[str]:
    """Packages whose version is another one: training goes on, bit equality does not."""

    def flat_versions(record: dict[str, Any]) -> dict[str, Any]:
        return {**record, **record.get("packages", {}), "packages": None}

    now, old = flat_versions(package_versions()), flat_versions(before)
    return [
        f"version of {name}: {old[name]} -> {now[name]} (results may differ in the last bits)"
        for name in now
        if name in old and old[name] != now[name]
    ]
