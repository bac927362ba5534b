"""A base that is quantized already: LoRA, local previews and chat work, the rest is one error."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.cli import main
from trainer.config.training_sections import ModelSection
from trainer.core import TrainerEngine
from trainer.core.finished import open_run
from trainer.core.merging import export_merged
from trainer.errors import ModelError
from trainer.models.load import read_model_config
from trainer.models.quantized import check_trainable, quantization_of
from trainer.server.held_model import HeldModel

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.fixture
def quantized(tmp_path: Path, tokenizer: Any, make_model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes a bitsandbytes folder of 4 or 8 bit, beside its plain original."""

    def make(bits: int) -> Path:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        plain, folder = tmp_path / "plain", tmp_path / f"bits-{bits}"
        size = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        make_model(vocab_size=len(tokenizer), **size).save_pretrained(plain)
        options: dict[str, Any] = (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
            if bits == 4
            else {"load_in_8bit": True}
        )
        model = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
        )
        model.save_pretrained(folder)
        for one in (plain, folder):
            tokenizer.save_pretrained(one)
        return folder

    return make


def run(job: Callable[..., Any], folder: Path, mode: str = "lora", **sections: Any) -> Any:
    hyper = {"training_mode": mode, "max_steps": 3, "learning_rate": 1e-2}
    monitoring = {"inference_interval": 3, "preview_max_tokens": 3, "num_eval_samples": 1}
    monitoring |= sections.pop("monitoring", {})
    config = job(model_path=str(folder), hyperparams=hyper, monitoring=monitoring, **sections)
    return TrainerEngine().run_job(config)


@pytest.mark.parametrize("bits", [4, 8])
def test_lora_trains_previews_and_chats_on_a_quantized_base(
    bits: int,
    quantized: Callable[..., Path],
    job: Callable[..., Any],
    capsys: Any,
    monkeypatch: Any,
) -> None:
    result = run(job, quantized(bits))
    assert result.success, result.error_message
    answers = [json.loads(line) for line in (result.output_dir / "previews.jsonl").open()]
    assert len(answers) == 2
    assert not any(answer["error_message"] for answer in answers)
    monkeypatch.setattr("sys.stdin", io.StringIO("what is 1 plus 1?\n"))
    assert main(["chat", str(result.output_dir), "--max-new-tokens", "3"]) == 0
    assert "no answer" not in capsys.readouterr().out
    with pytest.raises(ModelError, match=f"bitsandbytes, {bits} bit.*--base"):
        export_merged(open_run(result.output_dir), result.output_dir / "merged_model")
    assert not list(result.output_dir.glob("*merged*"))


@pytest.mark.parametrize(
    ("mode", "backend", "words"),
    [
        ("full", "local", "training_mode=full would have to move them"),
        ("lora", "sidecar", "preview_backend=sidecar sends plain weights"),
        ("lora", "remote_3090", "preview_backend=remote_3090 sends plain weights"),
    ],
)
def test_what_a_quantized_base_cannot_do_is_refused_before_anything_is_written(
    mode: str, backend: str, words: str, quantized: Callable[..., Path], job: Callable[..., Any]
) -> None:
    remote = {"remote_3090_host": "127.0.0.1"} if backend == "remote_3090" else {}
    result = run(job, quantized(4), mode, monitoring={"preview_backend": backend, **remote})
    assert result.exit_code == 2
    assert words in str(result.error_message)
    assert not result.output_dir.exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "hqq"])
def test_other_kinds_of_quantized_weights_are_refused_by_name(
    method: str, model_folder: Path, job: Callable[..., Any]
) -> None:
    path = model_folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    for mode in ("full", "lora"):
        result = run(job, model_folder, mode)
        assert result.exit_code == 2
        assert f"quantized already ({method})" in str(result.error_message)
        assert not result.output_dir.exists()
    with pytest.raises(ModelError, match=method):
        HeldModel(str(model_folder), "cpu", wait_for_weights=False)


def test_an_adapter_of_a_quantized_base_is_merged_into_the_original(
    quantized: Callable[..., Path], job: Callable[..., Any], tmp_path: Path
) -> None:
    result = run(job, quantized(4))
    words = ["export", str(result.output_dir), "--merge", "--base", str(tmp_path / "plain")]
    assert main(words) == 0
    merged = result.output_dir / "merged_model"
    assert quantization_of(read_model_config_of(merged)) is None


def read_model_config_of(folder: Path) -> Any:
    return read_model_config(ModelSection(model_path=str(folder)))


def test_a_quantized_model_is_served_and_takes_no_weights(quantized: Callable[..., Path]) -> None:
    folder = quantized(4)
    held = HeldModel(str(folder), "cpu", wait_for_weights=False)
    with torch.no_grad():
        assert torch.isfinite(held.model(torch.tensor([[5, 6, 7]])).logits).all()
    with pytest.raises(ModelError, match="a trainer sends plain ones"):
        HeldModel(str(folder), "cpu", wait_for_weights=True)


def test_modules_whose_weights_are_quantized_are_not_trained_whole(
    quantized: Callable[..., Path], job: Callable[..., Any]
) -> None:
    result = run(job, quantized(4), lora={"modules_to_save": ("down_proj",)})
    assert result.exit_code == 2
    assert "down_proj are quantized" in str(result.error_message)
    assert not result.output_dir.exists()


def test_a_config_says_how_its_weights_are_quantized() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig()
    assert quantization_of(config) is None
    check_trainable(config, "m", training_mode="full", previews="sidecar")
    config.quantization_config = {"load_in_8bit": True}
    assert str(quantization_of(config)) == "bitsandbytes, 8 bit"
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert str(quantization_of(config)) == "gptq, 4 bit"


def test_the_missing_package_is_named(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.models import precision as module

    folder = quantized(4)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'ultimate-trainer\[8bit\]'"):
        read_model_config_of(folder)
