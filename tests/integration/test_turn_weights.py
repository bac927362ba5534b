"""Weights of turns in a file reach the optimizer: one SGD step is the one computed by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.config import create_default_config
from trainer.core import TrainerEngine

RATE = 0.5


def conversation(*weights: float | None) -> dict[str, Any]:
    """As many questions and answers as weights; None: the answer has no key `weight`."""
    turns: list[dict[str, Any]] = []
    for n, weight in enumerate(weights):
        answer = {"role": "assistant", "content": "two plus two is " + "four " * (n + 1)}
        turns.append({"role": "user", "content": f"what is {n} plus two?"})
        turns.append(answer if weight is None else {**answer, "weight": weight})
    return {"messages": turns}


MIXED = [conversation(0.5, None), conversation(2.0), conversation(None, 0, 0.3), conversation(None)]
CASES = {
    "fractions": MIXED,
    "one value": [conversation(0.25, 0.25)],
    "no weights": [conversation(1, 0)],
}


def step_by_hand(folder: Path, rows: list[dict[str, Any]]) -> torch.Tensor:
    """-RATE x the gradient of sum(w x ce) / sum(w), by full logits of one row after the other."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    total, share = torch.zeros(()), 0.0
    for row in rows:
        found = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        answers = [turn.get("weight", 1.0) for turn in row["messages"][1::2]]
        weights: list[float] = []
        for is_answer, run in itertools.groupby(found["assistant_masks"]):
            weights += [answers.pop(0) if is_answer else 0.0] * len(list(run))
        ids = torch.tensor(found["input_ids"])
        losses = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total = total + (torch.tensor(weights[1:]) * losses).sum()
        share += sum(weights[1:])
    (total / share).backward()
    return flat({n: -RATE * p.grad for n, p in model.named_parameters() if p.grad is not None})


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.fixture
def step(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., torch.Tensor]:
    """A function that makes one SGD step of all rows of a file, and says what moved."""
    import trainer.core.training as training

    path = model_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.0}))
    monkeypatch.setattr(
        training,
        "build_optimizer",
        lambda model, *_, **__: torch.optim.SGD(model.parameters(), lr=RATE),
    )

    def one_step(name: str, file: Path, batch_size: int, **data: Any) -> torch.Tensor:
        config = create_default_config(
            model_path=str(model_folder),
            dataset_path=str(file),
            output_dir=str(tmp_path / name),
            hyperparams={
                "batch_size": batch_size,
                "gradient_accumulation": 4,
                "max_steps": 1,
                "lr_scheduler": "constant",
                "warmup_steps": 0,
                "max_grad_norm": 0.0,
                "learning_rate": RATE,
                "fp_precision": "fp32",
                "max_length": 256,
            },
            data={"validation_split": 0, "cache_dir": str(tmp_path / "cache"), **data},
            monitoring={"inference_interval": 0, "report_to": ()},
            environment={"num_threads": 1, "device": "cpu"},
        )
        result = TrainerEngine().run_job(config)
        assert result.success, result.error_message
        before = load_file(model_folder / "model.safetensors")
        after = load_file(tmp_path / name / "final_model" / "model.safetensors")
        return flat({key: after[key].double() - before[key].double() for key in before})

    return one_step


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(CASES))
def test_one_step_of_weighted_turns_is_the_step_by_hand(
    step: Callable[..., torch.Tensor],
    write_rows: Callable[..., Path],
    model_folder: Path,
    case: str,
) -> None:
    file, expected = write_rows(CASES[case]), step_by_hand(model_folder, CASES[case])
    ways = {
        "plain": step("plain", file, 1),
        "cached": step("cached", file, 4),
        "packed": step("packed", file, 1, enable_packing=True),
    }
    for name, ours in ways.items():
        assert (ours - expected).norm() <= 2e-5 * expected.norm(), name
