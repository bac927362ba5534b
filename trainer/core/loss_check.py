"""At start: is the loss on supervised positions the model's own?"""

from __future__ import annotations

from trainer.core.context import RunContext
from trainer.core.evaluate import Collate
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.loss import compare_with_own_loss
from trainer.preview.neutral import undisturbed


def is_loss_equal(run: RunContext, trainer: SupervisedTrainer, collate: Collate) -> bool:
    """Compare both losses on one batch, without a trace; say so loudly where they differ."""
    size = min(len(run.data.train), trainer.args.per_device_train_batch_size)
    batch = collate([run.data.train[i] for i in range(size)])
    batch = {key: value.to(trainer.args.device) for key, value in batch.items()}
    with undisturbed(trainer.model), trainer.accelerator.autocast():
        check = compare_with_own_loss(trainer.model, batch, run.precision.compute_dtype)
    if not check.is_equal:
        run.notice(
            f"the loss on supervised positions is {check.ours:.6f}, the model's own is "
            f"{check.own:.6f}: this model adds something of its own, so its own forward is "
            "used (right, but slower)",
            "warning",
        )
    return check.is_equal
