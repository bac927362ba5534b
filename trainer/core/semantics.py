"""SEMANTICS: which rules a run trains by, so that no run is continued by others than its own.

The number rises when the same config, rows and seed would train otherwise than before: rates, ids,
order, split, golden answers. It stands in run.json and in the manifest of every checkpoint; one
without it is of number 1. Reading a run (monitor, report, chat, export) needs no number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.errors import ResumeError

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
