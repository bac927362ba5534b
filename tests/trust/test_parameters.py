"""N20 and N23: exactly the intended weights move, and added tokens are trained, saved, reloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.config import create_default_config
from trainer.core import TrainerEngine, training

MARKERS = ("<<ANS_START>>", "<<ANS_END>>")


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, qa_file: Path) -> Callable[..., Any]:
    """A function that makes the config of a run of three steps at a high rate."""

    def make(**sections: Any) -> Any:
        hyper = {
            "batch_size": 8,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "lr_scheduler": "constant",
            "fp_precision": "fp32",
            **sections.pop("hyperparams", {}),
        }
        return create_default_config(
            model_path=str(sections.pop("model_path", model_folder)),
            dataset_path=str(qa_file),
            output_dir=str(tmp_path / "out"),
            hyperparams=hyper,
            monitoring={"inference_interval": 0, "report_to": ()},
            environment={"num_threads": 1, "device": "cpu"},
            **sections,
        )

    return make


MODES: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "full": ({}, lambda name: True),
    "lora": (
        {"hyperparams": {"training_mode": "lora"}},
        lambda name: "lora_" in name,
    ),
    "some modules": (
        {"hyperparams": {"training_mode": "lora"}, "lora": {"target_modules": ("q_proj",)}},
        lambda name: "q_proj.lora_" in name,
    ),
    "with a saved module": (
        {
            "hyperparams": {"training_mode": "lora"},
            "lora": {"target_modules": ("q_proj",), "modules_to_save": ("norm",)},
        },
        lambda name: "q_proj.lora_" in name or "norm.modules_to_save" in name,
    ),
}


def check_what_moves(config: Callable[..., Any], mode: str) -> None:
    """N20: after three steps the named parameters differ, all others are bit-equal."""
    sections, is_meant = MODES[mode]
    engine = TrainerEngine()
    trainer = engine.create_trainer(config(**sections))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    buffers = {name: b.clone() for name, b in trainer.model.named_buffers()}
    trainer.train()
    moved = {
        name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert moved == {name for name in before if is_meant(name)}
    assert moved
    assert all(torch.equal(b, buffers[name]) for name, b in trainer.model.named_buffers())


@pytest.mark.parametrize("mode", MODES)
def test_n20_exactly_the_intended_parameters_move(config: Callable[..., Any], mode: str) -> None:
    check_what_moves(config, mode)


def test_mutant_n20_frozen_adapter_is_killed(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import trainer.core.preparation as preparation

    add = preparation.add_lora

    def frozen(*args: Any, **named: Any) -> Any:
        model = add(*args, **named)
        name = next(n for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n)
        model.get_parameter(name).requires_grad_(False)
        return model

    monkeypatch.setattr(preparation, "add_lora", frozen)
    with pytest.raises(AssertionError):
        check_what_moves(config, "lora")


@pytest.fixture
def folder_of(
    tmp_path: Path, tokenizer: Any, make_model: Callable[..., Any]
) -> Callable[[bool], Path]:
    """A function that saves a model with a tied or an untied head."""

    def make(tied: bool) -> Path:
        folder = tmp_path / f"tied-{tied}"
        make_model(vocab_size=len(tokenizer), tie_word_embeddings=tied).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def check_added_tokens(config: Callable[..., Any], folder: Path) -> None:
    """N23: the markers are one id each, their rows are trained, and a reload says the same."""
    engine = TrainerEngine()
    asked = config(model_path=folder, model={"add_tokens": MARKERS}, profile={"name": "regime3"})
    model, tokenizer = engine.load_model(asked)
    old = AutoModelForCausalLM.from_pretrained(folder)
    new_rows = list(range(old.config.vocab_size, len(tokenizer)))
    assert tokenizer.convert_tokens_to_ids(list(MARKERS)) == new_rows
    mean = old.get_input_embeddings().weight.mean(dim=0)
    before = model.get_input_embeddings().weight[new_rows].detach().clone()
    assert torch.allclose(before, mean.expand_as(before), atol=1e-7)
    result = engine.run_job(asked)
    assert result.success, result.error_message
    again = AutoTokenizer.from_pretrained(result.model_path)
    assert again.encode(MARKERS[0] + "x" + MARKERS[1])[::2] == new_rows
    loaded = AutoModelForCausalLM.from_pretrained(result.model_path)
    assert loaded.config.vocab_size == len(tokenizer)
    for module in (loaded.get_input_embeddings(), loaded.get_output_embeddings()):
        assert not torch.isclose(module.weight[new_rows], before).all(dim=1).any()
    ids = torch.tensor([again.encode(f"what is {MARKERS[0]} two {MARKERS[1]}")])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_n23_added_tokens_are_trained_saved_and_reloaded(
    config: Callable[..., Any], folder_of: Callable[[bool], Path], tied: bool
) -> None:
    check_added_tokens(config, folder_of(tied))


def test_mutant_n23_head_not_saved_is_killed(
    config: Callable[..., Any],
    folder_of: Callable[[bool], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    save = training.save_final_model

    def without_head(model: Any, *args: Any, **named: Any) -> Any:
        state = model.state_dict()
        state.pop("lm_head.weight")
        monkeypatch.setattr(model, "state_dict", lambda: state)
        path = save(model, *args, **named)
        monkeypatch.undo()
        return path

    monkeypatch.setattr(training, "save_final_model", without_head)
    with pytest.raises(AssertionError):
        check_added_tokens(config, folder_of(False))
