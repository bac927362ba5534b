"""FinishedRun: the weights that a run left behind, opened by chat, export and serve.

A run, one of its checkpoints, or a folder that holds a model or an adapter and no run. Finding them
needs no torch, which takes seconds to load: a wrong folder or step is told before.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trainer.config.loader import explain
from trainer.config.schema import TrainerConfig
from trainer.config.section import WRITTEN
from trainer.config.training_sections import ModelSection
from trainer.core.checkpoint import (
    MANIFEST,
    find_checkpoint,
    find_latest_checkpoint,
    verify_checkpoint,
)
from trainer.core.run_folder import RunFolder
from trainer.errors import CheckpointError, ConfigError, OutputError, ResumeError
from trainer.files import read_json_object, require_folder
from trainer.models import is_adapter_folder
from trainer.monitoring.resuming import ALLOW_CODE, named_code
from trainer.profiles import DataProfile, get_profile

if TYPE_CHECKING:
    import torch

MODEL_CONFIG = "config.json"


@dataclass(frozen=True)
class FinishedRun:
    """Weights, and what is known of the run that made them."""

    folder: Path
    """Of the run; of the weights where they belong to none."""
    config: TrainerConfig
    recorded_prompt: str | None
    model_dir: Path
    note: str
    """Which weights these are, in words."""
    base: str | None = None
    """Where the adapter's base is now, if the user says so."""
    is_checkpoint: bool = False
    """Files of training lie beside the weights, which are in its own dtypes."""
    date: dt.date | None = None
    """The day of the run, in its system prompt and in what its chat template prints."""
    is_prompt_open: bool = False
    """The record has no system prompt: the config, else the profile, has it."""
    step: int | None = None
    """Optimizer step that the weights are of; None where the run does not say."""
    allow_code: bool = False
    """Code that the record names may run: a profile, and files of the model."""

    @property
    def is_adapter(self) -> bool:
        """Whether the weights are an adapter's."""
        return is_adapter_folder(self.model_dir)

    @property
    def system_prompt(self) -> str | None:
        """The system turn of training.

        Raises:
            ConfigError: as of `profile`, where only the profile knows it.
        """
        if not self.is_prompt_open:
            return self.recorded_prompt
        date, prompt = self.date or dt.date.today(), self.config.profile.system_prompt
        if prompt is not None:
            return prompt.replace("{date}", date.isoformat())
        return self.profile().system_prompt(date=date)

    def profile(self) -> DataProfile:
        """The profile the run was trained with.

        Raises:
            ConfigError: it is code that nobody has allowed.
        """
        self._check_code("profile.name")
        return get_profile(self.config.profile.name, dict(self.config.profile.options))

    def trusts_model(self) -> bool:
        """Whether Python files beside the weights may run, as `model.trust_remote_code` says.

        Raises:
            ConfigError: the run was told so, but nobody has told us.
        """
        self._check_code("model.trust_remote_code")
        return self.config.model.trust_remote_code

    def _check_code(self, key: str) -> None:
        code = named_code(self.config.model_dump()).get(key)
        if code is not None and not self.allow_code:
            raise ConfigError(
                f"{self.folder}: the run was trained with {key} that is code ({code}), and this "
                f"folder may be somebody else's; give {ALLOW_CODE} if you know that code."
            )

    def dtype(self) -> torch.dtype:
        """What the run computed in; without a run what the model is saved in."""
        import torch

        from trainer.models.precision import DTYPES

        precision = self.config.hyperparams.fp_precision
        if precision is not None:
            return DTYPES[precision]
        found = getattr(self.model_config(), "dtype", None)
        return next((dtype for dtype in DTYPES.values() if dtype == found), torch.float32)

    def model_config(self) -> Any:
        """The model config, of an adapter its base's; no weights are read."""
        from trainer.models.adapter_files import read_base_config
        from trainer.models.load import read_model_config

        trust = self.trusts_model()
        if self.is_adapter:
            return read_base_config(self.model_dir, trust_remote_code=trust, base=self.base)
        path = str(self.model_dir.resolve())
        return read_model_config(ModelSection(model_path=path, trust_remote_code=trust))

    def load(
        self,
        dtype: Any = None,
        device: torch.device | None = None,
        *,
        quantize: bool | None = None,
    ) -> tuple[Any, Any]:
        """Model and tokenizer.

        Args:
            dtype: of plain weights; None: fp32.
            device, quantize: as of `load_finished_model`.
        """
        from transformers.utils.logging import disable_progress_bar

        from trainer.models.adapter_files import load_finished_model, tokenizer_section
        from trainer.models.chat_template import fix_date
        from trainer.models.load import load_tokenizer

        disable_progress_bar()  # the caller shows that something is going on
        trust = self.trusts_model()
        section = ModelSection(model_path=str(self.model_dir.resolve()), trust_remote_code=trust)
        tokenizer = load_tokenizer(tokenizer_section(section, self.base))
        model = load_finished_model(
            self.model_dir,
            dtype=dtype,
            trust_remote_code=trust,
            base=self.base,
            device=device,
            quantize=quantize,
        )
        # The weights learned to answer under the date of their run.
        fix_date(tokenizer, self.date)
        return model, tokenizer


def open_run(
    path: Path, *, step: str | None = None, base: str | None = None, allow_code: bool = False
) -> FinishedRun:
    """Find the weights of a run, and what it was; none of its code runs here.

    Args:
        path: folder of a run, of one of its checkpoints, or of a model or adapter.
        step: a number or `best`: that checkpoint of the run; None: the final model, else the
            newest verified checkpoint.
        base: where an adapter's base is now.
        allow_code: what is loaded from it later may run code that its record names.
    Raises:
        OutputError: there are no such weights.
        ConfigError: `step` beside a folder that is one checkpoint or model already.
    """
    found = _open_run(path, step=step, base=base)
    return dataclasses.replace(found, allow_code=allow_code)


def _open_run(path: Path, *, step: str | None, base: str | None) -> FinishedRun:
    if (path / RunFolder.RUN_JSON).is_file():
        model_dir, note, is_checkpoint = _weights_of(path, step)
        record = _read_json(path / RunFolder.RUN_JSON)
        found = _finished(path, record, model_dir, note, base, is_checkpoint)
        made = _read_json(model_dir / MANIFEST) if is_checkpoint else _final_step(path, record)
        return dataclasses.replace(found, step=made.get("step"))
    if step is not None:
        raise ConfigError(
            f"--step {step}: {path} is not the folder of a run (no {RunFolder.RUN_JSON} in it), so "
            "it has no steps to choose from; give the folder that was --output of `trainer train`."
        )
    if (path / MANIFEST).is_file():
        return _open_checkpoint(path, base)
    if is_adapter_folder(path) or (path / MODEL_CONFIG).is_file():
        run = path.resolve().parent
        if (run / RunFolder.RUN_JSON).is_file():  # RUN/final_model, RUN/merged_model
            record = _read_json(run / RunFolder.RUN_JSON)
            found = _finished(path.parent, record, path, f"model in {path.name}", base, False)
            is_final = path.name == RunFolder.FINAL_MODEL  # a merged one may be of any step
            made = _final_step(run, record) if is_final else {}
            return dataclasses.replace(found, step=made.get("step"))
        note = "adapter" if is_adapter_folder(path) else "model"
        return FinishedRun(path, TrainerConfig(), None, path, f"{note} in {path}", base)
    advice = "give the folder of a run (--output of `trainer train`), a checkpoint or a model."
    require_folder(path, advice)
    raise OutputError(
        f"{path}: holds no run (no {RunFolder.RUN_JSON}), no checkpoint and no model; {advice}"
    )


def _weights_of(run: Path, step: str | None) -> tuple[Path, str, bool]:
    """Folder of the wanted weights, in words which they are, whether it is a checkpoint."""
    root = run / RunFolder.CHECKPOINTS
    if step is None:
        if (run / RunFolder.FINAL_MODEL).is_dir():
            return run / RunFolder.FINAL_MODEL, "final model", False
        try:
            path, found, _ = find_latest_checkpoint(root)
        except ResumeError as error:
            raise OutputError(
                f"{run}: the run has no final model and no whole checkpoint; it must be trained "
                "first."
            ) from error
        return path, f"checkpoint of step {found.step}; the run has no final model", True
    chosen = find_checkpoint(run, step)
    return chosen.path, f"checkpoint of step {chosen.step}, {chosen.why}", True


def _final_step(run: Path, record: dict[str, Any]) -> dict[str, Any]:
    """`step` of a run's final model: the best one, else the last."""
    summary = record.get("summary")
    best = summary.get("final_model_step") if isinstance(summary, dict) else None
    if isinstance(best, int):
        return {"step": best}
    return read_json_object(run / RunFolder.STATUS) or {}


def _verify(path: Path) -> int:
    try:
        return verify_checkpoint(path).step
    except CheckpointError as error:
        raise OutputError(f"{error} Choose another checkpoint.") from error


def _open_checkpoint(path: Path, base: str | None) -> FinishedRun:
    """A checkpoint by its own folder, wherever that is; its run is asked where it is there."""
    path = path.resolve()
    step, run = _verify(path), path.parents[1]
    note = f"checkpoint of step {step}"
    if (run / RunFolder.RUN_JSON).is_file():
        found = _finished(run, _read_json(run / RunFolder.RUN_JSON), path, note, base, True)
        return dataclasses.replace(found, step=step)
    metadata = _read_json(path / MANIFEST)["metadata"]
    found = _finished(path, {**metadata, "system_prompt": None}, path, note, base, True)
    return dataclasses.replace(found, is_prompt_open=True, step=step)


def _finished(
    folder: Path,
    record: dict[str, Any],
    model_dir: Path,
    note: str,
    base: str | None,
    is_checkpoint: bool,
) -> FinishedRun:
    """A run by its record: `run.json`, or a checkpoint's manifest."""
    try:
        config = TrainerConfig.model_validate(record["config"], context=WRITTEN)
        prompt = record["system_prompt"]
        date = dt.date.fromisoformat(record["date"]) if record.get("date") else None
    except ValidationError as error:
        raise _unusable(folder, explain(error).replace("\n", " ")) from error
    except (KeyError, TypeError, ValueError) as error:
        raise _unusable(folder, f"{type(error).__name__}: {error}") from error
    return FinishedRun(folder, config, prompt, model_dir, note, base, is_checkpoint, date)


def _unusable(folder: Path, reason: str) -> OutputError:
    return OutputError(
        f"{folder}: the record of the run cannot be used ({reason}); it was written by another "
        "version of this program."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({error}).") from error
    return found
