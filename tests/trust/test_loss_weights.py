"""N1 to N5 and N14 with loss weights: sum(w x ce) / sum(w), however a step's rows are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.trust.reference import (
    IGNORED,
    WeightedRows,
    distance,
    gradient,
    llama,
    ragged_rows,
    sgd_change,
    token_mean,
    weighted_mean,
    weighted_rows,
    weights,
)
from tests.trust.trainers import dataset, make_trainer, trained_change
from trainer.core import evaluation, hf_trainer, loss
from trainer.core.evaluation import Evaluator
from trainer.data.batches import BLANK, PackedDataset, PadCollator
from trainer.errors import ConfigError

CUTS = ((1, 8), (2, 4), (8, 1))
FP64 = torch.float64


def batch_of(rows: Any) -> dict[str, torch.Tensor]:
    data = dataset(rows)
    return PadCollator(0)([data[index] for index in range(len(rows))])


# ---- N1, N2


def check_loss(model: Any, rows: WeightedRows) -> None:
    """N1, N2: loss and gradient of a ragged batch are those of the weighted mean by hand."""
    ours, plain = loss.supervised_loss(model, model, batch_of(rows)), weighted_mean(model, rows)
    assert abs(ours.item() - plain.item()) <= 1e-6 * plain.item()
    assert distance(gradient(model, ours), gradient(model, plain)) <= 1e-6


@pytest.mark.parametrize("unit", [0.25, 0.3])
def test_n1_the_loss_is_the_weighted_mean(unit: float) -> None:
    check_loss(llama(dtype=FP64), weighted_rows(5, unit=unit))


def test_n1_two_tokens_by_hand() -> None:
    model = llama(dtype=FP64)
    ids, counts = [5, 6, 7, 8], [0.0, 0.0, 0.5, 2.0]
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = -(0.5 * log_p[1, 7] + 2.0 * log_p[2, 8]) / 2.5
    rows: WeightedRows = [(ids, [IGNORED, IGNORED, 7, 8], counts)]
    ours = loss.supervised_loss(model, model, batch_of(rows))
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)


def test_n1_weights_act_on_adapters_too() -> None:
    from peft import LoraConfig, get_peft_model

    base = llama(dtype=FP64)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    adapted.double()
    check_loss(adapted, weighted_rows(5))


def test_n1_under_autocast_the_weights_stay_fp32() -> None:
    model, rows = llama(), weighted_rows(5, unit=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = loss.supervised_loss(model, model, batch_of(rows))
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(weighted_mean(model, rows).item(), rel=1e-2)
    assert batch_of(rows)["loss_weights"].dtype == torch.float32


# ---- N3


def check_accumulation(dtype: torch.dtype, tolerance: float, num_rows: int) -> None:
    """N3: however a step's rows are cut, it is the reference's step."""
    rows = weighted_rows(num_rows)
    plan = make_trainer(llama(dtype=dtype), rows, batch_size=8)
    order = plan.order.epoch_rows(0)
    windows = [[rows[i] for i in order[at : at + 8]] for at in range(0, num_rows, 8)]
    expected = sgd_change(llama(dtype=dtype), windows, weighted_mean)
    for batch_size, accumulation in CUTS:
        ours = trained_change(
            llama(dtype=dtype), rows, batch_size=batch_size, accumulation=accumulation
        )
        assert distance(ours, expected) <= tolerance, (batch_size, accumulation)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "num_rows"), [(torch.float32, 2e-6, 8), (FP64, 1e-12, 5)]
)
def test_n3_one_weighted_step_is_the_same_however_it_is_cut(
    dtype: torch.dtype, tolerance: float, num_rows: int
) -> None:
    check_accumulation(dtype, tolerance, num_rows)


def test_n3_weighted_steps_with_a_partial_last_one_are_the_same_however_they_are_cut() -> None:
    check_accumulation(FP64, 1e-12, 21)


def test_mutant_n3_weighted_mean_per_micro_batch_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = hf_trainer.supervised_loss

    def mean(model: Any, unwrapped: Any, batch: Any, num_items: Any = None, **more: Any) -> Any:
        rows_of_the_step = 8
        return plain(model, unwrapped, batch) * len(batch["labels"]) / rows_of_the_step

    monkeypatch.setattr(hf_trainer, "supervised_loss", mean)
    with pytest.raises(AssertionError):
        check_accumulation(torch.float32, 2e-6, 8)


def test_mutant_n3_weights_that_are_ignored_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PadCollator.__call__

    def unweighted(self: Any, rows: Any) -> Any:
        batch = plain(self, rows)
        del batch["loss_weights"]
        return batch

    monkeypatch.setattr(PadCollator, "__call__", unweighted)
    with pytest.raises(AssertionError):
        check_accumulation(torch.float32, 2e-6, 8)


def test_mutant_n3_a_sum_of_weights_over_the_count_of_tokens_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        hf_trainer, "loss_share", lambda batch: (batch["labels"][:, 1:] != IGNORED).sum()
    )
    with pytest.raises(AssertionError):
        check_accumulation(torch.float32, 2e-6, 8)


def test_mutant_n1_weights_that_are_not_shifted_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PadCollator.__call__

    def one_late(self: Any, rows: Any) -> Any:
        batch = plain(self, rows)
        return {**batch, "loss_weights": batch["loss_weights"].roll(1, dims=1)}

    monkeypatch.setattr(PadCollator, "__call__", one_late)
    with pytest.raises(AssertionError):
        check_loss(llama(dtype=FP64), weighted_rows(5))


# ---- weights of 0 and 1 are the token mean


@pytest.mark.parametrize("capacity", [None, 48])
def test_weights_of_0_and_1_train_bit_for_bit_as_labels_do(capacity: int | None) -> None:
    rows = ragged_rows(12)
    weighted = [(ids, labels, [float(x != IGNORED) for x in labels]) for ids, labels in rows]
    options: dict[str, Any] = {"batch_size": 2, "accumulation": 2, "capacity": capacity}
    plain = trained_change(llama(), rows, **options)
    assert torch.equal(trained_change(llama(), weighted, **options), plain)
    assert dataset(weighted).fingerprint() == dataset(rows).fingerprint()


def test_one_weight_for_all_tokens_is_the_token_mean() -> None:
    rows = ragged_rows(6)
    halves: WeightedRows = [(ids, labels, [0.5] * len(ids)) for ids, labels in rows]
    model = llama(dtype=FP64)
    ours = loss.supervised_loss(model, model, batch_of(halves))
    assert ours.item() == pytest.approx(token_mean(model, rows).item(), rel=1e-12)


def test_a_step_of_weight_0_moves_nothing_and_is_not_nan() -> None:
    [(ids, labels)] = ragged_rows(1)
    model = llama()
    before = weights(model)
    trainer = make_trainer(model, [(ids, labels, [0.0] * len(ids))], batch_size=1)
    trainer.train()
    assert torch.equal(weights(model), before)
    assert trainer.last_step is not None
    assert trainer.last_step.train_loss == 0


# ---- N5, N14


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_n5_packed_rows_keep_their_weights(attention: str) -> None:
    rows = weighted_rows(20)
    plain = llama(dtype=FP64)
    expected = gradient(plain, weighted_mean(plain, rows))
    model = llama(dtype=FP64, attn_implementation=attention)
    ours = trained_change(model, rows, batch_size=2, accumulation=20, capacity=48)
    assert distance(-ours, expected) <= 1e-6


def check_evaluation() -> None:
    """N14: the evaluation loss is the weighted mean, whatever the batches."""
    model, rows = llama(), weighted_rows(13)
    expected = weighted_mean(model, rows).item()
    for batch_size in (1, 4, 13):
        evaluator = Evaluator(
            dataset(rows),
            collate=PadCollator(0),
            max_rows=len(rows),
            batch_size=batch_size,
            autocast_dtype=None,
        )
        found = evaluator(model)
        assert found.loss == pytest.approx(expected, rel=1e-6)
        tokens = sum(label != IGNORED for _, labels, _ in rows for label in labels[1:])
        assert found.num_trained_tokens == tokens


def test_n14_the_evaluation_loss_is_weighted_as_training_is() -> None:
    check_evaluation()


def test_mutant_n14_an_evaluation_over_the_count_of_tokens_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        evaluation, "loss_share", lambda batch: (batch["labels"][:, 1:] != IGNORED).sum()
    )
    with pytest.raises(AssertionError):
        check_evaluation()


# ---- the way of the weights


def test_weights_survive_the_arrays_and_are_part_of_the_fingerprint() -> None:
    rows = weighted_rows(4)
    data = dataset(rows)
    again = type(data).from_arrays(data.as_arrays())
    for index, (_, labels, counts) in enumerate(rows):
        assert again[index]["loss_weights"].tolist() == pytest.approx(counts)
        assert all((c > 0) == (x != IGNORED) for c, x in zip(counts, labels, strict=True))
    assert again.fingerprint() == data.fingerprint()
    doubled: WeightedRows = [(*row[:2], [2 * w for w in row[2]]) for row in rows]
    assert dataset(doubled).fingerprint() != data.fingerprint()
    assert "weights" not in dataset(ragged_rows(4)).as_arrays()


def test_rows_with_and_without_weights_and_blanks_share_a_batch() -> None:
    ids = [5, 6, 7]
    rows: Any = [(ids, [IGNORED, 6, 7]), (ids[:2], [IGNORED, 6], [0.0, 0.5])]
    data = dataset(rows)
    batch = PadCollator(0)([data[0], data[1], data[BLANK]])
    assert batch["loss_weights"].tolist() == [[0, 1, 1], [0, 0.5, 0], [0, 0, 0]]
    packed = PackedDataset(data, 8)
    assert packed[0]["loss_weights"].tolist() == [0, 1, 1, 0, 0.5]
    assert packed[BLANK]["loss_weights"].tolist() == [0]


def test_a_model_with_a_loss_of_its_own_refuses_weights_instead_of_ignoring_them() -> None:
    with pytest.raises(ConfigError, match="the rows weigh their answers, but LlamaForCausalLM"):
        loss.full_loss(llama(), batch_of(weighted_rows(2)))
