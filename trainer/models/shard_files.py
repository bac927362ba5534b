"""Weights in shards on disk: read into a model of any number of processes, or a plain one.

A checkpoint of sharded weights has them in a folder `weights`: safetensors files by torch's
distributed checkpoint, of each process its own. Nothing here needs a process group.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ModelError

if TYPE_CHECKING:
    import torch

WEIGHTS = "weights"
"""Folder of the weights' shards in a checkpoint."""

SHARD_FILES = "shard-*.safetensors"


def has_shards(folder: Path) -> bool:
    """Whether a folder's weights are in shards."""
    return any((folder / WEIGHTS).glob(SHARD_FILES))


def sizes_of(folder: Path) -> Mapping[str, torch.Size]:
    """The shape of each whole tensor in the safetensors files of a folder."""
    found = _reader(folder).read_metadata().state_dict_metadata
    return {name: one.size for name, one in found.items()}


def fill(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Read tensors in place; of those in shards the part of this process.

    Args:
        tensors: by their names in the files.
        folder: of safetensors files, whole ones or shards.
    Raises:
        ModelError: one is missing, or has another shape.
    """
    import torch
    from torch.distributed.checkpoint.state_dict_loader import load

    sizes = sizes_of(folder)
    for name, tensor in tensors.items():
        if name not in sizes:
            raise ModelError(f"{folder}: the tensor {name} is missing.")
        if sizes[name] != tensor.shape:
            raise ModelError(
                f"{folder}: {name} has the shape {tuple(sizes[name])}, and {tuple(tensor.shape)} "
                "is needed."
            )
    with torch.no_grad(), warnings.catch_warnings():
        # Without a process group, which is what is wanted.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(dict(tensors), storage_reader=_reader(folder), no_dist=True)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files of a folder, whole, on the CPU."""
    import torch

    found = _reader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in found.items()
    }
    fill(tensors, folder)
    return tensors


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder))


def load_sharded(folder: str, *, config: Any, **options: Any) -> Any:
    """A plain model of the weights that a checkpoint has in shards.

    Args:
        folder: of the checkpoint.
        config: of the model.
        options: of transformers' `from_pretrained`; those that look for files do nothing.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    trust = options.pop("trust_remote_code")
    for name in ("revision", "local_files_only"):
        options.pop(name)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust))
    state = read_all(Path(folder) / WEIGHTS)
    model = kind.from_pretrained(None, config=config, state_dict=state, **options)
    # Nothing was renamed or cut on the way in, and transformers would do as little on the way out.
    vars(model).pop("_weight_conversions", None)
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config._name_or_path = model.name_or_path = folder
    return model
