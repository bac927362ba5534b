"""N1, N2, N3, N7, N14: losses and gradients are those of plain arithmetic, however rows are cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.trust.reference import (
    Rows,
    distance,
    gradient,
    llama,
    ragged_rows,
    sgd_change,
    token_mean,
    weights,
)
from tests.trust.trainers import dataset, make_trainer, trained_change
from trainer.core import evaluation, hf_trainer, loss
from trainer.core.evaluation import Evaluator
from trainer.data.batches import PadCollator

TIED = pytest.mark.parametrize("tied", [False, True])


def batch_of(rows: Rows) -> dict[str, torch.Tensor]:
    data = dataset(rows)
    return PadCollator(0)([data[index] for index in range(len(rows))])


# ---- N1, N2


def check_loss(tied: bool) -> None:
    """N1: the loss of a ragged batch is the token mean."""
    model, rows = llama(tied=tied, dtype=torch.float64), ragged_rows(5)
    ours, plain = loss.supervised_loss(model, model, batch_of(rows)), token_mean(model, rows)
    assert abs(ours.item() - plain.item()) <= 1e-6 * plain.item()


@TIED
def test_n1_the_loss_is_the_token_mean(tied: bool) -> None:
    check_loss(tied)


def test_mutant_n1_shift_off_by_one_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return values.flatten()[positions].clamp(min=0)  # a label that is not trained is no id

    monkeypatch.setattr(loss, "_next", same)
    with pytest.raises(AssertionError):
        check_loss(False)


def check_gradient(tied: bool) -> None:
    """N2: gradients are autograd's of the token mean, and finite differences agree."""
    model, rows = llama(tied=tied, dtype=torch.float64), ragged_rows(5)
    batch = batch_of(rows)
    ours = gradient(model, loss.supervised_loss(model, model, batch))
    assert distance(ours, gradient(model, token_mean(model, rows))) <= 1e-6
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    loss.supervised_loss(model, model, batch).backward()
    for parameter, at in twenty_places(parameters):
        flat, slope = parameter.data.view(-1), float(parameter.grad.view(-1)[at])
        assert (nudged(model, rows, flat, at)) == pytest.approx(slope, rel=1e-4, abs=1e-8)


def twenty_places(parameters: list[Any]) -> list[tuple[Any, int]]:
    generator = torch.Generator().manual_seed(1)

    def draw(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    chosen = [parameters[draw(len(parameters))] for _ in range(20)]
    return [(parameter, draw(parameter.numel())) for parameter in chosen]


def nudged(model: Any, rows: Rows, flat: torch.Tensor, at: int, size: float = 1e-5) -> float:
    """Slope of the token mean along one weight, from both sides."""
    before, values = flat[at].item(), []
    with torch.no_grad():
        for shift in (size, -size):
            flat[at] = before + shift
            values.append(token_mean(model, rows).item())
        flat[at] = before
    return (values[0] - values[1]) / (2 * size)


@TIED
def test_n2_gradients_are_those_of_the_token_mean(tied: bool) -> None:
    check_gradient(tied)


def test_mutant_n2_scaled_loss_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = loss.supervised_loss
    monkeypatch.setattr(loss, "supervised_loss", lambda *args: 1.001 * plain(*args))
    with pytest.raises(AssertionError):
        check_gradient(False)


# ---- N3

CUTS = ((1, 8), (2, 4), (8, 1))


def windows(rows: Rows, trainer: Any) -> list[Rows]:
    order = trainer.order.epoch_rows(0)
    size = trainer.order.group_size
    return [[rows[i] for i in order[at : at + size]] for at in range(0, len(order), size)]


def check_accumulation(dtype: torch.dtype, tolerance: float, num_rows: int) -> None:
    """N3: however a step's rows are cut, it is the reference's step."""
    rows = ragged_rows(num_rows)
    plan = make_trainer(llama(dtype=dtype), rows, batch_size=8)
    expected = sgd_change(llama(dtype=dtype), windows(rows, plan))
    for batch_size, accumulation in CUTS:
        ours = trained_change(
            llama(dtype=dtype), rows, batch_size=batch_size, accumulation=accumulation
        )
        assert distance(ours, expected) <= tolerance, (batch_size, accumulation)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("num_rows", [pytest.param(8, marks=pytest.mark.long), 5])
def test_n3_one_step_is_the_same_however_it_is_cut(
    dtype: torch.dtype, tolerance: float, num_rows: int
) -> None:
    check_accumulation(dtype, tolerance, num_rows)


def test_n3_five_steps_with_a_partial_last_one_are_the_same_however_they_are_cut() -> None:
    # In fp64 only: at rate 1, steps multiply the rounding of those before them.
    check_accumulation(torch.float64, 1e-12, 37)


def test_mutant_n3_mean_per_micro_batch_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = hf_trainer.supervised_loss

    def mean(model: Any, unwrapped: Any, batch: Any, num_items: Any = None, **more: Any) -> Any:
        share = (batch["labels"][:, 1:] != -100).sum().clamp(min=1)
        rows_of_the_step = 8
        return plain(model, unwrapped, batch, share) * len(batch["labels"]) / rows_of_the_step

    monkeypatch.setattr(hf_trainer, "supervised_loss", mean)
    with pytest.raises(AssertionError):
        check_accumulation(torch.float32, 2e-6, 8)


# ---- N7


def check_checkpointing() -> None:
    """N7: ten AdamW steps with recomputed activations are bit-equal to those without."""

    def adamw(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    ends, calls = [], {False: 0, True: 0}
    for is_on in calls:

        def note(*_: Any, is_on: bool = is_on) -> None:
            calls[is_on] += 1

        # With dropout: what is computed again must draw the same numbers again.
        model = llama(attention_dropout=0.1)
        # Before the forward: what is recomputed may end within it, once all is there again.
        handle = model.model.layers[0].mlp.register_forward_pre_hook(note)
        torch.manual_seed(3)
        trainer = make_trainer(
            model,
            ragged_rows(40),
            batch_size=4,
            optimizer=adamw,
            gradient_checkpointing=is_on,
        )
        trainer.train()
        assert trainer.state.global_step == 10
        handle.remove()
        ends.append(weights(model))
    assert torch.equal(*ends)
    assert calls == {False: 10, True: 20}


def test_n7_gradient_checkpointing_changes_no_bit() -> None:
    check_checkpointing()


def test_mutant_n7_checkpointing_that_does_nothing_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "trainer.core.hf_trainer.TrainingArguments.activation_checkpointing",
        property(lambda self: False, lambda self, value: None),
    )
    with pytest.raises(AssertionError):
        check_checkpointing()


# ---- N14


def evaluated(model: Any, rows: Rows, batch_size: int) -> float:
    evaluator = Evaluator(
        dataset(rows),
        collate=PadCollator(0),
        max_rows=len(rows),
        batch_size=batch_size,
        autocast_dtype=None,
    )
    return evaluator(model).loss


def check_evaluation() -> None:
    """N14: the evaluation loss is the token mean, whatever the batches and the order."""
    model, rows = llama(), ragged_rows(13)
    expected = token_mean(model, rows).item()
    for batch_size in (1, 4, 13):
        for order in (rows, rows[::-1]):
            assert evaluated(model, order, batch_size) == pytest.approx(expected, rel=1e-6)


def test_n14_the_evaluation_loss_does_not_depend_on_batches_or_order() -> None:
    check_evaluation()


def test_n14_a_batch_that_is_not_finite_makes_the_loss_so() -> None:
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = math.nan
    rows = ragged_rows(8)
    clean = [([7 if token == 5 else token for token in ids], labels) for ids, labels in rows]
    assert math.isfinite(evaluated(model, clean, 2))
    clean[3][0][0] = 5
    assert not math.isfinite(evaluated(model, clean, 2))


def test_mutant_n14_mean_of_means_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = evaluation.supervised_loss

    tokens = sum(sum(label != -100 for label in labels[1:]) for _, labels in ragged_rows(13))

    def mean(model: Any, unwrapped: Any, batch: Any, num_items: Any = None, **more: Any) -> Any:
        return plain(model, unwrapped, batch) * tokens * len(batch["labels"]) / 13

    monkeypatch.setattr(evaluation, "supervised_loss", mean)
    with pytest.raises(AssertionError):
        check_evaluation()
