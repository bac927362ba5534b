"""Local previews leave no trace, halve the batch out of memory, and never raise."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from trainer.preview.base import PreviewBackend, PreviewRequest
from trainer.preview.local import LocalPreviewBackend
from trainer.preview.samples import sample_requests
from trainer.preview.scheduler import samples_of
from trainer.profiles import get_profile


@pytest.fixture
def backend(make_model: Callable[..., Any], tokenizer: Any) -> LocalPreviewBackend:
    return LocalPreviewBackend(
        model=make_model(), tokenizer=tokenizer, max_new_tokens=8, temperature=0.7
    )


def requests(count: int) -> list[PreviewRequest]:
    return [PreviewRequest(prompt=f"what is {n}?", golden_answer=str(n)) for n in range(count)]


def test_it_is_a_preview_backend(backend: LocalPreviewBackend) -> None:
    assert isinstance(backend, PreviewBackend)
    result = backend.preview("what is two?", "four", 7, max_new_tokens=5)
    assert (result.step, result.golden_answer, result.matches) == (7, "four", False)
    assert 1 <= result.tokens_generated <= 5
    assert result.tokens_per_sec > 0


def test_random_state_modes_and_use_cache_are_as_before(backend: LocalPreviewBackend) -> None:
    model = backend.model
    model.train()
    model.model.layers[0].eval()  # a model may be in mixed modes
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    state = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    side = backend.tokenizer.padding_side
    backend.preview_batch(requests(3), 1)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert after == state
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert backend.tokenizer.padding_side == side


def test_text_prompts_are_rendered_with_the_system_prompt(backend: LocalPreviewBackend) -> None:
    backend.system_prompt = "Be terse."
    text = backend.tokenizer.decode(backend.render("hi"))
    assert text == (
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_exact_ids_are_used_as_they_are(backend: LocalPreviewBackend) -> None:
    ids = tuple(backend.render("what is two?"))
    by_ids = PreviewRequest(prompt="shown only", prompt_token_ids=ids)
    by_text = PreviewRequest(prompt="what is two?")
    one, two = backend.preview_batch([by_ids, by_text], 1)
    assert one.raw_text == two.raw_text


def out_of_memory_above(backend: LocalPreviewBackend, limit: int) -> list[int]:
    """Let the model's generate run out of memory for more rows than `limit`; returns the sizes."""
    sizes: list[int] = []
    generate = backend.model.generate

    def limited(*args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs["input_ids"].shape[0])
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(*args, **kwargs)

    backend.model.generate = limited
    return sizes


def test_out_of_memory_halves_the_batch(backend: LocalPreviewBackend) -> None:
    sizes = out_of_memory_above(backend, 2)
    results = backend.preview_batch(requests(5), 1)
    assert sizes == [5, 2, 3, 1, 2]
    assert [result.prompt for result in results] == [r.prompt for r in requests(5)]
    assert all(result.ok for result in results)


def test_further_samples_change_nothing_of_the_first_and_halve_alike(
    backend: LocalPreviewBackend,
) -> None:
    kept = {"text", "raw_text", "matches", "tokens_generated", "finish_reason", "health"}
    alone = samples_of(backend, requests(2), 1, 1)
    several = samples_of(backend, requests(2), 1, 3)
    assert [one.model_dump(include=kept) for one in several] == [
        one.model_dump(include=kept) for one in alone
    ]
    assert {len(one.samples) for one in several} == {2}
    for one in several:
        assert len({said.text for said in one.answers}) == 3
    sizes = out_of_memory_above(backend, 1)
    halved = backend.preview_batch(sample_requests(requests(2), 2), 1)
    assert sizes == [2, 1, 1]
    assert [one.text for one in halved] == [one.samples[1].text for one in several]


def test_a_sample_that_fails_is_told_and_the_others_stay(backend: LocalPreviewBackend) -> None:
    answer = backend._answer

    def fails(asked: Any, step: int, settings: Any) -> Any:
        if asked[0].sample == 1:
            raise RuntimeError("no luck")
        return answer(asked, step, settings)

    backend._answer = fails  # type: ignore[method-assign]
    for one in samples_of(backend, requests(2), 1, 3):
        assert [said.ok for said in one.answers] == [True, False, True]
        assert one.samples[0].error_message == "RuntimeError: no luck"


def test_out_of_memory_for_one_prompt_skips_it_and_says_so(backend: LocalPreviewBackend) -> None:
    out_of_memory_above(backend, 0)
    results = backend.preview_batch(requests(2), 1)
    assert all("out of memory" in (result.error_message or "") for result in results)
    assert backend.skipped_for_memory == 2


def test_a_retry_starts_without_what_the_failed_attempt_held(
    backend: LocalPreviewBackend,
) -> None:
    generate, held, alive = backend.model.generate, [], []

    class Cache:
        pass

    def hungry(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(one() is not None for one in held))
        cache = Cache()
        cache.itself = cache  # type: ignore[attr-defined]  # modules and caches hold cycles
        held.append(weakref.ref(cache))
        if kwargs["input_ids"].shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(*args, **kwargs)

    backend.model.generate = hungry
    assert all(result.ok for result in backend.preview_batch(requests(4), 1))
    assert alive[:3] == [0, 0, 0]  # attempts with 4, 2 and 1 prompts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_retry_finds_the_memory_that_the_failed_attempt_held(
    backend: LocalPreviewBackend,
) -> None:
    backend.model.to("cuda")
    generate, share = backend.model.generate, int(torch.cuda.mem_get_info()[0] * 0.6)

    def hungry(*args: Any, **kwargs: Any) -> Any:
        held = [torch.empty(share, dtype=torch.uint8, device="cuda")]
        if kwargs["input_ids"].shape[0] > 1:
            held.append(torch.empty(share, dtype=torch.uint8, device="cuda"))  # out of memory
        return generate(*args, **kwargs)

    backend.model.generate = hungry
    assert all(result.ok for result in backend.preview_batch(requests(2), 1))


def test_any_other_failure_becomes_a_result(backend: LocalPreviewBackend) -> None:
    [result] = backend.preview_batch([PreviewRequest(prompt="x", prompt_token_ids=(999999,))], 4)
    assert result.finish_reason == "error"
    assert "IndexError" in (result.error_message or "")
    assert (result.step, result.text, result.matches) == (4, "", None)


def test_the_profile_stops_and_compares(make_model: Callable[..., Any], tokenizer: Any) -> None:
    backend = LocalPreviewBackend(
        model=make_model(), tokenizer=tokenizer, profile=get_profile("regime3"), temperature=0
    )
    assert backend.settings.stop_strings == ("<<ANS_END>>",)
