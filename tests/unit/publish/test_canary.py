"""The canary: right weights pass in every precision, weights of one step earlier do not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from trainer.preview.base import PreviewRequest
from trainer.preview.neutral import as_received, golden_logprobs
from trainer.publish import identity
from trainer.publish.identity import CANARY_TOKENS, NOISE_FP32, Canary, canary_rows

NUM_CANARIES = 48
Pair = tuple[list[int], list[int]]


def to_bf16(_: torch.Tensor) -> torch.dtype:
    return torch.bfloat16


@pytest.fixture
def in_training(make_model: Callable[..., Any]) -> Iterator[Any]:
    """A model as it is while a bf16 run trains: fp32 masters, autocast inside `forward`."""
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's, in one process
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = make_model(hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for parameter in model.parameters():  # as far from uniform answers as a trained model
            parameter.mul_(6)
    yield accelerator.prepare(model)
    accelerator.free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)


def worker_of(model: Any) -> Any:
    """What a worker holds: the numbers that travel, in an fp32 model without autocast."""
    fresh = type(model)(copy.deepcopy(model.config))
    sent = {name: value.bfloat16() for name, value in model.state_dict().items()}
    fresh.load_state_dict(sent)
    return fresh.eval()


def short_pairs(count: int = NUM_CANARIES, num_golden: int = 2) -> list[Pair]:
    """Prompts with golden answers of a few tokens."""
    random = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(3, 300, (12,), generator=random).tolist(),
            torch.randint(3, 300, (num_golden + n % 3,), generator=random).tolist(),
        )
        for n in range(count)
    ]


def is_verified(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    canary = Canary((0,), len(mine), NOISE_FP32, lambda: mine)
    return canary.disagreement(float(mine.sum()), sum(theirs.tolist())) is None


def num_verified(model: Any, worker: Any, pairs: list[Pair]) -> int:
    found = 0
    for prompt, golden in pairs:
        with as_received(model, to_bf16):
            mine = golden_logprobs(model, prompt, golden)
        found += is_verified(mine, golden_logprobs(worker, prompt, golden))
    return found


def one_step(model: Any) -> None:
    """As small a step as anybody takes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = torch.tensor([short_pairs(1, 20)[0][1]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def long_pair() -> list[Pair]:
    return short_pairs(1, CANARY_TOKENS)


def test_right_weights_are_verified_in_bf16_with_answers_of_two_tokens(in_training: Any) -> None:
    pairs = short_pairs()
    assert num_verified(in_training, worker_of(in_training), pairs) == NUM_CANARIES


def test_weights_of_one_step_earlier_are_refused(in_training: Any) -> None:
    worker = worker_of(in_training)
    one_step(in_training)
    assert num_verified(in_training, worker, long_pair()) == 0
    assert num_verified(in_training, worker_of(in_training), long_pair()) == 1


def test_a_canary_is_computed_in_fp32_and_leaves_no_trace(in_training: Any) -> None:
    seen: list[torch.dtype] = []
    gate = in_training.model.layers[0].mlp.gate_proj
    hook = gate.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    before = {name: (id(p), p.data_ptr()) for name, p in in_training.named_parameters()}
    forward = in_training.forward
    num_verified(in_training, worker_of(in_training), short_pairs(1))
    assert set(seen) == {torch.float32}
    in_training(input_ids=torch.tensor([[5, 6]]))
    assert seen[-1] == torch.bfloat16  # training goes on under autocast
    hook.remove()
    assert {name: (id(p), p.data_ptr()) for name, p in in_training.named_parameters()} == before
    assert in_training.forward == forward
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in in_training.modules())


def test_an_error_inside_a_canary_leaves_no_trace(in_training: Any) -> None:
    head = in_training.lm_head.weight
    with pytest.raises(IndexError), as_received(in_training, to_bf16):
        golden_logprobs(in_training, [999_999], [5])
    assert in_training.lm_head.weight is head
    assert in_training.model.embed_tokens.weight is head


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gemma3", "lora"])
def test_every_family_is_scored_as_its_worker_scores_it(family: str) -> None:
    model, sent_as, worker = FAMILIES[family]()
    for prompt, golden in short_pairs(4):
        with as_received(model, sent_as):
            mine = golden_logprobs(model, prompt, golden)
        torch.testing.assert_close(
            mine, golden_logprobs(worker, prompt, golden), atol=1e-4, rtol=1e-4
        )


def _family(name: str) -> Any:
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, MixtralConfig

    small: dict[str, Any] = {
        "vocab_size": 303,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    configs = {
        "gpt2": lambda: GPT2Config(vocab_size=303, n_embd=32, n_layer=2, n_head=4),
        "mixtral": lambda: MixtralConfig(**small, num_local_experts=4),
        "gemma3": lambda: Gemma3TextConfig(**small, head_dim=8),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[name]())
    return model, to_bf16, worker_of(model)


def _adapters() -> Any:
    """LoRA in fp32 on a base in bf16, embeddings and head among the targets."""
    from peft import LoraConfig, get_peft_model

    def build(dtype: torch.dtype) -> Any:
        base = _family("gemma3")[0].to(dtype)
        targets = ["q_proj", "down_proj", "lm_head", "embed_tokens"]
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        return get_peft_model(base, config)

    model, worker = build(torch.bfloat16), build(torch.float32)
    adapters = {id(p) for n, p in model.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for (name, mine), theirs in zip(model.named_parameters(), worker.parameters(), strict=True):
            if "lora_" in name:
                mine.data = mine.data.float()
            theirs.copy_(mine.bfloat16())
    return model, lambda tensor: torch.bfloat16 if id(tensor) in adapters else tensor.dtype, worker


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: _family("gpt2"),
    "mixtral": lambda: _family("mixtral"),
    "gemma3": lambda: _family("gemma3"),
    "lora": _adapters,
}


def requests(*lengths: int) -> list[PreviewRequest]:
    return [
        PreviewRequest(
            prompt=str(n), prompt_token_ids=(1, 2), golden_token_ids=tuple(range(n)) or None
        )
        for n in lengths
    ]


def test_short_golden_answers_are_taken_together() -> None:
    assert canary_rows(requests(30, 3, 0, 40, 500)) == (0, 1, 3)
    assert canary_rows(requests(4, 0, 4)) == (0, 2)
    assert canary_rows(requests(0)) == ()


def test_more_tokens_allow_a_smaller_mean_difference() -> None:
    def allowed(n: int) -> float:
        canary = Canary((0,), n, NOISE_FP32, lambda: torch.zeros(n))
        low, high = 0.0, 10.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            is_close = canary.disagreement(0.0, middle * n) is None
            low, high = (middle, high) if is_close else (low, middle)
        return low

    assert allowed(64) == pytest.approx(NOISE_FP32 / 8, rel=1e-4)
    assert allowed(1) == pytest.approx(NOISE_FP32, rel=1e-4)


def test_mutant_canary_scored_under_autocast_is_killed(
    in_training: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    monkeypatch.setitem(globals(), "as_received", lambda *_: contextlib.nullcontext())
    assert num_verified(in_training, worker_of(in_training), short_pairs()) < NUM_CANARIES


def test_mutant_canary_tolerance_for_the_whole_sum_is_killed(
    in_training: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 0.02 nats a token, whatever the number of tokens: what was allowed in bf16 once.
    worker = worker_of(in_training)
    one_step(in_training)
    monkeypatch.setattr(identity.math, "sqrt", lambda n: 0.02 * n / NOISE_FP32)
    assert num_verified(in_training, worker, long_pair()) == 1


def test_mutant_canary_of_unrounded_weights_is_killed(in_training: Any) -> None:
    worker, missed = worker_of(in_training), 0
    for prompt, golden in short_pairs():
        with as_received(in_training, lambda tensor: tensor.dtype):
            mine = golden_logprobs(in_training, prompt, golden)
        theirs = golden_logprobs(worker, prompt, golden)
        assert math.isfinite(float(mine.sum()))
        missed += not is_verified(mine, theirs)
    assert missed > 0
