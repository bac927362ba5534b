"""Weights whose only copy is bf16, and 8-bit moments: N25, and what a resume and ranks rely on."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.config.training_sections import Hyperparams
from trainer.core import bf16_masters
from trainer.core.bf16_masters import Bf16AdamW
from trainer.core.optim import build_optimizer, check_optimizer, state_placeholders
from trainer.errors import ConfigError
from trainer.models.precision import keep_vectors_wide

MakeModel = Callable[..., Any]
SIZES = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
"""Matrices that are large enough for 8-bit moments."""
SMALL = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}
"""The smallest of them."""
MODES = [
    ("bf16_stochastic", "adamw"),
    ("bf16_stochastic", "adamw_8bit"),
    ("fp32", "adamw_8bit"),
]
CPU = torch.device("cpu")


def optimizer_of(model: Any, masters: str, optimizer: str = "adamw", **values: Any) -> Any:
    """Build a run's optimizer; a model in bf16 gets its wide vectors first, as in a run."""
    if masters == "bf16_stochastic":
        keep_vectors_wide(model)
    given = {"masters": masters, "optimizer": optimizer, "learning_rate": 2e-5, **values}
    return build_optimizer(model, Hyperparams.model_validate(given), seed=7)


def step(model: Any, optimizer: Any, number: int) -> None:
    drawn = torch.Generator().manual_seed(number)
    ids = torch.randint(0, model.config.vocab_size, (2, 24), generator=drawn)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def made(make_model: MakeModel, masters: str, **sizes: int) -> Any:
    model = make_model(**{**SIZES, **sizes})
    return model.bfloat16() if masters == "bf16_stochastic" else model


# ---- N25: updates survive the dtype


def check_n25(
    make_model: MakeModel, masters: str, optimizer: str, *, steps: int, **sizes: int
) -> None:
    """Updates at 2e-5 are there: as many weights were moved, and as far on the whole, as in fp32.

    A weight that went up and down again by one bf16 step was moved, so all steps are looked at. Of
    the whole: the part of the fp32 run's way that this run went too (its projection) is 1.
    """
    ways, moved = [], []
    for kind in ("fp32", masters):
        model = make_model(**{**SIZES, **sizes})
        if kind != "fp32":
            model = model.bfloat16()
        name = "fp32" if kind == "pure bf16" else kind
        stepper = optimizer_of(model, name, "adamw" if kind == "fp32" else optimizer)
        before = [p.detach().clone() for p in model.parameters()]
        start, touched = before, [torch.zeros_like(p, dtype=torch.bool) for p in before]
        for number in range(steps):
            step(model, stepper, number)
            after = [p.detach().clone() for p in model.parameters()]
            touched = [t | (a != b) for t, a, b in zip(touched, after, before, strict=True)]
            before = after
        pairs = zip(before, start, strict=True)
        ways.append(torch.cat([(a.float() - b.float()).flatten() for a, b in pairs]))
        moved.append(torch.cat([one.flatten() for one in touched]))
    assert int((moved[0] & moved[1]).sum()) >= 0.95 * int(moved[0].sum())
    assert float(ways[0] @ ways[1] / (ways[0] @ ways[0])) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_n25_updates_survive_bf16_weights(make_model: MakeModel, optimizer: str) -> None:
    check_n25(make_model, "bf16_stochastic", optimizer, steps=100, **SMALL)


def test_mutant_n25_rounding_to_the_nearest_is_killed(make_model: MakeModel) -> None:
    with pytest.raises(AssertionError):
        check_n25(make_model, "pure bf16", "adamw", steps=100, **SMALL)


SEVEN_MILLION: dict[str, int] = {
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_n25_holds_for_seven_million_weights(make_model: MakeModel, optimizer: str) -> None:
    check_n25(make_model, "bf16_stochastic", optimizer, steps=100, **SEVEN_MILLION)


@pytest.mark.long
def test_mutant_n25_of_seven_million_weights_is_killed(make_model: MakeModel) -> None:
    with pytest.raises(AssertionError):
        check_n25(make_model, "pure bf16", "adamw", steps=100, **SEVEN_MILLION)


def test_rounding_is_right_in_the_mean() -> None:
    """Each weight is 1/4 of a bf16 step above one: a quarter of all copies goes up."""
    weight = torch.nn.Parameter(torch.ones(40_000, dtype=torch.bfloat16))
    torchao = pytest.importorskip("torchao.optim")
    groups = [{"params": [weight], "weight_decay": 0.0}]
    one = bf16_masters.make_bf16_adamw(torchao._AdamW, groups, wide=(), seed=1, lr=2**-7 / 4)
    weight.grad = -torch.ones_like(weight)  # the first step of AdamW is its rate
    one.step()
    up = (weight.detach().float() - 1) * 2**7
    assert set(up.tolist()) == {0.0, 1.0}
    assert float(up.mean()) == pytest.approx(0.25, abs=0.01)  # 4.6 standard deviations


# ---- what is kept: the mean of squares, the state, the random numbers


def mean_square_after(kind: Any) -> float:
    """The mean of squared gradients after 100 steps of gradients of 1 and 400 of 0.1."""
    torchao = pytest.importorskip("torchao.optim")
    weight = torch.nn.Parameter(torch.zeros(16, dtype=torch.bfloat16))
    optimizer = kind(torchao._AdamW, [{"params": [weight], "weight_decay": 0.0}])
    for number in range(500):
        weight.grad = torch.full_like(weight, 1.0 if number < 100 else 0.1)
        optimizer.step()
    return float(optimizer.state[weight]["exp_avg_sq"].float().mean())


def test_the_mean_of_squares_falls_when_gradients_do() -> None:
    expected = 0.01 + (1 - 0.999**100 - 0.01) * 0.999**400
    found = mean_square_after(
        lambda kind, groups: bf16_masters.make_bf16_adamw(kind, groups, wide=(), seed=1, lr=1e-5)
    )
    assert found == pytest.approx(expected, rel=1e-2)


def test_mutant_moments_in_the_dtype_of_the_weights_are_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        Bf16AdamW, "_new_buffer", lambda self, p, signed: torch.zeros_like(p)
    )  # torchao's own
    with pytest.raises(AssertionError):
        test_the_mean_of_squares_falls_when_gradients_do()


def check_continued(make_model: MakeModel, masters: str, optimizer: str) -> None:
    """Saved after two steps and loaded, with other random numbers around: the same bits."""
    straight, again = (made(make_model, masters) for _ in range(2))
    first = optimizer_of(straight, masters, optimizer)
    for number in range(2):
        step(straight, first, number)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = optimizer_of(again, masters, optimizer)
    again.load_state_dict(straight.state_dict())
    second.load_state_dict(torch.load(file, weights_only=True))
    for number in range(2, 5):
        step(straight, first, number)
        torch.randn(number)
        step(again, second, number)
    pairs = zip(straight.named_parameters(), again.parameters(), strict=True)
    for (name, p), q in pairs:
        assert torch.equal(p, q), name
        for key, value in first.state[p].items():
            other = second.state[q][key]
            pair = (value, other) if not hasattr(value, "codes") else (value.codes, other.codes)
            assert torch.equal(*map(torch.as_tensor, pair)), (name, key)
            assert torch.as_tensor(value).dtype == torch.as_tensor(other).dtype, (name, key)


@pytest.mark.parametrize(("masters", "optimizer"), MODES)
def test_saved_and_loaded_an_optimizer_goes_on_bit_for_bit(
    make_model: MakeModel, masters: str, optimizer: str
) -> None:
    check_continued(make_model, masters, optimizer)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("lost", ["load_state_dict", "random_numbers_of"])
def test_mutant_what_torch_and_torchao_do_themselves_is_killed(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, lost: str, optimizer: str
) -> None:
    if lost == "load_state_dict":  # fp32 moments are cast to bf16
        monkeypatch.setattr(Bf16AdamW, lost, torch.optim.Optimizer.load_state_dict)
    else:  # rounding draws from the random state that previews and data draw from
        monkeypatch.setattr(bf16_masters, lost, lambda *_: contextlib.nullcontext())
    with pytest.raises(AssertionError):
        check_continued(make_model, "bf16_stochastic", optimizer)


def test_rounding_leaves_the_random_state_and_the_rates_alone(make_model: MakeModel) -> None:
    """Ranks whose random states differ round alike, and so keep one model."""
    models = [made(make_model, "bf16_stochastic") for _ in range(2)]
    for rank, model in enumerate(models):
        optimizer = optimizer_of(model, "bf16_stochastic")
        torch.manual_seed(rank)
        for number in range(2):
            before = torch.get_rng_state()
            model.eval()  # no dropout
            step(model, optimizer, number)
            assert torch.equal(before, torch.get_rng_state())
        assert [group["lr"] for group in optimizer.param_groups] == [2e-5, 2e-5]
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("masters", "optimizer"), MODES)
def test_room_that_is_held_for_the_state_is_what_the_state_takes(
    make_model: MakeModel, masters: str, optimizer: str
) -> None:
    model = made(make_model, masters)
    stepper = optimizer_of(model, masters, optimizer)
    held = sum(one.numel() * one.element_size() for one in state_placeholders(stepper))
    step(model, stepper, 0)
    tensors = [
        part
        for state in stepper.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and key != "step" and "qmap" not in key
        for part in ([value.codes, value.scale] if hasattr(value, "codes") else [value])
    ]
    taken = sum(one.numel() * one.element_size() for one in tensors)
    assert held == pytest.approx(taken, rel=0.02)  # but for the scales of blocks
    if "8bit" in optimizer:
        assert held < 0.6 * 8 * sum(p.numel() for p in model.parameters())
    assert state_placeholders(stepper) == []


def test_embeddings_keep_32_bits_in_each_model_of_a_process(make_model: MakeModel) -> None:
    """bitsandbytes' own manager would give the second model the places of the first one's."""
    for is_tied in (True, False):
        model = make_model(**SIZES, tie_word_embeddings=is_tied)
        optimizer = optimizer_of(model, "fp32", "adamw_8bit")
        step(model, optimizer, 0)
        wide = {
            name
            for name, p in model.named_parameters()
            if p.ndim == 2 and optimizer.state[p]["state1"].dtype == torch.float32
        }
        assert wide == {"model.embed_tokens.weight"}
    other = torch.nn.Linear(128, 128, bias=False)  # its only parameter is where the embedding was
    optimizer = optimizer_of(other, "fp32", "adamw_8bit")
    other(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    assert optimizer.state[other.weight]["state1"].dtype == torch.uint8


# ---- what is refused


@pytest.mark.parametrize(
    ("values", "package", "extra"),
    [
        ({"masters": "bf16_stochastic"}, "torchao", "torchao"),
        ({"masters": "bf16_stochastic", "optimizer": "adamw_8bit"}, "torchao", "torchao"),
        ({"optimizer": "adamw_8bit"}, "bitsandbytes", "qlora"),
    ],
)
def test_a_missing_package_is_one_line_with_the_pip_command(
    values: dict[str, str], package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (package, f"{package}.optim"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ConfigError) as caught:
        check_optimizer(Hyperparams.model_validate(values), CPU)
    assert f"pip install 'ultimate-trainer[{extra}]'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paged_moments_are_refused_where_nothing_is_paged() -> None:
    with pytest.raises(ConfigError, match="nothing is paged; adamw_8bit is the same"):
        check_optimizer(Hyperparams(optimizer="paged_adamw_8bit"), CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_compiled_rounding_on_a_gpu_is_a_function_of_seed_and_step(
    make_model: MakeModel, optimizer: str
) -> None:
    models = [made(make_model, "bf16_stochastic").cuda() for _ in range(2)]
    for model in models:
        stepper = optimizer_of(model, "bf16_stochastic", optimizer)
        for _ in range(3):
            torch.randn(5, device="cuda")
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.5)
            stepper.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_paged_adamw_steps_on_a_gpu(make_model: MakeModel) -> None:
    model = make_model(**SIZES).cuda()
    optimizer = optimizer_of(model, "fp32", "paged_adamw_8bit")
    ids = torch.arange(12, device="cuda")[None]
    before = [p.detach().clone() for p in model.parameters()]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))
