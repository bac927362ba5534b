"""The model that a run leaves behind, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trainer import files
from trainer.errors import OutputError
from trainer.models.adapters import save_adapter

FAILED = "free some space or choose another folder."

KEPT = "The newest checkpoint holds the trained weights: --resume saves them again."


def save_final_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    stop_ids: frozenset[int],
    use_cache: bool,
    when_written: Callable[[], None] = lambda: None,
) -> Path:
    """Write model (or adapter) and tokenizer to `folder`, in place of an earlier one.

    Args: as of `write_model`, and:
        when_written: called once the files are whole, before they take the folder's name.
    Raises:
        OutputError: the folder cannot be written.
    """
    with staged(folder, advice=f"{FAILED} {KEPT}") as staging:
        write_model(model, tokenizer, staging, dtype=dtype, stop_ids=stop_ids, use_cache=use_cache)
        when_written()
    return folder


@contextlib.contextmanager
def staged(folder: Path, *, advice: str = FAILED) -> Iterator[Path]:
    """A folder to write into that becomes `folder` at the end of the block, or leaves no trace.

    Raises:
        OutputError: it cannot be written; the message ends with `advice`.
    """
    staging = folder.with_name(f".tmp-{folder.name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        if folder.exists():  # of the interrupted run that this one resumed
            shutil.rmtree(folder)
        staging.rename(folder)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise OutputError(f"{folder}: cannot save the model ({error}); {advice}") from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


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
        dtype: floating-point weights are saved in it; adapters stay fp32.
        stop_ids: become the model's end-of-text ids, so that generation elsewhere stops too.
        use_cache: value for the saved model config (training turns it off).
    Raises:
        OSError: the folder cannot be written.
    """
    with files.library_errors():
        if hasattr(model, "peft_config"):
            save_adapter(model, folder)
        else:
            _save_full(model, folder, dtype, stop_ids, use_cache)
        tokenizer.save_pretrained(folder)


def _save_full(
    model: Any, folder: Path, dtype: torch.dtype, stop_ids: frozenset[int], use_cache: bool
) -> None:
    """save_pretrained with weights cast on the way and a config that says so."""
    weights = cast_state(model.state_dict(), dtype)
    config, generation = model.config, model.generation_config
    before = config.use_cache, generation.eos_token_id
    named = generation.eos_token_id
    named = set(named if isinstance(named, list) else [named]) - {None}
    try:
        config.use_cache = use_cache
        generation.eos_token_id = sorted(named | stop_ids)
        model.save_pretrained(folder, state_dict=weights)
    finally:
        config.use_cache, generation.eos_token_id = before
    # save_pretrained writes the dtype of the model in memory, not that of the weights it was given.
    path = folder / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def cast_state(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating tensors in another dtype; names that share one tensor share its copy too.

    save_pretrained tells tied weights by their memory: cast one by one, a tied head is saved twice.
    """
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    cast = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            cast[name] = tensor
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.data_ptr() == 0 or key not in copies:  # no memory: nothing to share
            copies[key] = tensor.to(dtype)
        cast[name] = copies[key]
    return cast
