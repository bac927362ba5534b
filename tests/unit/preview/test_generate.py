"""All sampling: independent of batch and order, stopped where it should, counted rightly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.models.devices import any_algorithm
from trainer.preview import generate as sampling
from trainer.preview.generate import (
    GenerationSettings,
    NoiseProcessor,
    StopStrings,
    generate,
    left_pad,
)

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16], [20, 21]]


def settings(**changes: Any) -> GenerationSettings:
    return GenerationSettings(
        **{"max_new_tokens": 12, "temperature": 0.0, "seed": 1, "pad_id": 0, **changes}
    )


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    return make_model(seed=3).eval()


@torch.no_grad()
def run(model: Any, tokenizer: Any, prompts: Any, **changes: Any) -> list[list[int]]:
    return [g.raw_ids for g in generate(model, tokenizer, prompts, settings(**changes))]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_says_what_one_by_one_says(model: Any, tokenizer: Any, temperature: float) -> None:
    batch = run(model.double(), tokenizer, PROMPTS, temperature=temperature)
    single = [run(model, tokenizer, [prompt], temperature=temperature)[0] for prompt in PROMPTS]
    assert batch == single


def test_a_sample_is_the_same_whatever_batch_it_is_in(model: Any, tokenizer: Any) -> None:
    model.double()

    def ask(prompts: Any, samples: list[int]) -> list[list[int]]:
        with torch.no_grad():
            found = generate(model, tokenizer, prompts, settings(temperature=1.0), (), samples)
        return [one.raw_ids for one in found]

    alone = {(n, k): ask([PROMPTS[n]], [k])[0] for n in range(4) for k in range(3)}
    for k in range(3):
        assert ask(PROMPTS, [k] * 4) == [alone[n, k] for n in range(4)]
    mixed = [(2, 1), (0, 2), (2, 0), (2, 2), (1, 1), (0, 0)]
    together = ask([PROMPTS[n] for n, _ in mixed], [k for _, k in mixed])
    assert together == [alone[place] for place in mixed]
    assert [alone[n, 0] for n in range(4)] == run(model, tokenizer, PROMPTS, temperature=1.0)
    assert len({tuple(alone[2, k]) for k in range(3)}) == 3


def test_samples_of_a_prompt_are_independent_draws_of_the_softmax() -> None:
    """Pairs of samples 0 and 1 of 20,000 prompts: all 36 cells as often as they should be."""
    prompts, chosen = [[n] for n in range(20_000)], []
    for sample in (0, 1):
        processor = NoiseProcessor(prompts, 0.7, seed=0, samples=[sample] * len(prompts))
        chosen.append(processor(None, LOGITS.expand(len(prompts), -1)).argmax(-1))  # type: ignore[arg-type]
    expected = torch.softmax(LOGITS / 0.7, -1)
    pairs = torch.bincount(6 * chosen[0] + chosen[1], minlength=36)
    cells = 20_000 * torch.outer(expected, expected).flatten()
    assert chi_square(pairs, cells) < 66.6  # 35 degrees of freedom


def test_greedy_is_the_argmax_of_a_plain_forward_loop(model: Any, tokenizer: Any) -> None:
    expected = list(PROMPTS[0])
    with torch.no_grad():
        for _ in range(12):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert run(model, tokenizer, PROMPTS[:1])[0] == expected[3:]


def test_noise_depends_on_seed_prompt_and_position_only(model: Any, tokenizer: Any) -> None:
    one = run(model, tokenizer, PROMPTS, temperature=1.0)
    torch.manual_seed(123)
    assert run(model, tokenizer, PROMPTS, temperature=1.0) == one
    assert run(model, tokenizer, PROMPTS, temperature=1.0, seed=2) != one


def draws(logits: torch.Tensor, count: int, temperature: float = 0.7) -> torch.Tensor:
    """How often each token is drawn at position 0 of `count` different prompts."""
    processor = NoiseProcessor([[n] for n in range(count)], temperature, seed=0)
    chosen = processor(None, logits.expand(count, -1)).argmax(-1)  # type: ignore[arg-type]
    return torch.bincount(chosen, minlength=logits.numel())


def chi_square(seen: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((seen - expected) ** 2 / expected).sum())


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, 0.3])
LIMIT = 20.5
"""Chi-square with 5 degrees of freedom: 1 in 1,000 fair draws is above it."""


def test_noise_samples_the_softmax() -> None:
    for temperature in (0.3, 0.7, 1.5):
        expected = 20_000 * torch.softmax(LOGITS / temperature, -1)
        assert chi_square(draws(LOGITS, 20_000, temperature), expected) < LIMIT


def test_neighbouring_positions_of_a_row_are_independent() -> None:
    processor = NoiseProcessor([[n] for n in range(200)], 1.0, seed=0)
    flat = torch.zeros(200, 4)
    drawn = [processor(None, flat).argmax(-1) for _ in range(40)]  # type: ignore[arg-type]
    pairs = 4 * torch.cat(drawn[::2]) + torch.cat(drawn[1::2])
    seen = torch.bincount(pairs, minlength=16)
    assert chi_square(seen, torch.full((16,), 250.0)) < 37.7  # 15 degrees of freedom


def test_a_token_that_is_ruled_out_is_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    assert set(draws(logits, 2000).nonzero().flatten().tolist()) == {1, 3}


def test_a_tiny_temperature_is_greedy() -> None:
    assert draws(LOGITS, 50, 1e-38)[0] == 50


def test_one_number_is_drawn_per_row_and_token(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int]] = []
    uniform = sampling.uniform

    def counted(seed: int, position: int) -> float:
        drawn.append((seed, position))
        return uniform(seed, position)

    monkeypatch.setattr(sampling, "uniform", counted)
    run(model, tokenizer, PROMPTS, temperature=1.0, max_new_tokens=9)
    assert len(drawn) == len(set(drawn)) == 9 * len(PROMPTS)


def test_a_row_draws_the_same_alone_and_in_a_batch_whatever_the_vocabulary() -> None:
    scores = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    together, alone = (
        NoiseProcessor(PROMPTS, 1.0, 7),
        [NoiseProcessor([prompt], 1.0, 7) for prompt in PROMPTS],
    )
    for _ in range(5):
        batch = together(None, scores).argmax(-1)  # type: ignore[arg-type]
        single = [
            int(one(None, scores[n : n + 1]).argmax())  # type: ignore[arg-type]
            for n, one in enumerate(alone)
        ]
        assert batch.tolist() == single


def test_mutant_one_number_for_all_positions_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    uniform = sampling.uniform
    monkeypatch.setattr(sampling, "uniform", lambda seed, position: uniform(seed, 0))
    with pytest.raises(AssertionError):
        test_neighbouring_positions_of_a_row_are_independent()


def test_mutant_temperature_left_out_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    init = NoiseProcessor.__init__

    def forgets(self: Any, prompts: Any, temperature: float, seed: int) -> None:
        init(self, prompts, 1.0, seed)

    monkeypatch.setattr(NoiseProcessor, "__init__", forgets)
    with pytest.raises(AssertionError):
        test_noise_samples_the_softmax()


def test_generation_ends_at_a_stop_id_and_counts_it_once(model: Any, tokenizer: Any) -> None:
    free = run(model, tokenizer, PROMPTS[:1])[0]
    stop = free[4]
    with torch.no_grad():
        [answer] = generate(model, tokenizer, PROMPTS[:1], settings(stop_ids=frozenset({stop})))
    first = free.index(stop)
    assert answer.raw_ids == free[: first + 1]
    assert answer.token_ids == free[:first]
    assert answer.is_stopped


def test_a_stop_string_split_over_tokens_ends_its_row_only(model: Any, tokenizer: Any) -> None:
    free = run(model, tokenizer, PROMPTS, max_new_tokens=20)
    text = tokenizer.decode(free[0], clean_up_tokenization_spaces=False)
    stop = text[5:11]
    with torch.no_grad():
        answers = generate(
            model, tokenizer, PROMPTS, settings(max_new_tokens=20, stop_strings=(stop,))
        )
    said = tokenizer.decode(answers[0].token_ids, clean_up_tokenization_spaces=False)
    assert stop in said
    assert stop not in tokenizer.decode(answers[0].token_ids[:-1])
    assert answers[0].is_stopped
    for answer, ids in zip(answers[1:], free[1:], strict=True):
        if stop not in tokenizer.decode(ids):
            assert answer.token_ids == ids


def test_an_answer_cut_at_the_limit_is_not_called_stopped(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        [answer] = generate(model, tokenizer, PROMPTS[:1], settings(max_new_tokens=3))
    assert len(answer.raw_ids) == 3
    assert not answer.is_stopped


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = left_pad([[5, 6], [7]], pad_id=9)
    assert ids.tolist() == [[5, 6], [9, 7]]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_the_folders_own_generation_config_does_not_change_a_preview(
    model: Any, tokenizer: Any
) -> None:
    before = run(model, tokenizer, PROMPTS)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 9.0
    assert run(model, tokenizer, PROMPTS) == before


@pytest.mark.parametrize("stop", ["a", "b" * 60, "end " * 50, "\u00e9" * 100, "<|x|>" * 40])
def test_a_stop_string_is_found_however_many_tokens_it_has(tokenizer: Any, stop: str) -> None:
    ids = tokenizer("q" * 50 + stop)["input_ids"]
    found = StopStrings(tokenizer, [stop, "never"], 3)
    assert bool(found(torch.tensor([[0, 0, 0, *ids]]), None)[0])
    assert not bool(found(torch.tensor([[0, 0, 0, *ids[:-1]]]), None)[0])


def test_the_check_of_long_stop_strings_is_killed_by_a_fixed_window(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: 48 tokens at the end are looked at, whatever is looked for."""
    start = StopStrings.__init__

    def fixed(self: Any, *values: Any) -> None:
        start(self, *values)
        self.window = 48

    monkeypatch.setattr(StopStrings, "__init__", fixed)
    with pytest.raises(AssertionError):
        test_a_stop_string_is_found_however_many_tokens_it_has(tokenizer, "b" * 60)


@pytest.mark.parametrize("temperature", [9e-6, 1e-38, 5e-324])
def test_a_temperature_that_is_as_good_as_zero_is_greedy(
    model: Any, tokenizer: Any, temperature: float
) -> None:
    greedy = run(model, tokenizer, PROMPTS)
    assert run(model, tokenizer, PROMPTS, temperature=temperature) == greedy


def test_sampling_goes_on_where_only_deterministic_algorithms_are_allowed(
    model: Any, tokenizer: Any
) -> None:
    """On a GPU its cumulative sum has none, and would raise."""
    seen: list[bool] = []

    def look(ids: Any, scores: torch.Tensor) -> torch.Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return scores

    asked = GenerationSettings(max_new_tokens=2, temperature=1.0, seed=1)
    torch.use_deterministic_algorithms(True)
    try:
        generate(model, tokenizer, [[5, 6]], asked, [look])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen
    assert not any(seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_equal_scores_give_equal_tokens_on_a_gpu(is_deterministic: bool) -> None:
    scores = torch.randn(4, 151_936, generator=torch.Generator().manual_seed(0)) * 3
    prompts = [[1, 2], [3], [4, 5, 6], [7]]
    found = []
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        for device in ("cpu", "cuda"):
            processor = NoiseProcessor(prompts, 0.7, 42)
            with any_algorithm():
                drawn = [processor(None, scores.to(device)).argmax(-1) for _ in range(20)]
            found.append(torch.stack(drawn).cpu())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*found)
