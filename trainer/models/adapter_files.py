"""Adapters on disk: saved without copies of the base, opened with it again.

Beside PEFT's files lies `base.json`: the name of the base and short hashes of its weights, by
which a base that was moved or changed meanwhile is known again.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from trainer.config.training_sections import ModelSection
from trainer.errors import ModelError
from trainer.files import SAVED_BASE as SAVED_BASE
from trainer.files import library_errors
from trainer.models import is_adapter_folder
from trainer.models.adapters import merge_adapter
from trainer.models.load import load_model, looks_like_path, read_model_config
from trainer.models.precision import check_mergeable, save_full

BASE_RECORD = "base.json"

SAMPLES = 1024
"""Weights of each matrix that go into its hash, evenly spread."""


def describe_base(model: Any) -> dict[str, Any]:
    """What `base.json` says of a model: its name, and a hash of each matrix.

    Hashes are of a sample in bf16, so that they do not depend on whether it was loaded in fp32 or
    bf16. In fp16 small weights were rounded otherwise: such a model has no hashes.
    """
    matrices = {
        name: _sample_hash(parameter)
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.float32, torch.bfloat16) and parameter.ndim > 1
    }
    return {"name": model.config._name_or_path, "sha256_of_samples": matrices}


def _sample_hash(parameter: torch.Tensor) -> str:
    flat = parameter.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLES)].to(torch.bfloat16).cpu().contiguous()
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter of a PEFT model, and what is known of its base (`model.base_record`)."""
    # PEFT would add the base's embeddings where they have adapters; they are the base's own.
    model.save_pretrained(folder, save_embedding_layers=False)
    record = getattr(model, "base_record", None)
    if record is not None:
        (folder / BASE_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_finished_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    base: str | None = None,
    device: torch.device | None = None,
) -> Any:
    """Load a model folder as a run leaves it, an adapter with its base.

    Args:
        folder: of the model or adapter.
        dtype: of the weights; None: fp32.
        trust_remote_code: as the run was told.
        base: folder or hub id of an adapter's base, where it is no longer at its old place.
        device: where the weights are to be; None: the CPU.
    Raises:
        ModelError: the folder holds no model, or its base cannot be loaded or is another one.
    """
    dtype = dtype or torch.float32
    if not is_adapter_folder(folder):
        if base is not None:
            raise ModelError(
                f"{folder}: these are all weights of a model, not an adapter; leave --base out."
            )
        path = str(folder.resolve())
        section = ModelSection(model_path=path, trust_remote_code=trust_remote_code)
        return load_model(section, dtype=dtype, device=device)
    section = base_of(folder, trust_remote_code=trust_remote_code, base=base)
    try:
        model = load_model(section, dtype=dtype, device=device)
    except ModelError as error:
        raise ModelError(_of_base(folder, error)) from error
    check_base(folder, model)
    return _put_on(model, folder)


def load_merged(folder: Path, *, base: str | None) -> Any:
    """An adapter and its base as one plain model in fp32.

    Raises:
        ModelError: the base is gone, another one, or quantized.
    """
    config = read_base_config(folder, trust_remote_code=False, base=base)
    check_mergeable(config, f"{folder}: the base of this adapter")
    return merge_adapter(load_finished_model(folder, base=base))


def tokenizer_section(section: ModelSection, base: str | None) -> ModelSection:
    """Where the tokenizer of a model or adapter is: with an adapter, or else with its base."""
    folder = Path(section.model_path)
    if not is_adapter_folder(folder) or (folder / "tokenizer.json").is_file():
        return section
    return base_of(folder, trust_remote_code=section.trust_remote_code, base=base)


def read_base_config(folder: Path, *, trust_remote_code: bool, base: str | None) -> Any:
    """The model config of an adapter's base, without its weights.

    Raises:
        ModelError: the base is gone.
    """
    try:
        return read_model_config(base_of(folder, trust_remote_code=trust_remote_code, base=base))
    except ModelError as error:
        raise ModelError(_of_base(folder, error)) from error


def _of_base(folder: Path, error: ModelError) -> str:
    """The loader's words name an option of training; here it is an adapter's base."""
    words = str(error).replace("model.model_path=", "")
    return f"{folder}: the base of this adapter: {words} --base says where it is."


def base_of(folder: Path, *, trust_remote_code: bool = False, base: str | None) -> ModelSection:
    """The base model of an adapter; one that the run saved itself moves with the run.

    Args:
        base: takes the place of what the adapter says.
    Raises:
        ModelError: it is no longer there, or the adapter names none.
    """
    saved = _adapter_config(folder)
    named = saved.get("base_model_name_or_path")
    if base is not None:
        return ModelSection(model_path=base, trust_remote_code=trust_remote_code)
    if not named:
        raise ModelError(
            f"{folder}: the adapter does not say what its base is; give --base FOLDER_OR_HUB_ID."
        )
    if not Path(named).exists():
        beside = [parent / SAVED_BASE for parent in folder.resolve().parents[:2]]
        found = [path for path in beside if Path(named).name == SAVED_BASE and path.is_dir()]
        if not found and looks_like_path(named):
            raise ModelError(
                f"{folder}: the base of this adapter was in {named}, and there is no such folder "
                "now. Say where it is: --base FOLDER_OR_HUB_ID."
            )
        named = str(found[0]) if found else named
    return ModelSection(
        model_path=named, revision=saved.get("revision"), trust_remote_code=trust_remote_code
    )


def _adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise TypeError("it holds no object")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read ({error}).") from error
    return saved


def check_base(folder: Path, model: Any) -> None:
    """Compare a loaded base with what is recorded beside the adapter, as far as it is.

    Raises:
        ModelError: its weights are others.
    """
    path = folder / BASE_RECORD
    if not path.is_file():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = dict(record["sha256_of_samples"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read ({error!r}); remove it to go without.") from error
    found = describe_base(model)["sha256_of_samples"]
    common = sorted(set(known) & set(found))
    other = [name for name in common if known[name] != found[name]]
    if other:
        raise ModelError(
            f"{folder}: {model.config._name_or_path} is not the base that this adapter was trained "
            f"on, which was {record['name']}: {len(other)} of {len(common)} matrices differ "
            f"({other[0]} is the first). Give that one: --base FOLDER_OR_HUB_ID."
        )


def _put_on(model: Any, folder: Path) -> Any:
    """The adapter on its base.

    Raises:
        ModelError: their shapes or names differ.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, UserWarning) as error:
        cause = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{folder}: this adapter does not fit {model.config._name_or_path}, which must be the "
            f"model it was trained on; give that one: --base FOLDER_OR_HUB_ID. Cause: {cause}"
        ) from error


def write_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    stop_ids: frozenset[int],
    use_cache: bool,
) -> None:
    """Write model (or adapter) and tokenizer.

    Args:
        model: the unwrapped model; its own weights are not changed.
        dtype, stop_ids, use_cache: as of `save_full`; adapters stay fp32.
    Raises:
        OSError: the folder cannot be written.
    """
    with library_errors():
        if hasattr(model, "peft_config"):
            save_adapter(model, folder)
        else:
            save_full(model, folder, dtype, stop_ids, use_cache)
        tokenizer.save_pretrained(folder)
