"""The state of a sharded run in a checkpoint, and any checkpoint's state back into any run.

Full training: each process writes its own shards of the weights (`weights/`) and of the optimizer's
moments (`moments/`) by torch's distributed checkpoint, as safetensors; `optimizer.pt` has the rest
of the optimizer's state, by names of parameters. Adapters are small: they, and their optimizer,
are gathered and written as a run of one process writes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainer import files
from trainer.core.checkpoint import Hashes
from trainer.core.sharding import plain_class, state_tensors, whole_adapter
from trainer.core.together import OfRankError
from trainer.errors import ModelError, ResumeError
from trainer.models.adapter_files import save_adapter
from trainer.models.shard_files import WEIGHTS, fill, has_shards, sizes_of

MOMENTS = "moments"
"""Folder of the optimizer's sharded state in a checkpoint."""

OPTIMIZER_FILE = "optimizer.pt"

README = """The weights of this checkpoint are in shards: programs for whole models cannot open it.

`trainer export RUN --step N --output FOLDER` writes a plain model folder of it; `trainer chat`,
`trainer serve` and `--model` read it as it is. `weights/` and `moments/` are of
torch.distributed.checkpoint (HuggingFaceStorageReader).
"""

FILE_BYTES = 1 << 30
"""About as much of a process's shards goes into one file, and through its memory at once."""


class SharedState:
    """Weights and optimizer of a sharded run, as they are written at one step."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        """Take note of them.

        Args:
            model: sharded; with adapters where those are trained.
            optimizer: of its trainable parameters.
        """
        self.model, self.optimizer = model, optimizer
        self._adapter: dict[str, torch.Tensor] = {}
        self._optimizer_state: dict[str, Any] = {}

    def write_share(self, folder: Path) -> Hashes:
        """Write this process's shards, or gather the adapters on rank 0; called by all.

        Returns:
            What this process has written.
        Raises:
            OSError: on every process, where one could not write.
        """
        if is_adapted(self.model):
            self._gather_adapter()
            return {}
        names = names_of_parameters(self.model)
        weights = {names[0]: tensor.detach() for names, tensor in state_tensors(self.model)}
        _write_shards(weights, folder / WEIGHTS)
        _write_shards(_moments(self.optimizer, names), folder / MOMENTS)
        found = {}
        for part in (WEIGHTS, MOMENTS):
            for path in sorted((folder / part).glob(f"shard-{dist.get_rank() + 1:05d}-*")):
                files.sync_file(path)
                found[f"{part}/{path.name}"] = {
                    "size": path.stat().st_size,
                    "sha256": files.hash_file(path),
                }
        return found

    def write_rest(self, folder: Path) -> None:
        """On rank 0, behind `write_share`: what is not in shards."""
        if is_adapted(self.model):
            save_adapter(self.model, folder, self._adapter)
            torch.save(self._optimizer_state, folder / OPTIMIZER_FILE)
            self._adapter, self._optimizer_state = {}, {}
            return
        for part in (WEIGHTS, MOMENTS):
            files.sync_dir(folder / part)
        (folder / "README.md").write_text(README, encoding="utf-8")
        self.model.config.save_pretrained(folder)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)
        torch.save(
            _named_state(self.optimizer, names_of_parameters(self.model)), folder / OPTIMIZER_FILE
        )

    def _gather_adapter(self) -> None:
        is_main = dist.get_rank() == 0
        self._adapter = whole_adapter(self.model)
        found: dict[str, Any] = self.optimizer.state_dict()
        state: dict[int, dict[str, Any]] = {}
        for number, one in found["state"].items():  # the optimizer's own, and stays as it is
            state[number] = {}
            for key, value in one.items():
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                if is_main:
                    state[number][key] = whole.cpu()
        self._optimizer_state = {**found, "state": state} if is_main else {}


def is_adapted(model: Any) -> bool:
    """Whether a model is a base with adapters, which alone are trained."""
    return hasattr(model, "peft_config")


def names_of_parameters(model: nn.Module) -> dict[int, str]:
    """id of each parameter -> its first name in the model's state."""
    return {id(tensor): names[0] for names, tensor in state_tensors(model)}


def _moments(optimizer: Any, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """What an optimizer keeps in shards, by the names of the parameters."""
    return {
        f"{names[id(parameter)]}.{key}": value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, DTensor)
    }


def _named_state(optimizer: Any, names: dict[int, str]) -> dict[str, Any]:
    """An optimizer's state by the names of the parameters; what is in shards is only named."""
    groups, state = [], {}
    for group in optimizer.param_groups:
        groups.append({**group, "params": [names[id(one)] for one in group["params"]]})
        for parameter in group["params"]:
            state[names[id(parameter)]] = {
                key: MOMENTS if isinstance(value, DTensor) else value
                for key, value in optimizer.state.get(parameter, {}).items()
            }
    return {"param_groups": groups, "state": state}


# ---- writing by torch's distributed checkpoint


class _Doors(FileSystem):
    """Files of shards, through the door by which every write of a save goes."""

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        files.announce("create", Path(path))
        with super().create_stream(path, mode) as stream:
            yield stream
            files.announce("write", Path(path))


def _write_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write what this process has of some tensors; called by all.

    Raises:
        OfRankError: on all processes; names the rank that could not write.
    """
    if not tensors:
        return
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_file_numbers(tensors), save_distributed=True
    )
    writer.fs = _Doors()
    try:
        save(tensors, storage_writer=writer)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        words = " ".join(str(cause).split()) or type(cause).__name__
        raise OfRankError(f"rank {rank}: {words}") from error


def _file_numbers(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Into which file of each process a tensor goes: numbers from 1."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size() // dist.get_world_size()
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    return numbers


# ---- reading: from shards or whole files, into shards or a plain model


def load_weights(model: Any, folder: Path) -> None:
    """Take the weights of a checkpoint, which has shards, or whose model is in shards now.

    Raises:
        ResumeError: they are not this model's.
    """
    try:
        if is_adapted(model):
            fill(_adapter_tensors(model), folder)
            return
        source = folder / WEIGHTS if has_shards(folder) else folder
        wanted = _wanted(model, sizes_of(source))
        if source == folder and None in wanted:
            _load_converted(model, folder)
            return
        fill({str(name): tensor for name, tensor in wanted.items()}, source)
    except ModelError as error:
        raise ResumeError(
            f"--resume {folder}: its weights are not those of this model ({error}) Continue with "
            "the strategy and number of processes that made it."
        ) from error


def has_names_of(model: Any, folder: Path) -> bool:
    """Whether the files of a checkpoint name all tensors of a model as they are named in memory."""
    return None not in _wanted(model, sizes_of(folder))


def _wanted(model: Any, known: Mapping[str, Any]) -> dict[str | None, torch.Tensor]:
    """Each tensor of a model's state once, by a name of it that is known; None where none is."""
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {
        next((one for one in shared if one in known), None): state[shared[0]].detach()
        for shared in names.values()
    }


def _load_converted(model: Any, folder: Path) -> None:
    """Weights that transformers names and cuts otherwise in files, such as those of experts.

    Raises:
        ModelError: some are missing.
    """
    whole, found = plain_class(model).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = sorted([*found["missing_keys"], *map(str, found["mismatched_keys"])])
    if wrong:
        raise ModelError(f"{folder}: {wrong[0]} is missing, or has another shape.")
    state = whole.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, DTensor):
                tensor.to_local().copy_(_part_of(state[name], tensor))
            else:
                tensor.copy_(state[name])


def _adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The trained tensors of a PEFT model, by the names that PEFT gives them in files."""
    from peft import get_peft_model_state_dict

    state = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.requires_grad
    }
    # Stand-ins, because it is only the names that are asked for.
    marks = {name: torch.empty(one.shape, device="meta") for name, one in state.items()}
    by_mark = {id(mark): name for name, mark in marks.items()}
    found = get_peft_model_state_dict(model, state_dict=dict(marks), save_embedding_layers=False)
    return {saved: state[by_mark[id(mark)]].detach() for saved, mark in found.items()}


def load_optimizer(model: Any, optimizer: Any, folder: Path) -> None:
    """Take the optimizer's state of a checkpoint, as `load_weights` takes the weights.

    Raises:
        ResumeError: it is of other parameters.
    """
    saved = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", mmap=True, weights_only=True)
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    if has_shards(folder):
        saved = _by_number(saved, model, parameters, folder)
    for number, one in saved["state"].items():
        for key, value in one.items():
            one[key] = _like(value, parameters[number])
    optimizer.load_state_dict(saved)


def _by_number(
    saved: dict[str, Any], model: Any, parameters: list[Any], folder: Path
) -> dict[str, Any]:
    """State by names as torch has it, by numbers of parameters, with the moments read."""
    known = names_of_parameters(model)
    names = [known[id(one)] for one in parameters]
    listed = [name for group in saved["param_groups"] for name in group["params"]]
    if listed != names:
        other = sorted(set(listed) ^ set(names)) or ["their order"]
        raise ResumeError(
            f"--resume {folder}: its optimizer has other parameters than this run ({other[0]})."
        )
    numbers = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    moments: dict[str, torch.Tensor] = {}
    for name, one in saved["state"].items():
        state[numbers[name]] = dict(one)
        for key, value in one.items():
            if isinstance(value, str):  # of the shards
                moment = torch.zeros_like(parameters[numbers[name]].detach())
                state[numbers[name]][key] = moments[f"{name}.{key}"] = moment
    if moments:
        fill(moments, folder / MOMENTS)
    groups = [
        {**group, "params": [numbers[name] for name in group["params"]]}
        for group in saved["param_groups"]
    ]
    return {"state": {number: state[number] for number in sorted(state)}, "param_groups": groups}


def _like(value: Any, parameter: Any) -> Any:
    """A whole tensor of an optimizer's state in the shards of its parameter; others as they are."""
    is_whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
    if not is_whole or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    part = _part_of(value, parameter)
    local = torch.empty_like(parameter.to_local(), dtype=value.dtype)
    local.copy_(part)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _part_of(whole: torch.Tensor, like: DTensor) -> torch.Tensor:
    """What this process has of a whole tensor, if that lies as another one does."""
    shape, offsets = compute_local_shape_and_global_offset(
        like.shape, like.device_mesh, like.placements
    )
    return whole[tuple(slice(start, start + n) for start, n in zip(offsets, shape, strict=True))]
