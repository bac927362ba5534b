"""The loss on supervised positions: logits are computed where something is trained, nowhere else.

It is sum(w x ce) / sum(w) over the trained tokens of a whole optimizer step; w is 1 for rows
without loss weights, which makes it the token mean.

A forward pre-hook on the LM head keeps the supervised hidden states; the model's own forward
does the rest, so that logit scaling, soft-capping, adapters and DDP wrappers keep working. Where
the logits of a batch would be large, the head is applied to tiles of the kept states (tiles.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer.core.source_losses import SourceSums
from trainer.core.tiles import PostHead, Tiling, summed_in_tiles, summed_loss
from trainer.data.batches import LOSS_WEIGHTS, SOURCES
from trainer.data.rows import IGNORE_INDEX
from trainer.errors import ConfigError

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""How far our loss may be from the model's own on one batch, by compute dtype."""

SUPERVISED = "supervised"
"""Key of batches: `supervised_positions` of the labels, made on the CPU beside the batch."""

NUM_TOKENS = "num_tokens"
"""Key of batches: tokens that are neither padding nor blank, a plain int."""

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Config fields by which models multiply or divide their logits, or what goes into the head."""


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """Where labels (B, T) have a trained token next: (N,) int64, ascending indices into B x T.

    On a GPU this waits for the device; batches of a run bring it along (`SUPERVISED`).
    """
    is_trained = F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    return is_trained.flatten().nonzero().flatten()


def _next(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Of (B, T) values those one place behind the positions, (N,)."""
    return values.flatten().index_select(0, positions + 1)


def forward_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch the model's forward takes, without the labels."""
    ours = ("labels", LOSS_WEIGHTS, SOURCES, SUPERVISED, NUM_TOKENS)
    return {key: value for key, value in batch.items() if key not in ours}


def loss_share(batch: dict[str, Any]) -> torch.Tensor:
    """What the loss of a batch is divided by: its supervised tokens, or the sum of their weights.

    Returns:
        A scalar on the batch's device, int64 without loss weights, float32 with them.
    """
    keep: torch.Tensor = batch["labels"][:, 1:] != IGNORE_INDEX
    weights: torch.Tensor | None = batch.get(LOSS_WEIGHTS)
    return keep.sum() if weights is None else (weights[:, 1:] * keep).sum()


def supervised_logits(
    model: Any, unwrapped: Any, inputs: dict[str, Any], positions: torch.Tensor
) -> torch.Tensor:
    """Logits at the kept positions.

    Args:
        model: the (possibly DDP-wrapped) model whose forward must run.
        unwrapped: the same model without wrappers.
        inputs: what the forward takes, all (B, T) tensors and lengths, no labels.
        positions: (N,), indices into B x T, of the logits that are wanted.
    Returns:
        (N, V), in the order of the positions.
    """
    return _forward_on(model, unwrapped, inputs, positions)[0]


def _forward_on(
    model: Any, unwrapped: Any, inputs: dict[str, Any], positions: torch.Tensor
) -> tuple[torch.Tensor, Any]:
    """Logits (N, V) at the positions, and the forward's whole output."""
    head = head_of(unwrapped)
    fired = False

    def keep_only(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal fired
        if args[0].shape[:2] != inputs["input_ids"].shape:
            return args
        fired = True
        return (_kept(args[0], positions)[None], *args[1:])

    hook = head.register_forward_pre_hook(keep_only) if head is not None else None
    try:
        output = model(**inputs, use_cache=False)
    finally:
        if hook is not None:
            hook.remove()
    if fired and output.logits.shape[:2] == (1, len(positions)):
        return output.logits[0], output
    # The head was called in another way (or not at all): full logits are right, only slower.
    return _kept(output.logits, positions), output


def _kept(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(B, T, D) -> (N, D); by index, for a mask's length is known to the device only."""
    return states.flatten(0, 1).index_select(0, positions)


def head_of(unwrapped: Any) -> Any:
    """The LM head of a model, adapters or not; None where it has none."""
    base = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
    return base.get_output_embeddings()


def find_post_head(model: Any, batch: dict[str, Any]) -> PostHead | None:
    """What the model does behind its head, found by comparing what goes in with what comes out.

    A config's field alone does not tell: `logits_scaling` divides logits in Granite, multiplies
    them in HyperCLOVA X and divides the hidden states in MiniCPM3.

    Args:
        model: unwrapped, in eval mode and under no_grad.
        batch: one row or more, as of `supervised_loss`.
    Returns:
        None where it is something else, or the head is not called as a module.
    """
    seen: list[torch.Tensor] = []
    head = head_of(model)
    if head is None:
        return None
    hook = head.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        logits = model(**forward_inputs(batch), use_cache=False).logits
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0].shape != logits.shape:
        return None
    errors = {
        post: float((post(seen[0]).float() - logits.float()).abs().max())
        for post in _candidates(model.config)
    }
    best = min(errors, key=lambda post: errors[post])
    rounding = 4 * torch.finfo(seen[0].dtype).eps * float(logits.abs().max())
    return best if errors[best] <= rounding else None


def _candidates(config: Any) -> Iterator[PostHead]:
    """All that a config may mean; the cap first, which small logits alone do not show."""
    configs = [config, config.get_text_config()]
    values = {float(v) for c in configs for name in SCALES if (v := getattr(c, name, None))}
    caps = {float(v) for c in configs if (v := getattr(c, "final_logit_softcapping", None))}
    scales = [1.0, *sorted({*values, *(1 / value for value in values)})]
    for cap, scale in itertools.product([*sorted(caps), None], scales):
        yield PostHead(scale, cap)


def _tiled_sum(
    model: Any,
    unwrapped: Any,
    inputs: dict[str, Any],
    positions: torch.Tensor,
    *,
    target: torch.Tensor,
    weights: torch.Tensor | None,
    tiling: Tiling,
) -> tuple[torch.Tensor, torch.Tensor | None, Any] | None:
    """Summed cross-entropy, tile by tile, that of each position, and the router loss.

    A kernel does not tell of each position, and most models have no router loss.

    Args:
        target: (N,) token ids that follow the positions.
        weights: (N,), or None.
    Returns:
        None where the head was not called as expected, or its weights are in shards again.
    """
    head = head_of(unwrapped)
    hidden: list[torch.Tensor] = []
    device = inputs["input_ids"].device.type
    autocast = torch.autocast(device, enabled=False)

    def take(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal autocast
        hidden.append(_kept(args[0], positions))  # (N, D)
        # Accelerate puts autocast around the forward alone; tiles are made as if within it.
        dtype, is_on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        autocast = torch.autocast(device, dtype=dtype, enabled=is_on)
        return (args[0][:1, :1], *args[1:])  # the forward goes on with one position

    hook = head.register_forward_pre_hook(take)
    try:
        output = model(**inputs, use_cache=False)
    finally:
        hook.remove()
    if len(hidden) != 1 or any(isinstance(one, DTensor) for one in head.parameters()):
        return None
    aux_loss = getattr(output, "aux_loss", None)
    logits = output.logits if isinstance(unwrapped, FSDPModule) else None
    del output  # the graph of its logits keeps the head's weights in autocast's dtype
    with autocast:
        total, each = summed_in_tiles(hidden.pop(), head, target, weights, tiling)
    if logits is not None:
        total = _through(total, logits)
    return total, each, aux_loss


class _Through(torch.autograd.Function):
    """The first argument; the second gets a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, total: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        [logits] = ctx.saved_tensors
        return gradient, torch.zeros_like(logits)


def _through(total: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A loss that is made beside the model's output, with the output in its graph.

    The backward hooks of FSDP are at the output. Where they did not run, this process would gather
    and reduce in another order than one whose batch was too small for tiles, and both would wait.
    """
    found: torch.Tensor = _Through.apply(total, logits)  # type: ignore[no-untyped-call]
    return found


def supervised_loss(
    model: Any,
    unwrapped: Any,
    batch: dict[str, Any],
    num_items: torch.Tensor | int | None = None,
    *,
    tiling: Tiling | None = None,
    router: float = 0.0,
    by_source: SourceSums | None = None,
) -> torch.Tensor:
    """Cross-entropy summed over supervised tokens, each times its weight, over `num_items`.

    And the router loss of a mixture of experts, where the model's own loss has it too. That one is
    a mean over the tokens of a forward pass, which no count of tokens divides: the caller divides
    it by the forward passes of a step, so that accumulation does not multiply it.

    Args:
        batch: input_ids, labels, (B, T) int64, what else the forward takes, any loss_weights,
            (B, T) float32, aligned with the labels, and any `supervised`, the positions.
        num_items: `loss_share` of the whole optimizer step; None: of this batch, so that the
            result is its mean in nats per token.
        tiling: proved for this model. None: all logits at once.
        router: the forward's `aux_loss` is added times this; 0 leaves it out.
        by_source: gets the loss of each position, where the batch says which source it is of.
    Returns:
        A scalar, float32 (float64 for a float64 model). Zero with zero gradient where the
        batch has no supervised token, and where all of the step have weight 0.
    """
    inputs, labels = forward_inputs(batch), batch["labels"]
    positions = batch.get(SUPERVISED)
    if positions is None:
        positions = supervised_positions(labels)
    wanted, weights = _next(labels, positions), None
    if LOSS_WEIGHTS in batch:
        weights = _next(batch[LOSS_WEIGHTS], positions)
    found = None
    if tiling is not None and len(wanted) > tiling.length:
        found = _tiled_sum(
            model, unwrapped, inputs, positions, target=wanted, weights=weights, tiling=tiling
        )
    if found is None:
        logits, output = _forward_on(model, unwrapped, inputs, positions)
        aux_loss = getattr(output, "aux_loss", None)
        found = *summed_loss(logits, wanted, weights), aux_loss
    total, each, aux_loss = found
    if by_source is not None and each is not None and SOURCES in batch:
        by_source.add(each, weights, _next(batch[SOURCES], positions))
    if num_items is None:
        num_items = len(wanted) if weights is None else weights.sum()
    loss: torch.Tensor = total / _divisor(num_items)
    if router and len(wanted):  # blank rows have no router loss either
        loss = loss + router * aux_loss.to(loss.device)
    return loss


def prove_tiling(model: Any, batch: dict[str, Any], dtype: torch.dtype) -> Tiling | None:
    """How the loss of this model may be made in tiles; the caller sets eval, autocast, no_grad.

    Args:
        model: unwrapped.
        batch: with several trained positions.
        dtype: in which the model computes.
    Returns:
        None where tiles give another loss than all logits at once, or the model has no head.
    """
    post = find_post_head(model, batch)
    if post is None:
        return None
    small = Tiling(post, max(1, int((batch["labels"] != IGNORE_INDEX).sum()) // 4))
    whole = float(supervised_loss(model, model, batch))
    tiled = float(supervised_loss(model, model, batch, tiling=small))
    if abs(whole - tiled) > RELATIVE_TOLERANCE.get(dtype, 1e-6) * max(abs(whole), 1e-6):
        return None
    return Tiling.of(post, model.config.get_text_config().vocab_size, model.device.type)


def _divisor(num_items: torch.Tensor | int) -> torch.Tensor | int:
    """1 in place of 0: a sum over nothing is zero, not NaN."""
    if isinstance(num_items, torch.Tensor):
        return torch.where(num_items > 0, num_items, torch.ones_like(num_items))
    return num_items or 1


def full_loss(
    model: Any, batch: dict[str, Any], num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """The model's own loss by its own forward with labels; the fallback of the above.

    What such a model adds to the cross-entropy is added once a forward pass, undivided.

    Raises:
        ConfigError: the batch has loss weights, which a model's own loss cannot take.
    """
    loss: torch.Tensor = _own_forward(model, batch, num_items).loss
    return loss


def _own_forward(model: Any, batch: dict[str, Any], num_items: torch.Tensor | int | None) -> Any:
    if LOSS_WEIGHTS in batch:
        raise ConfigError(
            f"the rows weigh their answers, but {type(model).__name__} has a loss of its own, "
            "which takes no weights; leave the weights out of the rows (or give only 0 and 1), "
            "or turn off in the model's config.json what adds to its loss."
        )
    count = _divisor(loss_share(batch) if num_items is None else num_items)
    inputs = {**forward_inputs(batch), "labels": batch["labels"]}
    return model(**inputs, use_cache=False, num_items_in_batch=count)


def router_coefficient(model: Any) -> float:
    """What a model's own loss takes its router loss times; 0 where it does not add one."""
    configs = [model.config, model.config.get_text_config()]
    if not any(getattr(config, "output_router_logits", False) for config in configs):
        return 0.0
    found = [getattr(config, "router_aux_loss_coef", None) for config in configs]
    return float(next((value for value in found if value is not None), 0.0))


@dataclass(frozen=True)
class LossCheck:
    """Our loss beside the model's own on one batch."""

    ours: float
    own: float
    is_equal: bool
    router: float
    """`router_coefficient`, which ours was made with."""


def compare_with_own_loss(
    model: Any, batch: dict[str, Any], compute_dtype: torch.dtype
) -> LossCheck:
    """Compute both losses on one batch; the caller sets eval mode, autocast and no_grad.

    Ours may differ by the rounding of the compute dtype, because it multiplies other shapes. What
    a model adds to its loss can be less than that: its loss is compared, more closely, with the
    cross-entropy of the same logits and the router loss of the same forward pass. Loss weights are
    left out: a model's own loss takes none.
    """
    batch = {key: value for key, value in batch.items() if key != LOSS_WEIGHTS}
    output = _own_forward(model, batch, None)
    router = router_coefficient(model) if getattr(output, "aux_loss", None) is not None else 0.0
    ours = float(supervised_loss(model, model, batch, router=router))
    own, scale = float(output.loss), max(abs(float(output.loss)), 1e-6)
    is_equal = abs(ours - own) <= RELATIVE_TOLERANCE.get(compute_dtype, 1e-6) * scale
    labels = batch["labels"]
    if output.logits is not None and output.logits.shape[:2] == labels.shape:
        positions = supervised_positions(labels)
        logits = _kept(output.logits, positions).float()
        plain = float(F.cross_entropy(logits, _next(labels, positions)))
        if router:
            plain += router * float(output.aux_loss)
        is_equal = is_equal and abs(plain - own) <= RELATIVE_TOLERANCE[torch.float32] * scale
    return LossCheck(ours, own, is_equal, router)
