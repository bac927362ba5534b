"""Effects of sections hyperparams, lora, locked, output and environment."""

from __future__ import annotations

import json
import math
import os
from typing import Any
from unittest import mock

import pytest
import torch

from tests.trust.effects import shows
from tests.trust.lab import BATCH_SIZE, LORA, NUM_STEPS, RATE, Lab, Seen
from tests.trust.reference import distance, flat
from trainer.commands.train import run as train_command
from trainer.core import TrainerEngine
from trainer.core.hf_trainer import SupervisedTrainer

TRAIN_ROWS = 30


def change(lab: Lab, seen: Seen) -> torch.Tensor:
    from safetensors.torch import load_file

    start = load_file(lab.model / "model.safetensors")
    return seen.weights - flat([start[name] for name in sorted(seen.tensors)])


@shows("hyperparams.training_mode")
def training_mode(lab: Lab) -> None:
    assert not (lab.base.folder / "final_model" / "adapter_config.json").exists()
    seen = lab.run(hyperparams=LORA)
    assert all("lora_" in name for name in seen.tensors)


@shows("hyperparams.batch_size")
def batch_size(lab: Lab) -> None:
    started = [lab.run(hyperparams={"batch_size": n, "max_steps": 1}) for n in (1, 8)]
    assert [s.events("RunStarted")[0].effective_batch_size for s in started] == [1, 8]
    assert started[1].steps[0].num_tokens > 4 * started[0].steps[0].num_tokens


@shows("hyperparams.gradient_accumulation")
def gradient_accumulation(lab: Lab) -> None:
    hyper = {"batch_size": 4, "gradient_accumulation": 2, "max_steps": 1}
    trainer = lab.trainer(hyperparams=hyper)
    calls = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: (calls.append(1), compute(*a, **k))[1]
    trainer.train()
    assert trainer.state.global_step == 1
    assert len(calls) == 2


@shows("hyperparams.learning_rate", "hyperparams.max_steps")
def learning_rate(lab: Lab) -> None:
    seen = lab.run(hyperparams={"learning_rate": 3e-3, "max_steps": 3})
    assert seen.rates == [3e-3] * 3
    assert lab.base.rates == [RATE] * NUM_STEPS
    assert seen.result.global_step == 3


@shows("hyperparams.num_epochs")
def num_epochs(lab: Lab) -> None:
    seen = lab.run(hyperparams={"num_epochs": 1.5, "max_steps": None, "batch_size": 10})
    assert seen.result.global_step == math.ceil(1.5 * TRAIN_ROWS / 10)


@shows("hyperparams.max_length")
def max_length(lab: Lab) -> None:
    card = lab.data(hyperparams={"max_length": 40}).card
    assert card.longest_row == 40 < lab.data().card.longest_row
    assert card.num_truncated > 0


@shows("hyperparams.fp_precision")
def fp_precision(lab: Lab) -> None:
    seen = lab.run(hyperparams={"fp_precision": "bf16", "max_steps": 1})
    assert {tensor.dtype for tensor in seen.tensors.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in lab.base.tensors.values()} == {torch.float32}


@shows("hyperparams.optimizer")
def optimizer(lab: Lab) -> None:
    assert distance(lab.run(hyperparams={"optimizer": "muon"}).weights, lab.base.weights) > 1e-4
    if not torch.cuda.is_available():
        assert "adamw_8bit" in lab.refusal(hyperparams={"optimizer": "adamw_8bit"})


@shows("hyperparams.lr_scheduler")
def lr_scheduler(lab: Lab) -> None:
    done = [step / NUM_STEPS for step in range(NUM_STEPS)]
    for name, expected in (
        ("linear", [RATE * (1 - part) for part in done]),
        ("cosine", [RATE * 0.5 * (1 + math.cos(math.pi * part)) for part in done]),
    ):
        rates = lab.run(hyperparams={"lr_scheduler": name}).rates
        assert all(abs(a - b) < 1e-12 for a, b in zip(rates, expected, strict=True))


@shows("hyperparams.warmup_steps")
def warmup_steps(lab: Lab) -> None:
    thirds = [RATE / 3, 2 * RATE / 3, RATE, RATE]
    assert lab.run(hyperparams={"warmup_steps": 2}).rates == pytest.approx(thirds)
    assert lab.run(hyperparams={"warmup_steps": 0.5}).rates == pytest.approx(thirds)


@shows("hyperparams.weight_decay")
def weight_decay(lab: Lab) -> None:
    """One step: matrices shrink by rate x decay, norms do not."""
    plain, decayed = (
        lab.run(hyperparams={"max_steps": 1, "weight_decay": decay}).tensors for decay in (0, 0.5)
    )
    from safetensors.torch import load_file

    for name, start in load_file(lab.model / "model.safetensors").items():
        expected = torch.zeros_like(start) if start.ndim < 2 else -RATE * 0.5 * start
        assert torch.allclose(decayed[name] - plain[name], expected, atol=1e-6), name


@shows("hyperparams.adam_beta1", "hyperparams.adam_beta2")
def adam_betas(lab: Lab) -> None:
    for name, at in (("adam_beta1", 0), ("adam_beta2", 1)):
        seen = lab.run(hyperparams={name: 0.5})
        assert {group["betas"][at] for group in seen.optimizer_groups()} == {0.5}
        assert distance(seen.weights, lab.base.weights) > 1e-4


@shows("hyperparams.adam_epsilon")
def adam_epsilon(lab: Lab) -> None:
    seen = lab.run(hyperparams={"adam_epsilon": 1e3})
    assert change(lab, seen).norm() < 1e-3 * change(lab, lab.base).norm()


@shows("hyperparams.max_grad_norm")
def max_grad_norm(lab: Lab) -> None:
    """With a large epsilon Adam's step is proportional to the gradient."""
    hyper = {"adam_epsilon": 1e3, "max_steps": 1, "learning_rate": 1e3}
    free, clipped = (lab.run(hyperparams={**hyper, "max_grad_norm": n}) for n in (0, 0.01))
    shrunk = change(lab, clipped).norm() / change(lab, free).norm()
    assert abs(shrunk * free.steps[0].grad_norm / 0.01 - 1) < 1e-2


@shows("hyperparams.gradient_checkpointing")
def gradient_checkpointing(lab: Lab) -> None:
    counts = []
    for is_on in (False, True):
        trainer = lab.trainer(hyperparams={"gradient_checkpointing": is_on, "max_steps": 1})
        calls: list[int] = []
        layer = trainer.model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        counts.append(len(calls))
    assert counts == [2, 4]  # one step, and the memory probe before it


@shows("hyperparams.early_stopping_patience", "hyperparams.early_stopping_min_delta")
def early_stopping(lab: Lab) -> None:
    often = {"micro_eval_interval": 1}
    assert lab.run(monitoring=often).result.global_step == NUM_STEPS
    for delta, is_early in ((0.0, False), (5.0, True)):
        hyper = {"early_stopping_patience": 1, "early_stopping_min_delta": delta}
        step = lab.run(hyperparams=hyper, monitoring=often).result.global_step
        assert (step == 2) == is_early


# ---- lora


def adapter(seen: Seen) -> dict[str, Any]:
    path = seen.folder / "final_model" / "adapter_config.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@shows("lora.r", "lora.target_modules")
def lora_shape(lab: Lab) -> None:
    seen = lab.run(hyperparams=LORA, lora={"r": 3, "target_modules": ["q_proj"]})
    shapes = {tuple(t.shape) for name, t in seen.tensors.items() if "lora_A" in name}
    assert shapes == {(3, 64)}
    assert all("q_proj" in name for name in seen.tensors)


@shows("lora.alpha")
def lora_alpha(lab: Lab) -> None:
    """The adapter's output is multiplied by alpha / r."""
    trainers = [lab.trainer(hyperparams=LORA, lora={"r": 4, "alpha": a}) for a in (4, 12)]
    layers = [t.model.base_model.model.model.layers[0].self_attn.q_proj for t in trainers]
    outputs = []
    for layer in layers:
        torch.nn.init.ones_(layer.lora_B["default"].weight)
        x = torch.arange(64.0)[None]
        outputs.append(layer(x) - layer.base_layer(x))
    assert torch.allclose(3 * outputs[0], outputs[1], rtol=1e-3)


@shows("lora.dropout")
def lora_dropout(lab: Lab) -> None:
    one, two = (lab.run(hyperparams=LORA, lora={"dropout": d}) for d in (0.0, 0.5))
    assert distance(one.weights, two.weights) > 1e-3


@shows("lora.modules_to_save")
def lora_modules_to_save(lab: Lab) -> None:
    seen = lab.run(hyperparams=LORA, lora={"modules_to_save": ["lm_head"]})
    assert any("lm_head" in name for name in seen.tensors)
    assert adapter(seen)["modules_to_save"] == ["lm_head"]


# ---- locked

LOCKED: dict[str, tuple[Any, Any]] = {
    "architecture": ("LlamaForCausalLM", "Qwen3ForCausalLM"),
    "context_length": (512, 513),
}


@shows("locked.architecture", "locked.context_length", "locked.vocab_size", "locked.base_model")
def locked(lab: Lab) -> None:
    size = len(lab.tokenizer)
    for name, (right, wrong) in {
        **LOCKED,
        "vocab_size": (size, size + 1),
        "base_model": (str(lab.model), "qwen3"),
    }.items():
        lab.data(locked={name: right})
        assert f"locked.{name}={wrong!r}" in lab.refusal(locked={name: wrong})


# ---- output


@shows("output.output_dir", "output.checkpoint_interval", "output.keep_checkpoints")
def checkpoints(lab: Lab) -> None:
    folder = lab.path("elsewhere")
    output = {"output_dir": str(folder), "checkpoint_interval": 1, "keep_checkpoints": 3}
    seen = lab.run(output=output)
    assert (folder / "run.json").is_file()
    assert seen.checkpoints == [f"step-{step:08d}" for step in (2, 3, 4)]
    assert lab.base.checkpoints == [f"step-{NUM_STEPS:08d}"]


@shows("output.resume")
def resume(lab: Lab) -> None:
    folder = str(lab.path("again"))
    lab.run(output={"output_dir": folder}, hyperparams={"max_steps": 2})
    seen = lab.run(output={"output_dir": folder, "resume": "latest"})
    assert [step.step for step in seen.steps] == [3, 4]
    assert torch.equal(seen.weights, lab.base.weights)


@shows("output.report")
def report(lab: Lab) -> None:
    for wanted in (True, False):
        folder = lab.path("reported")
        words = ["--dataset", str(lab.file), "--model", str(lab.model), "--output", str(folder)]
        words += ["--max-steps", "2", "--fp32", "--quiet", "--monitoring.inference_interval", "0"]
        words += ["--hyperparams.warmup_steps", "0"]
        words += ["--output.report", str(wanted).lower()]
        assert train_command(words) == 0
        assert (folder / "report.html").exists() == wanted


# ---- environment


@shows("environment.device")
def device(lab: Lab) -> None:
    assert lab.trainer(environment={"device": "cpu"}).args.device.type == "cpu"
    assert "cuda:77" in lab.refusal(environment={"device": "cuda:77"})


@shows("environment.seed")
def seed(lab: Lab) -> None:
    same, other = (lab.run(environment={"seed": n}) for n in (42, 43))
    assert torch.equal(same.weights, lab.base.weights)
    assert distance(other.weights, lab.base.weights) > 1e-4


@shows("environment.deterministic")
def deterministic(lab: Lab) -> None:
    seen: list[bool] = []
    step = SupervisedTrainer.training_step

    def noting(self: Any, *args: Any, **options: Any) -> Any:
        is_set = os.environ.get("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
        seen.append(is_set and torch.are_deterministic_algorithms_enabled())
        return step(self, *args, **options)

    expected = lab.base.weights
    with mock.patch.object(SupervisedTrainer, "training_step", noting):
        for wanted in (True, False):
            found = lab.run(environment={"deterministic": wanted})
            assert seen == [wanted] * NUM_STEPS
            seen.clear()
            assert torch.equal(found.weights, expected), "on a CPU they are equal anyway"
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@shows("environment.num_threads")
def num_threads(lab: Lab) -> None:
    found = []
    try:
        for count in (2, 1):
            engine = TrainerEngine()
            engine.prepare_dataset(lab.config(environment={"num_threads": count}))
            found.append(torch.get_num_threads())
            engine.close()
    finally:
        torch.set_num_threads(1)
    assert found == [2, 1]


@shows("environment.num_workers")
def num_workers(lab: Lab) -> None:
    for count in (0, 1):
        trainer = lab.trainer(environment={"num_workers": count})
        collate = trainer.data_collator

        def noting(rows: Any, collate: Any = collate) -> Any:
            worker = torch.utils.data.get_worker_info()
            batch = collate(rows)
            return {**batch, "workers": torch.tensor(worker.num_workers if worker else 0)}

        trainer.data_collator = noting
        assert int(next(iter(trainer.get_train_dataloader()))["workers"]) == count


@shows("environment.offline")
def offline(lab: Lab) -> None:
    """With `offline` no name is looked up, let alone a connection made."""
    import os
    import socket
    import time
    from unittest import mock

    import huggingface_hub.constants as constants

    asked: list[Any] = []

    def refuse(*args: Any, **_: Any) -> Any:

        asked.append(args)
        raise socket.gaierror("no network in this test")

    environment = {name: v for name, v in os.environ.items() if name != "HF_HUB_OFFLINE"}
    for is_offline in (True, False):
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch.object(constants, "HF_HUB_OFFLINE", False),
            mock.patch.object(socket, "getaddrinfo", refuse),
            mock.patch.object(time, "sleep"),  # the hub client tries five times
        ):
            message = lab.refusal(
                model={"model_path": "nobody/no-model"}, environment={"offline": is_offline}
            )
        assert "nobody/no-model" in message
        assert bool(asked) is not is_offline


assert BATCH_SIZE == 4, "the numbers above are made for it"
