"""`trainer export RUN`: write the run's model as a folder for other programs."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rich.console import Console

from trainer.commands.arguments import add_allow_code_flag, add_weights_flags, parse
from trainer.core.checkpoint import MANIFEST, TRAINING_FILES
from trainer.core.finished import FinishedRun, open_run
from trainer.errors import ConfigError, OutputError

MERGED = "merged_model"

EXPORTED = "exported_model"


def run(argv: list[str]) -> int:
    """Copy the final model, or merge its adapter into its base."""
    words = parse(_parser(), argv)
    console = Console()
    finished = open_run(
        Path(words.run), step=words.step, base=words.base, allow_code=words.allow_code
    )
    if finished.base is not None and not (words.merge and finished.is_adapter):
        raise ConfigError(
            "--base applies only to an adapter that is merged; add --merge, or leave --base out."
        )
    is_merged = words.merge and finished.is_adapter
    default = MERGED if is_merged else EXPORTED
    target = Path(words.output) if words.output else finished.folder / default
    if target.exists():
        raise OutputError(f"{target}: exists already; choose another --output, or remove it.")
    with console.status(f"exporting the {finished.note}"):
        # torch takes seconds to load; mistakes on the command line are told before.
        from trainer.core.merging import export_merged

        if is_merged:
            words_of_check = export_merged(finished, target).words()
        else:
            _copy(finished, target)
    if is_merged:
        console.print(words_of_check, highlight=False)
    elif words.merge:
        console.print("the run trained all weights; there is no adapter to merge")
    kind = "merged model" if is_merged else "adapter" if finished.is_adapter else "model"
    console.print(f"{kind} written to {target} (from the {finished.note})", highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trainer export", description=__doc__)
    add_weights_flags(parser)
    add_allow_code_flag(parser)
    parser.add_argument(
        "--merge", action="store_true", help="add a LoRA adapter to its base: a plain model folder"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help=f"folder to write [RUN/{MERGED} of a merge, else RUN/{EXPORTED}]",
    )
    return parser


def _copy(finished: FinishedRun, target: Path) -> None:
    """The weights as they are; of a checkpoint as the run would have saved them at its end."""
    from trainer.data.template import ChatTemplate
    from trainer.files import staged
    from trainer.models.adapter_files import write_model

    with staged(target, advice="choose another --output.") as staging:
        if finished.is_checkpoint and not finished.is_adapter:
            model, tokenizer = finished.load()
            write_model(
                model,
                tokenizer,
                staging,
                dtype=finished.dtype(),
                stop_ids=ChatTemplate(tokenizer).stop_ids,
                use_cache=True,
            )
        else:
            ignore = shutil.ignore_patterns(*TRAINING_FILES, MANIFEST)
            shutil.copytree(
                finished.model_dir, staging, ignore=ignore if finished.is_checkpoint else None
            )
