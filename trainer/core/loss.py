"""The loss on supervised positions: logits are computed where something is trained, nowhere else.

It is sum(w x ce) / sum(w) over the trained tokens of a whole optimizer step; w is 1 for rows
without loss weights, which makes it the token mean.

A forward pre-hook on the LM head keeps the supervised hidden states; the model's own forward
does the rest, so that logit scaling, soft-capping, adapters and DDP wrappers keep working.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from trainer.data.batches import LOSS_WEIGHTS
from trainer.data.rows import IGNORE_INDEX
from trainer.errors import ConfigError

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""How far our loss may be from the model's own on one batch, by compute dtype."""


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
    base = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
    head = base.get_output_embeddings()
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


def supervised_loss(
    model: Any,
    unwrapped: Any,
    batch: dict[str, Any],
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy summed over supervised tokens, each times its weight, over `num_items`.

    Args:
        batch: input_ids, labels, (B, T) int64, what else the forward takes, and any
            loss_weights, (B, T) float32, aligned with the labels.
        num_items: `loss_share` of the whole optimizer step; None: of this batch, so that the
            result is its mean in nats per token.
    Returns:
        A scalar, float32 (float64 for a float64 model). Zero with zero gradient where the
        batch has no supervised token, and where all of the step have weight 0.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("labels", LOSS_WEIGHTS)}
    target = shifted_targets(batch["labels"])
    keep = target != IGNORE_INDEX
    logits = supervised_logits(model, unwrapped, inputs, keep)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()  # a softmax over many tokens loses digits in half precision
    if LOSS_WEIGHTS in batch:
        weights = F.pad(batch[LOSS_WEIGHTS][:, 1:], (0, 1))[keep]  # (N,), shifted as labels are
        total = (F.cross_entropy(logits, target[keep], reduction="none") * weights).sum()
    else:
        total = F.cross_entropy(logits, target[keep], reduction="sum")
    return total / _divisor(loss_share(batch) if num_items is None else num_items)


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
