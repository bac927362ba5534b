"""The finished model: written beside its place, then renamed; loads with plain transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from trainer.core import fs_ops
from trainer.errors import OutputError


def save_final_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    stop_ids: frozenset[int],
    use_cache: bool,
) -> Path:
    """Write model (or adapter) and tokenizer to `folder`.

    Args:
        model: the unwrapped model; its own weights are not changed.
        dtype: floating-point weights are saved in it; adapters stay fp32.
        stop_ids: become the model's end-of-text ids, so that generation elsewhere stops too.
        use_cache: value for the saved model config (training turns it off).
    Raises:
        OutputError: the folder cannot be written.
    """
    staging = folder.with_name(f".tmp-{folder.name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        with fs_ops.library_errors():
            if hasattr(model, "peft_config"):
                model.save_pretrained(staging)
            else:
                _save_full(model, staging, dtype, stop_ids, use_cache)
            tokenizer.save_pretrained(staging)
        if folder.exists():  # of the interrupted run that this one resumed
            shutil.rmtree(folder)
        staging.rename(folder)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise OutputError(
            f"{folder}: cannot save the model ({error}); free some space or choose another folder. "
            "The newest checkpoint holds the trained weights: --resume saves them again."
        ) from error
    return folder


def _save_full(
    model: Any, folder: Path, dtype: torch.dtype, stop_ids: frozenset[int], use_cache: bool
) -> None:
    """save_pretrained with weights cast on the way and a config that says so."""
    weights = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
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
