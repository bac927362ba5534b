"""The commands as a user types them, each in a process of its own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
SHORT = ["--batch-size", "4", "--fp32", "--monitoring.preview_max_tokens", "8"]
SHORT += ["--monitoring.preview_temperature", "0"]


def losses(out: Path) -> list[float]:
    """Training loss of each step."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return list({row["step"]: row["train_loss"] for row in rows if "tokens_per_s" in row}.values())


@pytest.fixture
def finished(cli: Callable[..., Any], qa_file: Path, tmp_path: Path) -> Path:
    """The folder of a finished run of the tiny model."""
    out = tmp_path / "run"
    words = ["train", "--dataset", qa_file, "--model", "tiny", "--output", out, "--max-steps", "6"]
    done = cli(*words, *SHORT)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_file(), reason="the GSM8K rows are not beside the repository")
def test_gsm8k_trains_to_the_end_with_previews_and_a_falling_loss(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "gsm"
    words = ["train", "--dataset", GSM8K, "--model", "tiny", "--max-steps", "40", "--output", out]
    done = cli(*words, "--monitoring.inference_interval", "20")
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stdout.splitlines() if "loading the libraries" not in line)
    assert first == f"live page: trainer monitor {out}"
    assert "golden:" in done.stdout
    assert "previews at step 40" in done.stdout
    found = losses(out)
    assert sum(found[-5:]) / 5 < 0.8 * found[0]
    steps = {json.loads(line)["step"] for line in (out / "previews.jsonl").open()}
    assert steps == {0, 20, 40}


@pytest.mark.slow
def test_the_classic_script_trains_qwen3_offline_from_a_hub_cache(
    cli: Callable[..., Any],
    qa_file: Path,
    tmp_path: Path,
    tokenizer: Any,
    make_model: Callable[..., Any],
) -> None:
    cache = tmp_path / "hub"
    repo = cache / "models--Qwen--Qwen3-0.6B"
    snapshot = repo / "snapshots" / ("0" * 40)
    make_model(vocab_size=len(tokenizer)).save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    words = ["--dataset", qa_file, "--model", "qwen3", "--output", tmp_path / "outputs"]
    done = cli(
        *words,
        *SHORT,
        "--max-steps",
        "3",
        command=[sys.executable, str(ROOT / "core" / "train.py")],
        env={"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "final_model" / "model.safetensors").is_file()


def test_without_network_and_cache_there_is_one_error(
    cli: Callable[..., Any], qa_file: Path, tmp_path: Path
) -> None:
    env = {"HF_HUB_CACHE": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    done = cli("train", "--dataset", qa_file, "--model", "qwen3", "--output", "out", env=env)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "not in the local cache" in done.stderr
    assert not (tmp_path / "cwd" / "out").exists()


def test_a_dry_run_prints_the_sums_and_trains_nothing(
    cli: Callable[..., Any], qa_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dry"
    words = ["--dataset", qa_file, "--model", "tiny", "--output", out, "--max-steps", "5"]
    done = cli("train", "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    shown = ("trained", "weights", "gradients", "optimizer", "activations", "fits", "qlora", "5 of")
    for word in shown:
        assert word in done.stdout, done.stdout
    assert re.search(r"\n  bf16 +(\d+\.\d\d times fp32's speed|this CPU has no bf16)", done.stdout)
    assert [path.name for path in out.iterdir()] == ["config.resolved.json"]


@pytest.mark.slow
def test_a_dry_runs_config_file_trains_the_same_run(
    cli: Callable[..., Any], qa_file: Path, tmp_path: Path
) -> None:
    words = ["--dataset", qa_file, "--model", "tiny", "--output", tmp_path / "dry", *SHORT]
    assert cli("train", "--dry-run", *words, "--max-steps", "2").returncode == 0
    file = tmp_path / "dry" / "config.resolved.json"
    done = cli("train", "--config", file, "--output", tmp_path / "real")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "real")) == 2


@pytest.mark.slow
def test_chat_answers_lines_of_standard_input(cli: Callable[..., Any], finished: Path) -> None:
    words = ["chat", finished, "--max-new-tokens", "5"]
    done = cli(*words, input="what is 3 plus 3?\n/reset\nand 4?\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_chat_with_a_folder_that_is_no_run_says_so(cli: Callable[..., Any]) -> None:
    done = cli("chat", ".")
    assert done.returncode == 2
    assert "holds no run" in done.stderr


@pytest.mark.slow
def test_an_exported_merge_is_a_plain_model_that_says_what_the_adapter_says(
    cli: Callable[..., Any], qa_file: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from trainer.models.adapter_files import load_finished_model

    out, merged = tmp_path / "lora", tmp_path / "merged"
    words = ["--dataset", qa_file, "--model", "tiny", "--output", out, "--max-steps", "4", *SHORT]
    done = cli("train", *words, "--hyperparams.training_mode", "lora")
    assert done.returncode == 0, done.stderr
    done = cli("export", out, "--merge", "--output", merged)
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        one = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        two = load_finished_model(out / "final_model")(ids).logits
    assert torch.allclose(one, two, atol=1e-5)


def test_doctor_and_models_print_what_is_here(cli: Callable[..., Any]) -> None:
    doctor = cli("doctor", "--offline")
    assert doctor.returncode == 0, doctor.stderr
    for word in ("torch", "memory", "attention", "precision", "not asked"):
        assert word in doctor.stdout
    assert doctor.stderr == ""
    models = cli("models")
    assert "Qwen/Qwen3-0.6B" in models.stdout


@pytest.mark.slow
def test_json_display_prints_one_object_per_line(
    cli: Callable[..., Any], qa_file: Path, tmp_path: Path
) -> None:
    words = ["--dataset", qa_file, "--model", "tiny", "--output", tmp_path / "o", *SHORT]
    done = cli("train", *words, "--max-steps", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert all(isinstance(json.loads(line), dict) for line in done.stdout.splitlines())


def test_an_unknown_command_names_the_nearest_one(cli: Callable[..., Any]) -> None:
    done = cli("trian")
    assert done.returncode == 2
    assert "Did you mean 'train'?" in done.stderr


def test_a_dry_run_prints_json_for_programs_and_little_when_quiet(
    cli: Callable[..., Any], qa_file: Path, tmp_path: Path
) -> None:
    words = ["--dry-run", "--dataset", qa_file, "--model", "tiny", "--output", tmp_path / "dry"]
    done = cli("train", *words, "--json")
    assert done.returncode == 0, done.stderr
    last = [json.loads(line) for line in done.stdout.splitlines()][-1]
    assert (last["event"], last["num_steps"]) == ("DryRun", 5)
    assert last["memory"]["weights"] == 4 * last["memory"]["num_parameters"]
    fit = last["fit"]
    assert (fit["device"], fit["batch_size"], fit["gradient_accumulation"]) == ("cpu", 8, 1)
    assert 0 < fit["total"] < fit["memory"]
    assert [mode["mode"] for mode in last["modes"]][:1] == ["full"]
    assert last["precision"] == "fp32 everywhere on cpu"
    assert "fp32" in last["bf16"]["words"]
    quiet = cli("train", *words, "--quiet").stdout
    assert "card" not in quiet
    assert "memory" in quiet


def test_a_path_that_the_locale_cannot_show_is_printed_all_the_same(
    cli: Callable[..., Any], qa_file: Path
) -> None:
    words = ["train", "--dry-run", "--dataset", qa_file, "--model", "tiny"]
    done = cli(*words, "--output", "\u00fc", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
