"""Attention and batches that are proved on the loaded model before the first step.

The documents of a pack are told apart by the mask that transformers makes from positions (sdpa,
eager, flex), or by the borders that a varlen kernel is given (flash attention in its versions,
kernels from the hub). The former takes several packs as rows: one long row would need a mask of
its length squared. The latter is only right for one row, and takes rows that are not packed so too,
which spares their padding. What is found wrong is replaced where there is another way, with a
notice, and else refused.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.loss import (
    NUM_TOKENS,
    RELATIVE_TOLERANCE,
    SUPERVISED,
    forward_inputs,
    supervised_logits,
    supervised_positions,
)
from trainer.data.batches import (
    JoinCollator,
    PackCollator,
    PadCollator,
    count_tokens,
    join_documents,
    on_device,
)
from trainer.data.rows import IGNORE_INDEX
from trainer.errors import ConfigError
from trainer.models.attention import AttentionPlan, attention_error
from trainer.preview.neutral import undisturbed

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
"""Rows in, one batch out."""

SAME_SHAPE_TOLERANCE = 1e-5
"""Between batches that differ in other documents only: no dtype excuses a difference there."""

DOCUMENT_LENGTH = 8

COMPARED = (1, 2, 3, DOCUMENT_LENGTH - 1)
"""Tokens of a document whose prediction is compared: a convolution leaks into the first ones."""

NUM_PADDED = 4
"""Padded rows whose logits are compared with a mask and without one, at most."""

REFUSALS = (TypeError, ValueError, NotImplementedError, RuntimeError, ImportError)
"""What models and kernels raise that do not take a batch."""


class TrainingCollator:
    """Another collator's batches, and what the loss would else have to ask the device for."""

    def __init__(self, collate: Collate, *, with_mask: bool = True) -> None:
        """Without `with_mask` padded rows have no attention mask: for models proved to need none.

        A mask, even of ones, keeps sdpa from its fast kernels.
        """
        self.collate, self.with_mask = collate, with_mask

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch with `supervised`, (N,) int64, and `num_tokens`, an int."""
        batch = self.collate(rows)
        counts = {
            SUPERVISED: supervised_positions(batch["labels"]),
            NUM_TOKENS: int(count_tokens(batch)),
        }
        if not self.with_mask:
            batch = {key: value for key, value in batch.items() if key != "attention_mask"}
        return {**batch, **counts}


# ---- what a model's attention takes


def attention_name(model: Any) -> str:
    """The attention that the language model's layers ask transformers for."""
    config = _base(model).config.get_text_config()
    return str(getattr(config, "_attn_implementation", None) or "eager")


def takes_borders(model: Any) -> bool:
    """Whether attention goes through transformers' varlen path, whatever the kernel's name."""
    return ALL_ATTENTION_FUNCTIONS.get(attention_name(model)) is flash_attention_forward


def pack_collator(
    model: Any, pad_id: int, *, buckets: Sequence[int] = ()
) -> PackCollator | JoinCollator:
    """What makes a batch of packs for this model's attention; rows are padded to `buckets`."""
    return _join_collator(model) if takes_borders(model) else PackCollator(pad_id, buckets=buckets)


def _join_collator(model: Any) -> JoinCollator:
    parameters = inspect.signature(type(_base(model)).forward).parameters.values()
    names = {parameter.name for parameter in parameters}
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return JoinCollator(with_borders=is_open or "cu_seq_lens_q" in names)


# ---- the choice


@dataclass(frozen=True)
class BatchChoice:
    """How a run's rows become batches."""

    collate: Collate
    attention: str
    """What was taken and why, in words."""
    notices: tuple[str, ...]
    """What was not possible, for the user."""


def choose_batches(
    trainer: SupervisedTrainer,
    plan: AttentionPlan,
    *,
    is_packed: bool,
    pad_id: int,
    buckets: Sequence[int] = (),
) -> BatchChoice:
    """Set the attention of the model, and choose the batches that are right with it.

    Args:
        buckets: lengths that padded batches have; none: that of their longest row.
    Raises:
        ModelError: the attention that was asked for does not run here.
        ConfigError: packing, with a model whose documents see each other.
    """
    model, size = trainer.model, trainer.args.per_device_train_batch_size
    own, refused = attention_name(model), list[str]()
    expected = None
    for name in plan.candidates:
        with _looking_at(trainer, own):
            expected = _alone(model, size) if expected is None else expected
        wrong = _why_not(trainer, name, expected)
        if wrong is None:
            taken = f"{name}, which is installed and proved with this model"
            return BatchChoice(_join_collator(model), taken, tuple(refused))
        refused.append(f"{name} is not used: {wrong}")
    _set_attention(model, own)
    reason = f"{own}; {plan.reason}" if plan.asked == "auto" else plan.reason
    if plan.asked != "auto":
        _check_runs(trainer, own)
    if is_packed:
        collate: Collate = pack_collator(model, pad_id, buckets=buckets)
        with _looking_at(trainer, own):
            check_documents_apart(model, batch_size=size, collate=collate)
        return BatchChoice(collate, reason, tuple(refused))
    if takes_borders(model):
        with _looking_at(trainer, own):
            wrong = why_not_apart(model, batch_size=size, collate=_join_collator(model))
        if wrong is None:
            return BatchChoice(_join_collator(model), reason, tuple(refused))
        refused.append(f"rows are padded, not joined: {type(_base(model)).__name__} {wrong}")
    return BatchChoice(PadCollator(pad_id, buckets=buckets), reason, tuple(refused))


@contextlib.contextmanager
def _looking_at(trainer: SupervisedTrainer, name: str) -> Iterator[None]:
    """Without a trace, and in fp32 where model and kernel allow it, which hides least.

    Varlen kernels take half precision only.
    """
    dtypes = {parameter.dtype for parameter in trainer.model.parameters()}
    is_varlen = ALL_ATTENTION_FUNCTIONS.get(name) is flash_attention_forward
    needs_autocast = is_varlen or "/" in name or len(dtypes) > 1
    autocast = trainer.accelerator.autocast() if needs_autocast else contextlib.nullcontext()
    with undisturbed(trainer.model), autocast:
        yield


def _why_not(trainer: SupervisedTrainer, name: str, expected: torch.Tensor) -> str | None:
    """Why a candidate of `auto` is not taken.

    Args:
        expected: logits of `_alone` by the model's own attention.
    """
    model, size = trainer.model, trainer.args.per_device_train_batch_size
    try:
        _set_attention(model, name)
        _check_backward(trainer)
        with trainer.accelerator.autocast(), undisturbed(model):
            apart = _distance(_alone(model, size), expected)
            tolerance = RELATIVE_TOLERANCE.get(_compute_dtype(model), 1e-4)
            if not apart <= tolerance:
                return f"its logits differ from those of the model's own attention by {apart:.1e}"
            return why_not_apart(model, batch_size=size, collate=_join_collator(model))
    except REFUSALS as error:
        return " ".join(str(error).split())[:200]


def _set_attention(model: Any, name: str) -> None:
    base = _base(model)
    if attention_name(model) != name:
        base.set_attn_implementation(name)
    if attention_name(model) != name:
        raise ValueError(f"{type(base).__name__} cannot change its attention")


def _check_runs(trainer: SupervisedTrainer, name: str) -> None:
    """Forward and backward with the attention that was asked for.

    Raises:
        ModelError: it does not run on this device, or in this precision.
    """
    try:
        _check_backward(trainer)
    except REFUSALS as error:
        raise attention_error(name, error) from error


def _check_backward(trainer: SupervisedTrainer) -> None:
    model = trainer.model
    with trainer.accelerator.autocast(), undisturbed(model), torch.enable_grad():
        logits = _logits(model, PadCollator(0)([_document(_ids(model, 1)[0, 0], COMPARED)]))
        torch.autograd.grad(
            logits.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )


def needs_mask(trainer: SupervisedTrainer) -> bool:
    """Whether padded batches must carry an attention mask.

    Where a router loss is trained they must: it leaves out what is masked.
    """
    if trainer.use_own_forward or trainer.router:
        return True
    with _looking_at(trainer, attention_name(trainer.model)):
        return not needs_no_mask(trainer.model, batch_size=trainer.args.per_device_train_batch_size)


# ---- the proofs


def check_documents_apart(
    model: Any, *, batch_size: int = 2, collate: Collate | None = None
) -> None:
    """Refuse packing where documents see each other; the caller sets eval mode and autocast.

    Args:
        batch_size: packs in a batch of the run.
        collate: makes the run's batches of packs; None: what `pack_collator` chooses.
    Raises:
        ConfigError: the logits of a document depend on another one, or on where it stands; or the
            model does not take packs at all.
    """
    wrong = why_not_apart(model, batch_size=batch_size, collate=collate or pack_collator(model, 0))
    if wrong is not None:
        raise ConfigError(
            f"data.enable_packing=true, but {type(model).__name__} {wrong}; set "
            "data.enable_packing=false."
        )


@torch.no_grad()
def why_not_apart(model: Any, *, batch_size: int, collate: Collate) -> str | None:
    """What is wrong with packs of this model; None where each document is as if it were alone.

    The caller sets eval mode and autocast.
    """
    size = _vocabulary(model)
    before, told = _ids(model, batch_size)
    # Of several lengths, so that rows are padded and borders are not all the same distance apart.
    first = [ids[: DOCUMENT_LENGTH - n % 3] for n, ids in enumerate(before)]
    where = f"attention {attention_name(model)}, {batch_size} packs a batch"
    alone = _logits(model, PadCollator(0)([_document(ids, COMPARED) for ids in told]))
    try:
        packed = _logits(model, collate(_packs(first, told)))
        changed = _logits(model, collate(_packs([(ids + 1) % size for ids in first], told)))
    except REFUSALS as error:
        return f"does not take packed rows ({where}): {' '.join(str(error).split())[:300]}"
    moved, apart = _distance(packed, changed, alone), _distance(packed, alone)
    # Both are written so that a NaN refuses.
    if not moved <= SAME_SHAPE_TOLERANCE:
        return (
            f"lets the documents of a pack see each other ({where}): logits of a document change "
            f"by {moved:.1e} (relative) when others do, as convolution or recurrent layers make "
            "them, whatever the attention"
        )
    tolerance = RELATIVE_TOLERANCE.get(_compute_dtype(model), 1e-4)
    if not apart <= tolerance:
        return (
            f"gives different logits for a document in a pack than for it alone ({where}): they "
            f"differ by {apart:.1e} (relative), and rounding explains at most {tolerance:.0e}; the "
            "model does not reset its state at each document"
        )
    return None


@torch.no_grad()
def needs_no_mask(model: Any, *, batch_size: int) -> bool:
    """Whether rows padded at their ends give the same logits without an attention mask.

    So it is where each token sees earlier ones only. The caller sets eval mode and autocast.
    """
    _, told = _ids(model, min(batch_size, NUM_PADDED))
    rows = [_document(ids[: DOCUMENT_LENGTH - n % 3], (1, 2, 3)) for n, ids in enumerate(told)]
    rows.append(_document(told[0].repeat(2), (1, 2, 3, DOCUMENT_LENGTH)))  # all others are padded
    for row in rows:  # the last token before the padding too
        row["labels"][-1] = row["input_ids"][-1]
    # What the padding is must not matter either.
    fillings = [PadCollator(pad) for pad in (0, _vocabulary(model) - 1)]
    masked = _logits(model, fillings[0](rows))
    try:
        one, other = (
            _logits(model, TrainingCollator(fill, with_mask=False)(rows)) for fill in fillings
        )
    except REFUSALS:
        return False
    tolerance = RELATIVE_TOLERANCE.get(_compute_dtype(model), 1e-4)
    moved, apart = _distance(one, other, masked), _distance(one, masked)
    return moved <= SAME_SHAPE_TOLERANCE and apart <= tolerance


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _compute_dtype(model: Any) -> torch.dtype:
    """Of the matrix products: autocast's where it is on, whatever the weights are kept in."""
    parameter = next(model.parameters())
    if torch.is_autocast_enabled(parameter.device.type):
        return torch.get_autocast_dtype(parameter.device.type)
    dtype: torch.dtype = parameter.dtype
    return dtype


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _ids(model: Any, batch_size: int) -> torch.Tensor:
    """Token ids, (2, batch_size, DOCUMENT_LENGTH): first and second documents, always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, batch_size, DOCUMENT_LENGTH)
    return torch.randint(_vocabulary(model), shape, generator=generator)


def _distance(a: torch.Tensor, b: torch.Tensor, of: torch.Tensor | None = None) -> float:
    """The largest difference, relative to the largest logit of `of`, or of `b`."""
    scale = float((b if of is None else of).abs().max().clamp(min=1e-6))
    return float((a - b).abs().max()) / scale


@torch.no_grad()
def _alone(model: Any, batch_size: int) -> torch.Tensor:
    """Logits of documents that are rows of their own, none of them padded."""
    return _logits(
        model, PadCollator(0)([_document(ids, COMPARED) for ids in _ids(model, batch_size)[1]])
    )


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
    positions = supervised_positions(batch["labels"])
    return supervised_logits(model, model, forward_inputs(batch), positions).float()
