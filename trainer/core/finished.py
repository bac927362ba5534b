"""Open a run that ended: its model, tokenizer, profile and system prompt, for chat and export."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from trainer.config.schema import ModelSection, TrainerConfig
from trainer.core.checkpoint import find_latest_checkpoint
from trainer.core.run_folder import RunFolder
from trainer.errors import OutputError
from trainer.models.load import load_finished_model, load_tokenizer
from trainer.models.template_date import fix_date
from trainer.profiles import DataProfile, get_profile


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder says about its run."""

    folder: Path
    config: TrainerConfig
    system_prompt: str | None
    model_dir: Path
    note: str
    """Which weights these are, in words."""
    date: dt.date | None = None
    """The day of the run, in its system prompt and in what its chat template prints."""

    def profile(self) -> DataProfile:
        """The profile the run was trained with."""
        return get_profile(self.config.profile.name, dict(self.config.profile.options))

    def load(self, dtype: Any = None) -> tuple[Any, Any]:
        """Model (in `dtype`, fp32 if None) and tokenizer."""
        disable_progress_bar()  # the caller shows that something is going on
        trust = self.config.model.trust_remote_code
        tokenizer = load_tokenizer(
            ModelSection(model_path=str(self.model_dir.resolve()), trust_remote_code=trust)
        )
        # The weights learned to answer under the date of their run.
        fix_date(tokenizer, self.date)
        model = load_finished_model(self.model_dir, dtype=dtype, trust_remote_code=trust)
        return model, tokenizer


def open_run(path: Path) -> FinishedRun:
    """Read a run folder; takes the final model, else the newest verified checkpoint.

    Raises:
        OutputError: this is no run folder, or it holds no weights yet.
    """
    record = path / RunFolder.RUN_JSON
    if not record.is_file():
        raise OutputError(
            f"{path}: there is no {RunFolder.RUN_JSON} in it, so it is no run folder; give the "
            "folder that was --output of `trainer train`."
        )
    manifest = json.loads(record.read_text(encoding="utf-8"))
    model_dir, note = path / RunFolder.FINAL_MODEL, "final model"
    if not model_dir.is_dir():
        model_dir, found, _ = find_latest_checkpoint(path / RunFolder.CHECKPOINTS)
        note = f"checkpoint of step {found.step}; the run has no final model"
    return FinishedRun(
        folder=path,
        config=TrainerConfig.model_validate(manifest["config"]),
        system_prompt=manifest["system_prompt"],
        model_dir=model_dir,
        note=note,
        date=dt.date.fromisoformat(manifest["date"]) if manifest.get("date") else None,
    )
