"""Looking at a model without a trace: state put back, golden answers scored, nothing sampled."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextlib.contextmanager
def rng_preserved() -> Iterator[None]:
    """Restore the random state of Python, NumPy, torch and every initialised GPU."""
    python, numpy_state = random.getstate(), np.random.get_state()
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put every module into eval mode and back into its own, which may differ within a model.

    Layers that are compiled run as they were written. Gradient checkpointing acts in train mode
    only, so it needs no switch of its own; `use_cache` is put back because generation sets it.
    """
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        model.eval()
        with uncompiled(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        if config is not None:
            config.use_cache = use_cache


@contextlib.contextmanager
def uncompiled(model: Any) -> Iterator[None]:
    """Run every module by its own code, also one that `module.compile()` was called on.

    A prompt and each token of an answer have lengths of their own, and each would be compiled.
    """
    compiled = {
        module: call
        for module in model.modules()
        if (call := getattr(module, "_compiled_call_impl", None)) is not None
    }
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """All of the above, without gradients: for anything done with a model between two steps."""
    with rng_preserved(), evaluating(model), resharded(model), torch.no_grad():
        yield


@contextlib.contextmanager
def resharded(model: Any) -> Iterator[None]:
    """Give gathered weights back behind a forward pass that no backward pass follows.

    Some layers of a sharded model keep theirs until then: what is loaded into the shards meanwhile
    would not be seen by the next forward pass.
    """
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


# ---- log-probabilities of a golden answer under a model's weights: one forward pass, no sampling


def golden_logprobs(model: Any, prompt: Sequence[int], golden: Sequence[int]) -> torch.Tensor:
    """How likely each golden token is, given the prompt and the golden tokens before it.

    Leaves the model as it was. The caller chooses autocast.

    Returns:
        (len(golden),) float32 on the model's device, nats. Nothing waits for the device here.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *golden]], device=device)
    with undisturbed(model):
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = torch.log_softmax(logits.float(), -1).gather(1, ids[0, len(prompt) :, None])
    return chosen[:, 0]


SentAs = Callable[[torch.Tensor], torch.dtype]
"""The dtype in which a parameter or buffer travels to whoever answers."""


@contextlib.contextmanager
def as_received(
    model: Any, sent_as: SentAs, *, autocast: torch.dtype | None = None
) -> Iterator[None]:
    """Compute as a worker does with the weights that it is sent: rounded for the way, then fp32.

    The training process computes otherwise: its weights are not rounded or stay in half precision,
    and accelerate has put autocast inside `model.forward`. Each layer gets its rounded fp32 weights
    only while it runs, so that no second copy of the model is made; the parameters themselves are
    not touched. Of a sharded model they are what its own forward pass has gathered for the layer,
    and all processes run that pass together.

    Args:
        autocast: compute in this dtype after all, for attention kernels that take nothing wider.
    """
    device = next(model.parameters()).device.type
    with (
        contextlib.ExitStack() as hooks,
        _own_forward(model),
        _products_of_quantized(model, autocast or torch.float32),
        _inputs_uncast(model),
        torch.autocast(device, dtype=autocast, enabled=autocast is not None),
    ):
        for module, places in _units(model):
            changed = [one for one in places if _is_changed(one.value, sent_as)]
            if changed:
                swap = _Swap(changed, sent_as)
                # Inside the hooks of a sharded layer, which gather its weights and give them back.
                begin = module.register_forward_pre_hook(swap.begin)
                end = module.register_forward_hook(swap.end, prepend=True, always_call=True)
                hooks.callback(begin.remove)
                hooks.callback(end.remove)
        yield


@contextlib.contextmanager
def _inputs_uncast(model: Any) -> Iterator[None]:
    """Have the layers of a sharded model take what they are given, not round it first."""
    # Private, as FSDP offers no other way to change its policy for one pass.
    states = [one._get_fsdp_state() for one in model.modules() if isinstance(one, FSDPModule)]
    before = [state._mp_policy for state in states]
    for state in states:
        state._mp_policy = dataclasses.replace(state._mp_policy, cast_forward_inputs=False)
    try:
        yield
    finally:
        for state, own in zip(states, before, strict=True):
            state._mp_policy = own


@contextlib.contextmanager
def _own_forward(model: Any) -> Iterator[None]:
    """The model's own `forward` in place of the one with autocast that accelerate put there."""
    own = model.__dict__.get("_original_forward")
    patched = model.__dict__.get("forward")
    if own is None or patched is None:
        yield
        return
    model.forward = own
    try:
        yield
    finally:
        model.forward = patched


@contextlib.contextmanager
def _products_of_quantized(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Have bitsandbytes' 4-bit layers multiply in `dtype`, whatever they were told at loading."""
    layers = [module for module in model.modules() if hasattr(module, "compute_dtype")]
    before = [module.compute_dtype for module in layers]
    for module in layers:
        module.compute_dtype = dtype
    try:
        yield
    finally:
        for module, own in zip(layers, before, strict=True):
            module.compute_dtype = own


class _Place:
    """Where a module keeps one parameter or buffer."""

    def __init__(self, held: dict[str, Any], name: str) -> None:
        self.held, self.name = held, name
        self.value: torch.Tensor = held[name]


class _Swap:
    """Two hooks: fp32 copies of what was sent go in before a module runs, and out behind it."""

    def __init__(self, places: list[_Place], sent_as: SentAs) -> None:
        self.places = places
        # Asked of the parameters themselves: a sharded layer has others while it runs.
        self.dtypes = [sent_as(one.value) for one in places]

    def begin(self, *_: Any) -> None:
        for one, dtype in zip(self.places, self.dtypes, strict=True):
            one.value = one.held[one.name]
            sent = one.value.detach().to(dtype).float()
            # A parameter stays one: adapters of experts move what they wrap to another place and
            # back meanwhile, and take anything else for a buffer.
            is_parameter = isinstance(one.value, nn.Parameter)
            one.held[one.name] = nn.Parameter(sent, requires_grad=False) if is_parameter else sent

    def end(self, *_: Any) -> None:
        for one in self.places:
            one.held[one.name] = one.value


def _is_changed(value: torch.Tensor, sent_as: SentAs) -> bool:
    return value.is_floating_point() and (value.dtype, sent_as(value)) != (torch.float32,) * 2


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[_Place]]]:
    """Modules that are called, each with what it may read while it runs.

    A layer of a list is one unit, because its code may read what its parts hold; everything else
    (embeddings, the last norm, the head) is a unit by itself.
    """
    if isinstance(module, nn.ModuleList):
        for layer in module:
            if isinstance(layer, nn.ModuleList | nn.ModuleDict):
                yield from _units(layer)
            else:
                yield layer, [place for part in layer.modules() for place in _places(part)]
        return
    if hasattr(module, "base_layer"):  # an adapter, which may read the weights that it wraps
        yield module, [place for part in module.modules() for place in _places(part)]
        return
    containers = [one for one in module.children() if _is_container(one)]
    yield module, [place for part in (module, *containers) for place in _places(part)]
    for child in module.children():
        if not _is_container(child):
            yield from _units(child)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.ParameterList | nn.ParameterDict)


def _places(module: nn.Module) -> list[_Place]:
    """A module's own parameters, and the buffers that are saved with it and so travel too."""
    names = module._non_persistent_buffers_set
    parameters = [
        _Place(module._parameters, n) for n, p in module._parameters.items() if p is not None
    ]
    buffers = [
        _Place(module._buffers, name)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in names
    ]
    return parameters + buffers
