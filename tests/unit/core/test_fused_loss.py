"""A kernel for head and loss in one is used where it is proved, and only there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.trust import reference
from trainer.core import fused_loss
from trainer.core.fused_loss import check_loss_kernel, liger_sum, why_not, with_kernel
from trainer.core.loss import supervised_loss
from trainer.core.tiles import PostHead, Tiling
from trainer.errors import ConfigError

POSTS = [PostHead(), PostHead(0.25), PostHead(cap=3.0), PostHead(2.0, 5.0)]


def by_hand(
    states: Any, head: Any, target: Any, weights: Any, post: PostHead, **wrong: Any
) -> torch.Tensor:
    """What Liger's kernel computes, written with matrices."""
    logits = states.double() @ head.weight.double().T * wrong.get("scale", post.scale)
    cap = wrong.get("cap", post.cap)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    loss = logits.logsumexp(-1) - logits.gather(1, target[:, None])[:, 0]
    return (loss if weights is None or wrong.get("unweighted") else loss * weights).sum()


@pytest.mark.parametrize("post", POSTS)
def test_a_kernel_that_says_what_tiles_say_is_proved(post: PostHead) -> None:
    head = nn.Linear(16, 100, bias=False)
    assert why_not(by_hand, head, post, torch.float32) is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"scale": 1.0}, "its loss differs"),
        ({"cap": None}, "its loss differs"),
        ({"unweighted": True}, "its loss differs"),
    ],
)
def test_a_kernel_that_leaves_something_out_is_not_taken(wrong: Any, words: str) -> None:
    def kernel(*values: Any) -> torch.Tensor:
        return by_hand(*values, **wrong)

    found = why_not(kernel, nn.Linear(16, 100, bias=False), PostHead(2.0, 5.0), torch.float32)
    assert words in str(found)


def test_a_kernel_with_a_wrong_gradient_is_not_taken() -> None:
    def kernel(states: Any, *rest: Any) -> torch.Tensor:
        return by_hand(states * 0.5 + (states * 0.5).detach(), *rest)

    found = why_not(kernel, nn.Linear(16, 100, bias=False), PostHead(), torch.float32)
    assert "its gradient differs" in str(found)


def test_a_kernel_that_fails_or_a_head_of_another_kind_is_told() -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such architecture")

    plain = nn.Linear(16, 100, bias=False)
    assert "no such architecture" in str(why_not(broken, plain, PostHead(), torch.float32))
    biased = nn.Linear(16, 100)
    assert "bias" in str(why_not(by_hand, biased, PostHead(2.0), torch.float32))

    class Adapted(nn.Linear):
        pass

    assert "Adapted" in str(why_not(by_hand, Adapted(16, 100), PostHead(), torch.float32))


def test_a_proved_kernel_makes_the_loss_of_a_batch() -> None:
    model = reference.llama()
    batch = {"input_ids": torch.arange(40)[None], "labels": torch.arange(40)[None]}
    calls = []

    def kernel(*values: Any) -> torch.Tensor:
        calls.append(len(values[0]))
        return by_hand(*values)

    whole = supervised_loss(model, model, batch)
    found = supervised_loss(model, model, batch, tiling=Tiling(PostHead(), 7, kernel))
    assert calls == [39]
    assert float(found) == pytest.approx(float(whole), rel=1e-6)


def test_where_there_is_no_gpu_tiles_stay_and_asking_for_the_kernel_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiling, cpu = Tiling(PostHead(), 7), torch.device("cpu")
    options: dict[str, Any] = {"dtype": torch.float32, "notice": print}
    assert with_kernel("auto", tiling, reference.llama(), **options) == tiling
    monkeypatch.setattr(fused_loss.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="runs on a CUDA GPU, and the device is cpu"):
        check_loss_kernel("liger", cpu)
    monkeypatch.setattr(fused_loss.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ultimate-trainer\[liger\]'"):
        check_loss_kernel("liger", cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ligers_kernel_is_proved_on_a_gpu(post: PostHead, dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    head = nn.Linear(256, 5000, bias=False).to("cuda", dtype)
    assert why_not(liger_sum, head, post, dtype) is None
    without = dataclasses.replace(post, cap=9.0)
    kernel: Callable[..., torch.Tensor] = lambda *v: liger_sum(*v[:4], without)  # noqa: E731
    assert why_not(kernel, head, post, dtype) is not None
