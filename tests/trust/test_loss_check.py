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

from tests.trust.reference import (
    IGNORED,
    Rows,
    decoder,
    distance,
    gradient,
    llama,
    ragged_rows,
    token_mean,
    weighted_mean,
    weighted_rows,
    weights,
)
from tests.trust.trainers import dataset, make_trainer
from trainer.core import checks, hf_trainer, loss, training
from trainer.core.checks import NUM_SUPERVISED, choose_loss, telling_part
from trainer.core.tiles import PostHead, Tiling
from trainer.data.batches import PadCollator, blank_row
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
def test_a_router_loss_is_found_in_any_precision(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, config, options = MIXTURES[family]
    assert compare(decoder(kind, config, **options), ragged_rows(8), dtype) == (True, [])
    model = decoder(kind, config, **options, output_router_logits=True)
    assert compare(model, ragged_rows(8), dtype) == (True, [])
    # One that ours does not know: the model's own forward is used.
    monkeypatch.setattr(loss, "router_coefficient", lambda model: 0.0)
    is_equal, [notice] = compare(model, ragged_rows(8), dtype)
    assert not is_equal
    assert "its own forward is used" in notice


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
    with pytest.raises(ValueError, match="unpack"):
        test_a_router_loss_is_found_in_any_precision("mixtral", torch.bfloat16, monkeypatch)


# ---- the router loss in training


def mixture(family: str) -> Any:
    kind, config, options = MIXTURES[family]
    heavy = {**options, "router_aux_loss_coef": 0.3, "output_router_logits": True}
    # The fast way to multiply experts takes no fp64.
    heavy["experts_implementation"] = "eager"
    return decoder(kind, config, dtype=torch.float64, **heavy)


def plain_batch(rows: Any) -> dict[str, torch.Tensor]:
    """Right-padded, with nothing of the package's."""
    longest = max(len(row[0]) for row in rows)
    fills = {"input_ids": 0, "labels": IGNORED}
    batch = {
        key: torch.tensor([row[at] + [fill] * (longest - len(row[at])) for row in rows])
        for at, (key, fill) in enumerate(fills.items())
    }
    mask = [[1] * len(row[0]) + [0] * (longest - len(row[0])) for row in rows]
    return {**batch, "attention_mask": torch.tensor(mask)}


def expected_change(family: str, passes: list[Any], *, weighted: bool = False) -> Any:
    """Loss and gradient of one step: token mean over all rows, router loss averaged over passes."""
    model = mixture(family)
    routers = [
        model(**plain_batch(rows), use_cache=False).aux_loss * model.router_aux_loss_coef
        for rows in passes
    ]
    rows = [row for part in passes for row in part]
    mean = (weighted_mean if weighted else token_mean)(model, rows)
    total = mean + torch.stack(routers).mean()
    return total.item(), gradient(model, total), mean.item()


def check_router_loss(
    family: str, batch_size: int, accumulation: int, *, weighted: bool = False, tile: int = 0
) -> None:
    rows: Any = (weighted_rows if weighted else ragged_rows)(8)
    model = mixture(family)
    cut = {"batch_size": batch_size, "accumulation": accumulation}
    trainer = make_trainer(model, rows, **cut)
    choose_loss(trainer, dataset(rows), dtype=torch.float64, notice=lambda *_: None)
    assert not trainer.use_own_forward
    trainer.tiling = Tiling(PostHead(), tile) if tile else None
    order = trainer.order.epoch_rows(0)
    passes = [
        [rows[i] for i in order[at : at + batch_size]] for at in range(0, len(rows), batch_size)
    ]
    wanted, change, without = expected_change(family, passes, weighted=weighted)
    before = weights(model)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.last_step is not None
    # Routers compute in fp32.
    assert trainer.last_step.train_loss == pytest.approx(wanted, rel=1e-6)
    assert distance(before - weights(model), change) <= 2e-6
    assert abs(wanted - without) > 0.1


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_a_step_has_the_loss_and_gradient_of_the_models_own_forward(family: str) -> None:
    rows = ragged_rows(8)
    model = mixture(family)
    own = model(**plain_batch(rows), use_cache=False).loss
    wanted, change, _ = expected_change(family, [rows])
    assert own.item() == pytest.approx(wanted, rel=1e-6)
    assert distance(gradient(model, own), change) <= 2e-6
    check_router_loss(family, 8, 1)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4)])
def test_n3_a_router_loss_is_averaged_over_the_passes_of_a_step(
    batch_size: int, accumulation: int
) -> None:
    check_router_loss("mixtral", batch_size, accumulation)


def test_a_router_loss_goes_with_weights_and_tiles() -> None:
    check_router_loss("qwen3_moe", 4, 2, weighted=True)
    check_router_loss("qwen3_moe", 4, 2, weighted=True, tile=5)


def test_blank_rows_have_no_router_loss() -> None:
    model = mixture("mixtral")
    blank = PadCollator(0)([blank_row(), blank_row()])
    ours = loss.supervised_loss(model, model, blank, 5, router=0.3)
    assert ours.item() == 0
    assert not gradient(model, ours).any()


def test_mutant_n3_a_router_loss_that_is_added_at_each_pass_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mutation is what transformers' own Trainer does."""
    plain = hf_trainer.supervised_loss

    def undivided(*args: Any, router: float, **named: Any) -> torch.Tensor:
        return plain(*args, router=router * 4, **named)

    monkeypatch.setattr(hf_trainer, "supervised_loss", undivided)
    with pytest.raises(AssertionError):
        check_router_loss("mixtral", 2, 4)


# ---- memory


def test_weighted_rows_are_refused_where_the_model_adds_something_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, config, options = MIXTURES["mixtral"]
    assert compare(decoder(kind, config, **options), weighted_rows(4)) == (True, [])
    model = decoder(kind, config, **options, output_router_logits=True)
    assert compare(model, weighted_rows(4)) == (True, [])
    monkeypatch.setattr(loss, "router_coefficient", lambda model: 0.0)
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
