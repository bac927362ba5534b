"""`trainer export --merge`: an adapter added to its base, written, loaded again and compared.

Merged in fp32 and rounded to the saved dtype afterwards, because merging in bf16 loses small
updates. Nothing stays on disk unless the folder, loaded again, says what the adapter says. An
adapter that was trained on a quantized base is merged into the plain one: how far that takes it
from what was trained is measured, and must be what quantization alone does to the base.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.core.finished import FinishedRun
from trainer.counts import counted
from trainer.data.template import ChatTemplate
from trainer.errors import ModelError, OutputError
from trainer.files import staged
from trainer.models.adapter_files import (
    load_finished_model,
    quantized_from,
    write_model,
)
from trainer.models.adapters import has_true_tie, merge_adapter
from trainer.models.load import check_vocabulary, embedding_rows
from trainer.models.quantized import check_mergeable, quantization_of, set_dtype

ROWS, ROW_LENGTH = 4, 48
"""Rows of drawn ids, and as many of the run's own texts; tokens of each."""

EXACT = 1e-5
"""Relative difference of two ways to compute the same logits in fp32: rounding, always allowed."""

LOOSE = 1e-4
"""The same in deep models; allowed while it is small against what the adapter changes."""

SHARE_OF_EFFECT = 0.05

ROUNDING = {torch.float32: EXACT, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Relative change of logits when weights are rounded to the dtype; more is no rounding."""


MAX_QUANTIZATION = 2.0
"""How many times farther than the plain base from its quantized copy a merged model may be."""


@dataclass(frozen=True)
class QuantizedBase:
    """Logits of an adapter and of its base as they were in training: quantized."""

    adapted: torch.Tensor
    plain: torch.Tensor


@dataclass(frozen=True)
class MergeReport:
    """How far the logits of the merged model are from the adapter's, at most."""

    merged: float
    """Merged in fp32 against base with adapter in fp32."""
    rounded: float
    """What rounding to `dtype` adds; 0 in fp32."""
    largest: float
    """The largest logit, for scale."""
    dtype: torch.dtype
    num_rows: int
    quantization: tuple[float, float] | None = None
    """Relative distance of the merged model from the adapter on its quantized base, and of the
    plain base from the quantized one; None where no quantized base is there."""

    def words(self) -> str:
        """For the terminal."""
        name = str(self.dtype).removeprefix("torch.")
        rows = counted(self.num_rows, "row")
        rounding = f", rounding to {name} moves them by {self.rounded:.2g}" if self.rounded else ""
        return (
            f"compared on {rows}, logits up to {self.largest:.3g}: merged and "
            f"adapter differ by {self.merged:.2g} in fp32{rounding}; loaded again it is the same"
            f"{self._words_of_quantization()}"
        )

    def _words_of_quantization(self) -> str:
        if self.quantization is None:
            return ""
        merged, base = self.quantization
        return (
            f". The adapter was trained on a quantized base: merged into the plain one its logits "
            f"are {merged:.2%} of their norm from those of training; the base alone is {base:.2%}"
        )


def export_merged(finished: FinishedRun, target: Path) -> MergeReport:
    """Write the run's adapter and its base as one plain model.

    Raises:
        ModelError: the base is gone, does not fit, or is quantized.
        OutputError: the folder cannot be written, or the merged model says something else.
    """
    check_mergeable(finished.model_config(), f"{finished.model_dir}: the base of this adapter")
    model, tokenizer = finished.load(quantize=False)
    check_vocabulary(model, tokenizer)
    dtype, rows = finished.dtype(), probe_rows(finished, tokenizer, embedding_rows(model))
    adapted, plain = _both_logits(model, rows)
    model = merge_adapter(model)
    merged = logits_of(model, rows)
    _check_merge(adapted, merged, plain)
    quantization = _check_quantization(_as_trained(finished, rows), merged, plain)
    _round(model, dtype)
    rounded = logits_of(model, rows)
    _check_rounding(merged, rounded, dtype)
    with staged(target, advice="choose another --output.") as staging:
        stop_ids = ChatTemplate(tokenizer).stop_ids
        write_model(model, tokenizer, staging, dtype=dtype, stop_ids=stop_ids, use_cache=True)
        del model  # two models in fp32 need not be held at once
        gc.collect()
        _check_reloaded(finished, staging, rows, rounded)
    return MergeReport(
        merged=distance(adapted, merged)[0],
        rounded=distance(merged, rounded)[0],
        largest=float(adapted.abs().max()),
        dtype=dtype,
        num_rows=len(rows),
        quantization=quantization,
    )


def _both_logits(model: Any, rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of an adapter, and of its base alone."""
    model.eval()
    adapted = logits_of(model, rows)
    with model.disable_adapter():
        return adapted, logits_of(model, rows)


def _as_trained(finished: FinishedRun, rows: Sequence[torch.Tensor]) -> QuantizedBase | None:
    """The adapter on the quantized base that it was trained on; None where it was not, or is gone.

    Computed in fp32, so that only the quantized weights make a difference.
    """
    if quantized_from(finished.model_dir) is not None:
        model, _ = finished.load()
    elif finished.base is not None:  # the plain model of a folder that is quantized itself
        trained = dataclasses.replace(finished, base=None)
        try:
            if quantization_of(trained.model_config()) is None:
                return None
            model, _ = trained.load()
        except ModelError:
            return None
    else:
        return None
    set_dtype(model, torch.float32)
    return QuantizedBase(*_both_logits(model, rows))


def _check_quantization(
    trained: QuantizedBase | None, merged: torch.Tensor, plain: torch.Tensor
) -> tuple[float, float] | None:
    """Compare what a merge changes with what quantization alone does to the base.

    Returns:
        Both relative distances, as MergeReport has them.
    """
    if trained is None:
        return None
    moved, base = distance(trained.adapted, merged)[1], distance(trained.plain, plain)[1]
    if not moved <= MAX_QUANTIZATION * base + EXACT:
        raise OutputError(
            f"merged into the plain base the adapter would say something else than in training: "
            f"its logits are {moved:.2%} of their norm from those on the quantized base, and "
            f"quantization alone moves the base by {base:.2%}. Nothing was written; export without "
            "--merge, and load the adapter on a quantized base."
        )
    return moved, base


def probe_rows(finished: FinishedRun, tokenizer: Any, num_ids: int) -> list[torch.Tensor]:
    """Rows (1, T) to compare models on: ids drawn from the whole vocabulary, and the run's texts.

    Special tokens are left out of the drawn ones: some stand for images.
    """
    special = set(tokenizer.all_special_ids)
    ids = torch.tensor(
        sorted(i for i in set(tokenizer.get_vocab().values()) - special if i < num_ids)
    )
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    drawn = ids[order.repeat(-(-ROWS * ROW_LENGTH // len(ids)))[: ROWS * ROW_LENGTH]]
    rows = list(drawn.reshape(ROWS, 1, ROW_LENGTH))
    for text in _texts(finished.folder / "previews.jsonl"):
        found = tokenizer(text, add_special_tokens=True)["input_ids"][:ROW_LENGTH]
        if found and max(found) < num_ids:
            rows.append(torch.tensor([found]))
    return rows


def _texts(previews: Path) -> Sequence[str]:
    """The first few prompts of a run's previews with their golden answers."""
    texts: dict[str, None] = {}
    if previews.is_file():
        with previews.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                texts.setdefault(f"{row.get('prompt')}\n{row.get('golden_answer')}")
                if len(texts) == ROWS:
                    break
    return list(texts)


def logits_of(model: Any, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits of all rows one behind the other, (sum of T, V) float32."""
    with torch.inference_mode():
        found = [model(input_ids=row, use_cache=False).logits[0].float() for row in rows]
    return torch.cat(found)


def distance(one: torch.Tensor, two: torch.Tensor) -> tuple[float, float]:
    """The largest difference, and the norm of the difference relative to that of `one`."""
    difference = one - two
    return float(difference.abs().max()), float(difference.norm() / one.norm())


def _check_merge(adapted: torch.Tensor, merged: torch.Tensor, plain: torch.Tensor) -> None:
    effect = distance(adapted, plain)[1]
    largest, relative = distance(adapted, merged)
    if not relative <= max(EXACT, min(LOOSE, SHARE_OF_EFFECT * effect)):
        raise OutputError(
            f"the merged model would say something else than the adapter: logits differ by "
            f"{largest:.2g} ({relative:.1e} of their norm). Nothing was written; export without "
            "--merge, plain PEFT loads the adapter."
        )


def _round(model: Any, dtype: torch.dtype) -> None:
    """Give fp32 weights the values that they will have in the saved dtype."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(parameter.to(dtype))


def _check_rounding(merged: torch.Tensor, rounded: torch.Tensor, dtype: torch.dtype) -> None:
    largest, relative = distance(merged, rounded)
    if not relative <= ROUNDING[dtype]:  # NaN too: fp16 ends at 65,504
        raise OutputError(
            f"rounding the merged weights to {dtype} changes the logits by {largest:.2g} "
            f"({relative:.1e} of their norm). Nothing was written; export without --merge."
        )


def _check_reloaded(
    finished: FinishedRun, folder: Path, rows: Sequence[torch.Tensor], wanted: torch.Tensor
) -> None:
    trust = finished.trusts_model()
    model = load_finished_model(folder, trust_remote_code=trust).eval()
    largest, relative = distance(wanted, logits_of(model, rows))
    if not relative <= EXACT or not has_true_tie(model):
        raise OutputError(
            f"the merged model that was written, loaded again, says something else: logits differ "
            f"by {largest:.2g} ({relative:.1e} of their norm), tie_word_embeddings is "
            f"{model.config.tie_word_embeddings}. It was removed; export without --merge."
        )
