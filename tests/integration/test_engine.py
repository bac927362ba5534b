"""Whole runs: what a user gets, and that previews, resume and batching change nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.core import TrainerEngine
from trainer.monitoring import TrainingStatusReader
from trainer.monitoring.events import (
    CheckpointSaved,
    EvaluationDone,
    PhaseChanged,
    PreviewsDone,
    StepDone,
)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_writes_what_it_promises(train: Callable[..., Any]) -> None:
    result = train()
    assert result.success, result.error_message
    assert (result.state, result.exit_code, result.global_step) == ("completed", 0, 12)
    names = {path.name for path in result.output_dir.iterdir()}
    assert {
        "config.resolved.json",
        "run.json",
        "status.json",
        "metrics.jsonl",
        "previews.jsonl",
        "checkpoints",
        "final_model",
    } <= names
    status = TrainingStatusReader(result.output_dir).read()
    assert (status.state, status.step, status.total_steps) == ("completed", 12, 12)
    assert status.epoch == status.num_epochs == 12 / 8  # max_steps wins over num_epochs
    losses = [
        row["train_loss"]
        for row in rows_of(result.output_dir / "metrics.jsonl")
        if row["type"] == "StepDone"
    ]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert math.isfinite(result.val_loss)


def test_previews_come_at_step_zero_the_interval_and_the_end(train: Callable[..., Any]) -> None:
    result = train()
    rows = [row for row in rows_of(result.output_dir / "previews.jsonl") if "prompt" in row]
    by_step: dict[int, list[str]] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row["prompt"])
        assert row["golden_answer"]
        assert row["held_out"]
    assert list(by_step) == [0, 5, 10, 12]
    assert len({tuple(prompts) for prompts in by_step.values()}) == 1
    assert result.summary["previews"]["done"] == 16


def test_weights_are_bit_identical_with_previews_and_without(
    train: Callable[..., Any], assert_same_weights: Callable[..., None]
) -> None:
    steps = {"max_steps": 30}
    on = train(
        "on", hyperparams=steps, monitoring={"inference_interval": 5, "preview_temperature": 0.9}
    )
    off = train(
        "off", hyperparams=steps, monitoring={"inference_interval": 0, "micro_eval_interval": 0}
    )
    assert on.summary["previews"]["done"] == 28
    assert off.summary["previews"] is None
    assert_same_weights(on.model_path, off.model_path)


@pytest.mark.parametrize("mode", ["full", pytest.param("lora", marks=pytest.mark.long)])
def test_resume_at_three_different_steps_equals_the_uninterrupted_run(
    train: Callable[..., Any], assert_same_weights: Callable[..., None], mode: str
) -> None:
    # 32 training rows in steps of 2 x 4 are 4 steps an epoch: 2 is within the first epoch,
    # 4 at a border, 7 within the second. Dropout is on, in attention and in the adapters.
    hyper = {
        "training_mode": mode,
        "gradient_accumulation": 2,
        "max_steps": 10,
        "warmup_steps": 3,
        "optimizer": "adamw",
    }
    options: dict[str, Any] = {"hyperparams": hyper, "lora": {"dropout": 0.1}}
    keep = {"checkpoint_interval": 1, "keep_checkpoints": 20}
    straight = train("straight", **options, output=keep)
    assert straight.success, straight.error_message
    reference = metrics(straight)
    for step in (2, 4, 7):
        folder = straight.output_dir.parent / f"again{step}"
        copy_run(straight.output_dir, folder, up_to=step)
        again = train(f"again{step}", **options, output={**keep, "resume": "latest"})
        assert again.success, again.error_message
        assert_same_weights(again.model_path, straight.model_path)
        assert metrics(again)[step:] == reference[step:]


def copy_run(source: Path, target: Path, *, up_to: int) -> None:
    """What a run folder looked like when the process died after the checkpoint of a step."""
    import shutil

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("final_model", ".lock"))
    for folder in (target / "checkpoints").iterdir():
        if int(folder.name.split("-")[1]) > up_to:
            shutil.rmtree(folder)


def metrics(result: Any) -> list[tuple[Any, ...]]:
    reader = TrainingStatusReader(result.output_dir)
    return [
        (row["step"], row["train_loss"], row["grad_norm"], row["learning_rate"])
        for row in reader.metrics()
        if row["type"] == "StepDone"
    ]


def test_muon_resumes_bit_for_bit_too(
    train: Callable[..., Any], assert_same_weights: Callable[..., None]
) -> None:
    options: dict[str, Any] = {"hyperparams": {"optimizer": "muon", "max_steps": 6}}
    keep = {"checkpoint_interval": 1, "keep_checkpoints": 20}
    straight = train("straight", **options, output=keep)
    copy_run(straight.output_dir, straight.output_dir.parent / "again", up_to=3)
    again = train("again", **options, output={**keep, "resume": "latest"})
    assert again.success, again.error_message
    assert_same_weights(again.model_path, straight.model_path)


def test_the_final_model_loads_with_plain_transformers_and_says_the_same(
    train: Callable[..., Any],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(hyperparams={"max_steps": 5})
    model = AutoModelForCausalLM.from_pretrained(result.model_path)
    tokenizer = AutoTokenizer.from_pretrained(result.model_path)
    assert model.config.use_cache is True
    last = next(r for r in TrainingStatusReader(result.output_dir).previews() if r.step == 5)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": last.prompt}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    said = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(said, clean_up_tokenization_spaces=False).startswith(last.raw_text)


def test_an_adapter_loads_with_plain_peft_and_merges(
    train: Callable[..., Any], cli: Callable[..., Any], model_folder: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = train(hyperparams={"training_mode": "lora", "max_steps": 5})
    assert result.success, result.error_message
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = PeftModel.from_pretrained(base, result.model_path).eval()
    done = cli("export", result.output_dir, "--merge")
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(result.output_dir / "merged_model").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        with adapted.disable_adapter():
            untrained = adapted(ids).logits
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, rtol=2e-5, atol=2e-5)
        assert not torch.allclose(untrained, merged(ids).logits, rtol=1e-2, atol=1e-2)


def test_only_the_adapters_move_in_lora_mode(train: Callable[..., Any], model_folder: Path) -> None:
    from safetensors.torch import load_file

    result = train(hyperparams={"training_mode": "lora", "max_steps": 4})
    adapter = load_file(result.model_path / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)
    moved = [name for name in adapter if "lora_B" in name and adapter[name].abs().max() > 0]
    assert len(moved) == sum("lora_B" in name for name in adapter)
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_is_saved_in_the_precision_of_the_run(
    train: Callable[..., Any], precision: str
) -> None:
    from safetensors.torch import load_file

    result = train(hyperparams={"fp_precision": precision, "max_steps": 3})
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    saved = load_file(result.model_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    config = json.loads((result.model_path / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    masters = load_file(result.checkpoint_path / "model.safetensors")
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}


def test_a_nan_stops_the_run_before_the_weights_move(
    train: Callable[..., Any], job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.core import TrainerEngine
    from trainer.core.hf_trainer import SupervisedTrainer

    seen: dict[str, Any] = {}
    compute = SupervisedTrainer.compute_loss

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        if self.state.global_step == 3:  # the fourth step
            seen["before"] = {k: v.clone() for k, v in self.model.state_dict().items()}
            seen["trainer"] = self
            return loss * float("nan")
        return loss

    monkeypatch.setattr(SupervisedTrainer, "compute_loss", poisoned)
    result = TrainerEngine().run_job(job(output={"checkpoint_interval": 2}))
    assert (result.success, result.exit_code, result.state) == (False, 1, "failed")
    assert result.summary["error_type"] == "NonFiniteError"
    assert "step 4" in result.error_message
    after = seen["trainer"].model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in seen["before"].items())
    assert TrainingStatusReader(result.output_dir).read().state == "failed"
    assert result.checkpoint_path.name == "step-00000002"


def test_early_stopping_stops_and_says_why(train: Callable[..., Any]) -> None:
    hyper = {
        "early_stopping_patience": 2,
        "learning_rate": 1e-12,
        "max_steps": 50,
        "early_stopping_min_delta": 0.01,
        "weight_decay": 0.0,
    }
    options = {"micro_eval_interval": 2}
    result = train(hyperparams=hyper, monitoring=options, output={"keep_checkpoints": 1})
    assert result.success, result.error_message
    assert result.global_step == 6
    assert "early stopping" in result.summary["stop_reason"]
    # The best step has a checkpoint, and keeps it beside the newest one.
    kept = sorted(path.name for path in (result.output_dir / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000006"]
    assert "the checkpoint of the lowest one (step 2) is kept" in result.summary["stop_reason"]


def test_the_final_evaluation_answers_held_out_prompts(train: Callable[..., Any]) -> None:
    result = train(monitoring={"final_eval_prompts": 5, "max_eval_tokens": 4})
    found = result.summary["final_evaluation"]
    assert found["num_prompts"] == 5
    assert found["matched"] == round(found["exact_match"] * 5)
    answers = rows_of(result.output_dir / "final_evaluation.jsonl")
    assert len(answers) == 5
    assert all(row["tokens_generated"] <= 4 for row in answers)


def test_locked_values_are_compared_with_the_model(train: Callable[..., Any]) -> None:
    right = {"architecture": "Qwen3ForCausalLM", "context_length": 512}
    assert train("right", locked=right, hyperparams={"max_steps": 1}).success
    result = train("wrong", locked={**right, "vocab_size": 7})
    assert result.exit_code == 2
    assert "locked.vocab_size=7" in result.error_message
    assert not result.output_dir.exists()


def test_a_user_prompt_is_previewed_with_the_system_prompt(train: Callable[..., Any]) -> None:
    result = train(
        monitoring={"preview_prompts": ("what is the fox?",)},
        profile={"system_prompt": "Be terse."},
        hyperparams={"max_steps": 2},
    )
    rows = list(TrainingStatusReader(result.output_dir).previews())
    mine = [row for row in rows if row.prompt_id == "user-0"]
    assert [row.step for row in mine] == [0, 2]
    assert mine[0].golden_answer is None
    assert mine[0].matches is None


def test_what_keeps_training_from_a_step_is_said_before_and_that_it_goes_on_after(
    job: Callable[..., Any],
) -> None:
    told: list[str] = []

    class Listener:
        def on_event(self, event: Any) -> None:
            if isinstance(event, PhaseChanged):
                told.append(event.text)
            elif isinstance(event, PreviewsDone | EvaluationDone | StepDone | CheckpointSaved):
                told.append(f"{type(event).__name__} {event.step}")

        def close(self) -> None:
            pass

    config = job(hyperparams={"max_steps": 4}, monitoring={"num_eval_samples": 3})
    assert TrainerEngine(observers=[Listener()]).run_job(config).success
    begin = told.index("making the previews of step 0 (3 prompts, 8 tokens)")
    assert told[begin : begin + 5] == [
        *(told[begin], "PreviewsDone 0", "training", "making step 1 of 4", "StepDone 1")
    ]
    end = told.index("StepDone 4")
    assert told[end + 1 : end + 9] == [
        "measuring the validation loss of step 4",
        "training",
        "EvaluationDone 4",
        "making the previews of step 4 (3 prompts, 8 tokens)",
        "PreviewsDone 4",
        "training",
        "writing the checkpoint of step 4",
        "CheckpointSaved 4",
    ]
