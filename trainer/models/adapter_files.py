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
from trainer.models import is_adapter_folder, looks_like_path
from trainer.models.adapters import merge_adapter
from trainer.models.load import (
    grow_embeddings,
    load_model,
    read_model_config,
)
from trainer.models.precision import DTYPES, save_full
from trainer.models.quantized import check_bitsandbytes, check_mergeable

BASE_RECORD = "base.json"

SAMPLES = 1024
"""Weights of each matrix that go into its hash, evenly spread."""


def describe_base(model: Any, *, is_quantized_copy: bool = False) -> dict[str, Any]:
    """What `base.json` says of a model: its name, and a hash of each matrix.

    Hashes are of a sample in bf16, so that they do not depend on whether it was loaded in fp32 or
    bf16. In fp16 small weights were rounded otherwise: such a model has no hashes. Quantized
    matrices are hashed as they are, by kind of device: their last bits depend on it.

    Args:
        is_quantized_copy: what lies under that name is plain, and is quantized while it is loaded,
            from the dtype that its other weights have.
    """
    matrices, quantized = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float32, torch.bfloat16) and parameter.ndim > 1:
            matrices[name] = _sample_hash(parameter.detach())
        elif parameter.dtype in (torch.uint8, torch.int8):
            quantized[name] = _sample_hash(parameter.detach())
    record = {"name": model.config._name_or_path, "sha256_of_samples": matrices}
    if quantized:
        device = str(next(model.parameters()).device.type)
        record["quantized"] = {
            "while_loading": is_quantized_copy,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device,
            "sha256_of_samples": quantized,
        }
    return record


def quantized_from(folder: Path) -> torch.dtype | None:
    """The dtype out of which the base of an adapter was quantized while it was loaded.

    Returns:
        None where the adapter was trained on what lies under its base's name.
    """
    quantized = _base_record(folder).get("quantized", {})
    if not quantized.get("while_loading"):
        return None
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    return dtypes.get(str(quantized.get("dtype")), torch.float32)


def _base_record(folder: Path) -> dict[str, Any]:
    """What `base.json` says; nothing where there is none.

    Raises:
        ModelError: it cannot be read.
    """
    path = folder / BASE_RECORD
    if not path.is_file():
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for part in (record, record.get("quantized", record)):
            dict(part["sha256_of_samples"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: cannot be read ({error!r}); remove it to go without.") from error
    return record


def _sample_hash(matrix: torch.Tensor) -> str:
    flat = matrix.reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
    if sample.is_floating_point():
        sample = sample.to(torch.bfloat16)
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def save_adapter(model: Any, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter of a PEFT model, and what is known of its base (`model.base_record`).

    Args:
        state: what is trained of the model, where it holds shards of it only.
    """
    # PEFT would add the base's embeddings where they have adapters; they are the base's own.
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form, with nothing filled in
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
    quantize: bool | None = None,
) -> Any:
    """Load a model folder as a run leaves it, an adapter with its base.

    Args:
        folder: of the model or adapter.
        dtype: of the weights; None: fp32.
        trust_remote_code: as the run was told.
        base: folder or hub id of an adapter's base, where it is no longer at its old place.
        device: where the weights are to be; None: the CPU.
        quantize: make nf4 of an adapter's plain base; None: where it was trained so, and as then.
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
    source = quantized_from(folder) if quantize is None else None
    if source is not None:
        check_bitsandbytes(f"{folder}: this adapter was trained on a base in nf4, which")
        dtype, quantize = source, True  # out of another dtype it would be other 4 bits
    try:
        model = load_model(section, dtype=dtype, device=device, quantize=bool(quantize))
    except ModelError as error:
        raise ModelError(_of_base(folder, error)) from error
    check_base(folder, model)
    rows = token_rows(folder)
    if rows:
        grow_embeddings(model, rows)
    return _put_on(model, folder)


def load_merged(folder: Path, *, base: str | None) -> Any:
    """An adapter and its base as one plain model in fp32, whatever it was quantized to in training.

    Raises:
        ModelError: the base is gone, another one, or quantized.
    """
    config = read_base_config(folder, trust_remote_code=False, base=base)
    check_mergeable(config, f"{folder}: the base of this adapter")
    return merge_adapter(load_finished_model(folder, base=base, quantize=False))


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


GIVE_BASE = "--base FOLDER_OR_HUB_ID"
"""How chat, export and serve are told where an adapter's base is."""


def base_of(
    folder: Path, *, trust_remote_code: bool = False, base: str | None, advice: str = GIVE_BASE
) -> ModelSection:
    """The base model of an adapter; one that the run saved itself moves with the run.

    Args:
        base: takes the place of what the adapter says.
        advice: what the user can give where it is not found.
    Raises:
        ModelError: it is no longer there, or the adapter names none.
    """
    saved = read_adapter_config(folder)
    named = saved.get("base_model_name_or_path")
    if base is not None:
        return ModelSection(model_path=base, trust_remote_code=trust_remote_code)
    if not named:
        raise ModelError(f"{folder}: the adapter does not say what its base is; give {advice}.")
    if not Path(named).exists():
        beside = [parent / SAVED_BASE for parent in folder.resolve().parents[:2]]
        found = [path for path in beside if Path(named).name == SAVED_BASE and path.is_dir()]
        if not found and looks_like_path(named):
            raise ModelError(
                f"{folder}: the base of this adapter was in {named}, and there is no such folder "
                f"now. Say where it is: {advice}."
            )
        named = str(found[0]) if found else named
    return ModelSection(
        model_path=named, revision=saved.get("revision"), trust_remote_code=trust_remote_code
    )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's own file of an adapter.

    Raises:
        ModelError: it cannot be read.
    """
    path = folder / "adapter_config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise TypeError("it holds no object")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read ({error}).") from error
    return saved


def token_rows(folder: Path) -> list[int]:
    """Ids of the tokens whose rows an adapter holds, which its base may not have yet."""
    found = read_adapter_config(folder).get("trainable_token_indices") or {}
    try:
        lists = found.values() if isinstance(found, dict) else [found]
        return sorted({int(one) for ids in lists for one in ids})
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{folder}: trainable_token_indices={found!r} in adapter_config.json are no ids."
        ) from error


def check_base(folder: Path, model: Any, *, advice: str = GIVE_BASE) -> None:
    """Compare a loaded base with what is recorded beside the adapter, as far as it is.

    Args:
        advice: what the user can give instead.
    Raises:
        ModelError: its weights are others.
    """
    record = _base_record(folder)
    if not record:
        return
    described = describe_base(model)
    known, found = dict(record["sha256_of_samples"]), described["sha256_of_samples"]
    theirs, mine = record.get("quantized"), described.get("quantized")
    alike = ("device", "dtype")  # else the same base has other bits
    if theirs and mine and all(theirs.get(key) == mine[key] for key in alike):
        known |= theirs["sha256_of_samples"]
        found |= mine["sha256_of_samples"]
    common = sorted(set(known) & set(found))
    other = [name for name in common if known[name] != found[name]]
    if other:
        raise ModelError(
            f"{folder}: {model.config._name_or_path} is not the base that this adapter was trained "
            f"on, which was {record['name']}: {len(other)} of {len(common)} matrices differ "
            f"({other[0]} is the first). Give that one: {advice}."
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
    adapter: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write model (or adapter) and tokenizer.

    Args:
        model: the unwrapped model; its own weights are not changed.
        dtype, stop_ids, use_cache: as of `save_full`; adapters stay fp32.
        adapter: as the `state` of `save_adapter`.
    Raises:
        OSError: the folder cannot be written.
    """
    with library_errors():
        if hasattr(model, "peft_config"):
            save_adapter(model, folder, adapter)
        else:
            save_full(model, folder, dtype, stop_ids, use_cache)
        tokenizer.save_pretrained(folder)
