"""What must be equal for a run to be continued bit for bit, and what may change."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.schema import TrainerConfig
from trainer.core.checkpoint import find_latest_checkpoint, load_named_checkpoint
from trainer.core.hf_trainer import RUN_STATE_FILE
from trainer.core.run_folder import package_versions
from trainer.core.semantics import check_semantics
from trainer.errors import ResumeError

LATEST = "latest"

FREE_SECTIONS = frozenset({"monitoring", "output", "locked"})
"""May change freely: they say what is written, not what is trained."""
FREE_KEYS = frozenset(
    {
        "environment.device",
        "environment.num_threads",
        "environment.num_workers",
        "environment.offline",
        "hyperparams.num_epochs",
        "hyperparams.max_steps",
        "hyperparams.early_stopping_patience",
        "hyperparams.early_stopping_min_delta",
        "data.dataset_path",
        "data.validation_path",
        "data.max_rows",
        "data.cache",
        "data.cache_dir",
    }
)
"""May change: paths, because the rows themselves are compared; lengths of the run, recorded."""


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint and what it says about its run."""

    path: Path
    step: int
    metadata: dict[str, Any]
    run_state: dict[str, Any]
    problems: tuple[str, ...] = ()
    """Newer checkpoints that were passed over, and why."""

    @property
    def date(self) -> dt.date | None:
        """The date in the run's prompts, which a resume must not change."""
        recorded = self.metadata.get("date")
        return dt.date.fromisoformat(recorded) if recorded else None


def find_resume_point(wanted: str, root: Path) -> ResumePoint:
    """Find and verify the checkpoint to continue from.

    Args:
        wanted: `latest`, or the folder of one checkpoint.
        root: the run's `checkpoints/`.
    Raises:
        ResumeError: nothing to resume, the named checkpoint is broken, or its run was begun
            under other rules than this version's.
    """
    problems: list[str] = []
    if wanted == LATEST:
        path, manifest, problems = find_latest_checkpoint(root)
    else:
        path = Path(wanted)
        manifest = load_named_checkpoint(path)
    check_semantics(manifest.metadata, path)
    run_state = json.loads((path / RUN_STATE_FILE).read_text())
    return ResumePoint(path, manifest.step, manifest.metadata, run_state, tuple(problems))


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys of a two-level config dict."""
    return {
        f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()
    }


def check_resumable(
    point: ResumePoint, config: TrainerConfig, fingerprint: str, num_steps: int
) -> list[str]:
    """Compare a checkpoint's record with the run that wants to continue it.

    Args:
        point: its metadata has `config`, `data_fingerprint` and `versions`.
        config: of the run, resolved.
        fingerprint: of the encoded training rows.
        num_steps: optimizer steps of the whole run.
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
    refused = [text for key, text in changed.items() if key not in FREE_KEYS]
    if refused:
        raise ResumeError(
            "--resume continues a run as it was, and these values differ from the checkpoint's: "
            f"{'; '.join(refused)}. Set them back, or start a new run in another --output."
        )
    if metadata["data_fingerprint"] != fingerprint:
        raise ResumeError(
            "--resume: the training rows are not those of the checkpoint (content, order or "
            "tokenizer changed). Restore the data file, or start a new run in another --output."
        )
    if num_steps < point.step:
        raise ResumeError(
            f"--resume: {point.step} steps are done already, and this run is to have {num_steps}. "
            "Raise hyperparams.max_steps or num_epochs, or name an older checkpoint: --resume "
            "STEP_DIR."
        )
    return [*changed.values(), *_version_changes(metadata.get("versions", {}))]


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
