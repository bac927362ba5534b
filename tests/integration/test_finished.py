"""What `chat`, `export` and `serve` open: a run, any step of it, a checkpoint, a model."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.integration.serving import running_server
from trainer.cli import main
from trainer.core.finished import open_run
from trainer.errors import ConfigError, ModelError, OutputError
from trainer.models.adapter_files import load_finished_model, load_merged
from trainer.server.held_model import HeldModel

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
QUIET = {"inference_interval": 0, "micro_eval_interval": 2}
SAVES = {"checkpoint_interval": 2, "keep_checkpoints": 9}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


@pytest.fixture
def finished(train: Callable[..., Any]) -> Callable[..., Path]:
    """A function that trains 6 steps with a checkpoint every 2; returns the run's folder."""

    def make(mode: str = "lora", **more: Any) -> Path:
        hyper = {"training_mode": mode, "max_steps": 6, "learning_rate": 3e-2}
        result = train(mode, hyperparams=hyper, monitoring=QUIET, output=SAVES, **more)
        assert result.success, result.error_message
        return Path(result.output_dir)

    return make


def test_a_step_of_a_run_is_opened_by_number_by_best_and_by_folder(
    finished: Callable[..., Path], tmp_path: Path
) -> None:
    run = finished()
    by_step = {step: open_run(run, step=str(step)) for step in (2, 4, 6)}
    seen = {step: logits(one.load()[0]) for step, one in by_step.items()}
    assert not torch.equal(seen[2], seen[4])
    assert torch.equal(seen[6], logits(open_run(run).load()[0]))
    folder = run / "checkpoints" / "step-00000002"
    assert torch.equal(seen[2], logits(open_run(folder).load()[0]))
    assert open_run(folder).system_prompt == open_run(run).system_prompt
    shutil.copytree(folder, tmp_path / "x" / folder.name)  # a checkpoint without its run
    assert torch.equal(seen[2], logits(open_run(tmp_path / "x" / folder.name).load()[0]))
    (run / "best.json").write_text('{"step": 4}')
    best = open_run(run, step="best")
    assert "step 4, marked as best" in best.note
    assert torch.equal(seen[4], logits(best.load()[0]))


def test_best_is_the_step_of_the_lowest_validation_loss(finished: Callable[..., Path]) -> None:
    run = finished()
    losses = {
        event["step"]: event["val_loss"]
        for event in map(json.loads, (run / "metrics.jsonl").open())
        if event.get("type") == "EvaluationDone"
    }
    assert len(losses) == 3
    assert open_run(run).step == open_run(run / "final_model").step == 6
    found = open_run(run, step="best")
    assert found.step == int(found.model_dir.name[-8:])
    assert found.model_dir.name == f"step-{min(losses, key=lambda step: losses[step]):08d}"


def test_a_step_that_is_not_there_names_those_that_are(finished: Callable[..., Path]) -> None:
    run = finished()
    with pytest.raises(OutputError, match="step 3 has no checkpoint; checkpoints: step 2, 4, 6"):
        open_run(run, step="3")
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        open_run(run / "checkpoints" / "step-00000002", step="4")
    broken = run / "checkpoints" / "step-00000004" / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    with pytest.raises(OutputError, match="It is damaged"):
        open_run(run, step="4")
    with pytest.raises(OutputError, match=r"no such folder; |holds no run"):
        open_run(run / "logs")


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_an_exported_checkpoint_is_what_the_run_would_have_saved(
    mode: str, finished: Callable[..., Path], assert_same_weights: Callable[..., None]
) -> None:
    run = finished(mode)
    assert main(["export", str(run), "--step", "6", "--output", str(run / "x")]) == 0
    assert_same_weights(run / "x", run / "final_model")
    names = {path.name for path in (run / "final_model").iterdir()}
    # The card tells of the whole run, so that final_model alone has it.
    assert {path.name for path in (run / "x").iterdir()} == names - {"README.md"}
    for name in names & {"config.json", "generation_config.json", "base.json"}:
        assert (run / "x" / name).read_text() == (run / "final_model" / name).read_text()


def test_a_merged_step_is_that_steps_model(finished: Callable[..., Path]) -> None:
    run = finished()
    assert main(["export", str(run), "--merge", "--step", "2"]) == 0
    said = logits(open_run(run, step="2").load()[0])
    merged = logits(open_run(run / "merged_model").load()[0])
    assert torch.allclose(said, merged, atol=1e-5)
    assert main(["export", str(run), "--step", "0"]) == 2
    assert main(["export", str(run), "--step", "worst"]) == 2


def test_chat_takes_a_step_and_a_checkpoint(
    finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = finished()
    answers = []
    for words in ([run, "--step", "2"], [run / "checkpoints" / "step-00000002"], [run]):
        monkeypatch.setattr("sys.stdin", io.StringIO("what is 3 plus 3?\n"))
        assert main(["chat", *map(str, words), "--max-new-tokens", "8"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_the_server_answers_with_an_adapter_on_its_base(finished: Callable[..., Path]) -> None:
    folder = open_run(finished(), step="4").model_dir
    held = HeldModel(str(folder), "cpu", wait_for_weights=False)
    said = logits(load_finished_model(folder))
    assert torch.allclose(said, logits(held.model), atol=1e-5)
    assert held.weights_id == held.original_id


@pytest.mark.slow
def test_serve_takes_a_step_of_a_run_and_answers_what_chat_says(
    finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = finished()
    monkeypatch.setattr("sys.stdin", io.StringIO("what is 3 plus 3?\n"))
    assert main(["chat", str(run), "--step", "2", "--max-new-tokens", "8"]) == 0
    said = capsys.readouterr().out
    with running_server(str(run), "--step", "2") as server:
        assert "checkpoint of step 2" in server.log()
        asked = {"prompt": "what is 3 plus 3?", "max_new_tokens": 8, "temperature": 0, "seed": 42}
        answer = httpx.post(f"{server.url}/generate", json=asked, timeout=120)
        [model] = httpx.get(f"{server.url}/models").json()["models"]
        active = httpx.get(f"{server.url}/info").json()["active"]
    assert (model["run"], model["step"]) == (run.name, 2)
    assert active == {name: model[name] for name in ("weights_id", "run", "step")}
    assert answer.status_code == 200, answer.text
    assert said.removesuffix(" [cut at the limit]\n") == answer.json()["text"]


@pytest.mark.slow
def test_serve_says_once_that_another_run_answers_and_how_to_bring_its_own_back(
    finished: Callable[..., Path], train: Callable[..., Any]
) -> None:
    run = finished("full")
    with running_server(str(run)) as server, httpx.Client(base_url=server.url, timeout=120) as http:

        def active() -> str:
            return str(http.get("/info").json()["active"]["weights_id"])

        own = active()
        there = {"remote_3090_host": "127.0.0.1", "remote_3090_port": server.port}
        result = train(
            "other",
            hyperparams={"max_steps": 4, "learning_rate": 3e-2},
            monitoring={"preview_backend": "remote_3090", "inference_interval": 2, **there},
        )
        assert result.summary["previews"]["verified"] > 4
        assert active() != own
        [line] = [one for one in server.log().splitlines() if "is answered with" in one]
        [weights] = re.findall(r"set_active with (\S+) brings", line)
        assert "the weights of the run other" in line
        assert f"those of {run.name}, step 6 " in line
        body = {"weights_id": weights}
        assert http.post("/models/set_active", json=body).status_code == 200
        assert active() == own == weights


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["RUN", "--model", "tiny"], "each name a model"),
        (["--model", "tiny", "--step", "2"], "give it as RUN"),
        (["--model", "tiny", "--base", "x"], "give it as RUN"),
        (["RUN", "--step", "5"], "step 5 has no checkpoint"),
        (["RUN/merged", "--base", "x"], "holds a whole model"),
    ],
)
def test_serve_refuses_weights_that_are_not_there(
    words: list[str], expected: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "RUN" / "merged").mkdir(parents=True)
    (tmp_path / "RUN" / "merged" / "config.json").write_text("{}")
    record = {"config": {}, "system_prompt": None}
    (tmp_path / "RUN" / "run.json").write_text(json.dumps(record))
    full = [word.replace("RUN", str(tmp_path / "RUN")) for word in words]
    assert main(["serve", *full, "--port", "0"]) == 2
    assert expected in " ".join(capsys.readouterr().err.split())


# ---- the base of an adapter


def test_a_moved_base_is_asked_for_and_found_by_base(
    finished: Callable[..., Path], model_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    run, moved = finished(), tmp_path / "moved"
    said = logits(load_finished_model(run / "final_model"))
    shutil.move(model_folder, moved)
    for words in (["chat", str(run)], ["export", str(run), "--merge"]):
        assert main(words) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"was in {model_folder}" in error
        assert "--base FOLDER_OR_HUB_ID" in error
    assert torch.equal(said, logits(load_finished_model(run / "final_model", base=str(moved))))
    assert main(["export", str(run), "--merge", "--base", str(moved)]) == 0
    merged = logits(open_run(run / "merged_model").load()[0])
    assert torch.allclose(said, merged, atol=1e-5)
    served = logits(load_merged(run / "final_model", base=str(moved)))
    assert torch.allclose(said, served, atol=1e-5)


WRONG = {
    "other width": ({"hidden_size": 64}, "does not fit|matrices differ"),
    "other vocabulary": ({"vocab_size": 310}, "matrices differ"),
    "other weights": ({"seed": 5}, "is not the base that this adapter was trained on"),
    "other depth": ({"num_hidden_layers": 1, "seed": 5}, "is not the base"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_base_that_is_another_model_is_refused(
    name: str,
    finished: Callable[..., Path],
    make_model: Callable[..., Any],
    tmp_path: Path,
) -> None:
    changes, words = WRONG[name]
    make_model(**changes).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=words):
        load_finished_model(finished() / "final_model", base=str(tmp_path / "other"))


def test_without_a_record_a_base_of_another_shape_is_refused_all_the_same(
    finished: Callable[..., Path], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    adapter = finished() / "final_model"
    (adapter / "base.json").unlink()
    make_model(intermediate_size=96).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="does not fit"):
        load_finished_model(adapter, base=str(tmp_path / "other"))


def test_a_base_that_changed_at_its_place_is_refused(
    finished: Callable[..., Path], model_folder: Path, make_model: Callable[..., Any]
) -> None:
    adapter = finished() / "final_model"
    make_model(seed=7).save_pretrained(model_folder)
    with pytest.raises(ModelError, match="matrices differ"):
        load_finished_model(adapter)


def test_the_record_of_a_base_does_not_depend_on_the_dtype(make_model: Callable[..., Any]) -> None:
    from trainer.models.adapter_files import describe_base

    one = make_model().bfloat16()
    two = make_model()
    two.load_state_dict(one.state_dict())
    hashes = [describe_base(model)["sha256_of_samples"] for model in (one, two)]
    assert hashes[0] == hashes[1]
    assert describe_base(two.half())["sha256_of_samples"] == {}
    assert len(hashes[0]) == 15  # the embedding once, seven matrices in each of two blocks


def test_base_beside_all_weights_is_refused(finished: Callable[..., Path], capsys: Any) -> None:
    run = finished("full")
    for words in (["chat", str(run)], ["export", str(run), "--merge"]):
        assert main([*words, "--base", str(run)]) == 2
        assert "--base" in capsys.readouterr().err
    assert not (run / "merged_model").exists()


def test_an_adapter_as_the_model_of_a_run_is_one_error_that_says_what_to_do(
    finished: Callable[..., Path], train: Callable[..., Any], tmp_path: Path
) -> None:
    adapter = finished() / "final_model"
    refused = train("again", model_path=str(adapter))
    assert refused.exit_code == 2
    assert "--merge --output MERGED" in str(refused.error_message)
    assert not (tmp_path / "again").exists()
    merged = tmp_path / "merged"
    assert main(["export", str(adapter), "--merge", "--output", str(merged)]) == 0
    assert train("again", model_path=str(merged)).success


def test_a_run_whose_record_lacks_secrets_is_opened(train: Callable[..., Any]) -> None:
    told = {**QUIET, "notify": ["sh", "-c", "true"], "notify_silence": 900.0}
    result = train(hyperparams={"max_steps": 2}, monitoring=told, output=SAVES)
    assert result.success, result.error_message
    run = Path(result.output_dir)
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["monitoring"]["notify"] == ["sh", "***", "***"]
    assert main(["export", str(run)]) == 0
    assert main(["export", str(run), "--step", "2", "--output", str(run / "x")]) == 0
    # An address whose password was left out, likewise.
    record["config"]["monitoring"] |= {
        "preview_backend": "openai",
        "openai_base_url": "http://***@127.0.0.1:1/v1",
        "openai_model": "m",
    }
    (run / "run.json").write_text(json.dumps(record))
    assert open_run(run).config.model.model_path


def test_a_marked_step_gives_the_final_model_and_its_card_says_so(
    train: Callable[..., Any], assert_same_weights: Callable[..., None]
) -> None:
    hyper = {"max_steps": 4, "learning_rate": 3e-2}
    first = train(hyperparams=hyper, monitoring=QUIET, output=SAVES)
    assert first.success, first.error_message
    run = Path(first.output_dir)
    (run / "best.json").write_text('{"step": 2}')
    output = {**SAVES, "final_model": "best", "resume": "latest"}
    again = train(hyperparams={**hyper, "max_steps": 6}, monitoring=QUIET, output=output)
    assert again.success, again.error_message
    assert again.summary["best"] == {"by": "mark", "step": 2, "value": None}
    assert main(["export", str(run), "--step", "2", "--output", str(run / "x")]) == 0
    assert_same_weights(run / "x", run / "final_model")
    card = (run / "final_model" / "README.md").read_text()
    assert "the weights are those of step 2, the best" in card
    assert "training loss of the last step" not in card
