"""The options of section `lora`: resumed bit for bit, published and proved, merged."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.integration.test_resume_exact import QUIET, check_same_state, resumed
from trainer.config.training_sections import LoraSection
from trainer.core.finished import open_run
from trainer.core.merging import distance, export_merged
from trainer.models.adapters import add_lora
from trainer.models.chat_template import chat_template_hash, tokenizer_hash
from trainer.models.load import add_tokens, grow_embeddings
from trainer.preview.neutral import as_received, golden_logprobs
from trainer.publish.identity import (
    NOISE_FP32,
    Canary,
    adapter_config,
    adapter_tensors,
    base_tensors,
    config_hash,
)
from trainer.publish.weight_file import WeightFile
from trainer.publish.wire import AdapterConfig, ServerHashes
from trainer.server import held_model
from trainer.server.held_model import HeldModel
from trainer.server.weight_store import check_fit

LORA = {"training_mode": "lora", "learning_rate": 1e-2, "max_steps": 6}
TOKENS = {"add_tokens": ["it is", "<<x>>"]}
FAMILY: dict[str, dict[str, Any]] = {
    "rslora": {"lora": {"use_rslora": True, "r": 4}},
    "dora": {"lora": {"use_dora": True, "r": 4, "dropout": 0.1}},
    "neftune": {"lora": {"neftune_alpha": 8.0}},
    "added tokens": {"model": TOKENS},
    "one layer": {"lora": {"layers_to_transform": [1], "init": "gaussian"}},
    "tied copy": {"lora": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}},
    "together": {
        "model": TOKENS,
        "lora": {"use_rslora": True, "use_dora": True, "r": 3, "dropout": 0.1, "neftune_alpha": 2},
    },
}
TRAINED_ON = "an adapter trained on"
SHORT = ("together", "tied copy", TRAINED_ON)
"""Of these the shorter test suite is made; the others are the long one's."""

EACH = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SHORT else pytest.mark.long)
        for name in (*FAMILY, TRAINED_ON)
    ],
)
GOLDEN = ([5, 6, 7, 8], list(range(20, 90)))


@pytest.fixture
def finished(train: Callable[..., Any]) -> Callable[..., Path]:
    """A function that trains with options of the family; gives the run's folder."""

    def run(name: str, /, **sections: Any) -> Path:
        result = train(name, hyperparams=LORA, monitoring=QUIET, **sections)
        assert result.success, result.error_message
        return Path(result.output_dir)

    return run


@pytest.fixture
def options(finished: Callable[..., Path]) -> Callable[[str], dict[str, Any]]:
    """A function that gives the sections of a member of the family; an adapter to train on."""

    def find(name: str) -> dict[str, Any]:
        if name != TRAINED_ON:
            return FAMILY[name]
        return {"model_path": str(finished("before", **FAMILY["together"]))}

    return find


@EACH
def test_n16_holds_for_the_family(
    train: Callable[..., Any], options: Callable[[str], Any], name: str
) -> None:
    hyper = {"gradient_accumulation": 2, **LORA}
    straight, again = resumed(train, 3, hyperparams=hyper, monitoring=QUIET, **options(name))
    check_same_state(straight.checkpoint_path, again.checkpoint_path)


# ---- what a server builds from what it is sent, in this process


def publish(
    model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """What a server says of the golden tokens that was sent this model's base and adapter."""
    sent = folder / "model"
    model.config.save_pretrained(sent)
    tokenizer.save_pretrained(sent)
    held = HeldModel(str(sent), "cpu", wait_for_weights=True, dtype="fp32")
    hashes = ServerHashes(
        config_hash=config_hash(model.config),
        tokenizer_hash=tokenizer_hash(tokenizer),
        chat_template_hash=chat_template_hash(tokenizer),
    )
    files = {"base": base_tensors(model), "adapter": adapter_tensors(model)}
    for name, tensors in files.items():
        values = {key: value.detach().to(dtype, copy=True) for key, value in tensors.items()}
        save_file(values, folder / name)
    base = WeightFile(folder / "base", hashes).manifest()
    check_fit(base, held.manifest)
    config = AdapterConfig.model_validate_json(adapter_config(model).model_dump_json())
    offer = WeightFile(folder / "adapter", hashes, base.weights_id, config).manifest()
    check_fit(offer, held.manifest)
    held.load_weights(
        str(folder / "adapter"),
        offer.weights_id,
        adapter=config,
        base_id=base.weights_id,
        base_path=str(folder / "base"),
    )
    return golden_logprobs(held.model, *GOLDEN)


def is_same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    canary = Canary((0,), len(GOLDEN[1]), NOISE_FP32, lambda: mine)
    return canary.disagreement(float(mine.sum()), float(theirs.sum())) is None


def is_verified(run: Path, folder: Path) -> bool:
    """Whether a server says the same with the final adapter of a run."""
    model, tokenizer = open_run(run).load()
    return is_same(golden_logprobs(model, *GOLDEN), publish(model, tokenizer, folder))


@pytest.mark.slow
def test_mutant_a_server_that_ignores_the_scale_is_found_out(
    finished: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = held_model._with_adapter

    def deaf(base: Any, adapter: AdapterConfig) -> Any:
        return build(base, adapter.model_copy(update={"use_rslora": False}))

    monkeypatch.setattr(held_model, "_with_adapter", deaf)
    assert not is_verified(finished("a", **FAMILY["rslora"]), tmp_path / "sent")


BF16: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "target_modules": ("q_proj", "lm_head", "embed_tokens")},
    "rows": {"use_rslora": True},
    "tied copy": {"modules_to_save": ("lm_head",), "ensure_weight_tying": True},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", BF16)
def test_a_server_computes_the_same_in_bf16(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, name: str, tied: bool
) -> None:
    if name == "tied copy" and not tied:
        pytest.skip("there is no tie")
    tokenizer = copy.deepcopy(tokenizer)
    base = make_model(vocab_size=len(tokenizer), tie_word_embeddings=tied).bfloat16()
    ids = []
    if name == "rows":
        add_tokens(tokenizer, ["<<x>>", "<<y>>"])
        ids = tokenizer.convert_tokens_to_ids(["<<x>>", "<<y>>"])
        grow_embeddings(base, ids)
    model = add_lora(base, LoraSection(**BF16[name]), seed=0, token_ids=ids)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    with as_received(model, lambda tensor: torch.bfloat16):
        mine = golden_logprobs(model, *GOLDEN)
    assert is_same(mine, publish(model, tokenizer, tmp_path / "sent", torch.bfloat16))
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


# ---- published, merged, and loaded by plain PEFT


@EACH
def test_n21_n29_a_server_and_a_merge_say_what_the_adapter_says(
    finished: Callable[..., Path], options: Callable[[str], Any], tmp_path: Path, name: str
) -> None:
    run = finished("a", **options(name))
    assert is_verified(run, tmp_path / "sent")
    report = export_merged(open_run(run), run / "merged_model")
    assert report.merged < 1e-4
    ids = torch.tensor([GOLDEN[0] + GOLDEN[1]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(run / "merged_model").eval()(ids).logits
        model = AutoPeftModelForCausalLM.from_pretrained(run / "final_model").eval()
        said = model(ids).logits
        with model.disable_adapter():
            plain = model(ids).logits
        served = HeldModel(str(run / "final_model"), "cpu", wait_for_weights=False)
        assert distance(said, served.model(ids).logits)[1] < 2e-6
    assert distance(said, merged)[1] < 2e-6
    assert distance(said, plain)[1] > 1e-2, "the adapter does something"


@pytest.mark.long
@pytest.mark.parametrize("name", ["together", TRAINED_ON])
def test_previews_of_a_sidecar_are_verified(
    train: Callable[..., Any], options: Callable[[str], Any], tmp_path: Path, name: str
) -> None:
    monitoring = {"preview_backend": "sidecar", "inference_interval": 3, "num_eval_samples": 2}
    result = train("a", hyperparams=LORA, monitoring=monitoring, **options(name))
    assert result.success, result.error_message
    lines = (tmp_path / "a" / "previews.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if row["step"] == 6]
    assert [row["weights"] for row in last] == ["verified"] * 2


# ---- what `--model` takes


@pytest.mark.slow
def test_a_run_stands_for_its_final_model_and_all_weights_are_trained_of_whole_models_only(
    train: Callable[..., Any], finished: Callable[..., Path], tmp_path: Path
) -> None:
    full = train("full", hyperparams={"max_steps": 2}, monitoring=QUIET)
    on = train("on", model_path=str(full.output_dir), hyperparams={"max_steps": 2})
    assert on.success, on.error_message
    record = json.loads((on.output_dir / "run.json").read_text())
    assert record["config"]["model"]["model_path"] == str(full.model_path)
    run = finished("adapter")
    for path in (run, run / "final_model", run / "checkpoints" / "step-00000006"):
        refused = train("no", model_path=str(path), hyperparams={"max_steps": 2})
        assert refused.exit_code == 2
        assert "set hyperparams.training_mode=lora" in refused.error_message
        assert not (tmp_path / "no").exists()
    shutil.rmtree(run / "final_model")
    refused = train("no", model_path=str(run), hyperparams=LORA)
    assert (refused.exit_code, "has no final model" in refused.error_message) == (2, True)
    onward = train("c", model_path=str(run / "checkpoints" / "step-00000006"), hyperparams=LORA)
    assert onward.success, onward.error_message


@pytest.mark.slow
def test_options_against_the_adapter_that_is_trained_on_are_refused_before_anything_is_written(
    train: Callable[..., Any], finished: Callable[..., Path], tmp_path: Path
) -> None:
    run = str(finished("adapter"))
    refused = train("no", model_path=run, hyperparams=LORA, lora={"r": 5})
    assert (refused.exit_code, "lora.r=5" in refused.error_message) == (2, True)
    refused = train("no", model_path=run, hyperparams=LORA, model={"add_tokens": ["it is"]})
    assert (refused.exit_code, "model.add_tokens" in refused.error_message) == (2, True)
    assert not (tmp_path / "no").exists()
