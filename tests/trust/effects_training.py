"""Effects of sections hyperparams, lora, locked, output and environment."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
from dataclasses import asdict
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.trust.effects import shows
from tests.trust.lab import BATCH_SIZE, LORA, NUM_STEPS, RATE, Lab, Seen
from tests.trust.reference import distance, flat, llama
from trainer.child import Child
from trainer.commands.train import run as train_command
from trainer.core import TrainerEngine, compiling
from trainer.core import batch_size as core_batch_size
from trainer.core.faults import watch_ranks
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.run import Job
from trainer.monitoring.beats import Settings
from trainer.monitoring.ranks import RankWatch

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


@shows("hyperparams.auto_batch_size")
def auto_batch_size(lab: Lab) -> None:
    def no_room(trainer: Any, model: Any, count: int) -> str | None:
        return "does not fit" if count > 2 else None

    cuts = []
    with mock.patch.object(core_batch_size, "try_longest", no_room):
        for is_on in (False, True):
            args = lab.trainer(hyperparams={"auto_batch_size": is_on}).args
            cuts.append((args.per_device_train_batch_size, args.gradient_accumulation_steps))
    assert cuts == [(4, 1), (2, 2)]


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
    assert distance(lab.run(hyperparams={"optimizer": "adamw_8bit"}).weights, lab.base.weights) > 0
    if not torch.cuda.is_available():
        assert "nothing is paged" in lab.refusal(hyperparams={"optimizer": "paged_adamw_8bit"})


@shows("hyperparams.masters")
def masters(lab: Lab) -> None:
    """The checkpoint keeps the weights as they are trained: matrices in bf16, norms in fp32."""
    hyper = {"masters": "bf16_stochastic", "fp_precision": "bf16", "max_steps": 2}
    kept = lab.run(hyperparams=hyper, output={"checkpoint_interval": 1})
    [path] = (kept.folder / "checkpoints" / kept.checkpoints[-1]).glob("*model.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in load_file(path).items()}
    narrow = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert narrow == {name for name in dtypes if "norm" not in name}


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


@shows("hyperparams.loss_kernel")
def loss_kernel(lab: Lab) -> None:
    """`liger` is refused where it cannot run; the choice itself is tested in test_fused_loss.py."""
    assert lab.run(hyperparams={"loss_kernel": "tiles", "max_steps": 1}).result.success
    result = lab.refusal(hyperparams={"loss_kernel": "liger", "max_steps": 1})
    assert "hyperparams.loss_kernel=liger" in result


@shows("hyperparams.compile")
def compile_blocks(lab: Lab) -> None:
    graphs: list[int] = []

    def compiler(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "BACKEND", compiler)
        seen = lab.run(hyperparams={"compile": "blocks", "max_steps": 1})
    assert seen.result.summary["compile"]["graphs"] == len(graphs) > 0
    assert lab.base.result.summary["compile"] is None
    assert seen.steps[0].train_loss == pytest.approx(lab.base.steps[0].train_loss, rel=1e-5)


@shows("hyperparams.early_stopping_patience", "hyperparams.early_stopping_min_delta")
def early_stopping(lab: Lab) -> None:
    often = {"micro_eval_interval": 1}
    assert lab.run(monitoring=often).result.global_step == NUM_STEPS
    for delta, is_early in ((0.0, False), (5.0, True)):
        hyper = {"early_stopping_patience": 1, "early_stopping_min_delta": delta}
        step = lab.run(hyperparams=hyper, monitoring=often).result.global_step
        assert (step == 2) == is_early


BY_SCORE = {"early_stopping_metric": "score.golden_probability", "early_stopping_patience": 1}
ASKED = {
    **{"micro_eval_interval": 1, "inference_interval": 1000, "num_eval_samples": 1},
    **{"num_score_prompts": 14, "preview_golden_logprobs": "on", "preview_max_tokens": 1},
}
HALF = {"validation_split": 0.5}


@shows("hyperparams.early_stopping_metric", "monitoring.score_lag")
def early_stopping_metric(lab: Lab) -> None:
    """A score that stays where it was at step 0 stops at step 1, and so much later as it lags."""
    still = {**BY_SCORE, "learning_rate": 1e-12}
    for lag in (0, 2):
        seen = lab.run(hyperparams=still, monitoring={**ASKED, "score_lag": lag}, data=HALF)
        assert seen.result.global_step == 1 + lag
        assert "score.golden_probability has not" in seen.result.summary["stop_reason"]
    other = {**BY_SCORE, "early_stopping_metric": "score.nothing"}
    told = lab.refusal(hyperparams=other, monitoring=ASKED)
    assert "there are score.golden_probability" in told


@shows("output.best_by")
def best_by(lab: Lab) -> None:
    for metric in ("val_loss", "score.golden_probability"):
        seen = lab.run(output={"best_by": metric}, monitoring=ASKED, data=HALF)
        assert seen.result.summary["best"]["by"] == metric
        is_asked = any(type(one).__name__ == "ScoreDecided" for one in seen.recorder.events)
        assert is_asked == (metric != "val_loss")


@shows("output.final_model")
def final_model(lab: Lab) -> None:
    """With this rate the loss only rises after the first steps."""
    hyper, often = {"learning_rate": 3.0}, {"micro_eval_interval": 1}
    for choice, is_best in (("last", False), ("best", True)):
        output = {"final_model": choice, "keep_checkpoints": 9}
        seen = lab.run(hyperparams=hyper, monitoring=often, output=output)
        best = seen.result.summary["best"]["step"]
        assert best < NUM_STEPS
        step = best if is_best else NUM_STEPS
        assert seen.result.summary["final_model_step"] == step
        kept = load_file(seen.folder / f"checkpoints/step-{step:08d}/model.safetensors")
        assert all(torch.equal(kept[name], tensor) for name, tensor in seen.tensors.items())


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


@shows("lora.use_rslora")
def lora_use_rslora(lab: Lab) -> None:
    """The adapter's output is multiplied by alpha / sqrt(r), here by 12 / 2 instead of 12 / 4."""
    scales = []
    for is_on in (False, True):
        trainer = lab.trainer(hyperparams=LORA, lora={"r": 4, "alpha": 12, "use_rslora": is_on})
        layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
        torch.nn.init.ones_(layer.lora_B["default"].weight)
        x = torch.arange(64.0)[None]
        scales.append(layer(x) - layer.base_layer(x))
    assert torch.allclose(2 * scales[0], scales[1], rtol=1e-3)


@shows("lora.use_dora")
def lora_use_dora(lab: Lab) -> None:
    """Before training a magnitude is the length of its row; then it is trained too."""
    lora = {"r": 4, "target_modules": ["q_proj"], "use_dora": True}
    trainer = lab.trainer(hyperparams=LORA, lora=lora)
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    [magnitude] = layer.lora_magnitude_vector["default"].parameters()
    assert torch.allclose(magnitude, layer.base_layer.weight.norm(dim=1))
    assert magnitude.requires_grad
    seen = lab.run(hyperparams=LORA, lora=lora)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    assert distance(seen.tensors[name], magnitude) > 1e-5
    assert not any("magnitude" in name for name in lab.run(hyperparams=LORA).tensors)


@shows("lora.dropout")
def lora_dropout(lab: Lab) -> None:
    one, two = (lab.run(hyperparams=LORA, lora={"dropout": d}) for d in (0.0, 0.5))
    assert distance(one.weights, two.weights) > 1e-3


@shows("lora.neftune_alpha")
def lora_neftune_alpha(lab: Lab) -> None:
    """Losses of training move with alpha; out of training there is no noise."""
    seen = [
        lab.run(hyperparams={**LORA, "max_steps": 2}, lora={"neftune_alpha": alpha})
        for alpha in (0.0, 0.01, 5.0)
    ]
    first = [one.steps[0].train_loss for one in seen]
    assert 0 < abs(first[1] - first[0]) < 0.1 * abs(first[2] - first[0])
    assert distance(seen[0].weights, seen[2].weights) > 1e-4
    trainer = lab.trainer(hyperparams=LORA, lora={"neftune_alpha": 50.0})
    batch = next(iter(trainer.get_train_dataloader()))
    found = []
    for is_training in (False, False, True):
        trainer.model.train(is_training)
        with torch.no_grad():
            found.append(float(trainer.compute_loss(trainer.model, batch)))
    assert found[0] == found[1] != found[2]


@shows("lora.modules_to_save")
def lora_modules_to_save(lab: Lab) -> None:
    seen = lab.run(hyperparams=LORA, lora={"modules_to_save": ["lm_head"]})
    assert any("lm_head" in name for name in seen.tensors)
    assert adapter(seen)["modules_to_save"] == ["lm_head"]


@shows("lora.init")
def lora_init(lab: Lab) -> None:
    """Uniform up to 1 / sqrt(width), or normal by 1 / r; the second matrix is 0."""
    lora = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    for init, check in (
        ("default", lambda a: float(a.abs().max()) <= a.shape[1] ** -0.5),
        ("gaussian", lambda a: float(a.std()) == pytest.approx(1 / 4, rel=0.2)),
    ):
        trainer = lab.trainer(hyperparams=LORA, lora={**lora, "init": init})
        named = dict(trainer.model.named_parameters())
        assert all(check(value) for name, value in named.items() if "lora_A" in name), init
        assert all(not value.any() for name, value in named.items() if "lora_B" in name)


@shows("lora.layers_to_transform")
def lora_layers_to_transform(lab: Lab) -> None:
    all_linear = lab.run(hyperparams=LORA).tensors
    seen = lab.run(hyperparams=LORA, lora={"layers_to_transform": [1]})
    assert set(seen.tensors) == {name for name in all_linear if ".layers.1." in name}
    assert len(seen.tensors) == len(all_linear) / 2
    assert "0 to 1" in lab.refusal(hyperparams=LORA, lora={"layers_to_transform": [2]})


@shows("lora.ensure_weight_tying")
def lora_ensure_weight_tying(lab: Lab) -> None:
    folder = lab.path("tied")
    llama(tied=True, vocab_size=len(lab.tokenizer)).save_pretrained(folder)
    lab.tokenizer.save_pretrained(folder)
    lora = {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}
    for is_on in (True, False):
        model = {"model_path": str(folder)}
        options = {**lora, "ensure_weight_tying": is_on}
        trained = lab.trainer(hyperparams=LORA, lora=options, model=model).model.get_base_model()
        head, embedding = trained.get_output_embeddings(), trained.get_input_embeddings()
        assert (head.weight is embedding.weight) == is_on
        assert head.weight.requires_grad
    assert "is not tied" in lab.refusal(hyperparams=LORA, lora=lora)
    words = lab.refusal(hyperparams=LORA, lora={"ensure_weight_tying": True}, model=model)
    assert "is in lora.modules_to_save" in words


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


@shows("output.allow_changes")
def allow_changes(lab: Lab) -> None:
    hyper = {"lr_scheduler": "constant", "learning_rate": 1e-3, "max_steps": 2}
    first = lab.run(hyperparams=hyper)
    changed = {**hyper, "learning_rate": 5e-4, "max_steps": 3}
    output = {"resume": "latest", "output_dir": str(first.folder)}
    assert "--allow-changes" in lab.refusal(hyperparams=changed, output=output)
    seen = lab.run(hyperparams=changed, output={**output, "allow_changes": True})
    assert [step.learning_rate for step in seen.steps] == [5e-4]


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


@shows("distributed.timeout_s")
def distributed_timeout(lab: Lab) -> None:
    assert lab.trainer(distributed={"timeout_s": 77}).args.ddp_timeout == 77


@shows("distributed.heartbeat_timeout_s")
def heartbeat_timeout(lab: Lab) -> None:
    """A process that stands still for two seconds is named with a limit of 1 s, not of 60 s."""
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    told: dict[float, str] = {}
    for limit in (1.0, 60.0):
        config = lab.config(distributed={"heartbeat_timeout_s": limit})
        with (
            mock.patch.dict(os.environ, ranks),
            mock.patch.object(
                RankWatch, "__init__", lambda self, **options: vars(self).update(options)
            ),
        ):
            job = Job(config, [])
            watch_ranks(job, config)
        assert job.ranks is not None
        with subprocess.Popen(["sleep", "60"]) as process:
            settings = Settings(
                0, 2, process.pid, vars(job.ranks)["timeout_s"], str(lab.folder), host="127.0.0.1"
            )
            watcher = Child(["trainer.monitoring.beats"])
            watcher.send(json.dumps(asdict(settings)).encode())
            assert b"port" in watcher.receive(60)
            process.send_signal(signal.SIGSTOP)
            with contextlib.suppress(TimeoutError):
                told[limit] = json.loads(watcher.receive(2.5))["fault"]["what"]
            process.kill()
            watcher.end(0.0)
    assert told == {1.0: "did not answer for 1 s (its process is stopped)"}


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
