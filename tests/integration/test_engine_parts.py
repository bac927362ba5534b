"""The engine in parts and in subclasses: each order of calls gives what a fresh engine gives."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.test_closing import is_locked, what_a_run_left
from trainer.core import TrainerEngine
from trainer.monitoring import TrainingStatusWriter

SHORT = {"max_steps": 2}
QUICK = {"inference_interval": 2, "num_eval_samples": 2, "preview_max_tokens": 4}


@pytest.fixture
def config(job: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes the config of a run of two steps in a folder of its own."""

    def make(name: str, **sections: Any) -> Any:
        hyper = {**SHORT, **sections.pop("hyperparams", {})}
        monitoring = {**QUICK, **sections.pop("monitoring", {})}
        return job(name, hyperparams=hyper, monitoring=monitoring, **sections)

    TrainerEngine().inspect_data(make("cached"))  # the card says whether rows came from the cache
    return make


# ---- parts before a whole call

PARTS = (
    *(pytest.param(part, marks=pytest.mark.long) for part in ("prepare_dataset", "load_model")),
    *("build_callbacks", "create_trainer"),
)


@pytest.mark.parametrize("part", PARTS)
def test_a_run_after_a_part_gives_what_a_fresh_engine_gives(
    part: str, config: Callable[..., Any]
) -> None:
    engine = TrainerEngine()
    getattr(engine, part)(config("out"))
    found = what_a_run_left(engine.run_job(config("out")))
    assert found == what_a_run_left(TrainerEngine().run_job(config("fresh")))
    assert not found["is_locked"]


@pytest.mark.parametrize("part", PARTS)
def test_a_dry_run_after_a_part_gives_what_a_fresh_engine_gives(
    part: str, config: Callable[..., Any]
) -> None:
    engine = TrainerEngine()
    getattr(engine, part)(config("out"))
    found = engine.dry_run(config("out")).as_json()
    fresh = TrainerEngine().dry_run(config("fresh")).as_json()
    for one in (found, fresh):
        assert one["fit"].pop("memory") > 0  # what is free at that moment
    assert found == fresh
    files = [
        sorted(path.name for path in Path(config(name).output.output_dir).iterdir())
        for name in ("out", "fresh")
    ]
    assert files[0] == files[1]
    assert engine.run_job(config("out")).success


def test_a_trainer_that_was_run_by_hand_is_not_run_again(config: Callable[..., Any]) -> None:
    engine = TrainerEngine()
    engine.create_trainer(config("out")).train()
    result = engine.run_job(config("out"))
    # As by a fresh engine: the folder holds the run that was made by hand.
    assert (result.success, result.exit_code) == (False, 2), result
    assert "holds a run already" in str(result.error_message)
    assert not is_locked(Path(config("out").output.output_dir))
    record = json.loads((result.output_dir / "run.json").read_text())
    assert record["state"] == "stopped"


def test_parts_that_are_given_up_leave_a_folder_and_the_status_as_they_were(
    config: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(config("first").output.output_dir)
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    engine = TrainerEngine(TrainingStatusWriter(tmp_path / "status.json"))
    engine.create_trainer(config("first", monitoring={"report_to": ("tensorboard",)}))
    result = engine.run_job(config("second"))
    assert result.success, result.error_message
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["output_dir"] == config("second").output.output_dir
    assert "cannot be written" not in caplog.text


def test_a_part_that_fails_says_so_in_the_writers_own_status(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TrainerEngine(TrainingStatusWriter(tmp_path / "status.json"))
    monkeypatch.setattr("trainer.core.preparation.load_base", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.load_model(config("out"))
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["error"]["type"]) == ("failed", "ZeroDivisionError")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["state"] == "failed"
    assert not is_locked(tmp_path / "out")


def test_an_engine_that_is_forgotten_changes_nothing_later(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    TrainerEngine().create_trainer(config("out"))
    monkeypatch.setenv("SET_LATER", "1")
    torch.set_num_threads(2)
    try:
        gc.collect()
        assert os.environ.get("SET_LATER") == "1"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_what_a_script_sets_between_parts_stays(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TrainerEngine()
    engine.load_model(config("out"))
    monkeypatch.setenv("SET_BETWEEN", "1")
    assert engine.run_job(config("out")).success
    assert os.environ.get("SET_BETWEEN") == "1"


# ---- the named methods: replaced in a subclass, and called by themselves


def test_a_subclass_that_changes_the_config_of_a_step_is_heard(
    config: Callable[..., Any],
) -> None:
    class Mine(TrainerEngine):
        def _load_model_and_tokenizer(self, config: Any) -> tuple[Any, Any]:
            lora = config.lora.model_copy(update={"r": 3})
            return super()._load_model_and_tokenizer(config.model_copy(update={"lora": lora}))

        def _build_callbacks(self, config: Any) -> list[Any]:
            changed = config.monitoring.model_copy(update={"inference_interval": 1})
            return super()._build_callbacks(config.model_copy(update={"monitoring": changed}))

    result = Mine().run_job(config("out", hyperparams={"training_mode": "lora"}))
    assert result.success, result.error_message
    adapter = json.loads((result.model_path / "adapter_config.json").read_text())
    assert adapter["r"] == 3
    assert result.summary["previews"]["asked"] == 2 * 3  # steps 0, 1, 2
    assert not is_locked(result.output_dir)


def test_each_named_method_of_a_subclass_is_a_step_of_the_run(config: Callable[..., Any]) -> None:
    called: list[str] = []

    class Mine(TrainerEngine):
        pass

    def noted(name: str) -> Callable[..., Any]:
        ours = getattr(TrainerEngine, name)

        def method(self: Any, *args: Any) -> Any:
            called.append(name)
            return ours(self, *args)

        return method

    names = [
        "_prepare_dataset",
        "_build_system_prompt",
        "_load_model_and_tokenizer",
        "_build_callbacks",
        "_create_trainer",
        "_build_training_arguments",
        "_execute_training",
    ]
    for name in names:
        setattr(Mine, name, noted(name))
    assert Mine().run_job(config("out")).success
    assert sorted(called) == sorted(names)


def test_the_named_methods_can_be_called_one_by_one_on_a_fresh_engine(
    config: Callable[..., Any],
) -> None:
    from trainer.profiles import get_profile

    engine = TrainerEngine()
    asked = config("out")
    model, tokenizer = engine._load_model_and_tokenizer(asked)
    data = engine._prepare_dataset(
        engine._stages(asked).prepared.config, get_profile("plain", {}), tokenizer
    )
    trainer = engine._create_trainer(asked, model, data, engine._build_callbacks(asked))
    assert trainer.model is model
    assert trainer.train_dataset is data.train
    engine._execute_training(trainer, asked)
    assert trainer.state.global_step == 2
    assert engine._get_torch_dtype("bf16") is torch.bfloat16
    assert engine._build_training_arguments(asked).max_steps == 2
    engine.close()
    assert not is_locked(Path(asked.output.output_dir))


def test_rows_that_are_prepared_by_the_method_alone_change_nothing_in_the_process(
    config: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    from trainer.profiles import get_profile

    asked = config("out", environment={"num_threads": 1})
    tokenizer = AutoTokenizer.from_pretrained(asked.model.model_path)
    before = (dict(os.environ), torch.get_num_threads())
    with caplog.at_level(logging.ERROR):
        data = TrainerEngine()._prepare_dataset(asked, get_profile("plain", {}), tokenizer)
    assert len(data.train) == 32
    assert (dict(os.environ), torch.get_num_threads()) == before
    assert not Path(asked.output.output_dir).exists()
