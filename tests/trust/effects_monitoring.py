"""Effects of section monitoring."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from tests.trust.effects import shows
from tests.trust.lab import NUM_STEPS, Lab, http_server
from trainer import cli
from trainer.config.monitoring_section import MonitoringConfig
from trainer.core import TrainerEngine
from trainer.monitoring import create_preview_backend
from trainer.preview.base import PreviewRequest

ANSWER = {"text": "hello", "tokens_generated": 1, "finish_reason": "stop", "weights_id": "w"}
COMPLETION = {
    "choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 1},
}


@shows("monitoring.status_update_interval")
def status_update_interval(lab: Lab) -> None:
    seen = lab.run(monitoring={"status_update_interval": 1})
    assert seen.recorder.shown == [1, 2, 3, 4]
    shown = lab.run(monitoring={"status_update_interval": 3}).recorder.shown
    assert len(set(shown)) < NUM_STEPS


@shows("monitoring.prompt_snapshot_interval")
def prompt_snapshot_interval(lab: Lab) -> None:
    seen = lab.run(monitoring={"prompt_snapshot_interval": 2})
    assert [event.step for event in seen.events("RowShown")] == [2, 4]
    assert lab.base.events("RowShown") == []


@shows("monitoring.micro_eval_interval", "monitoring.micro_eval_rows")
def micro_eval(lab: Lab) -> None:
    seen = lab.run(monitoring={"micro_eval_interval": 2, "micro_eval_rows": 3})
    found = seen.events("EvaluationDone")
    assert [(event.step, event.num_rows) for event in found] == [(2, 3), (4, 3)]
    assert lab.base.events("EvaluationDone") == []


@shows("monitoring.inference_interval", "monitoring.num_eval_samples", "monitoring.preview_prompts")
def previews(lab: Lab) -> None:
    asked = {"inference_interval": 2, "num_eval_samples": 3, "preview_prompts": ["who?"]}
    seen = lab.run(monitoring=asked)
    assert [event.step for event in seen.events("PreviewsDone")] == [0, 2, 4]
    assert [result.prompt_id for result in seen.previews].count("user-0") == 3
    assert len(seen.previews) == 3 * (3 + 1)
    assert lab.base.previews == []


@shows("monitoring.preview_max_tokens", "monitoring.preview_temperature")
def preview_tokens(lab: Lab) -> None:
    def ask(**monitoring: Any) -> list[Any]:
        last = {"inference_interval": 1000, **monitoring}
        found: list[Any] = lab.run(monitoring=last, hyperparams={"max_steps": 1}).previews
        return found

    greedy, again, hot = (ask(preview_temperature=t) for t in (0, 0, 5.0))
    assert [r.raw_text for r in greedy] == [r.raw_text for r in again]
    assert [r.raw_text for r in greedy] != [r.raw_text for r in hot]
    assert max(result.tokens_generated for result in greedy) == 6
    assert max(result.tokens_generated for result in ask(preview_max_tokens=2)) == 2


@shows("monitoring.num_preview_samples")
def num_preview_samples(lab: Lab) -> None:
    def ask(count: int) -> list[Any]:
        asked = {"inference_interval": 1000, "num_preview_samples": count}
        seen = lab.run(
            monitoring={**asked, "preview_temperature": 0.7}, hyperparams={"max_steps": 1}
        )
        return [[said.text for said in one.answers] for one in seen.previews]

    one, several = ask(1), ask(4)
    assert {len(texts) for texts in several} == {4}
    assert [texts[:1] for texts in several] == one
    assert all(len(set(texts)) > 1 for texts in several)


@shows("monitoring.preview_golden_logprobs")
def preview_golden_logprobs(lab: Lab) -> None:
    def ask(how: str, prompts: int) -> list[Any]:
        asked = {
            "inference_interval": 1000,
            "preview_golden_logprobs": how,
            "num_eval_samples": 2,
            "preview_prompts": ["who?"] * (prompts - 2),
            "preview_max_tokens": 1,
        }
        seen = lab.run(monitoring=asked, hyperparams={"max_steps": 1})
        assert len(seen.previews) == 2 * prompts
        return [one.golden_logprobs for one in seen.previews if one.golden_answer is not None]

    assert set(ask("off", 3)) == set(ask("auto", 17)) == {None}
    for found in (*ask("auto", 16), *ask("on", 17)):
        assert found
        assert max(found) <= 0


@shows("monitoring.scores", "monitoring.score_columns", "monitoring.score_timeout")
def scores(lab: Lab) -> None:
    """Each answer gets what a function says of a column of its row, if it says so in time."""
    folder = lab.path("scores")
    folder.mkdir()
    (folder / "lab_scores.py").write_text(
        "import time\n"
        "def size(completion, given):\n"
        "    return len(given)\n"
        "def slow(completion):\n"
        "    time.sleep(0.4)\n"
    )

    def ask(**monitoring: Any) -> Any:
        last = {"inference_interval": 1000, **monitoring}
        with mock.patch.object(sys, "path", [str(folder), *sys.path]):
            return lab.run(monitoring=last, hyperparams={"max_steps": 1})

    sized = ["exact", "lab_scores:size"]
    for column in ("question", "answer"):
        found = ask(scores=sized, score_columns={"given": column}).previews
        rows = {row["question"]: row[column] for row in lab.rows}
        assert all(set(one.scores) == {"exact", "size"} for one in found)
        assert [one.scores["size"] for one in found] == [len(rows[one.prompt]) for one in found]
    assert {len(one.scores) for one in ask().previews} == {0}
    seen = {limit: ask(scores=["lab_scores:slow"], score_timeout=limit) for limit in (0.2, 20)}
    told = {limit: [one.text for one in run.events("Notice")] for limit, run in seen.items()}
    assert any("score slow: no value" in text for text in told[0.2])
    assert not any("score slow: no value" in text for text in told[20])
    assert "exakt" in lab.refusal(monitoring={"scores": ["exakt"], "inference_interval": 1})


@shows("monitoring.num_score_prompts")
def num_score_prompts(lab: Lab) -> None:
    asked = {"scores": ["f1"], "inference_interval": 1000, "micro_eval_interval": 2}
    seen = lab.run(monitoring={**asked, "num_eval_samples": 2, "num_score_prompts": 3})
    found = [one for one in seen.events("ScoresDone") if one.source == "evaluation"]
    assert [(one.step, one.figures[0].num_prompts) for one in found] == [(0, 3), (2, 3), (4, 3)]
    assert {len(one.results) for one in seen.events("PreviewsDone")} == {2}
    lines = (seen.folder / "evaluations.jsonl").read_text().splitlines()
    assert len(lines) == 9
    assert not (lab.base.folder / "evaluations.jsonl").exists()


@shows("monitoring.canary_set")
def canary_set(lab: Lab) -> None:
    """Its prompts are measured at each preview step, by what was answered at step 0."""
    path = lab.path("canaries.jsonl")
    path.write_text('"what is 3 plus 3?"\n{"prompt": "who?"}\n')
    asked = {"inference_interval": 2, "canary_set": str(path)}
    seen = lab.run(monitoring=asked)
    found = seen.events("DriftMeasured")
    assert [(one.step, one.num_prompts) for one in found] == [(0, 2), (2, 2), (4, 2)]
    assert found[0].kl == 0 < found[1].kl
    assert (seen.folder / "drift_base.json").exists()
    assert lab.run(monitoring={"inference_interval": 2}).events("DriftMeasured") == []
    assert "no such file" in lab.refusal(monitoring={**asked, "canary_set": "generla"})


@shows("monitoring.max_output_tokens")
def max_output_tokens(lab: Lab) -> None:
    """Texts in status.json have at most four characters a token, and say that they were cut."""

    def longest(limit: int) -> int:
        seen = lab.run(
            monitoring={"inference_interval": 1000, "max_output_tokens": limit},
            hyperparams={"max_steps": 1},
        )
        return max(len(preview["golden_answer"]) for preview in seen.status["last_previews"])

    assert longest(1000) > 4 * 2 + 3
    assert longest(2) <= 4 * 2 + 3


@shows("monitoring.max_eval_tokens", "monitoring.final_eval_prompts")
def final_evaluation(lab: Lab) -> None:
    def answers(**monitoring: Any) -> list[Any]:
        folder = lab.run(monitoring=monitoring, hyperparams={"max_steps": 1}).folder
        lines = (folder / "final_evaluation.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    assert len(answers(final_eval_prompts=5, max_eval_tokens=3)) == 5
    for limit in (3, 9):
        found = answers(final_eval_prompts=2, max_eval_tokens=limit)
        assert max(answer["tokens_generated"] for answer in found) == limit
    assert not (lab.base.folder / "final_evaluation.jsonl").exists()


@shows("monitoring.preview_backend", "monitoring.openai_base_url", "monitoring.openai_model")
def openai(lab: Lab) -> None:
    def answer(request: Any) -> Any:
        return {"data": [{"id": "m1"}, {"id": "m2"}]} if request.command == "GET" else COMPLETION

    with http_server(answer) as (port, requests):
        there = {
            "preview_backend": "openai",
            "openai_base_url": f"http://127.0.0.1:{port}/v1",
            "inference_interval": 1000,
        }
        seen = lab.run(monitoring={**there, "openai_model": "m2"}, hyperparams={"max_steps": 1})
        assert {result.backend_type for result in seen.previews} == {"openai"}
        asked = [r for r in requests if r.command == "POST"]
        assert {r.path for r in asked} == {"/v1/chat/completions"}
        assert {r.body["model"] for r in asked} == {"m2"}
        assert "openai_model" in lab.refusal(monitoring=there)
    local = lab.run(monitoring={"inference_interval": 1000}, hyperparams={"max_steps": 1})
    assert {result.backend_type for result in local.previews} == {"local"}


@shows("monitoring.preview_drain_timeout")
def preview_drain_timeout(lab: Lab) -> None:
    """The end waits for slow previews only as long as it says."""

    def slow(request: Any) -> Any:
        if request.command == "GET":
            return {"data": [{"id": "m"}]}
        time.sleep(0.5)
        return COMPLETION

    with http_server(slow) as (port, _):
        there = {
            "preview_backend": "openai",
            "openai_base_url": f"http://127.0.0.1:{port}/v1",
            "inference_interval": 1000,
            "num_eval_samples": 2,
        }
        answered = {}
        for limit in (0, 30):
            seen = lab.run(
                monitoring={**there, "preview_drain_timeout": limit}, hyperparams={"max_steps": 1}
            )
            answered[limit] = {r.step for r in seen.previews if r.ok}
    assert 1 in answered[30]
    assert 1 not in answered[0]


@shows(
    "monitoring.remote_3090_host",
    "monitoring.remote_3090_port",
    "monitoring.remote_3090_model_id",
    "monitoring.remote_3090_key_file",
    "monitoring.remote_3090_timeout",
)
def remote(lab: Lab) -> None:
    key = lab.path("key")
    key.write_text("k" * 40)
    key.chmod(0o600)

    def ask(port: int, **more: Any) -> Any:
        config = MonitoringConfig(
            **{
                "preview_backend": "remote_3090",
                "remote_3090_host": "127.0.0.1",
                "remote_3090_port": port,
                "remote_3090_model_id": "asked-for",
                "remote_3090_key_file": str(key),
                **more,
            }
        )
        backend = create_preview_backend(config)
        try:
            return backend.preview_batch([PreviewRequest(prompt="hi")], 1)[0]
        finally:
            backend.close()

    with http_server(lambda request: ANSWER) as (port, requests):
        assert ask(port).text == "hello"
        assert requests[0].body["model_id"] == "asked-for"
        assert requests[0].headers["Authorization"] == "Bearer " + "k" * 40
        count = len(requests)
        assert not ask(port, remote_3090_host="127.0.0.2", remote_3090_timeout=1).ok
        assert len(requests) == count
    with http_server(lambda request: time.sleep(3)) as (port, _):
        started = time.monotonic()
        assert not ask(port, remote_3090_timeout=0.3).ok
        assert time.monotonic() - started < 3


@shows("monitoring.sidecar_device", "monitoring.sidecar_num_threads")
def sidecar(lab: Lab) -> None:
    """The process that answers was started for this device, with so many threads."""
    import subprocess

    started: list[Any] = []
    popen = subprocess.Popen

    class Noting(popen):  # type: ignore[type-arg, valid-type, misc]
        def __init__(self, words: Any, *args: Any, **named: Any) -> None:
            started.append((list(map(str, words)), named.get("env") or {}))
            super().__init__(words, *args, **named)

    asked = {"preview_backend": "sidecar", "inference_interval": 1000, "sidecar_num_threads": 2}
    with mock.patch.object(subprocess, "Popen", Noting):
        lab.run(
            monitoring={**asked, "sidecar_device": "cpu", "preview_drain_timeout": 0},
            hyperparams={"max_steps": 1},
        )
    [(words, environment)] = [one for one in started if "serve" in one[0]]
    assert words[words.index("--device") + 1] == "cpu"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert "cuda:77" in lab.refusal(monitoring={**asked, "sidecar_device": "cuda:77"})


@shows("monitoring.report_to")
def report_to(lab: Lab) -> None:
    seen = lab.run(monitoring={"report_to": ["tensorboard"]}, hyperparams={"max_steps": 1})
    assert list((seen.folder / "logs").glob("events.out.tfevents*"))
    assert not list(lab.base.folder.glob("logs/events*"))
    assert "'tensorbord'" in lab.refusal(monitoring={"report_to": ["tensorbord"]})


@shows("monitoring.tracker_texts")
def tracker_texts(lab: Lab) -> None:
    """What a row says is in the tracker's file, or in none of its files."""

    def logged(is_on: bool) -> bytes:
        asked = {"inference_interval": 1000, "report_to": ["tensorboard"], "tracker_texts": is_on}
        folder = lab.run(monitoring=asked, hyperparams={"max_steps": 1}).folder
        return b"".join(path.read_bytes() for path in folder.glob("logs/events*"))

    assert b"what is " in logged(True)
    assert b"what is " not in logged(False)
    assert "names no tracker that takes texts" in lab.refusal(monitoring={"tracker_texts": True})


class _Waiting:
    """An observer in which the run waits until there is something in a list."""

    def __init__(self, found: list[Any]) -> None:
        self.found = found

    def on_event(self, event: Any) -> None:
        deadline = time.monotonic() + 60
        while type(event).__name__ == "StepDone" and not self.found:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def close(self) -> None: ...


@shows("monitoring.notify", "monitoring.notify_silence")
def notify(lab: Lab) -> None:
    """A webhook hears of the end; and of silence, which is as short here as one step waits."""

    def told(**more: float) -> list[str]:
        with http_server(lambda _: {}) as (port, requests):
            url = f"http://127.0.0.1:{port}/hook-SECRET?token=SECRET"
            one = {"max_steps": 1}
            config = lab.config(monitoring={"notify": [url], **more}, hyperparams=one)
            waiting = _Waiting(requests if more else [0])
            assert TrainerEngine(observers=[waiting]).run_job(config).success
            assert {request.path for request in requests} == {"/hook-SECRET?token=SECRET"}
            files = [one for one in Path(config.output.output_dir).rglob("*") if one.is_file()]
            assert files
            assert not [one for one in files if b"SECRET" in one.read_bytes()]
            return [request.body["event"] for request in requests]

    assert told() == ["ended"]
    assert set(told(notify_silence=0.01)) >= {"silent", "ended"}
    refused = lab.refusal(monitoring={"notify": ["/no/such/program"]})
    assert "no program '/no/such/program'" in refused


@shows("monitoring.display")
def display(lab: Lab) -> None:
    """What the terminal gets: lines for people, one JSON object a line, or nothing."""

    def printed(name: str) -> list[str]:
        config = lab.config(hyperparams={"max_steps": 1}, monitoring={"display": name})
        path = lab.path("config.json")
        path.write_text(config.model_dump_json())
        out = io.StringIO()
        with contextlib.redirect_stdout(out), mock.patch.dict(os.environ):
            assert cli.main(["train", "--config", str(path)]) == 0
        return out.getvalue().splitlines()

    [line] = printed("quiet")
    assert line.startswith("completed, step 1 of 1")
    assert all(isinstance(json.loads(line), dict) for line in printed("json"))
    plain = printed("plain")
    assert any(line.startswith("data card") for line in plain)
    assert any(line.startswith("live page: trainer monitor ") for line in plain)
    assert printed("rich") != printed("plain")
