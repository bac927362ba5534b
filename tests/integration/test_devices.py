"""Every process computes on the device it is told: HF, accelerate, weights and optimizer alike."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from trainer.config import create_default_config
from trainer.config.loader import resolve
from trainer.config.training_sections import ModelSection
from trainer.core import hf_trainer, optim, preparation
from trainer.core.engine import TrainerEngine
from trainer.core.hf_trainer import ACCELERATE_DEVICE, build_training_arguments
from trainer.core.optim import build_optimizer
from trainer.core.preparation import load_for_training
from trainer.errors import ConfigError
from trainer.models import devices, load, train_on
from trainer.models.devices import cuda_problem, own_device
from trainer.models.load import load_model
from trainer.models.precision import resolve_device, resolve_precision

CUDA_1 = torch.device("cuda", 1)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """As far as HF and accelerate ask, this machine has two GPUs; what was set, in order."""
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield chosen
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments_on(device: torch.device) -> Any:
    config = resolve(create_default_config(model_path="tiny", dataset_path="rows", output_dir="x"))
    precision = resolve_precision("fp32", "full", torch.device("cpu"))
    return build_training_arguments(config, precision=precision, device=device, run_dir=Path("x"))


@pytest.mark.parametrize("own", [None, "cuda:0"])
def test_a_second_gpu_is_that_of_hf_and_of_accelerate_and_is_told_to_nobody_else(
    two_gpus: list[str], monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    if own is not None:
        monkeypatch.setenv(ACCELERATE_DEVICE, own)
    found = arguments_on(CUDA_1)
    assert found.device == CUDA_1
    assert found.distributed_state.device == CUDA_1
    assert two_gpus[-1] == "cuda:1"
    assert found.n_gpu == 1
    assert os.environ.get(ACCELERATE_DEVICE) == own


def test_the_first_gpu_is_taken_whatever_accelerate_was_told(
    two_gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ACCELERATE_DEVICE, "cuda:1")
    found = arguments_on(torch.device("cuda", 0))
    assert (found.device, found.distributed_state.device) == (torch.device("cuda", 0),) * 2


def test_under_torchrun_no_device_is_named_to_all_processes(
    two_gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(ACCELERATE_DEVICE, "cuda:0")
    seen: list[str | None] = []

    class Arguments:
        n_gpu, device = 1, CUDA_1

        def __init__(self, **options: Any) -> None:
            seen.append(os.environ.get(ACCELERATE_DEVICE))

    monkeypatch.setattr(hf_trainer, "TrainingArguments", Arguments)
    arguments_on(CUDA_1)
    assert seen == [None]
    for asked in ("auto", "cuda"):
        assert own_device(resolve_device(asked), asked) == CUDA_1
    with pytest.raises(ConfigError, match=r"device=cuda:1: under torchrun each process"):
        own_device(resolve_device("cuda:1"), "cuda:1")


def test_alone_a_gpu_without_number_is_the_first(two_gpus: list[str]) -> None:
    assert own_device(resolve_device("cuda"), "cuda") == torch.device("cuda", 0)
    assert own_device(resolve_device("cuda:1"), "cuda:1") == CUDA_1


@pytest.mark.parametrize("model", ["tiny", "folder"])
def test_weights_are_on_the_device_of_the_run_before_the_optimizer_is_built(
    job: Callable[..., Any], model_folder: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = torch.device("meta")  # stands for a GPU
    asked: list[torch.device] = []
    monkeypatch.setattr(optim, "computes_in_bf16", lambda d: bool(asked.append(d)))
    engine = TrainerEngine()
    config = job(hyperparams={"optimizer": "muon"})
    if model == "tiny":
        chosen = config.model.model_copy(update={"model_path": "tiny"})
        config = config.model_copy(update={"model": chosen})
    engine.prepare_dataset(config)
    stages = engine._open
    assert stages is not None
    prepared = dataclasses.replace(stages.prepared, device=meta)
    loaded = load_for_training(prepared, stages.job)
    assert {parameter.device for parameter in loaded.parameters()} == {meta}
    build_optimizer(loaded, prepared.config.hyperparams)
    assert asked == [meta], "Muon's arithmetic is that of the run's device"
    engine.close()


def test_the_gpu_of_the_run_is_the_current_one_before_anything_is_made_on_it(
    two_gpus: list[str], job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class LoadError(Exception):
        pass

    def refuse(*_: Any, **__: Any) -> None:
        raise LoadError

    monkeypatch.setattr(train_on, "load_model", refuse)
    engine = TrainerEngine()
    engine.prepare_dataset(job(environment={"device": "cpu"}))
    stages = engine._open
    assert stages is not None
    with pytest.raises(LoadError):
        load_for_training(dataclasses.replace(stages.prepared, device=CUDA_1), stages.job)
    assert two_gpus == ["cuda:1"]
    engine.close()


def test_a_folder_is_read_onto_the_gpu_and_never_held_by_the_cpu(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReadError(Exception):
        pass

    seen: list[Any] = []

    def read(loader: Any, section: Any, path: str, offline: bool, what: str, **extra: Any) -> Any:
        seen.append(extra.get("device_map"))
        raise ReadError

    monkeypatch.setattr(load, "read_model_config", lambda *_, **__: None)
    monkeypatch.setattr(load, "quantization_of", lambda config: None)
    monkeypatch.setattr(load, "_from_pretrained", read)
    for device in (CUDA_1, torch.device("cpu"), None):
        with pytest.raises(ReadError):
            load_model(
                ModelSection(model_path=str(model_folder)), dtype=torch.float32, device=device
            )
    assert seen == [{"": "cuda:1"}, None, None]


# ---- a GPU that cannot be used


@pytest.fixture
def unusable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The system has a driver and a GPU, and torch cannot use it."""
    (tmp_path / "version").touch()
    monkeypatch.setattr(devices, "DRIVER_FILES", (tmp_path / "version",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as NVML counts
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "init", init)
    return monkeypatch


def test_a_driver_that_is_too_old_is_named(unusable: pytest.MonkeyPatch) -> None:
    assert "driver on your system is too old" in (cuda_problem() or "")
    with pytest.raises(ConfigError, match=r"has 0 CUDA devices that torch can use \(The NVIDIA"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"


def test_what_hides_a_gpu_is_named(unusable: pytest.MonkeyPatch) -> None:
    unusable.setattr(torch.cuda, "init", lambda: None)
    assert "no GPU can be reached" in (cuda_problem() or "")
    unusable.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in (cuda_problem() or "")
    unusable.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda_problem() == "CUDA_VISIBLE_DEVICES hides all GPUs"
    unusable.setattr(devices, "DRIVER_FILES", (Path("/nowhere"),))
    assert cuda_problem() is None


@pytest.mark.parametrize(("asked", "is_told"), [("auto", True), ("cpu", False)])
def test_training_on_the_cpu_beside_a_gpu_is_told_unless_it_was_asked_for(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, asked: str, is_told: bool
) -> None:
    monkeypatch.setattr(preparation, "cuda_problem", lambda: "its driver is too old")
    told: list[str] = []

    class Listener:
        def on_event(self, event: Any) -> None:
            told.append(str(getattr(event, "text", "")))

        def close(self) -> None: ...

    engine = TrainerEngine(observers=[Listener()])
    engine.load_model(job(environment={"device": asked}))
    engine.close()
    words = "trains on the CPU: the GPU cannot be used (its driver is too old)"
    assert (words in told) is is_told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_trains_on_the_last_gpu(job: Callable[..., Any]) -> None:
    last = f"cuda:{torch.cuda.device_count() - 1}"
    config = job(environment={"device": last}, hyperparams={"optimizer": "muon", "max_steps": 3})
    engine = TrainerEngine()
    trainer = engine.create_trainer(config)
    assert {str(parameter.device) for parameter in trainer.model.parameters()} == {last}
    assert str(trainer.accelerator.device) == last
    assert engine.run_job(config).success
    assert ACCELERATE_DEVICE not in os.environ


# ---- environment.deterministic


def test_an_operation_without_deterministic_algorithm_is_one_clear_error(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(self: Any, *args: Any, **options: Any) -> Any:
        torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0]))  # one that has none anywhere

    monkeypatch.setattr(hf_trainer.SupervisedTrainer, "compute_loss", loss)
    result = TrainerEngine().run_job(job(environment={"deterministic": True}))
    assert result.exit_code == 2
    assert "environment.deterministic=true: put_ does not have" in str(result.error_message)
    assert "Set it to false" in str(result.error_message)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_deterministic_runs_on_a_gpu_are_equal_bit_for_bit(
    cli: Callable[..., Any],
    assert_same_weights: Any,
    model_folder: Path,
    qa_file: Path,
    tmp_path: Path,
    precision: str,
) -> None:
    """In processes of their own: torch looks once for the variable, at the first product."""
    for name in ("one", "two"):
        words = [
            "train",
            "--model",
            model_folder,
            "--dataset",
            qa_file,
            "--output",
            tmp_path / name,
        ]
        words += ["--hyperparams.fp_precision", precision, "--max-steps", "20"]
        words += ["--environment.device", "cuda", "--environment.deterministic", "true"]
        done = cli(*words, "--monitoring.inference_interval", "10")
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / name / "run.json").read_text())["summary"]
        assert summary["previews"]["failed"] == 0
    assert_same_weights(tmp_path / "one" / "final_model", tmp_path / "two" / "final_model")
