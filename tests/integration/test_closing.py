"""A run owns what it opens: nothing outlives it, and nothing keeps it from being closed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from trainer.core import TrainerEngine, preparation, run, run_folder, training
from trainer.core import engine as engine_module
from trainer.core.run_folder import RunFolder
from trainer.errors import TrainerError
from trainer.monitoring import TrainingStatusReader
from trainer.monitoring.events import RunEnded, StepDone
from trainer.preview.scheduler import PreviewScheduler

SHORT = {"max_steps": 2}
QUICK = {"inference_interval": 2, "num_eval_samples": 2, "preview_max_tokens": 4}


@pytest.fixture
def config(job: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes the config of a run of two steps in a folder of its own."""

    def make(name: str, **sections: Any) -> Any:
        monitoring = {**QUICK, **sections.pop("monitoring", {})}
        hyper = {**SHORT, **sections.pop("hyperparams", {})}
        return job(name, hyperparams=hyper, monitoring=monitoring, **sections)

    return make


def is_locked(folder: Path) -> bool:
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def what_a_run_left(result: Any) -> dict[str, Any]:
    """Everything of a run but times, paths and process numbers."""
    folder = result.output_dir
    manifest = json.loads((folder / "run.json").read_text())
    reader = TrainingStatusReader(folder)
    status = reader.read()
    return {
        "files": sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if not path.name.startswith("events.out")
        ),
        "state": (manifest["state"], status.state, result.state, result.exit_code, result.success),
        "steps": [
            (row["step"], row["train_loss"], row["learning_rate"])
            for row in reader.metrics()
            if row["type"] == "StepDone"
        ],
        "previews": [(one.step, one.prompt, one.text) for one in reader.previews()],
        "weights": (result.model_path / "model.safetensors").read_bytes(),
        "card": manifest["data_card"],
        "is_locked": is_locked(folder),
    }


def act(engine: TrainerEngine, name: str, config: Any) -> Any:
    """One of the three; what it found or why it refused, to be compared."""
    folder = config.output.output_dir
    try:
        if name == "run":
            result = engine.run_job(config)
            if result.exit_code == 2:
                return str(result.error_message).replace(folder, "FOLDER")
            return what_a_run_left(result)
        if name == "inspect":
            return engine.inspect_data(config).card.as_json()
        found = engine.dry_run(config).as_json()
        assert found["fit"].pop("memory") > 0  # what is free at that moment
    except TrainerError as error:
        return str(error).replace(folder, "FOLDER")
    return (
        found,
        Path(folder, "config.resolved.json").is_file(),
        Path(folder, "run.json").exists(),
    )


# The same config object every time; behind a run the folder holds one, and both must be refused.
ORDERS = [
    ("dry", "run", "inspect"),
    ("inspect", "run", "dry"),
    ("dry", "inspect", "run"),
    ("inspect", "dry", "run"),
    ("run", "dry", "inspect"),
    ("run", "inspect", "dry"),
    ("inspect", "inspect", "dry", "dry", "run", "run"),
]


@pytest.mark.parametrize("order", ORDERS[1:2], ids="-".join)
def test_one_engine_gives_in_any_order_what_fresh_engines_give(
    order: tuple[str, ...], config: Callable[..., Any]
) -> None:
    check_order(order, config)


@pytest.mark.long
@pytest.mark.parametrize("order", [ORDERS[0], *ORDERS[2:]], ids="-".join)
def test_one_engine_gives_in_every_order_what_fresh_engines_give(
    order: tuple[str, ...], config: Callable[..., Any]
) -> None:
    check_order(order, config)


def check_order(order: tuple[str, ...], config: Callable[..., Any]) -> None:
    one, asked, fresh = TrainerEngine(), config("one"), config("fresh")
    TrainerEngine().inspect_data(asked)  # from here on the rows are in the cache for both
    for name in order:
        assert act(one, name, asked) == act(TrainerEngine(), name, fresh), name


def test_a_second_run_of_an_equal_config_is_refused_and_harms_nothing(
    config: Callable[..., Any],
) -> None:
    engine = TrainerEngine()
    before = what_a_run_left(engine.run_job(config("out")))
    again = engine.run_job(config("out"))
    assert (again.success, again.exit_code) == (False, 2)
    assert "holds a run already" in str(again.error_message)
    assert json.loads((again.output_dir / "run.json").read_text())["state"] == "completed"
    assert before["steps"]


def test_what_was_made_in_parts_is_used_or_given_up(config: Callable[..., Any]) -> None:
    engine = TrainerEngine()
    model, _ = engine.load_model(config("first"))
    engine.prepare_dataset(config("second"))  # another run: the first is given up
    assert not (Path(config("first").output.output_dir)).exists()
    assert is_locked(Path(config("second").output.output_dir))
    result = engine.run_job(config("second"))
    assert result.success, result.error_message
    trainer = engine.create_trainer(config("third"))
    assert trainer.model is not model
    engine.close()
    assert not Path(config("third").output.output_dir).exists()


def test_a_part_that_fails_holds_no_lock(config: Callable[..., Any], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "x"}\n')
    engine = TrainerEngine()
    for _ in range(2):
        with pytest.raises(TrainerError, match=r"bad\.jsonl"):
            engine.prepare_dataset(config("out", dataset_path=str(bad)))
    assert not Path(config("out").output.output_dir).exists()


# ---- closing


def steps_of(config: Any) -> list[str]:
    seen: list[str] = []
    run.before_closing = seen.append
    try:
        assert TrainerEngine().run_job(config).success
    finally:
        run.before_closing = None
    assert len(seen) == len(set(seen)) >= 6
    return seen


def check_truth(result: Any, told: list[Any]) -> None:
    """Result, run.json, status.json and observers say the same, and the lock is free."""
    manifest = json.loads((result.output_dir / "run.json").read_text())
    assert manifest["state"] == result.state
    assert TrainingStatusReader(result.output_dir).read().state == result.state
    assert [event.state for event in told if isinstance(event, RunEnded)] == [result.state]
    assert not is_locked(result.output_dir)


class Listener:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_event(self, event: Any) -> None:
        self.told.append(event)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, marks=pytest.mark.long),
    ],
)
def test_a_signal_at_any_step_of_closing_changes_nothing(
    number: signal.Signals,
    config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = steps_of(config("clean"))
    before = signal.getsignal(number)
    for index, name in enumerate(steps):

        def send(step: str, wanted: str = name) -> None:
            if step == wanted:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # the impatient press twice

        monkeypatch.setattr(run, "before_closing", send)
        listener = Listener()
        result = TrainerEngine(observers=[listener]).run_job(config(f"out{index}"))
        assert (result.state, result.exit_code) == ("completed", 0), name
        assert "could not be closed" not in caplog.text, name
        check_truth(result, listener.told)
        assert signal.getsignal(number) is before


# ---- a signal at every line of the modules that begin, record and end a run

MODULES = {one.__file__ for one in (run, engine_module, training, preparation, run_folder)}


class Lines:
    """Counts the lines of MODULES that run while our handler is set; sends two signals at one."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.count = at, 0
        self.first_of: dict[tuple[str, int], int] = {}

    def __enter__(self) -> Lines:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._before)

    def _call(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename in MODULES else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line" and self._is_ours(signal.SIGINT):
            self.count += 1
            self.first_of.setdefault((frame.f_code.co_filename, frame.f_lineno), self.count)
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGINT)
                second = signal.SIGTERM if self._is_ours(signal.SIGTERM) else signal.SIGINT
                os.kill(os.getpid(), second)
        return self._line

    @staticmethod
    def _is_ours(number: signal.Signals) -> bool:
        return getattr(signal.getsignal(number), "__func__", None) is run.StopRequest.handle


def check_lines(
    config: Callable[..., Any], tmp_path: Path, *, is_resumed: bool, every: int, offset: int = 0
) -> None:
    plain: dict[str, Any] = {
        "monitoring": {"inference_interval": 0, "micro_eval_interval": 0},
        "data": {"validation_split": 0},
    }
    begun = TrainerEngine().run_job(config("begun", **plain))
    assert begun.success, begun.error_message
    (begun.output_dir / "checkpoints" / "step-00000002").rename(tmp_path / "step-00000002")
    shutil.rmtree(begun.output_dir / "checkpoints")
    shutil.rmtree(begun.output_dir / "final_model")

    def one(name: str, at: int) -> tuple[Any, list[Any], Lines]:
        options = dict(plain)
        if is_resumed:
            shutil.copytree(begun.output_dir, tmp_path / name)
            target = tmp_path / name / "checkpoints" / "step-00000002"
            shutil.copytree(tmp_path / "step-00000002", target)
            options |= {"output": {"resume": "latest"}, "hyperparams": {"max_steps": 3}}
        listener, asked = Listener(), config(name, **options)
        with Lines(at) as lines:
            result = TrainerEngine(observers=[listener]).run_job(asked)
        return result, listener.told, lines

    result, _, lines = one("clean", 0)
    assert result.success, result.error_message
    places = sorted(lines.first_of.items(), key=lambda place: place[1])
    assert len(places) > 300
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for place, at in places[offset::every]:
        result, told, _ = one(f"line{at}", at)
        if not (is_resumed and is_as_before(result.output_dir, begun.output_dir)):
            check_any_end(result, told, place)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        shutil.rmtree(result.output_dir, ignore_errors=True)


def is_as_before(folder: Path, begun: Path) -> bool:
    """A resume that was stopped before it wrote anything leaves what it found."""
    names = ("run.json", "status.json", "metrics.jsonl", "config.resolved.json")
    same = [(folder / name).read_bytes() == (begun / name).read_bytes() for name in names]
    return all(same) and not is_locked(folder) and not (folder / "final_model").exists()


def check_any_end(result: Any, told: list[Any], place: Any) -> None:
    """Whenever the signals came: all say the same, and what is said to be there is there."""
    # Of two signals at once the system may deliver either first.
    code = {"steps": 0, "SIGINT": 130, "SIGTERM": 143}[result.summary["ended_by"]]
    assert (result.exit_code, result.state == "completed") == (code, code == 0), place
    assert [one.state for one in told if isinstance(one, RunEnded)] == [result.state], place
    folder = result.output_dir
    assert (result.model_path is not None) == (folder / "final_model").exists(), place
    assert result.success == (result.state == "completed"), place
    if not folder.exists():
        return
    left = {path.name for path in folder.iterdir()}
    if left <= {".lock"}:  # stopped while the folder was taken
        return
    assert {"run.json", "status.json"} <= left, place
    check_truth(result, told)


@pytest.mark.parametrize(
    "is_resumed",
    [pytest.param(False, marks=pytest.mark.long), True],
    ids=["new", "resumed"],
)
def test_signals_at_some_lines_of_the_engine_end_a_run_truthfully(
    is_resumed: bool, config: Callable[..., Any], tmp_path: Path
) -> None:
    check_lines(config, tmp_path, is_resumed=is_resumed, every=30, offset=7)


@pytest.mark.long
@pytest.mark.parametrize("is_resumed", [False, True], ids=["new", "resumed"])
def test_signals_at_every_line_of_the_engine_end_a_run_truthfully(
    is_resumed: bool, config: Callable[..., Any], tmp_path: Path
) -> None:
    check_lines(config, tmp_path, is_resumed=is_resumed, every=1)


@pytest.mark.parametrize(
    "kind", [RuntimeError, pytest.param(KeyboardInterrupt, marks=pytest.mark.long)]
)
def test_an_error_at_any_step_of_closing_keeps_none_from_being_made(
    kind: type[BaseException],
    config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = steps_of(config("clean"))
    for index, name in enumerate(steps):
        made: list[str] = []

        def fail(step: str, wanted: str = name, made: list[str] = made) -> None:
            made.append(step)
            if step == wanted:
                raise kind("no")

        monkeypatch.setattr(run, "before_closing", fail)
        listener = Listener()
        result = TrainerEngine(observers=[listener]).run_job(config(f"out{index}"))
        assert result.state == "completed"
        assert made == steps
        check_truth(result, listener.told)
        assert f"{name}: could not be closed ({kind.__name__}: no)" in caplog.text


@pytest.mark.parametrize(
    ("home", "name"),
    [
        (PreviewScheduler, "close"),
        (RunFolder, "update_json"),
        (RunFolder, "close"),
        (Listener, "close"),
    ],
)
def test_what_cannot_be_closed_is_said_and_the_rest_is_closed(
    home: type,
    name: str,
    config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    close = getattr(home, name)

    def fail(self: Any, *args: Any) -> None:
        if name != "update_json":  # that one is told that the disk is full
            close(self, *args)
        raise OSError("no room")

    monkeypatch.setattr(home, name, fail)
    before = settings()
    listener = Listener()
    result = TrainerEngine(observers=[listener]).run_job(config("out"))
    assert result.state == "completed"
    assert "no room" in caplog.text
    assert TrainingStatusReader(result.output_dir).read().state == "completed"
    assert not is_locked(result.output_dir)
    assert isinstance(listener.told[-1], RunEnded)
    assert settings() == before


def test_a_signal_while_a_run_ends_stops_it_truthfully(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)

    places = [(training, "save_final_model"), (training, "final_evaluation")]
    for index, (module, name) in enumerate([*places, (engine_module, "assemble_trainer")]):
        listener = Listener()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            result = TrainerEngine(observers=[listener]).run_job(config(f"out{index}"))
        assert (result.state, result.exit_code) == ("stopped", 130), name
        check_truth(result, listener.told)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_figures_that_cannot_be_had_do_not_keep_a_run_from_ending(
    kind: type[BaseException], config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> Any:
        raise kind("no figures")

    monkeypatch.setattr(PreviewScheduler, "summary", fail)
    listener, before = Listener(), settings()
    result = TrainerEngine(observers=[listener]).run_job(config("out"))
    assert result.state in ("completed", "failed")
    check_truth(result, listener.told)
    assert settings() == before


def test_an_error_without_words_does_not_keep_a_run_from_ending(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("not even this")

    def fail(*_: Any, **__: Any) -> Any:
        raise MuteError

    monkeypatch.setattr(training, "save_final_model", fail)
    listener = Listener()
    result = TrainerEngine(observers=[listener]).run_job(config("out"))
    assert (result.state, result.exit_code) == ("failed", 1)
    assert "MuteError" in str(result.error_message)
    check_truth(result, listener.told)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("when", ["on_event", "close"])
def test_an_observer_that_raises_at_the_end_keeps_no_other_from_hearing_it(
    when: str, kind: type[BaseException], config: Callable[..., Any]
) -> None:
    class Bad(Listener):
        def on_event(self, event: Any) -> None:
            if when == "on_event" and isinstance(event, RunEnded):
                raise kind("no")

        def close(self) -> None:
            if when == "close":
                raise kind("no")

    class Closed(Listener):
        is_closed = False

        def close(self) -> None:
            self.is_closed = True

    last = Closed()
    result = TrainerEngine(observers=[Bad(), last]).run_job(config("out"))
    assert result.state == "completed"
    check_truth(result, last.told)
    assert last.is_closed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_handlers_are_given_back_is_no_exception(
    number: signal.Signals, config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(*_: Any) -> None:
        raise KeyboardInterrupt

    ours, set_handler, before = run.StopRequest.handle, signal.signal, signal.signal(number, own)
    given_back: list[Any] = []

    def interrupted(which: int, handler: Any) -> Any:
        found = set_handler(which, handler)
        if getattr(found, "__func__", None) is ours:
            given_back.append(which)
            os.kill(os.getpid(), number)  # behind each that is given back
        return found

    try:
        monkeypatch.setattr(signal, "signal", interrupted)
        result = TrainerEngine().run_job(config("out"))
        monkeypatch.undo()
        assert result.state == "completed"
        assert len(given_back) >= 3
        assert signal.getsignal(number) is own
        check_truth(result, [RunEnded(state="completed", step=2)])
    finally:
        set_handler(number, before)


# ---- nothing outlives the job


def settings() -> dict[str, Any]:
    from huggingface_hub import constants

    return {
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "bars": transformers_logging.is_progress_bar_enabled(),
        "verbosity": transformers_logging.get_verbosity(),
        "offline": constants.HF_HUB_OFFLINE,
        "signals": [
            signal.getsignal(number)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
        ],
    }


@pytest.mark.parametrize("how", ["run", "failed run", "workers", "dry", "inspect"])
def test_nothing_that_a_job_sets_in_the_process_outlives_it(
    how: str, config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    torch.set_num_threads(2)
    try:
        environment = {"num_threads": 1, "offline": True}
        if how == "workers":
            environment["num_workers"] = 1
        asked = config("out", environment=environment)
        before = settings()
        seen: list[int] = []
        if how == "failed run":

            class Breaker(Listener):
                def on_event(self, event: Any) -> None:
                    seen.append(torch.get_num_threads())

            monkeypatch.setattr(
                "trainer.core.engine.execute_training", lambda *_: seen.append(0) or 1 / 0
            )
            assert not TrainerEngine(observers=[Breaker()]).run_job(asked).success
            assert 1 in seen
        elif how in ("dry", "inspect"):
            act(TrainerEngine(), how, asked)
        else:
            result = TrainerEngine().run_job(asked)
            assert result.success, result.error_message
        assert settings() == before
    finally:
        torch.set_num_threads(1)


def test_a_hub_that_the_user_allows_is_allowed_again_after_an_offline_job(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    before = settings()
    TrainerEngine().inspect_data(config("out", environment={"offline": True}))
    assert settings() == before


def test_each_run_with_workers_hears_of_one_that_dies(
    config: Callable[..., Any],
) -> None:
    heard: list[Any] = []

    class Watch(Listener):
        def on_event(self, event: Any) -> None:
            if isinstance(event, StepDone):
                heard.append(signal.getsignal(signal.SIGCHLD))

    before = signal.getsignal(signal.SIGCHLD)
    for name in ("one", "two"):
        asked = config(name, environment={"num_workers": 1})
        result = TrainerEngine(observers=[Watch()]).run_job(asked)
        assert result.success, result.error_message
        assert signal.getsignal(signal.SIGCHLD) is before
    assert len(heard) == 4
    assert all(callable(handler) for handler in heard)


@pytest.mark.parametrize("how", ["run", "alone"])
def test_the_device_that_accelerate_is_told_is_that_of_this_job_only(
    how: str, config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = engine_module.build_training_arguments

    def of_a_second_gpu(*args: Any, **options: Any) -> Any:
        found = build(*args, **options)
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cuda:1"  # as where environment.device is cuda:1
        return found

    monkeypatch.setattr(engine_module, "build_training_arguments", of_a_second_gpu)
    before = settings()
    if how == "run":
        assert TrainerEngine().run_job(config("out")).success
    else:
        TrainerEngine()._build_training_arguments(config("out"))
    assert settings() == before
