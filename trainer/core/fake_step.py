"""The live tensor bytes of one training step, counted on tensors that have no memory.

The model's own forward and backward run on fake tensors (shapes and dtypes, no values), so that
what a family of models, autocast, adapters, an attention or gradient checkpointing keep and drop
is what they really do. Blocks that are equal are run three times, and the others are added up.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import moe

from trainer.core.loss import head_of
from trainer.core.tiles import PostHead, Tiling, summed_in_tiles, summed_loss

NUM_RUN = 3
"""Equal blocks that are run: the first and the last may keep more than those between them."""


@dataclass(frozen=True)
class StepShape:
    """What one micro-batch of a run looks like."""

    batch_size: int
    length: int
    """Of its rows, in tokens."""
    has_mask: bool
    """Attention gets a mask of (B, 1, T, T): rows of several lengths, or packs."""
    autocast_dtype: torch.dtype | None
    gradient_checkpointing: bool
    accumulates: bool
    """Gradients of earlier micro-batches are there already."""
    device_type: str
    """Where it is made: tiles of the loss go by it."""


@dataclass(frozen=True)
class StepBytes:
    """Bytes beside the weights and the optimizer's state; the parts are not all there at once."""

    peak: int
    """Most that is there at once: gradients, copies, activations, loss."""
    activations: int
    """Kept by the forward pass for the backward pass."""
    copies: int
    """Of weights in autocast's dtype, kept from forward to backward."""
    loss: int
    """Logits with their softmax and gradient."""


def count_step(model: nn.Module, shape: StepShape) -> StepBytes:
    """Run a forward and a backward pass on fake tensors.

    Args:
        model: on the meta device, adapters included; it is used up.
    Raises:
        Exception: whatever a model raises that computes with the values of tensors.
    """
    blocks = _shorten(model)
    live = LiveBytes()
    with FakeTensorMode():
        _make_fake(model)
        if shape.accumulates:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
        live.ignore([*model.parameters(), *model.buffers()])
        live.ignore([p.grad for p in model.parameters() if p.grad is not None])
        marks = _Marks(live, blocks.run)
        model.train()
        if shape.gradient_checkpointing:
            options = {"use_reentrant": False}
            _base(model).activation_checkpointing_enable(activation_checkpointing_kwargs=options)
            if hasattr(model, "peft_config"):
                model.enable_input_require_grads()  # type: ignore[operator]
        with live, _experts_on_fake_tensors():
            loss = _forward(model, shape, marks)
            loss.backward()  # type: ignore[no-untyped-call]
    marks.close()
    more = blocks.num - len(blocks.run)
    gradients = sum(_grad_bytes(p) for p in blocks.run[0].parameters()) if blocks.run else 0
    held = gradients_of(model) + more * gradients if shape.accumulates else 0
    late = 0 if shape.accumulates else more * gradients
    return StepBytes(
        # Full at the start of the backward pass, or at its end, when all gradients are there:
        # between the two, each block takes off and adds as much as any other.
        peak=held + max(marks.early_peak + more * marks.per_block, live.peak + late),
        activations=marks.kept - marks.copies + more * (marks.per_block - marks.copies_per_block),
        copies=marks.copies + more * marks.copies_per_block,
        loss=marks.loss_peak - marks.kept,
    )


def gradients_of(model: nn.Module) -> int:
    """Bytes of the gradients of all trained parameters."""
    return sum(_grad_bytes(parameter) for parameter in model.parameters())


def _grad_bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size() if parameter.requires_grad else 0


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, until nothing refers to them any more."""

    def __init__(self) -> None:
        """Begin at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.copies = 0
        self._known: dict[int, int] = {}
        self._given: set[int] = set()

    def ignore(self, tensors: list[Any]) -> None:
        """Tensors that are there before; what shares their memory is not counted either."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            self._known[key] = 0
            self._given.add(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and count what it made."""
        before = self.now
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._count(value)
        is_cast = func is torch.ops.aten._to_copy.default
        if is_cast and args[0].untyped_storage()._cdata in self._given:
            self.copies += self.now - before
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        weakref.finalize(storage, self._drop, key)
        self.now += self._known[key]
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


@dataclass
class _Blocks:
    """The longest list of equal layers, cut to what is run."""

    run: list[nn.Module]
    num: int


def _shorten(model: nn.Module) -> _Blocks:
    """Leave three of a model's blocks where all are equal; elsewhere it stays as it is."""
    lists = [one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one)]
    if not lists:
        return _Blocks([], 0)
    found = max(lists, key=lambda one: sum(p.numel() for p in one.parameters()))
    num = len(found)
    if num <= NUM_RUN or len({_signature(block) for block in found}) > 1:
        return _Blocks([], 0)
    del found[NUM_RUN:]
    config = _base(model).config
    for one in {id(c): c for c in (config, config.get_text_config())}.values():
        one.num_hidden_layers = NUM_RUN
    return _Blocks(list(found), num)


def _signature(block: nn.Module) -> tuple[Any, ...]:
    parameters = ((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters())
    return (type(block), *parameters)


def _make_fake(model: nn.Module) -> None:
    """Fake tensors of the CPU in place of those of the meta device; ties stay ties."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                tensor = torch.empty(old.shape, dtype=old.dtype)
                made[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad)
            module._parameters[name] = made[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@dataclass
class _Marks:
    """Reads the count where one block ends and the next begins."""

    live: LiveBytes
    blocks: list[nn.Module]
    per_block: int = 0
    copies_per_block: int = 0
    early_peak: int = 0
    """Until the gradient has come down to the first block."""
    kept: int = 0
    copies: int = 0
    loss_peak: int = 0
    _starts: list[tuple[int, int]] = field(default_factory=list)
    _hooks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        for nth in range(1, len(self.blocks)):
            hook = self._pre_hook(nth)
            self._hooks.append(self.blocks[nth].register_forward_pre_hook(hook, with_kwargs=True))

    def _pre_hook(self, nth: int) -> Callable[..., None]:
        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(self._starts) >= nth:  # computed again in the backward pass
                return
            self._starts.append((self.live.now, self.live.copies))
            hidden = args[0] if args else kwargs["hidden_states"]
            if nth == 1 and hidden.requires_grad:
                hidden.register_hook(self._note_gradient)

        return note

    def _note_gradient(self, gradient: torch.Tensor) -> None:
        self.early_peak, self.live.peak = self.live.peak, self.live.now

    def note_forward(self) -> None:
        """The model's forward is over, the loss is not made yet."""
        self.kept, self.copies = self.live.now, self.live.copies
        if len(self._starts) >= 2:
            (a, b), (c, d) = self._starts[0], self._starts[1]
            self.per_block, self.copies_per_block = c - a, d - b
        self.loss_peak, self._forward_peak = 0, self.live.peak
        self.live.peak = self.live.now

    def note_loss(self) -> None:
        """The loss is made, and its gradient of the hidden states."""
        if not self.loss_peak:
            self.loss_peak = self.live.peak
            self.live.peak = max(self.live.peak, self._forward_peak)

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def _forward(model: Any, shape: StepShape, marks: _Marks) -> torch.Tensor:
    """The loss of a batch whose every position is trained, as `supervised_loss` makes it."""
    size = (shape.batch_size, shape.length)
    inputs: dict[str, Any] = {"input_ids": torch.zeros(size, dtype=torch.int64)}
    if shape.has_mask:
        mask = torch.ones((size[0], 1, size[1], size[1]), dtype=torch.bool)
        inputs["attention_mask"] = mask
    text = _base(model).config.get_text_config()
    post = PostHead(cap=getattr(text, "final_logit_softcapping", None))
    tiling = Tiling.of(post, text.vocab_size, shape.device_type)
    wanted = torch.zeros(size[0] * size[1], dtype=torch.int64)
    is_tiled = len(wanted) > tiling.length
    head, kept = head_of(model), []

    def take(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states = args[0].flatten(0, -2).clone()
        marks.note_forward()
        if states.requires_grad:
            states.register_hook(lambda gradient: marks.note_loss())
        if not is_tiled:
            return (states[None], *args[1:])
        kept.append(states)
        return (args[0][:1, :1], *args[1:])

    autocast: Any = contextlib.nullcontext()
    if shape.autocast_dtype is not None:
        autocast = torch.autocast("cpu", dtype=shape.autocast_dtype)
    hook = head.register_forward_pre_hook(take)
    try:
        with autocast:
            logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    if not is_tiled:
        return summed_loss(logits[0], wanted, None)[0]
    del logits
    with autocast:
        return summed_in_tiles(kept.pop(), head, wanted, None, tiling)[0]


@contextlib.contextmanager
def _experts_on_fake_tensors() -> Iterator[None]:
    """Transformers' own stand-in for `grouped_mm`, whose checks of dtypes are for other devices."""
    before = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = before


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
