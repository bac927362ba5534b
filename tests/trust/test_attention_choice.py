"""Which attention a run takes, and which batches: planned by name, proved on the loaded model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
)

from tests.trust import flash
from tests.trust.reference import decoder, lfm2, llama, ragged_rows, weights
from tests.trust.trainers import make_trainer
from trainer.config import create_default_config
from trainer.config.training_sections import ModelSection
from trainer.core import TrainerEngine, evaluation, proofs
from trainer.core.loss import supervised_loss
from trainer.core.proofs import (
    BatchChoice,
    attention_name,
    choose_batches,
)
from trainer.data.batches import JoinCollator, PackCollator, PadCollator
from trainer.errors import ConfigError, ModelError
from trainer.models import attention
from trainer.models.attention import AttentionPlan, plan_attention
from trainer.models.precision import ResolvedPrecision, resolve_precision

BOTH = ("flash_attention_3", "flash_attention_2")
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def calls() -> Iterator[flash.Calls]:
    with flash.installed() as calls:
        yield calls


def choose(
    model: Any,
    *,
    asked: str = "auto",
    candidates: tuple[str, ...] = (),
    is_packed: bool = False,
    batch_size: int = 2,
) -> BatchChoice:
    trainer = make_trainer(model, ragged_rows(4), batch_size=batch_size)
    plan = AttentionPlan(asked, candidates, "planned")
    before = weights(model)
    choice = choose_batches(trainer, plan, is_packed=is_packed, pad_id=0)
    assert torch.equal(before, weights(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    return choice


# ---- auto


@pytest.mark.parametrize("is_packed", [True, False])
def test_auto_takes_the_best_that_is_installed_and_proved(
    calls: flash.Calls, is_packed: bool
) -> None:
    model = llama()
    choice = choose(model, candidates=BOTH, is_packed=is_packed)
    assert attention_name(model) == "flash_attention_3"
    assert isinstance(choice.collate, JoinCollator)
    assert choice.attention.startswith("flash_attention_3")
    assert choice.notices == ()
    assert calls.varlen


def test_auto_without_candidates_is_the_models_own_choice() -> None:
    for own in ("sdpa", "eager"):
        model = llama(attn_implementation=own)
        choice = choose(model)
        assert (attention_name(model), type(choice.collate)) == (own, PadCollator)
        assert choice.attention == f"{own}; planned"
    assert isinstance(choose(llama(), is_packed=True).collate, PackCollator)


def broken(**changes: Any) -> Any:
    """A kernel that does something else than it is asked for."""
    plain = flash.attend

    def attend(*args: torch.Tensor, **options: Any) -> torch.Tensor:
        return plain(*args, **{**options, **changes})

    return mock.patch.object(flash, "attend", attend)


def test_auto_leaves_a_kernel_that_computes_something_else(calls: flash.Calls) -> None:
    for changes in ({"scale": 0.3}, {"causal": False}, {"window": (2, 0)}):
        model = llama()
        with broken(**changes):
            choice = choose(model, candidates=BOTH)
        assert attention_name(model) == "sdpa"
        assert isinstance(choice.collate, PadCollator)
        assert [text.split()[0] for text in choice.notices] == list(BOTH)
        assert all("differ from those of the model's own attention" in t for t in choice.notices)


def test_auto_sees_that_a_soft_cap_is_left_out(calls: flash.Calls) -> None:
    options = {"head_dim": 16, "attn_implementation": "eager", "attn_logit_softcapping": 0.05}
    model = decoder(Gemma2ForCausalLM, Gemma2Config, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter *= 20  # scores that reach the cap
    assert choose(model, candidates=("flash_attention_2",)).notices == ()
    model.set_attn_implementation("eager")
    with broken(softcap=0.0):
        [notice] = choose(model, candidates=("flash_attention_2",)).notices
    assert attention_name(model) == "eager"
    assert "its logits differ" in notice


def test_auto_leaves_a_kernel_that_fails_in_the_backward_pass(calls: flash.Calls) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("head dim 256 needs another card")

    plain = flash.attend
    model = llama()
    with mock.patch.object(flash, "attend", lambda *a, **o: Fails.apply(plain(*a, **o))):
        choice = choose(model, candidates=("flash_attention_2",))
    assert attention_name(model) == "sdpa"
    assert choice.notices == ("flash_attention_2 is not used: head dim 256 needs another card",)


def test_auto_leaves_what_the_model_does_not_support() -> None:
    model = llama()
    [notice] = choose(model, candidates=("flash_attention_2",)).notices  # not installed here
    assert "flash_attention_2 is not used:" in notice
    assert attention_name(model) == "sdpa"


def test_auto_joins_no_rows_of_a_model_whose_documents_see_each_other(calls: flash.Calls) -> None:
    model = lfm2()
    choice = choose(model, candidates=("flash_attention_2",))
    assert attention_name(model) == "sdpa"
    assert isinstance(choice.collate, PadCollator)
    assert "see each other" in choice.notices[0]


def test_mutant_auto_without_a_proof_is_killed(
    calls: flash.Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs, "_distance", lambda *_: 0.0)
    for test in (
        test_auto_leaves_a_kernel_that_computes_something_else,
        test_auto_joins_no_rows_of_a_model_whose_documents_see_each_other,
    ):
        with pytest.raises((AssertionError, IndexError)):
            test(calls)


# ---- a name that was asked for


def test_rows_of_a_model_that_joins_wrongly_are_padded_with_a_notice(calls: flash.Calls) -> None:
    model = lfm2(attn_implementation="flash_attention_2")
    choice = choose(model, asked="flash_attention_2")
    assert attention_name(model) == "flash_attention_2"
    assert isinstance(choice.collate, PadCollator)
    [notice] = choice.notices
    assert notice.startswith("rows are padded, not joined: Lfm2ForCausalLM lets the documents")
    with pytest.raises(ConfigError, match="see each other"):
        choose(model, asked="flash_attention_2", is_packed=True)


def test_an_attention_that_does_not_run_here_is_one_error(calls: flash.Calls) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")

    model = llama(attn_implementation="flash_attention_2")
    with (
        mock.patch.object(flash, "attend", fails),
        pytest.raises(ModelError, match="flash_attention_2 cannot be used here: FlashAttention"),
    ):
        choose(model, asked="flash_attention_2")


def precision(name: Any, device: torch.device) -> ResolvedPrecision:
    found = resolve_precision("fp32", "full", CPU)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    return dataclasses.replace(found, compute_dtype=dtype)


def plan(
    name: str,
    *,
    device: torch.device = CPU,
    dtype: str = "bf16",
    dropout: float = 0.0,
    **more: Any,
) -> Any:
    section = ModelSection(model_path="tiny", attn_implementation=name, **more)
    config = llama(attention_dropout=dropout).config
    found = plan_attention(section, config, device=device, precision=precision(dtype, device))
    assert config._attn_implementation == "sdpa"  # what it was
    return found


@pytest.mark.parametrize(
    ("name", "device", "dtype", "expected"),
    [
        ("flash_attention_2", CPU, "bf16", r"runs on cuda.*and the device is cpu"),
        ("flash_attention_3", CUDA, "bf16", r"needs the package flash-attn-3"),
        ("flash_attention_2", CUDA, "bf16", r"pip install flash-attn .* or kernels .*\[kernels\]"),
        ("flash_attention_4", CUDA, "bf16", r"pip install flash-attn-4"),
        ("flex_attention", CPU, "fp32", "no backward pass on the CPU"),
        ("somebody/kernel", CPU, "bf16", r"package kernels; `pip install 'ultimate-trainer\[ker"),
        ("somebody/kernel:function", CUDA, "bf16", r"package kernels; `pip install 'ultimate"),
    ],
)
def test_what_is_missing_is_said(
    name: str, device: torch.device, dtype: str, expected: str
) -> None:
    with pytest.raises(ModelError, match=f"model.attn_implementation={name} .*{expected}"):
        plan(name, device=device, dtype=dtype)


def test_flash_attention_in_fp32_is_refused_on_a_gpu(calls: flash.Calls) -> None:
    kinds = {"supported_devices": ((flash._yes, "cuda"),)}
    entry = proofs_matrix()[2]
    with mock.patch.dict(entry, kinds):
        assert plan("flash_attention_2", device=CUDA).asked == "flash_attention_2"
        with pytest.raises(ModelError, match="half precision only"):
            plan("flash_attention_2", device=CUDA, dtype="fp32")
        assert plan("auto", device=CUDA).candidates == BOTH
        assert plan("auto", device=CUDA, dtype="fp32").candidates == ()
        assert plan("auto").candidates == ()
        assert plan("auto", device=CUDA, dropout=0.1).candidates == ("flash_attention_2",)


def test_a_kernel_without_dropout_is_refused_where_the_model_has_it(calls: flash.Calls) -> None:
    assert plan("flash_attention_2", dropout=0.1).asked == "flash_attention_2"
    with pytest.raises(ModelError, match=r"it has no dropout; config.json has attention_dropout=0"):
        plan("flash_attention_3", dropout=0.1)


def proofs_matrix() -> dict[int, dict[str, Any]]:
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

    found: dict[int, dict[str, Any]] = FLASH_ATTENTION_COMPATIBILITY_MATRIX
    return found


def test_a_kernel_of_the_hub_is_fetched_before_the_weights(calls: flash.Calls) -> None:
    from transformers.integrations import hub_kernels

    assert plan(flash.HUB_KERNEL).reason == f"{flash.HUB_KERNEL}, as configured"
    gone = mock.Mock(side_effect=FileNotFoundError("no such repository"))
    with (
        mock.patch.object(hub_kernels, "get_kernel", gone),
        pytest.raises(ModelError, match=r"somebody/other cannot be used here.*no such repository"),
    ):
        plan("somebody/other")
    assert gone.call_args.kwargs["allow_all_kernels"] is False
    with mock.patch.object(hub_kernels, "get_kernel", gone), pytest.raises(ModelError):
        plan("somebody/other", trust_remote_code=True)
    assert gone.call_args.kwargs["allow_all_kernels"] is True


def test_a_model_that_does_not_support_it_is_refused_before_its_weights(
    calls: flash.Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_supports_flash_attn", False)
    with pytest.raises(ModelError, match="does not support Flash Attention 2 yet"):
        plan("flash_attention_2")


# ---- whole runs


def run(folder: Path, base: Path, rows: Path, **sections: Any) -> tuple[Any, Any, list[str]]:
    """The trainer of a run that was begun, its folder's run.json, and what it was told."""
    notices: list[str] = []

    class Listener:
        def on_event(self, event: Any) -> None:
            notices.append(str(getattr(event, "text", "")))

        def close(self) -> None: ...

    engine = TrainerEngine(observers=[Listener()])
    config = create_default_config(
        model_path=str(base),
        dataset_path=str(rows),
        output_dir=str(folder),
        hyperparams={"fp_precision": "fp32", "batch_size": 4, "max_steps": 2, "max_length": 64},
        monitoring={"report_to": (), "inference_interval": 0},
        environment={"device": "cpu"},
        **sections,
    )
    trainer = engine.create_trainer(config)
    manifest = json.loads((folder / "run.json").read_text())
    result = engine.run_job(config)
    assert result.success, result.error_message
    return trainer, manifest, notices


def test_a_run_says_which_attention_it_takes_and_why(
    tmp_path: Path, model_folder: Path, qa_file: Path, calls: flash.Calls
) -> None:
    path = model_folder / "config.json"  # the stand-in has no dropout
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.0}))
    trainer, manifest, notices = run(tmp_path / "auto", model_folder, qa_file)
    reason = "sdpa; auto: the model's own choice, usually sdpa (flash attention has no kernels for "
    assert manifest["attention"] == f"{reason}cpu)"
    assert f"attention: {manifest['attention']}" in notices
    assert isinstance(trainer.data_collator.collate, PadCollator)
    assert not trainer.data_collator.with_mask
    assert not calls.varlen
    named = {"attn_implementation": "flash_attention_2"}
    trainer, manifest, _ = run(tmp_path / "named", model_folder, qa_file, model=named)
    assert manifest["attention"] == "flash_attention_2, as configured"
    assert isinstance(trainer.data_collator.collate, JoinCollator)
    assert calls.varlen


def test_batches_of_a_run_carry_what_the_loss_needs(
    tmp_path: Path, model_folder: Path, qa_file: Path
) -> None:
    trainer, _, _ = run(tmp_path / "run", model_folder, qa_file)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "supervised", "num_tokens"}
    assert isinstance(batch["num_tokens"], int)
    model = trainer.model.eval()
    alone = {key: batch[key] for key in ("input_ids", "labels")}
    assert supervised_loss(model, model, batch) == supervised_loss(model, model, alone)


@pytest.mark.slow
def test_held_out_rows_are_measured_in_batches_of_the_kind_that_is_trained(
    tmp_path: Path,
    model_folder: Path,
    qa_file: Path,
    calls: flash.Calls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = model_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.0}))
    seen: dict[str, list[Any]] = {}
    plain = evaluation.supervised_loss

    def noted(model: Any, unwrapped: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        loss = plain(model, unwrapped, batch, *rest, **named)
        batches.append(("cu_seq_lens_q" in batch, "attention_mask" in batch, float(loss)))
        return loss

    monkeypatch.setattr(evaluation, "supervised_loss", noted)
    for name in ("sdpa", "flash_attention_2"):
        for is_packed in (False, True):
            batches = seen[f"{name} {is_packed}"] = []
            run(
                tmp_path / f"{name}-{is_packed}",
                model_folder,
                qa_file,
                model={"attn_implementation": name},
                data={"enable_packing": is_packed, "validation_split": 0.25},
            )
    kinds = {name: {batch[:2] for batch in batches} for name, batches in seen.items()}
    assert kinds == {
        "sdpa False": {(False, False)},
        "sdpa True": {(False, True)},
        "flash_attention_2 False": {(True, False)},
        "flash_attention_2 True": {(True, False)},
    }
    for packed in ("False", "True"):
        one, other = ([b[2] for b in seen[f"{name} {packed}"]] for name in ("sdpa", BOTH[1]))
        assert one == pytest.approx(other, rel=1e-4)


def test_names_that_are_installed_are_listed(calls: flash.Calls) -> None:
    assert attention.installed_attention() == BOTH
