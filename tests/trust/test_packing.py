"""N5 and N6: packed rows train as unpacked ones do, and documents of a pack never meet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trust import flash
from trainer.config import create_default_config
from trainer.core import TrainerEngine
from trainer.core.proofs import check_documents_apart
from trainer.data.batches import PackCollator, best_fit_decreasing, count_tokens, join_documents
from trainer.errors import ConfigError


@pytest.fixture
def train(tmp_path: Path, model_folder: Path, qa_file: Path) -> Callable[..., Any]:
    """A function that trains a model without dropout for whole epochs of one step each."""
    path = model_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.0}))

    def run(name: str, *, packing: bool, attention: str = "sdpa", **sections: Any) -> Any:
        hyper = {
            "batch_size": 64,
            "learning_rate": 0.05,
            "num_epochs": 3,
            "fp_precision": "fp32",
            "max_length": 128,
            "max_grad_norm": 0.0,
            "warmup_steps": 0,
            **sections.pop("hyperparams", {}),
        }
        config = create_default_config(
            model_path=str(model_folder),
            dataset_path=str(qa_file),
            output_dir=str(tmp_path / name),
            hyperparams=hyper,
            model={"attn_implementation": attention},
            data={"enable_packing": packing, "validation_split": 0.1},
            monitoring={"inference_interval": 0, "report_to": ()},
            environment={"num_threads": 1, "device": "cpu"},
            **sections,
        )
        result = TrainerEngine().run_job(config)
        assert result.success, result.error_message
        return result

    return run


@pytest.fixture
def sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain SGD: AdamW would hide errors of scale."""
    import trainer.core.training as training

    monkeypatch.setattr(
        training,
        "build_optimizer",
        lambda model, *_, **__: torch.optim.SGD(model.parameters(), lr=0.1),
    )


def moved(before: Path, after: Path) -> torch.Tensor:
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    return torch.cat([(new[name].double() - old[name].double()).flatten() for name in sorted(new)])


def check_packed_equals_unpacked(train: Callable[..., Any], start: Path, attention: str) -> None:
    """N5: three steps over all rows move the weights alike."""
    plain = moved(start, train("plain", packing=False, attention=attention).model_path)
    packed = moved(start, train("packed", packing=True, attention=attention).model_path)
    assert plain.norm() > 0.01
    assert (packed - plain).norm() <= 2e-6 * plain.norm()


@pytest.mark.parametrize(
    "attention", ["sdpa", pytest.param("eager", marks=pytest.mark.long), "flash_attention_2"]
)
def test_n5_packed_trains_as_unpacked(
    train: Callable[..., Any], model_folder: Path, attention: str, sgd: None
) -> None:
    with flash.installed():
        check_packed_equals_unpacked(train, model_folder, attention)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_packs_for_a_varlen_kernel_are_trained_in_bf16(
    train: Callable[..., Any], mode: str
) -> None:
    hyper = {"batch_size": 2, "max_steps": 2, "fp_precision": "bf16", "training_mode": mode}
    hyper["learning_rate"] = 1e-3
    with flash.installed() as calls:
        train("bf16", packing=True, attention="flash_attention_2", hyperparams=hyper)
        assert calls.varlen


def add_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: an attention mask of ones beside the packs."""
    collate = PackCollator.__call__

    def with_mask(self: PackCollator, packs: list[Any]) -> dict[str, torch.Tensor]:
        batch = collate(self, packs)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    monkeypatch.setattr(PackCollator, "__call__", with_mask)


def test_mutant_n5_all_ones_mask_is_killed(
    train: Callable[..., Any], model_folder: Path, sgd: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_mask(monkeypatch)
    # The check at start would stop the run before N5 could see anything.
    monkeypatch.setattr("trainer.core.proofs.check_documents_apart", lambda *_, **__: None)
    with pytest.raises(AssertionError):
        check_packed_equals_unpacked(train, model_folder, "sdpa")


def second_logits(model: Any, first: list[int], second: list[int]) -> torch.Tensor:
    documents = [
        {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in (first, second)
    ]
    batch = PackCollator(0)([join_documents(documents)])
    del batch["labels"]
    with torch.no_grad():
        return model(**batch, use_cache=False).logits[0, len(first) :]


def check_first_document_changes_nothing(model: Any) -> None:
    """N6: document 2 is bit-equal, whatever stands in document 1."""
    one = second_logits(model, [5, 6, 7, 8], [9, 10, 11])
    two = second_logits(model, [50, 60, 70, 80], [9, 10, 11])
    assert torch.equal(one, two)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_n6_changing_document_1_leaves_document_2_bit_equal(
    make_model: Callable[..., Any], attention: str
) -> None:
    check_first_document_changes_nothing(make_model(attn_implementation=attention).eval())


def test_mutant_n6_positions_reset_only_is_killed(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_mask(monkeypatch)
    with pytest.raises(AssertionError):
        check_first_document_changes_nothing(make_model().eval())


def test_a_model_with_convolutions_is_refused_and_a_transformer_is_not(
    make_model: Callable[..., Any],
) -> None:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    check_documents_apart(make_model().eval())
    config = Lfm2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        full_attn_idxs=[1],
    )
    torch.manual_seed(0)
    with (
        torch.no_grad(),
        pytest.raises(ConfigError, match="Lfm2ForCausalLM lets the documents of a pack see"),
    ):
        check_documents_apart(Lfm2ForCausalLM(config).eval())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_gpu_keeps_the_documents_of_packs_apart_and_a_mask_is_noticed(
    make_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    dtype: torch.dtype,
) -> None:
    model = make_model().to("cuda", dtype).eval()
    check_documents_apart(model, batch_size=batch_size, collate=PackCollator(0))
    add_mask(monkeypatch)
    with pytest.raises(ConfigError, match="see each other"):
        check_documents_apart(model, batch_size=batch_size, collate=PackCollator(0))


def test_every_document_is_in_one_pack_and_no_pack_overflows() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 101, (500,), generator=generator).tolist()
    packs = best_fit_decreasing(lengths, 100)
    assert sorted(index for pack in packs for index in pack) == list(range(500))
    assert all(sum(lengths[i] for i in pack) <= 100 for pack in packs)
    assert len(packs) <= 1.05 * sum(lengths) / 100


def test_first_tokens_take_no_loss_and_padding_is_not_counted() -> None:
    long, short = ({"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (5, 3))
    batch = PackCollator(0)([join_documents([long, short]), join_documents([short])])
    assert batch["labels"][0].tolist() == [-100, 1, 2, 3, 4, -100, 1, 2]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch["labels"][1, 3:].tolist() == [-100] * 5
    assert int(count_tokens(batch)) == 11


def test_a_packed_run_resumes_bit_for_bit(train: Callable[..., Any], tmp_path: Path) -> None:
    hyper = {"batch_size": 2, "max_steps": 6, "learning_rate": 1e-2}
    keep = {"checkpoint_interval": 1, "keep_checkpoints": 20}
    straight = train("straight", packing=True, hyperparams=hyper, output=keep)
    shutil.copytree(tmp_path / "straight" / "checkpoints", tmp_path / "again" / "checkpoints")
    for step in range(4, 7):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step-{step:08d}")
    shutil.copy(tmp_path / "straight" / "run.json", tmp_path / "again")
    resume = {**keep, "resume": "latest"}
    again = train("again", packing=True, hyperparams=hyper, output=resume)
    one, two = (load_file(r.model_path / "model.safetensors") for r in (straight, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
