"""A base that is quantized already: adapters, previews and chat work, the rest is one error."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.previews.test_published import KEY, remote
from tests.integration.serving import running_server
from trainer.cli import main
from trainer.config.training_sections import ModelSection
from trainer.core import TrainerEngine
from trainer.core.finished import open_run
from trainer.core.merging import export_merged
from trainer.errors import ModelError
from trainer.models.load import read_model_config
from trainer.models.quantized import check_trainable, quantization_of
from trainer.publish.identity import canonical_tensors
from trainer.server.held_model import HeldModel, UnanswerableError

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
    ("bits", "mode"),
    [
        (4, "lora"),
        pytest.param(4, "qlora", marks=pytest.mark.long),
        pytest.param(8, "lora", marks=pytest.mark.long),
    ],
)
@pytest.mark.slow
def test_a_sidecar_takes_the_quantized_base_and_every_preview_is_verified(
    bits: int, mode: str, quantized: Callable[..., Path], job: Callable[..., Any]
) -> None:
    result = run(job, quantized(bits), mode, monitoring={"preview_backend": "sidecar"})
    assert result.success, result.error_message
    answers = [json.loads(line) for line in (result.output_dir / "previews.jsonl").open()]
    found = [(answer["weights"], answer["error_message"]) for answer in answers]
    assert found == [("verified", None)] * 2


def test_all_weights_of_a_quantized_base_are_not_trained(
    quantized: Callable[..., Path], job: Callable[..., Any]
) -> None:
    result = run(job, quantized(4), "full")
    assert result.exit_code == 2
    assert "training_mode=full would have to move them" in str(result.error_message)
    assert not result.output_dir.exists()


@pytest.mark.long
def test_a_server_of_the_quantized_folder_is_sent_adapters_only(
    quantized: Callable[..., Path], job: Callable[..., Any], tmp_path: Path
) -> None:
    folder = quantized(4)
    (tmp_path / "keys").write_text(f"{KEY}\n")
    with running_server("--model", str(folder), "--api-key-file", str(tmp_path / "keys")) as server:
        result = run(job, folder, monitoring=remote(server, tmp_path))
    answers = [json.loads(line) for line in (result.output_dir / "previews.jsonl").open()]
    found = [(answer["weights"], answer["error_message"]) for answer in answers]
    assert found == [("verified", None)] * 2
    [saved] = result.model_path.glob("*model.safetensors")
    sent = result.summary["previews"]["bytes_sent"]
    assert sent == pytest.approx(2 * saved.stat().st_size, rel=0.1)


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


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_server_takes_the_weights_of_its_twin_and_says_the_same(
    bits: int, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    folder = quantized(bits)
    held = HeldModel(str(folder), "cpu", wait_for_weights=False)
    waits = HeldModel(str(folder), "cpu", wait_for_weights=True)
    names = [entry.name for entry in held.manifest.tensors]
    assert [entry.name for entry in waits.manifest.tensors] == names
    assert waits.weights_id is None
    path = tmp_path / "base.safetensors"
    save_file({k: v.contiguous() for k, v in canonical_tensors(held.base).items()}, path)
    waits.load_weights(str(path), "f" * 64)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        found, wanted = (one.model(ids).logits for one in (waits, held))
    assert torch.isfinite(wanted).all()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shape", lambda said: {**said, "shape": [4096, 4096]}),
        ("blocksize", lambda said: {**said, "blocksize": 4096}),
        ("nothing", lambda said: {}),
        ("dtype", lambda said: {**said, "dtype": "load_library"}),
        ("offset", lambda said: {**said, "nested_offset": float("nan")}),
        ("another key", lambda said: {**said, "hook": 1}),
    ],
)
def test_a_text_that_is_not_of_its_matrix_is_refused_and_nothing_changes(
    name: str, change: Callable[[Any], Any], quantized: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    held = HeldModel(str(quantized(4)), "cpu", wait_for_weights=False)
    before = held.weights_id
    tensors = {k: v.contiguous() for k, v in canonical_tensors(held.base).items()}
    text = next(key for key in tensors if "quant_state.bitsandbytes" in key)
    said = change(json.loads(bytes(tensors[text].tolist())))
    tensors[text] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(UnanswerableError, match="quantized in another way"):
        held.load_weights(str(tmp_path / "base.safetensors"), "f" * 64)
    assert held.weights_id == before


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
    check_trainable(config, "m", training_mode="full")
    config.quantization_config = {"load_in_8bit": True}
    assert str(quantization_of(config)) == "bitsandbytes, 8 bit"
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert str(quantization_of(config)) == "gptq, 4 bit"


def test_the_missing_package_is_named(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.models import quantized as module

    folder = quantized(4)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'ultimate-trainer\[qlora\]'"):
        read_model_config_of(folder)


def test_qlora_without_the_package_is_one_line_and_nothing_is_written(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.models import quantized as module

    find = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util,
        "find_spec",
        lambda name: None if name == "bitsandbytes" else find(name),
    )
    result = train(hyperparams={"training_mode": "qlora"})
    assert result.exit_code == 2
    assert "pip install 'ultimate-trainer[qlora]'" in str(result.error_message)
    assert not result.output_dir.exists()
