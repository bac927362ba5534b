"""The loss on supervised positions: logits are computed where something is trained, nowhere else.

It is sum(w x ce) / sum(w) over the trained tokens of a whole optimizer step; w is 1 for rows
without loss weights, which makes it the token mean.

A forward pre-hook on the LM head keeps the supervised hidden states; the model's own forward
does the rest, so that logit scaling, soft-capping, adapters and DDP wrappers keep working. Where
the logits of a batch would be large, the head is applied to tiles of the kept states, whose logits
are computed again in the backward pass: memory for one tile in place of memory for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from trainer.data.batches import LOSS_WEIGHTS
from trainer.data.rows import IGNORE_INDEX
from trainer.errors import ConfigError

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""How far our loss may be from the model's own on one batch, by compute dtype."""


TILE_LOGITS = 2**26
"""Logits that one tile may have: 256 MiB in fp32, and about three times that with gradients."""

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Config fields by which models multiply or divide their logits, or what goes into the head."""


@dataclass(frozen=True)
class PostHead:
    """What a model's forward does to the output of its LM head: cap * tanh(scale * x / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) from the head's output."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


@dataclass(frozen=True)
class Tiling:
    """How the head is applied to parts of a batch's kept positions."""

    post: PostHead
    length: int
    """Positions in one tile; fewer than that are not tiled."""

    @classmethod
    def of(cls, post: PostHead, vocabulary: int) -> Tiling:
        """Tiles of at most TILE_LOGITS logits."""
        return cls(post, max(1, TILE_LOGITS // vocabulary))


def shifted_targets(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) moved one to the left: position t is trained to predict token t + 1."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def loss_share(batch: dict[str, Any]) -> torch.Tensor:
    """What the loss of a batch is divided by: its supervised tokens, or the sum of their weights.

    Returns:
        A scalar on the batch's device, int64 without loss weights, float32 with them.
    """
    keep: torch.Tensor = batch["labels"][:, 1:] != IGNORE_INDEX
    weights: torch.Tensor | None = batch.get(LOSS_WEIGHTS)
    return keep.sum() if weights is None else (weights[:, 1:] * keep).sum()


def supervised_logits(
    model: Any, unwrapped: Any, inputs: dict[str, Any], keep: torch.Tensor
) -> torch.Tensor:
    """Logits at the kept positions.

    Args:
        model: the (possibly DDP-wrapped) model whose forward must run.
        unwrapped: the same model without wrappers.
        inputs: what the forward takes, all (B, T) tensors and lengths, no labels.
        keep: (B, T) bool, positions whose logits are wanted.
    Returns:
        (N, V), N = keep.sum(), in row-major order of the positions.
    """
    head = head_of(unwrapped)
    fired = False

    def keep_only(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal fired
        fired = True
        return (args[0][keep][None], *args[1:])

    hook = head.register_forward_pre_hook(keep_only) if head is not None else None
    try:
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    if fired and logits.shape[0] == 1 and logits.shape[1] == int(keep.sum()):
        return logits[0]
    # The head was called in another way (or not at all): full logits are right, only slower.
    return logits[keep]


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
    inputs = {key: value for key, value in batch.items() if key not in ("labels", LOSS_WEIGHTS)}
    try:
        logits = model(**inputs, use_cache=False).logits
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
    keep: torch.Tensor,
    *,
    target: torch.Tensor,
    weights: torch.Tensor | None,
    tiling: Tiling,
) -> torch.Tensor | None:
    """Summed cross-entropy, tile by tile; None where the head was not called as expected.

    Args:
        target: (N,) token ids of the kept positions.
        weights: (N,), or None.
    """
    head = head_of(unwrapped)
    hidden: list[torch.Tensor] = []

    def take(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden.append(args[0][keep])  # (N, D)
        return (args[0][:1, :1], *args[1:])  # the forward goes on with one position

    hook = head.register_forward_pre_hook(take)
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    if len(hidden) != 1:
        return None

    def tile(states: torch.Tensor, wanted: torch.Tensor, by: torch.Tensor | None) -> torch.Tensor:
        return _summed(tiling.post(head(states[None])[0]), wanted, by)

    length = tiling.length
    weighed = itertools.repeat(None) if weights is None else torch.split(weights, length)
    parts = zip(torch.split(hidden[0], length), torch.split(target, length), weighed, strict=False)
    sums = [checkpoint(tile, *part, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum()


def _summed(
    logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Cross-entropy of (N, V) logits, each position times its weight."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()  # a softmax over many tokens loses digits in half precision
    if weights is None:
        return F.cross_entropy(logits, target, reduction="sum")
    return (F.cross_entropy(logits, target, reduction="none") * weights).sum()


def supervised_loss(
    model: Any,
    unwrapped: Any,
    batch: dict[str, Any],
    num_items: torch.Tensor | int | None = None,
    *,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Cross-entropy summed over supervised tokens, each times its weight, over `num_items`.

    Args:
        batch: input_ids, labels, (B, T) int64, what else the forward takes, and any
            loss_weights, (B, T) float32, aligned with the labels.
        num_items: `loss_share` of the whole optimizer step; None: of this batch, so that the
            result is its mean in nats per token.
        tiling: proved for this model. None: all logits at once.
    Returns:
        A scalar, float32 (float64 for a float64 model). Zero with zero gradient where the
        batch has no supervised token, and where all of the step have weight 0.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("labels", LOSS_WEIGHTS)}
    target = shifted_targets(batch["labels"])
    keep = target != IGNORE_INDEX
    wanted, weights = target[keep], None
    if LOSS_WEIGHTS in batch:
        weights = F.pad(batch[LOSS_WEIGHTS][:, 1:], (0, 1))[keep]  # (N,), shifted as labels are
    total = None
    if tiling is not None and len(wanted) > tiling.length:
        total = _tiled_sum(
            model, unwrapped, inputs, keep, target=wanted, weights=weights, tiling=tiling
        )
    if total is None:
        total = _summed(supervised_logits(model, unwrapped, inputs, keep), wanted, weights)
    return total / _divisor(loss_share(batch) if num_items is None else num_items)


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
    return Tiling.of(post, model.config.get_text_config().vocab_size)


def _divisor(num_items: torch.Tensor | int) -> torch.Tensor | int:
    """1 in place of 0: a sum over nothing is zero, not NaN."""
    if isinstance(num_items, torch.Tensor):
        return torch.where(num_items > 0, num_items, torch.ones_like(num_items))
    return num_items or 1


def full_loss(
    model: Any, batch: dict[str, Any], num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """The model's own loss by its own forward with labels; the fallback of the above.

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
    return model(**batch, use_cache=False, num_items_in_batch=count)


@dataclass(frozen=True)
class LossCheck:
    """Our loss beside the model's own on one batch."""

    ours: float
    own: float
    is_equal: bool


def compare_with_own_loss(
    model: Any, batch: dict[str, Any], compute_dtype: torch.dtype
) -> LossCheck:
    """Compute both losses on one batch; the caller sets eval mode, autocast and no_grad.

    Ours may differ by the rounding of the compute dtype, because it multiplies other shapes. What
    a model adds to its loss, such as the router loss of experts, can be less than that: its loss
    is compared, more closely, with the cross-entropy of the same logits. Loss weights are left
    out: a model's own loss takes none.
    """
    batch = {key: value for key, value in batch.items() if key != LOSS_WEIGHTS}
    ours = float(supervised_loss(model, model, batch))
    output = _own_forward(model, batch, None)
    own, scale = float(output.loss), max(abs(float(output.loss)), 1e-6)
    is_equal = abs(ours - own) <= RELATIVE_TOLERANCE.get(compute_dtype, 1e-6) * scale
    target = shifted_targets(batch["labels"])
    keep = target != IGNORE_INDEX
    if output.logits is not None and output.logits.shape[:2] == target.shape:
        plain = float(F.cross_entropy(output.logits[keep].float(), target[keep]))
        is_equal = is_equal and abs(plain - own) <= RELATIVE_TOLERANCE[torch.float32] * scale
    return LossCheck(ours, own, is_equal)
