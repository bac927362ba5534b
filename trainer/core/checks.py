"""Checks at the start: the loss is the model's own, packs stay apart, the longest batch fits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trainer.core.hf_trainer import SupervisedTrainer, is_out_of_memory
from trainer.core.loss import (
    RELATIVE_TOLERANCE,
    Tiling,
    compare_with_own_loss,
    full_loss,
    prove_tiling,
    shifted_targets,
    supervised_logits,
    supervised_loss,
)
from trainer.core.optim import state_placeholders
from trainer.data.batches import (
    LOSS_WEIGHTS,
    EncodedDataset,
    JoinCollator,
    PackCollator,
    PadCollator,
    join_documents,
    on_device,
)
from trainer.data.rows import IGNORE_INDEX
from trainer.errors import ConfigError
from trainer.preview.neutral import rng_preserved, undisturbed

NUM_SUPERVISED = 256
"""Tokens whose loss is compared, at most: the model's own loss makes logits of every position."""

NUM_ROWS_SEEN = 100


def is_loss_equal(
    trainer: SupervisedTrainer,
    rows: EncodedDataset,
    *,
    dtype: torch.dtype,
    notice: Callable[..., None],
) -> bool:
    """Compare both losses on a part of one row, without a trace; say so where they differ.

    Args:
        rows: the training rows, not packed.
        dtype: in which the model computes.
        notice: told (text, level) where they differ.
    Raises:
        ConfigError: they differ, and the rows weigh their answers, which an own loss cannot.
    """
    row = telling_part(rows)
    batch = on_device(PadCollator(0)([row]), trainer.args.device)
    with undisturbed(trainer.model), trainer.accelerator.autocast():
        check = compare_with_own_loss(trainer.model, batch, dtype)
    if check.is_equal:
        return True
    words = (
        f"the loss on supervised positions is {check.ours:.6f}, the model's own is "
        f"{check.own:.6f}: this model adds something of its own"
    )
    if LOSS_WEIGHTS in row:
        raise ConfigError(
            f"{words}, and the rows have loss weights, which its own loss does not support; remove "
            "the weights from the rows (or use only 0 and 1), or turn off the extra loss in the "
            "model's config.json."
        )
    notice(f"{words}, so its own forward is used (right, but slower)", "warning")
    return False


def tiling_of(model: Any, rows: EncodedDataset, dtype: torch.dtype) -> Tiling | None:
    """`prove_tiling` on a part of one row; the caller sets eval, autocast and no_grad."""
    batch = PadCollator(0)([telling_part(rows)])
    return prove_tiling(model, on_device(batch, next(model.parameters()).device), dtype)


def telling_part(rows: EncodedDataset) -> dict[str, Any]:
    """The stretch of at most 257 tokens with the most supervised ones, of the first 100 rows."""
    best: tuple[int, int, int] = (0, 0, 0)  # supervised tokens, row, first token
    for index in range(min(len(rows), NUM_ROWS_SEEN)):
        # A stretch's first token is predicted by none, so that its label does not count.
        trained = (rows[index]["labels"][1:] != IGNORE_INDEX).long()
        before = torch.cat([torch.zeros(1, dtype=torch.int64), trained.cumsum(0)])
        ends = torch.arange(len(before)).add(NUM_SUPERVISED).clamp(max=len(before) - 1)
        counts = before[ends] - before
        start = int(counts.argmax())
        if int(counts[start]) > best[0]:
            best = (int(counts[start]), index, start)
        if best[0] == NUM_SUPERVISED:
            break
    _, index, start = best
    return {key: value[start : start + NUM_SUPERVISED + 1] for key, value in rows[index].items()}


def forget_peak_memory(device: torch.device) -> None:
    """Memory that only the checks at start took is not what training needs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


# ---- how packs reach a model, and the check at start that their documents stay apart
#
# The documents of a pack are told apart by the mask that transformers makes from positions (sdpa,
# eager, flex), or by the borders that a varlen kernel is given (flash attention in its versions,
# kernels from the hub). The former takes several packs as rows: one long row would need a mask of
# its length squared. The latter is only right for one row.


SAME_SHAPE_TOLERANCE = 1e-5
"""Between batches that differ in other documents only: no dtype excuses a difference there."""

DOCUMENT_LENGTH = 8

COMPARED = (1, 2, 3, DOCUMENT_LENGTH - 1)
"""Tokens of a document whose prediction is compared: a convolution leaks into the first ones."""


def attention_name(model: Any) -> str:
    """The attention that the language model's layers ask transformers for."""
    config = _base(model).config.get_text_config()
    return str(getattr(config, "_attn_implementation", None) or "eager")


def takes_borders(model: Any) -> bool:
    """Whether attention goes through transformers' varlen path, whatever the kernel's name."""
    return ALL_ATTENTION_FUNCTIONS.get(attention_name(model)) is flash_attention_forward


def pack_collator(model: Any, pad_id: int) -> PackCollator | JoinCollator:
    """What makes a batch of packs for this model's attention."""
    if not takes_borders(model):
        return PackCollator(pad_id)
    parameters = inspect.signature(type(_base(model)).forward).parameters.values()
    names = {parameter.name for parameter in parameters}
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return JoinCollator(with_borders=is_open or "cu_seq_lens_q" in names)


def check_documents_apart(
    model: Any,
    *,
    batch_size: int = 2,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
) -> None:
    """Refuse models whose documents see each other; the caller sets eval mode and autocast.

    Args:
        batch_size: packs in a batch of the run.
        collate: makes the run's batches of packs; None: what `pack_collator` chooses.
    Raises:
        ConfigError: the logits of a document depend on another one, or on where it stands; or the
            model does not take packs at all.
    """
    collate = collate or pack_collator(model, 0)
    size = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    shape = (2, batch_size, DOCUMENT_LENGTH)
    before, told = torch.randint(size, shape, generator=generator)
    # Of several lengths, so that rows are padded and borders are not all the same distance apart.
    first = [ids[: DOCUMENT_LENGTH - n % 3] for n, ids in enumerate(before)]
    alone = _logits(model, PadCollator(0)([_document(ids, COMPARED) for ids in told]))
    name = f"data.enable_packing=true, but {type(model).__name__}"
    try:
        packed = _logits(model, collate(_packs(first, told)))
        changed = _logits(model, collate(_packs([(ids + 1) % size for ids in first], told)))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"{name} does not take packed rows (attention {attention_name(model)}): {error} "
            "Set data.enable_packing=false."
        ) from error
    scale = float(alone.abs().max().clamp(min=1e-6))
    moved = float((packed - changed).abs().max()) / scale
    apart = float((packed - alone).abs().max()) / scale
    # Both are written so that a NaN refuses.
    if not moved <= SAME_SHAPE_TOLERANCE:
        raise ConfigError(
            f"{name} lets the documents of a pack see each other (attention "
            f"{attention_name(model)}, {batch_size} packs a batch): logits of a document change "
            f"by {moved:.1e} (relative) when others do. Models with convolution or recurrent "
            "layers do that, whatever the attention; set data.enable_packing=false."
        )
    tolerance = RELATIVE_TOLERANCE.get(_compute_dtype(model), 1e-4)
    if not apart <= tolerance:
        raise ConfigError(
            f"{name} gives different logits for a document in a pack than for it alone (attention "
            f"{attention_name(model)}, {batch_size} packs a batch): they differ by {apart:.1e} "
            f"(relative); rounding explains at most {tolerance:.0e}. The model does not reset "
            "its state at each document; set data.enable_packing=false."
        )


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _compute_dtype(model: Any) -> torch.dtype:
    """Of the matrix products: autocast's where it is on, whatever the weights are kept in."""
    parameter = next(model.parameters())
    if torch.is_autocast_enabled(parameter.device.type):
        return torch.get_autocast_dtype(parameter.device.type)
    dtype: torch.dtype = parameter.dtype
    return dtype


def _packs(first: list[torch.Tensor], told: torch.Tensor) -> list[dict[str, Any]]:
    return [
        join_documents([_document(before, ()), _document(ids, COMPARED)])
        for before, ids in zip(first, told, strict=True)
    ]


def _document(ids: torch.Tensor, compared: tuple[int, ...]) -> dict[str, Any]:
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[list(compared)] = ids[list(compared)]
    return {"input_ids": ids, "labels": labels}


def _logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Logits (documents x compared tokens, V) float32, in the order of the documents."""
    batch = on_device(batch, next(model.parameters()).device)
    keep = shifted_targets(batch.pop("labels")) != IGNORE_INDEX
    with torch.no_grad():
        return supervised_logits(model, model, batch, keep).float()


# ---- the longest batch before the first step, so that running out of memory shows at the start
#
# It is a probe only: its gradients are thrown away, and random state and buffers are put back, so
# that the steps are those of a run without it.


class MemoryProbe(TrainerCallback):  # type: ignore[misc]
    """Acts once, when model and optimizer are ready; also in a run that is resumed."""

    def __init__(self) -> None:
        """Wait for `trainer` to be set."""
        self.trainer: SupervisedTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe, unless an epoch is a single step, which then holds the longest row anyway."""
        assert self.trainer is not None, "set by assemble_trainer"
        if self.trainer.order.steps_per_epoch > 1:
            probe(self.trainer)


def probe(trainer: SupervisedTrainer) -> None:
    """One forward and backward pass over as many of the longest rows as a device takes at once.

    Raises:
        ConfigError: they do not fit into memory.
    """
    problem = try_longest(trainer, trainer.model_wrapped, trainer.args.per_device_train_batch_size)
    if problem is not None:
        raise ConfigError(problem)


def try_longest(trainer: SupervisedTrainer, model: Any, count: int) -> str | None:
    """A pass over the `count` longest rows, which leaves nothing behind.

    Room for the optimizer's state is held meanwhile, where it has none yet.

    Args:
        model: in train mode from here on.
    Returns:
        None where they fit, else the message that says so: not the error, whose traceback would
        keep what the pass has made.
    """
    rows = trainer.order.longest_rows(count)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    problem = None
    try:
        with rng_preserved():
            _pass_over(trainer, model, batch)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        problem = _refusal(trainer, batch, error)
        model.zero_grad()  # of a backward pass that was cut short
    for buffer, before in buffers:
        buffer.data.copy_(before)
    forget_peak_memory(trainer.args.device)
    return problem


def _refusal(trainer: SupervisedTrainer, batch: dict[str, Any], error: RuntimeError) -> str:
    count, length = batch["input_ids"].shape
    return (
        f"the longest batch ({count} x {length} tokens) does not fit into the memory of "
        f"{trainer.args.device} ({' '.join(str(error).split())[:160]}); lower "
        "hyperparams.batch_size (and raise gradient_accumulation as much; auto_batch_size=true "
        "does both), lower max_length, or set gradient_checkpointing=true."
    )


def _pass_over(trainer: SupervisedTrainer, model: Any, batch: dict[str, Any]) -> None:
    model.train()
    room = state_placeholders(trainer.optimizer)
    inputs = trainer._prepare_inputs(batch)
    with trainer.compute_loss_context_manager():
        if trainer.use_own_forward:
            loss = full_loss(model, inputs)
        else:
            unwrapped = trainer.accelerator.unwrap_model(model)
            loss = supervised_loss(model, unwrapped, inputs, tiling=trainer.tiling)
    trainer.accelerator.backward(loss)
    model.zero_grad()
    del room  # held until here
