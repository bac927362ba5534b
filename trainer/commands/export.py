"""`trainer export RUN`: write the run's model as a folder for other programs."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rich.console import Console

from trainer.commands.arguments import parse
from trainer.core.finished import FinishedRun, open_run
from trainer.core.saving import save_final_model
from trainer.data.template import ChatTemplate
from trainer.errors import OutputError
from trainer.models.load import is_adapter_folder
from trainer.models.precision import DTYPES


def run(argv: list[str]) -> int:
    """Copy the final model, or merge its adapter into its base."""
    words = parse(_parser(), argv)
    console = Console()
    finished = open_run(Path(words.run))
    target = Path(words.output) if words.output else finished.folder / "merged_model"
    if target.exists():
        raise OutputError(f"{target}: exists already; choose another --output, or remove it.")
    is_adapter = is_adapter_folder(finished.model_dir)
    with console.status(f"exporting the {finished.note}"):
        if is_adapter and words.merge:
            _merge(finished, target)
        else:
            _copy(finished.model_dir, target)
    if words.merge and not is_adapter:
        console.print("this run trained all weights: there is nothing to merge")
    kind = "merged model" if is_adapter and words.merge else "adapter" if is_adapter else "model"
    console.print(f"{kind} written to {target} (from the {finished.note})", highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trainer export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of the run (--output of trainer train)")
    parser.add_argument(
        "--merge", action="store_true", help="add a LoRA adapter to its base: a plain model folder"
    )
    parser.add_argument("--output", help="folder to write [RUN/merged_model]")
    return parser


def _merge(finished: FinishedRun, target: Path) -> None:
    """Merge in fp32, then save in the run's compute dtype: merging in bf16 loses small updates."""
    model, tokenizer = finished.load()
    merged = model.merge_and_unload()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_final_model(
            merged,
            tokenizer,
            target,
            dtype=DTYPES[finished.config.hyperparams.fp_precision or "fp32"],
            stop_ids=ChatTemplate(tokenizer).stop_ids,
            use_cache=True,
        )
    except OSError as error:
        raise OutputError(
            f"{target}: cannot write it ({error}); choose another --output."
        ) from error


def _copy(source: Path, target: Path) -> None:
    staging = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, staging)
        staging.rename(target)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise OutputError(
            f"{target}: cannot write it ({error}); choose another --output."
        ) from error
