"""`trainer monitor --ask`: the weights of an ended run are asked by a server of the monitor."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.errors import PreviewError
from trainer.views.page.own_server import OwnServer
from trainer.views.run_reader import RunReader

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended."""
    root = tmp_path_factory.mktemp("ended")
    rows = [{"question": f"max of {n} and 7?", "answer": str(max(n, 7))} for n in range(20)]
    helpers.write_lines(root / "rows.jsonl", rows)
    words = [*("train", "--dataset", str(root / "rows.jsonl"), "--model", "tiny")]
    words += ["--output", str(root / "run"), "--max-steps", "2", "--monitoring.num_eval_samples"]
    words += ["1", "--monitoring.preview_max_tokens", "4", "--monitoring.final_eval_prompts", "1"]
    with helpers.program(*words) as (process, _):
        assert process.wait(120) == 0
    return root / "run"


def test_a_monitor_with_ask_answers_for_an_ended_run_and_ends_its_server_with_itself(
    open_page: Callable[..., Any], helpers: Any, run: Path
) -> None:
    words = ["monitor", str(run), "--port", "0", "--ask"]
    with helpers.program(*words, ready="monitor:") as (process, line):
        page = open_page(line.split()[1], wait_for="#ask textarea")
        assert "ends after 10 minutes without one" in page.inner_text("#ask")
        before = psutil.Process(process.pid).children(recursive=True)
        assert before == []  # nothing is started before somebody asks
        page.locator("#ask textarea").fill("max of 3 and 7?")
        page.get_by_label("at most, tokens").fill("8")
        page.locator("#ask textarea").press("Enter")
        page.get_by_text("Answered by final_model (weights ").wait_for()
        servers = psutil.Process(process.pid).children(recursive=True)
        assert "serve" in servers[0].cmdline()
        listening = {one.laddr.ip for one in servers[0].net_connections() if one.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
    assert psutil.wait_procs(servers, timeout=20)[1] == []


@pytest.mark.long
def test_the_server_ends_when_nobody_asks_and_starts_again_for_the_next_question(
    run: Path,
) -> None:
    reader = RunReader(run)
    reader.poll()
    server = OwnServer(idle_s=1.0)
    try:
        first = server.worker(reader).pid
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(first).wait(60)
        assert server.pid is None
        assert server.worker(reader).pid not in (None, first)
    finally:
        server.close()
    assert server.pid is None
    with pytest.raises(PreviewError, match="the monitor is ending"):
        server.worker(reader)


@pytest.mark.long
def test_a_final_model_that_cannot_be_loaded_is_one_sentence(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    (broken / "final_model" / "config.json").write_text(json.dumps({"model_type": "none"}))
    reader = RunReader(broken)
    reader.poll()
    server = OwnServer()
    with pytest.raises(PreviewError, match="the server of final_model did not start: error: "):
        server.worker(reader)
    assert server.pid is None
