"""`hyperparams.compile=blocks`: the same training, few graphs, and every refusal said."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch._inductor.exc import InvalidCxxCompiler
from transformers import CTRLConfig, Gemma3ForCausalLM, Gemma3TextConfig

from tests.integration.test_resume_exact import check_same_state, resumed
from tests.trust.reference import decoder, llama
from trainer.core import TrainerEngine, compiling, training
from trainer.core.compiling import check_blocks, check_compiler
from trainer.errors import ConfigError
from trainer.monitoring.events import Notice

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ONE_LENGTH = {"max_length": 64}
QUIET = {"inference_interval": 0, "micro_eval_interval": 0}


@pytest.fixture(scope="session", autouse=True)
def _cache_of_compiled_code(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Graphs that an earlier test run left would hide what compiling does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture
def plain_folder(tmp_path: Path, tokenizer: Any, make_model: Callable[..., Any]) -> Path:
    """A Qwen3 without dropout, whose passes can be compared."""
    folder = tmp_path / "plain"
    make_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and guards are real, what runs them is not compiled: seconds in place of a minute."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")


@pytest.fixture
def with_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW turns rounding into steps of full size where gradients are close to 0."""

    def build(model: Any, hyper: Any, **_: Any) -> torch.optim.Optimizer:
        moved = [one for one in model.parameters() if one.requires_grad]
        return torch.optim.SGD(moved, lr=hyper.learning_rate)

    monkeypatch.setattr(training, "build_optimizer", build)


def gemma3(**changes: Any) -> Any:
    """Layers of two kinds."""
    kinds = ["sliding_attention", "full_attention"]
    options = {"sliding_window": 16, "layer_types": kinds, **changes}
    return decoder(Gemma3ForCausalLM, Gemma3TextConfig, **options)


class Notices:
    """An observer that keeps what the user is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_event(self, event: Any) -> None:
        if isinstance(event, Notice):
            self.texts.append(event.text)

    def close(self) -> None: ...


def losses(result: Any) -> tuple[list[float], list[float]]:
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").open()]
    steps = [one["train_loss"] for one in lines if one["type"] == "StepDone"]
    return steps, [one["val_loss"] for one in lines if one["type"] == "EvaluationDone"]


def check_equal(train: Callable[..., Any], names: Any, **sections: Any) -> dict[str, Any]:
    """20 steps of SGD, compiled and not: losses, files and counts; returns the counts."""
    hyper = {**ONE_LENGTH, "max_steps": 20, **sections.pop("hyperparams", {})}
    plain = train("plain-run", hyperparams=hyper, **sections)
    compiled = train("compiled", hyperparams={**hyper, "compile": "blocks"}, **sections)
    assert plain.success, plain.error_message
    assert compiled.success, compiled.error_message
    for one, two in zip(losses(plain), losses(compiled), strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    assert len(losses(compiled)[0]) == 20
    assert names(plain.model_path) == names(compiled.model_path)
    counts: dict[str, Any] = compiled.summary["compile"]
    assert plain.summary["compile"] is None
    assert 1 <= counts["graphs"] <= counts["limit"]
    assert (counts["graph_breaks"], counts["uncompiled"]) == (0, 0)
    assert not counts["is_limit_reached"]
    recorded = json.loads((compiled.output_dir / "run.json").read_text())
    assert recorded["summary"]["compile"] == counts
    return counts


def names_of(folder: Path) -> list[str]:
    from safetensors.torch import load_file

    [path] = folder.glob("*model.safetensors")
    return sorted(load_file(path))


@pytest.mark.slow
@pytest.mark.usefixtures("with_sgd")
def test_twenty_losses_are_those_of_plain_layers(
    train: Callable[..., Any], plain_folder: Path
) -> None:
    """With previews and evaluations in between: they have shapes of their own and add no graph."""
    counts = check_equal(train, names_of, model_path=str(plain_folder))
    assert counts["lengths"] == [64]
    assert counts["graphs"] <= compiling.SHAPES_OF_A_LENGTH


LONG_CASES: dict[str, dict[str, Any]] = {
    "tiny": {"model_path": "tiny"},
    "llama": {},
    "gemma3": {},
    "several lengths": {"hyperparams": {"max_length": 160}},
    "packed": {"data": {"enable_packing": True}},
    "lora, checkpointed": {
        "hyperparams": {"training_mode": "lora", "gradient_checkpointing": True}
    },
    "accumulated": {"hyperparams": {"batch_size": 2, "gradient_accumulation": 2}},
}


@pytest.mark.long
@pytest.mark.usefixtures("with_sgd")
@pytest.mark.parametrize("case", LONG_CASES)
def test_losses_are_those_of_plain_layers_in_families_and_modes(
    case: str, train: Callable[..., Any], plain_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    sections = {"model_path": str(plain_folder), **LONG_CASES[case]}
    make = {"llama": llama, "gemma3": gemma3}.get(case)
    if make is not None:
        folder = tmp_path / case
        make(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        sections["model_path"] = str(folder)
    check_equal(train, names_of, **sections)


def test_graphs_are_bounded_by_lengths_and_the_run_says_what_was_compiled(
    job: Callable[..., Any], plain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dynamo.config.recompile_limit
    notices = Notices()
    lengths: set[int] = set()

    def compiler(graph: Any, inputs: Any) -> Any:
        lengths.update(one.shape[1] for one in inputs if one.ndim == 3)  # (B, T, D)
        return graph

    monkeypatch.setattr(compiling, "BACKEND", compiler)
    config = job(
        model_path=str(plain_folder),
        hyperparams={"max_length": 160, "compile": "blocks", "max_steps": 24},
        monitoring={"inference_interval": 6, "micro_eval_interval": 6},
    )
    result = TrainerEngine(observers=[notices]).run_job(config)
    counts = result.summary["compile"]
    assert result.success, result.error_message
    assert len(lengths) >= 2
    assert lengths <= set(counts["lengths"])
    assert 2 <= counts["graphs"] <= len(lengths) * compiling.SHAPES_OF_A_LENGTH
    assert counts["recompiles"] == counts["graphs"] - 1
    assert counts["graph_breaks"] == 0
    lines = [line for line in notices.texts if line.startswith("compiled ")]
    assert len(lines) == 2
    assert lines[-1].startswith(f"compiled {counts['graphs']} graphs in ")
    assert "0 graph breaks" in lines[-1]
    assert dynamo.config.recompile_limit == settings
    assert result.summary["previews"]["failed"] == 0


@pytest.mark.usefixtures("traced", "with_sgd")
def test_a_limit_that_is_reached_is_told_and_training_goes_on(
    job: Callable[..., Any], plain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices = Notices()
    monkeypatch.setattr(compiling, "SHAPES_OF_A_LENGTH", 0)
    options = {"model_path": str(plain_folder), "monitoring": QUIET}
    hyper = {**ONE_LENGTH, "max_steps": 3}
    config = job("over", hyperparams={**hyper, "compile": "blocks"}, **options)
    result = TrainerEngine(observers=[notices]).run_job(config)
    assert result.success
    assert result.summary["compile"]["is_limit_reached"]
    assert result.summary["compile"]["graphs"] == 0
    [line] = [line for line in notices.texts if "uncompiled from here on" in line]
    assert line.startswith("more than 0 graphs would be needed")
    plain = TrainerEngine().run_job(job("plain-run", hyperparams=hyper, **options))
    assert losses(result) == losses(plain)


def wrong(graph: Any, _: Any) -> Any:
    """A compiler that mixes the features of a layer's result up."""
    return lambda *args: tuple(
        one.flip(-1) if isinstance(one, torch.Tensor) and one.is_floating_point() else one
        for one in graph(*args)
    )


def failing(graph: Any, _: Any) -> Any:
    raise RuntimeError("no such instruction")


def interrupted(graph: Any, _: Any) -> Any:
    os.kill(os.getpid(), signal.SIGINT)
    raise RuntimeError("the compiler was ended by a signal")


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        (wrong, r"loss of the longest batch is .* compiled and .* uncompiled"),
        (failing, "torch could not compile a layer .*no such instruction"),
    ],
)
def test_a_compiler_that_fails_or_is_wrong_is_refused_before_the_first_step(
    compiler: Any,
    words: str,
    train: Callable[..., Any],
    plain_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", compiler)
    hyper = {**ONE_LENGTH, "compile": "blocks", "max_steps": 2}
    result = train(model_path=str(plain_folder), hyperparams=hyper, monitoring=QUIET)
    assert (result.exit_code, result.global_step) == (2, 0)
    assert re.search(words, result.error_message)
    assert "set hyperparams.compile=off" in result.error_message
    assert not result.output_dir.exists()


def test_a_signal_during_a_compilation_stops_the_run_as_a_signal_does(
    train: Callable[..., Any], plain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", interrupted)
    hyper = {**ONE_LENGTH, "compile": "blocks", "max_steps": 2}
    result = train(model_path=str(plain_folder), hyperparams=hyper, monitoring=QUIET)
    assert (result.state, result.exit_code) == ("stopped", 130)
    assert result.summary["ended_by"] == "SIGINT"


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_previews_of_compiled_runs_are_verified(train: Callable[..., Any]) -> None:
    """The canary is scored, and the weights are named, as without compiling."""
    hyper = {**ONE_LENGTH, "compile": "blocks", "max_steps": 5}
    sidecar = {"preview_backend": "sidecar", "preview_drain_timeout": 60}
    result = train(hyperparams=hyper, monitoring=sidecar)
    assert result.success, result.error_message
    previews = result.summary["previews"]
    assert previews["verified"] == previews["asked"] > 0
    names = names_of(result.model_path)
    assert names
    assert not [name for name in names if "_orig_mod" in name]


@pytest.mark.long
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    mode: str, train: Callable[..., Any]
) -> None:
    """Also with dropout, whose random numbers compiled code draws in another way."""
    hyper = {**ONE_LENGTH, "compile": "blocks", "max_steps": 6, "training_mode": mode}
    straight, again = resumed(train, 3, hyperparams=hyper, monitoring=QUIET)
    for step in (4, 6):
        name = f"checkpoints/step-{step:08d}"
        check_same_state(straight.output_dir / name, again.output_dir / name)


SCRIPT = """
import sys
from trainer.core import compiling
compiling.BACKEND = sys.argv.pop(1)
from trainer.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_two_processes_train_compiled_layers_as_plain_ones(
    plain_folder: Path, qa_file: Path, tmp_path: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)

    def steps(name: str) -> tuple[list[float], dict[str, Any] | None]:
        out = tmp_path / name
        words = ["train", "--model", plain_folder, "--dataset", qa_file, "--output", out]
        words += ["--max-steps", "5", "--fp32", "--monitoring.inference_interval", "0"]
        words += ["--hyperparams.max_length", "64", "--hyperparams.compile", name]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*launch, "--nproc-per-node", "2", script, "aot_eager", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
        counts = json.loads((out / "run.json").read_text())["summary"]["compile"]
        return [one["train_loss"] for one in lines if one["type"] == "StepDone"], counts

    (plain, none), (compiled, counts) = steps("off"), steps("blocks")
    assert none is None
    assert counts is not None
    assert 1 <= counts["graphs"] <= counts["limit"]
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert len(plain) == 5


# ---- refusals before anything is written


def refusal(call: Callable[[], None]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    assert "set hyperparams.compile=off" in str(caught.value)
    return str(caught.value)


def test_a_machine_that_cannot_compile_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_compiler(CPU)
    assert "this run is on mps" in refusal(lambda: check_compiler(torch.device("mps")))
    with dynamo.config.patch(disable=True):
        assert "TORCH_COMPILE_DISABLE" in refusal(lambda: check_compiler(CPU))
    with monkeypatch.context() as patch:
        patch.setattr(dynamo.eval_frame, "is_dynamo_supported", lambda: False)
        assert "cannot compile here" in refusal(lambda: check_compiler(CPU))
    with monkeypatch.context() as patch:
        patch.setattr(compiling.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        assert "Python.h" in refusal(lambda: check_compiler(CPU))

    def none_found() -> str:
        raise InvalidCxxCompiler

    from torch._inductor import cpp_builder

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    assert "needs a C++ compiler" in refusal(lambda: check_compiler(CPU))


def test_without_a_compiler_nothing_is_written(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_missing_on_cpu", lambda: "a C++ compiler")
    config = job(hyperparams={"compile": "blocks"})
    result = TrainerEngine().run_job(config)
    assert result.exit_code == 2
    assert result.error_message == (
        "hyperparams.compile=blocks needs a C++ compiler; install it, or set "
        "hyperparams.compile=off."
    )
    assert not result.output_dir.exists()


def test_models_without_layers_that_are_known_are_refused() -> None:
    config = CTRLConfig(vocab_size=64, n_embd=16, dff=32, n_layer=2, n_head=2)
    assert "no list of decoder layers" in refusal(lambda: check_blocks(config, "model"))
    remote = type("RemoteConfig", (CTRLConfig,), {"__module__": "transformers_modules.a.b"})()
    assert "runs code from its own folder" in refusal(lambda: check_blocks(remote, "model"))


def test_other_attention_than_sdpa_and_eager_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"
    words = refusal(lambda: compiling.CompiledBlocks(model, (64,), print))
    assert "attention flash_attention_2 gets the lengths" in words
