"""Drift is the KL from the weights before training, and leaves no trace in the model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from trainer.errors import ConfigError
from trainer.preview import measure_drift
from trainer.preview.canary_set import GENERAL_PROMPTS, read_canary_set
from trainer.preview.drift import BaseAnswer, Drift, DriftRequest, load_base, save_base
from trainer.preview.generate import GenerationSettings, generate
from trainer.preview.measure_drift import base_answers, drift_from

PROMPTS = [[5, 9, 40, 7], [11, 80, 3], [200, 4, 4, 6, 90, 17]]
SETTINGS = GenerationSettings(max_new_tokens=12, temperature=0.0, seed=0, stop_ids=frozenset({2}))


@pytest.fixture
def sure(make_model: Callable[..., Any]) -> Any:
    """A model whose next token is no toss-up, as those of trained ones: its logits are scaled."""
    model = make_model().eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(40)
    return model


def moved(model: Any, by: float) -> Any:
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(by * value.std() * torch.randn_like(value))
    return other


def full_kl(one: Any, other: Any, prompt: list[int], answer: list[int]) -> float:
    """Over the whole vocabulary, by hand in fp64."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        p, q = (
            model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for model in (one, other)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("by", [0.01, 0.1, 1.0])
def test_the_kept_tokens_give_a_bound_that_is_close_to_the_full_kl(
    sure: Any, tokenizer: Any, by: float
) -> None:
    base = base_answers(sure, tokenizer, PROMPTS, SETTINGS)
    now = moved(sure, by)
    found, _ = drift_from(now, PROMPTS, base)
    for prompt, one, kl in zip(PROMPTS, base, found, strict=True):
        whole = full_kl(sure, now, prompt, one.answer_ids)
        assert 0.8 * whole < kl <= whole + 1e-5


def test_with_the_whole_vocabulary_kept_it_is_the_full_kl(
    sure: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_drift, "TOP", 10_000)
    # 303 tokens are more than travel between machines, which no test here does.
    monkeypatch.setattr(measure_drift, "BaseAnswer", BaseAnswer.model_construct)
    base = base_answers(sure, tokenizer, PROMPTS, SETTINGS)
    now = moved(sure, 0.1)
    found, _ = drift_from(now, PROMPTS, base)
    for prompt, one, kl in zip(PROMPTS, base, found, strict=True):
        assert kl == pytest.approx(full_kl(sure, now, prompt, one.answer_ids), abs=2e-5)


def test_the_same_weights_have_no_drift(sure: Any, tokenizer: Any) -> None:
    base = base_answers(sure, tokenizer, PROMPTS, SETTINGS)
    found, is_changed = drift_from(sure, PROMPTS, base)
    assert max(found) < 1e-5
    assert is_changed == [False] * len(PROMPTS)


def test_tokens_that_are_equally_likely_are_no_change(sure: Any, tokenizer: Any) -> None:
    """In bf16 there are many: of two equal logits, one search finds the first and another not."""
    with torch.no_grad():
        sure.lm_head.weight[3::2] = sure.lm_head.weight[2:-1:2]
    base = base_answers(sure, tokenizer, PROMPTS, SETTINGS)
    swapped = [
        one.model_copy(update={"top_ids": [[b, a, *rest] for a, b, *rest in one.top_ids]})
        for one in base
    ]
    assert drift_from(sure, PROMPTS, base)[1] == [False] * len(PROMPTS)
    assert drift_from(sure, PROMPTS, swapped)[1] == [False] * len(PROMPTS)
    half = sure.bfloat16()
    base = base_answers(half, tokenizer, PROMPTS, SETTINGS)
    assert drift_from(half, PROMPTS, base)[1] == [False] * len(PROMPTS)


@pytest.mark.parametrize("by", [0.001, 0.03, 0.1, 0.3])
def test_a_greedy_answer_is_changed_where_generating_it_gives_another_one(
    sure: Any, tokenizer: Any, by: float
) -> None:
    base = base_answers(sure, tokenizer, PROMPTS, SETTINGS)
    now = moved(sure, by)
    _, is_changed = drift_from(now, PROMPTS, base)
    answers = generate(now, tokenizer, PROMPTS, SETTINGS)
    pairs = zip(base, answers, strict=True)
    assert is_changed == [one.answer_ids != answer.raw_ids for one, answer in pairs]


def test_measuring_leaves_model_and_random_state_as_they_were(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    drift_from(model, PROMPTS, base_answers(model, tokenizer, PROMPTS, SETTINGS))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


def test_base_answers_are_kept_for_the_same_prompts_only(
    sure: Any, tokenizer: Any, tmp_path: Path
) -> None:
    base = base_answers(sure, tokenizer, PROMPTS, SETTINGS)
    path = tmp_path / "base.json"
    assert load_base(path, PROMPTS) is None
    save_base(path, PROMPTS, base)
    assert load_base(path, PROMPTS) == base
    assert load_base(path, PROMPTS[:2]) is None
    assert load_base(path, [*PROMPTS[:2], [1, 2]]) is None
    path.write_text(path.read_text()[:-40])
    assert load_base(path, PROMPTS) is None


def test_what_travels_is_bounded_and_fits_together() -> None:
    one = {"answer_ids": [1], "text": "a", "top_ids": [[1, 2]], "top_logprobs": [[-0.1, -2.0]]}
    assert DriftRequest.model_validate({"prompts": [[1]], "base": [one]}).base is not None
    for wrong in (
        {"prompts": []},
        {"prompts": [[]]},
        {"prompts": [[1], [2]], "base": [one]},
        {"prompts": [[1]], "base": [{**one, "top_ids": [[1]]}]},
        {"prompts": [[1]], "base": [{**one, "top_logprobs": [[-0.1, float("nan")]]}]},
        {"prompts": [[1]], "base": [{**one, "answer_ids": [1, 2]}]},
        {"prompts": [[1]], "max_new_tokens": 100_000},
    ):
        with pytest.raises(ValidationError):
            DriftRequest.model_validate(wrong)


@pytest.mark.parametrize(
    "answer",
    [
        Drift(kl=[0.1], is_changed=[True]),
        Drift(kl=[0.1, -3.0], is_changed=[True, False]),
        Drift(kl=[0.1, float("inf")], is_changed=[True, False]),
        Drift(),
    ],
)
def test_a_server_that_answers_something_else_is_not_believed(answer: Drift) -> None:
    assert not answer.is_of(2)
    assert Drift(kl=[0.1, 0.0], is_changed=[True, False]).is_of(2)


# ---- the prompts


def test_the_built_in_set_has_twenty_prompts_and_off_has_none() -> None:
    assert read_canary_set("off") == []
    found = read_canary_set("general")
    assert len(found) == len(set(GENERAL_PROMPTS)) == 20
    assert found[0] == [{"role": "user", "content": GENERAL_PROMPTS[0]}]


def test_rows_of_a_file_are_texts_prompts_questions_or_conversations(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "left away"},
    ]
    rows = ["a", {"prompt": "b"}, {"question": "c", "answer": "left away"}, {"messages": turns}]
    path = tmp_path / "canaries.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_canary_set(str(path))
    assert [turns[-1]["content"] for turns in found] == ["a", "b", "c", "d"]
    assert [turn["role"] for turn in found[3]] == ["system", "user"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"prompt": ""}\n', "canaries.jsonl:1: no prompt"),
        ('"a"\n{"text": "b"}\n', "canaries.jsonl:2: no prompt"),
        ('"a"\nnonsense\n', "canaries.jsonl:2"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "canaries.jsonl:1: no prompt"),
        ("", "has 0 prompts"),
        ('"a"\n' * 257, "has 257 prompts"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        read_canary_set(str(path))
    with pytest.raises(ConfigError, match="no such file"):
        read_canary_set(str(tmp_path / "other.jsonl"))
