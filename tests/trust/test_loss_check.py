"""The comparison at start of our loss with the model's own: small, and it finds what differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.trust.reference import IGNORED, Rows, decoder, llama, ragged_rows, weighted_rows
from tests.trust.trainers import dataset, make_trainer
from trainer.core import checks, training
from trainer.core.checks import NUM_SUPERVISED, choose_loss, telling_part
from trainer.errors import ConfigError

EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
MIXTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {**EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    ),
}


def long_rows(count: int, length: int) -> Rows:
    """Rows of which the last half is trained."""
    generator = torch.Generator().manual_seed(0)
    rows: Rows = []
    for _ in range(count):
        ids = torch.randint(3, 128, (length,), generator=generator).tolist()
        rows.append((ids, [IGNORED] * (length // 2) + ids[length // 2 :]))
    return rows


def compare(
    model: Any, rows: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[bool, list[str]]:
    """What the check says, and its notices."""
    notices: list[str] = []
    trainer = make_trainer(model, rows, batch_size=8, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        choose_loss(
            trainer, dataset(rows), dtype=dtype, notice=lambda text, _: notices.append(text)
        )
    return not trainer.use_own_forward, notices


def test_the_loss_check_makes_logits_of_257_tokens_whatever_the_batch() -> None:
    seen: list[int] = []
    model = llama(max_position_embeddings=1024)
    model.lm_head.register_forward_hook(lambda *args: seen.append(args[2][..., 0].numel()))
    assert compare(model, long_rows(8, 1000)) == (True, [])
    assert seen
    assert max(seen) <= NUM_SUPERVISED + 1


def test_the_part_that_is_compared_has_the_most_supervised_tokens() -> None:
    part = telling_part(dataset([*ragged_rows(5), *long_rows(1, 700)]))
    assert len(part["input_ids"]) == NUM_SUPERVISED + 1
    assert int((part["labels"][1:] != IGNORED).sum()) == NUM_SUPERVISED
    rows: Rows = [([5, 6, 7, 8], [IGNORED, 6, IGNORED, IGNORED])]
    assert telling_part(dataset(rows))["labels"].tolist() == [IGNORED, 6, IGNORED, IGNORED]


@pytest.mark.parametrize("family", sorted(MIXTURES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_loss_is_found_in_any_precision(family: str, dtype: torch.dtype) -> None:
    kind, config, options = MIXTURES[family]
    for with_router_loss in (False, True):
        model = decoder(kind, config, **options, output_router_logits=with_router_loss)
        is_equal, notices = compare(model, ragged_rows(8), dtype)
        assert is_equal is not with_router_loss
        assert len(notices) == with_router_loss


def test_a_mean_of_another_kind_is_found() -> None:
    class Heavier(type(llama())):  # type: ignore[misc]
        def forward(self, *args: Any, **named: Any) -> Any:
            output = super().forward(*args, **named)
            if output.loss is not None:
                output.loss = output.loss * 1.01
            return output

    model = llama()
    model.__class__ = Heavier
    is_equal, [notice] = compare(model, ragged_rows(8), torch.bfloat16)
    assert not is_equal
    assert "its own forward is used" in notice


def test_mutant_loss_check_within_the_rounding_of_bf16_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "trainer.core.loss.RELATIVE_TOLERANCE", {torch.float32: 2e-2, torch.bfloat16: 2e-2}
    )
    with pytest.raises(AssertionError):
        test_a_router_loss_is_found_in_any_precision("mixtral", torch.bfloat16)


def test_weighted_rows_are_refused_where_the_model_adds_to_its_loss() -> None:
    kind, config, options = MIXTURES["mixtral"]
    assert compare(decoder(kind, config, **options), weighted_rows(4)) == (True, [])
    model = decoder(kind, config, **options, output_router_logits=True)
    with pytest.raises(
        ConfigError, match="adds something of its own, and the rows have loss weights"
    ):
        compare(model, weighted_rows(4))


def test_the_peak_of_the_checks_is_not_reported_as_the_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", done.append)
    checks.forget_peak_memory(torch.device("cpu"))
    assert not done
    checks.forget_peak_memory(torch.device("cuda", 0))
    assert done == [torch.device("cuda", 0)]


def test_the_peak_is_forgotten_after_the_checks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, qa_file: Any
) -> None:
    from trainer.config import create_default_config
    from trainer.core import TrainerEngine

    order: list[str] = []
    for name in ("choose_loss", "forget_peak_memory"):
        monkeypatch.setattr(training, name, lambda *_, name=name, **__: order.append(name) or True)
    config = create_default_config(
        model_path="tiny", dataset_path=str(qa_file), output_dir=str(tmp_path / "run")
    )
    TrainerEngine().create_trainer(config)
    assert order == ["choose_loss", "forget_peak_memory"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_check_leaves_a_small_peak_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    block = torch.empty(2**28, device=device)
    del block
    checks.forget_peak_memory(device)
    assert torch.cuda.max_memory_allocated(device) < 2**28
