"""The live page in a real browser, on runs that train in another process and on huge ones."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.views.page.charts import COLOURS

OpenPage = Callable[..., Any]
Monitor = Callable[..., str]


@pytest.mark.slow
def test_a_training_run_moves_is_asked_and_is_stopped(
    open_page: OpenPage, monitor: Monitor, helpers: Any, tmp_path: Path
) -> None:
    rows = [{"question": f"max of {n} and 7?", "answer": str(max(n, 7))} for n in range(80)]
    helpers.write_lines(tmp_path / "rows.jsonl", rows)
    run = tmp_path / "run"
    key_file = tmp_path / "key"
    key_file.write_text("0123456789abcdef0123456789abcdef\n")
    train = [
        *("train", "--dataset", str(tmp_path / "rows.jsonl"), "--model", "tiny"),
        *("--output", str(run), "--fp32", "--hyperparams.max_steps", "100000"),
        *("--hyperparams.batch_size", "2", "--hyperparams.max_length", "64"),
        *("--monitoring.inference_interval", "10", "--monitoring.preview_max_tokens", "8"),
        *("--monitoring.preview_temperature", "0"),
    ]
    serve = ["serve", "--model", "tiny", "--port", "0", "--api-key-file", str(key_file)]
    with helpers.program(*serve, ready="ready:") as (server, line):
        worker = {"url": line.split()[1], "key_file": str(key_file), "backend": "sidecar"}
        more = {"model_id": None, "system_prompt": None, "pid": server.pid}
        with helpers.program(*train, ready="training") as (process, _):
            (run / "worker.json").write_text(json.dumps({**worker, **more}))
            page = open_page(monitor(run, "--allow-control"), wait_for=".row-line")
            _step_and_loss_move(page)
            _answer_goes_through_steps_and_prompts(page)
            _only_a_kept_step_can_be_marked(page)
            _model_is_asked(page)
            _run_is_stopped(page)
            assert process.wait(60) == 0
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    assert (run / "final_model").is_dir()
    commands = json.loads((run / "control.json").read_text())["commands"]
    assert [command["command"] for command in commands] == ["stop"]  # no mark of another step


def _step_and_loss_move(page: Any) -> None:
    state, figure = page.locator(".state"), page.locator(".curve-now").last
    loss = figure.inner_text()
    at_a_step = page.wait_for_function(  # not at the previews between two steps
        """() => {
          const words = document.querySelector('.state').innerText;
          return /^training, step \\d+ of 100000, .* left$/.test(words) && words;
        }"""
    )
    words = at_a_step.json_value()
    page.wait_for_function("old => document.querySelector('.state').innerText !== old", arg=words)
    page.wait_for_function(
        "old => [...document.querySelectorAll('.curve-now')].pop().innerText !== old", arg=loss
    )
    first, second = (int(re.search(r"step (\d+)", text)[1]) for text in (words, state.inner_text()))  # type: ignore[index]
    assert second > first


def _answer_goes_through_steps_and_prompts(page: Any) -> None:
    page.locator(".row-line").nth(2).click(position={"x": 60, "y": 12})
    prompt = page.locator(".question").inner_text()
    page.wait_for_function("document.querySelector('.place').innerText.startsWith('step')")
    while not page.locator(".place").inner_text().startswith("step 0 "):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("/\\(1 of \\d\\d?\\)/.test(document.querySelector('.place').innerText)")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.place').innerText.startsWith('step 10 (2 of')")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("document.querySelector('.place').innerText.startsWith('step 0 (1 of')")
    page.keyboard.press("k")
    page.wait_for_function(
        "old => document.querySelector('.question').innerText !== old", arg=prompt
    )
    assert page.locator(".place").inner_text().startswith("step 0 (1 of")
    assert page.locator(".answer-pane").get_by_text("golden", exact=True).is_visible()


def _only_a_kept_step_can_be_marked(page: Any) -> None:
    """The page shows step 0, which has no checkpoint; the step that trains now is not meant."""
    page.get_by_role("button", name="Mark as best").click()
    page.get_by_text("Step 0, whose answers you see, has no checkpoint").wait_for()


def _model_is_asked(page: Any) -> None:
    box = page.get_by_role("textbox", name="Prompt")
    for prompt in ("max of 3 and 4?", "max of 5 and 6?"):
        box.fill(prompt)
        box.press("Enter")
        page.locator(".asked", has_text=prompt).wait_for()
        page.wait_for_function("document.querySelector('.ask textarea').value === ''")
    asked = page.locator(".asked")
    assert asked.count() == 2
    assert "max of 5 and 6?" in asked.first.inner_text()  # the newest first
    assert re.search(r"Answered by .*weights [0-9a-f]{12}", asked.first.inner_text())
    assert asked.first.locator(".answer").text_content()  # of an untrained model: anything
    asked.first.get_by_role("button", name="pin").click()
    pin = page.locator(".pin")
    assert "max of 5 and 6?" in pin.inner_text()
    prompts = page.locator(".rows").get_by_role("option")
    assert prompts.filter(has_text="max of 5 and 6?").count() == 0  # it enters no statistic
    pin.get_by_text("answers before").wait_for()  # it was asked again at a preview step


def _run_is_stopped(page: Any) -> None:
    page.get_by_role("button", name="Stop after this step").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Cancel").click()
    dialog.wait_for(state="hidden")
    # It goes on: at a step, or at the previews between two of them.
    assert "of 100000" in page.locator(".state").inner_text()
    page.get_by_role("button", name="Stop after this step").click()
    page.get_by_role("dialog").get_by_role("button", name="Stop after this step").click()
    page.wait_for_function(
        "document.querySelector('.state').innerText.startsWith('stopped by the control file')"
    )


@pytest.mark.slow
def test_a_run_of_100000_rows_and_5000_previews_is_shown(
    open_page: OpenPage,
    monitor: Monitor,
    helpers: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    total = 100_000
    columns = ("learning_rate", "grad_norm", "tokens_per_s", "step_time_s", "eta_s", "memory_gib")
    same = dict.fromkeys(columns, 0.5)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, total + 1):
            loss = 99.0 if step == 54_321 else 1 + 4 * math.exp(-step / 9000)
            row = {"type": "StepDone", "created_at": 1.7e9 + step, "step": step, **same}
            row |= {"total_steps": total, "epoch": 1.0, "train_loss": loss, "num_tokens": 900}
            file.write(json.dumps({**row, "num_trained_tokens": 300}) + "\n")
    previews = [helpers.preview_of(s, n) for s in range(0, total + 1, 100) for n in range(5)]
    helpers.write_lines(run / "previews.jsonl", previews)
    status = helpers.status_of(step=total, total_steps=total, train_loss=1.0)
    (run / "status.json").write_text(json.dumps(status))
    url = monitor(run)
    started = time.perf_counter()
    page = open_page(url, wait_for=".curve canvas")
    drawn_s = time.perf_counter() - started
    paint = page.evaluate(
        "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"
    )
    with capsys.disabled():
        print(f"\n100,000 rows, {len(previews)} previews: first paint {paint:.2f} s, ", end="")
        print(f"loss chart drawn {drawn_s:.2f} s after the request")
    assert page.locator(".state").inner_text() == f"completed, step {total} of {total}"
    assert page.locator(".place").inner_text() == "step 100,000 (1001 of 1001)"
    seconds = [_seconds_from_file_to_page(page, run, helpers, total + n) for n in range(1, 8)]
    with capsys.disabled():
        print(f"from the file to the page: {statistics.median(seconds):.2f} s, ", end="")
        print(f"{min(seconds):.2f} to {max(seconds):.2f} s in {len(seconds)} tries")


def _seconds_from_file_to_page(page: Any, run: Path, helpers: Any, step: int) -> float:
    """Add a preview and write the status as a run does; wait until the page shows both."""
    lines = [helpers.preview_of(step, n, text=f"said at {step}") for n in range(5)]
    with (run / "previews.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    status = json.dumps(helpers.status_of(step=step, total_steps=step, train_loss=1.0))
    (run / "status.tmp").write_text(status)
    started = time.perf_counter()
    (run / "status.tmp").replace(run / "status.json")
    page.wait_for_function(
        "step => document.querySelector('.state').innerText.includes(`step ${step} of`)"
        " && document.querySelector('.answer-pane').innerText.includes(`said at ${step}`)",
        arg=step,
    )
    return time.perf_counter() - started


def test_a_page_opened_before_the_run_starts_shows_it_and_a_restart_counts_once(
    open_page: OpenPage, monitor: Monitor, helpers: Any, tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"  # made by the run
    page = open_page(monitor(outputs), wait_for="h1")
    assert f"Waiting for a run in {outputs}" in page.locator(".page").inner_text()
    run = outputs / "run"
    run.mkdir(parents=True)
    lines = [helpers.preview_of(step, 0) for step in (0, 100, 200)]
    helpers.write_lines(run / "previews.jsonl", lines)
    (run / "status.json").write_text(json.dumps(helpers.status_of(step=200, total_steps=400)))
    page.get_by_role("link", name="run").click()
    page.wait_for_function("document.querySelector('.place')?.innerText === 'step 200 (3 of 3)'")
    with (run / "previews.jsonl").open("a") as file:  # a resume from 100 makes 200 again
        file.write(json.dumps({"type": "resumed", "step": 100, "created_at": 1.0}) + "\n")
        file.write(json.dumps(helpers.preview_of(200, 0, text="again")) + "\n")
    page.wait_for_function("document.body.innerText.includes('again')")
    assert page.locator(".place").inner_text() == "step 200 (3 of 3)"
    page.reload()
    page.wait_for_function("document.querySelector('.place')?.innerText === 'step 200 (3 of 3)'")


def test_a_run_that_hangs_turns_amber_and_frames_without_data_are_not_drawn(
    open_page: OpenPage, monitor: Monitor, helpers: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    # The process that is named must be older than the run, or it is not the run's.
    times = {"started_at": time.time(), "updated_at": time.time() - 60, "eta_s": 500.0}
    status = {"state": "training", "phase": "training", "pid": os.getpid(), **times}
    path = run / "status.json"
    path.write_text(json.dumps(helpers.status_of(step=200, total_steps=400, **status)))
    page = open_page(monitor(run), wait_for=".state-silent")
    assert re.match(r"no update for 1 min.*; training, step 200 of 400", page.inner_text(".state"))
    assert " left" not in page.locator(".page").inner_text()
    assert page.locator("canvas:visible").count() == 0
    assert not page.locator(".sources").is_visible()
    assert page.locator("[role=status]").first.text_content() == "no update for a while"
    now = {**status, "updated_at": time.time()}
    path.write_text(json.dumps(helpers.status_of(step=202, total_steps=400, **now)))
    page.wait_for_function("document.querySelector('.state').innerText.includes(' left')")
    assert page.locator(".state-silent").count() == 0


def test_drift_has_a_curve_a_figure_and_an_alert(
    open_page: OpenPage, monitor: Monitor, helpers: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text(json.dumps(helpers.status_of(step=50, total_steps=400)))
    rows: list[dict[str, Any]] = [
        {"type": "StepDone", "step": n, "train_loss": 2.0} for n in range(1, 51)
    ]
    counts = {"num_changed": 12, "num_prompts": 20, "worst_prompt": "Hamlet?", "worst_kl": 2.0}
    rows += [
        {"type": "DriftMeasured", "step": step, "kl": kl, "duration_s": 0.5, **counts}
        for step, kl in ((0, 0.0), (50, 1.25))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = open_page(monitor(run), wait_for=".alerts-warning")
    assert "drift of 1.25 nats per token" in page.inner_text(".alerts summary")
    assert "drift 1.250 nats per token" in page.inner_text(".figures-line")
    page.get_by_text("all curves").click()
    title = page.get_by_text("drift from the answers before training, nats per token")
    title.wait_for()
    title.locator("xpath=..").locator("canvas").wait_for()


def test_an_ended_page_names_the_final_evaluation_and_its_wrong_rows(
    open_page: OpenPage, monitor: Monitor, helpers: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    answers = [helpers.preview_of(9, n, matches=n != 3, text=f"answer {n}") for n in range(5)]
    helpers.write_lines(run / "final_evaluation.jsonl", answers)
    summary = {"final_evaluation": {"exact_match": 0.8, "matched": 4, "num_prompts": 5}}
    status = helpers.status_of(step=9, total_steps=9, summary=summary)
    (run / "status.json").write_text(json.dumps(status))
    page = open_page(monitor(run), wait_for=".sources")
    assert "Final evaluation: 80.0 % (4/5) right." in page.inner_text(".headline-rest")
    # Without previews it is what the page opens on.
    chosen = page.get_by_role("button", name="final evaluation 80.0 % (4/5)")
    assert chosen.get_attribute("aria-pressed") == "true"
    page.wait_for_selector(".row-line[aria-selected=true]")
    assert page.locator(".row-line").count() == 5
    page.get_by_role("button", name="wrong now 1").click()
    page.wait_for_function("document.querySelectorAll('.row-line').length === 1")
    page.wait_for_function(
        "prompt => document.querySelector('.question').innerText === prompt",
        arg=answers[3]["prompt"],
    )
    assert page.inner_text(".side .answer del") == "100"
    assert page.inner_text(".side .answer ins") == "3"
    assert "trainer chat" not in page.locator("#ask").inner_text()  # it left no weights
    assert "it left no weights" in page.locator("#ask").inner_text()


COUNTED = """window.told = []; const Real = window.Notification;
window.Notification = class extends Real {
  constructor(...words) { super(...words); window.told.push(words); }
};"""


def test_a_browser_that_was_allowed_by_a_click_tells_the_end_once(
    open_page: OpenPage, monitor: Monitor, helpers: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    times = {"started_at": time.time(), "updated_at": time.time(), "pid": os.getpid()}
    status = helpers.status_of(step=1, total_steps=9, **times)
    training = {**status, "state": "training", "phase": "training"}
    (run / "status.json").write_text(json.dumps(training))
    page = open_page(
        monitor(run), wait_for=".alerts", at_start=COUNTED, permissions=["notifications"]
    )
    page.locator(".alerts summary").click()
    page.get_by_role("button", name="notify me in this browser").click()
    page.get_by_text("this browser notifies you while the page stays open").wait_for()
    assert page.evaluate("window.told.length") == 0
    (run / "status.json").write_text(json.dumps({**status, "step": 9}))
    page.wait_for_function("window.told.length > 0")
    page.wait_for_timeout(1200)
    assert page.evaluate("window.told") == [["run", {"body": "completed, step 9 of 9"}]]


def test_runs_are_searched_sorted_and_compared_by_what_differs(
    open_page: OpenPage, monitor: Monitor, helpers: Any, tmp_path: Path
) -> None:
    for rate, (name, right) in enumerate((("one", 3), ("two", 1), ("three", 2))):
        run = tmp_path / name
        run.mkdir()
        (run / "status.json").write_text(json.dumps(helpers.status_of(step=9, total_steps=18)))
        texts = ["answer 100" if n < right else "answer 7" for n in range(4)]
        lines = [
            helpers.preview_of(9, n, text=text, matches=n < right) for n, text in enumerate(texts)
        ]
        helpers.write_lines(run / "previews.jsonl", lines)
        config = {"hyperparams": {"learning_rate": rate, "batch_size": 8}}
        (run / "run.json").write_text(json.dumps({"config": config}))
    page = open_page(monitor(tmp_path), wait_for=".run-table .q-checkbox")
    names = page.locator(".run-name")
    page.wait_for_function("document.querySelector('.run-table').innerText.includes('3/4')")
    for right in (1, 2, 3):  # each run says whether it gets better
        page.get_by_text(f"{right} of 4 right.").wait_for()
    assert page.locator(".run-bar > div").first.evaluate("one => one.style.width") == "50%"
    page.get_by_role("combobox", name="sort by").click()
    page.get_by_role("option", name="most right").click()
    page.wait_for_function(
        """[...document.querySelectorAll('.run-name')].map(one => one.innerText).join()
             === 'one,three,two'"""
    )
    page.get_by_role("textbox", name="search runs").fill("thr")
    page.wait_for_function("document.querySelectorAll('.run-name').length === 1")
    page.get_by_role("textbox", name="search runs").fill("")
    page.wait_for_function("document.querySelectorAll('.run-name').length === 3")
    button = page.get_by_role("button", name="Compare")
    assert button.is_disabled()
    for name in names.all_inner_texts():
        page.get_by_role("checkbox", name=f"compare {name}").click()
    page.get_by_role("button", name="Compare 3").click()
    page.wait_for_selector("#previews .answer")
    config = page.locator("#config tr").all_inner_texts()
    assert [row.split() for row in config[1:]] == [["hyperparams.learning_rate", "0", "2", "1"]]
    assert "2 of 4 prompts that all of them answered" in page.inner_text("#previews")
    assert page.locator(".apart").count() == 2  # 0 is right for all, 3 for none
    assert page.locator(".apart").first.locator("ins").inner_text() == "7"
    assert "A: one 3 of 4 right" in page.locator(".compared").first.inner_text()


def test_the_curves_of_a_comparison_take_the_colours_of_the_page(
    open_page: OpenPage, monitor: Monitor, helpers: Any, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        run = tmp_path / name
        run.mkdir()
        (run / "status.json").write_text(json.dumps(helpers.status_of(step=99, total_steps=99)))
        rows = [{"type": "StepDone", "created_at": 1.7e9, "step": n} for n in range(1, 99)]
        steps = [{**row, "train_loss": 1 + 1 / (n + 1)} for n, row in enumerate(rows)]
        helpers.write_lines(run / "metrics.jsonl", steps)
    url = monitor(tmp_path)
    page = open_page(url, wait_for="table .q-checkbox", color_scheme="dark")
    for name in ("one", "two"):
        page.get_by_role("checkbox", name=f"compare {name}").click()
    page.get_by_role("button", name="Compare the two").click()
    page.wait_for_selector(".chart-big canvas")
    light, dark = (hex_to_rgb(COLOURS[is_dark]["train"]) for is_dark in (False, True))
    page.wait_for_function(HAS_COLOUR, arg=dark)
    assert not page.evaluate(HAS_COLOUR, light)
    page.emulate_media(color_scheme="light")  # the system's colours change at dusk and dawn
    page.wait_for_function(HAS_COLOUR, arg=light)
    assert not page.evaluate(HAS_COLOUR, dark)


def hex_to_rgb(colour: str) -> list[int]:
    return list(bytes.fromhex(colour.removeprefix("#")))


HAS_COLOUR = """wanted => [...document.querySelectorAll('.chart-big canvas')].some(canvas => {
  const seen = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  for (let i = 0; i < seen.length; i += 4)
    if (wanted.every((value, n) => Math.abs(seen[i + n] - value) < 3)) return true;
  return false;
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_and_a_phone_scrolls_no_page_sideways(
    open_page: OpenPage, monitor: Monitor, helpers: Any, tmp_path: Path, scheme: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    error = {"type": "OSError", "message": "disk full"}
    status = helpers.status_of(state="failed", step=200, total_steps=400, error=error)
    (run / "status.json").write_text(json.dumps(status))
    lines = [helpers.preview_of(step, n) for step in range(0, 500, 10) for n in range(3)]
    tokens = {"golden_tokens": ["a", "b", "c", "d"], "golden_logprobs": [-0.01, -0.3, -1.5, -6]}
    lines.append(helpers.preview_of(500, 0, matches=False, **tokens))
    helpers.write_lines(run / "previews.jsonl", lines)
    phone = {"width": 390, "height": 844}
    page = open_page(
        monitor(run),
        wait_for=".row-line",
        at_start=WIDEST_FRAME,
        color_scheme=scheme,
        viewport=phone,
    )
    assert page.evaluate("document.body.classList.contains('body--dark')") == (scheme == "dark")
    page.wait_for_function("document.fonts.status === 'loaded'")
    assert page.evaluate("widest") <= 390
    assert page.evaluate(CONTRASTS) == []


# The widest that the page was in any frame: before its fonts came, too.
WIDEST_FRAME = """window.widest = 0;
(function look() {
  const root = document.documentElement;
  if (root) window.widest = Math.max(window.widest, root.scrollWidth);
  requestAnimationFrame(look);
})();"""

CONTRASTS = """() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return [m, m[3] ?? 1]; };
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const [colour, alpha] = parse(getComputedStyle(e).backgroundColor);
      if (alpha > 0.9) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const e of document.querySelectorAll('.page *')) {
    const hasText = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!hasText || !e.getClientRects().length || e.closest('[disabled]')) continue;
    const [ink] = parse(getComputedStyle(e).color);
    const [a, b] = [luminance(ink), luminance(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const words = e.innerText.slice(0, 20);
    if (ratio < 4.5) poor.push(`${e.tagName}.${e.className} ${words} ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


def test_a_run_whose_files_take_seconds_to_read_is_shown_when_they_are_read(
    open_page: OpenPage, monitor: Monitor, helpers: Any, tmp_path: Path
) -> None:
    """As on a slow disk, or on a machine that trains with all its cores."""
    run = tmp_path / "run"
    run.mkdir()
    text = json.dumps(helpers.status_of(step=200, total_steps=200))
    (run / "status.json").write_text(text)
    url = monitor(run)
    os.mkfifo(tmp_path / "slow")
    (tmp_path / "slow").replace(run / "status.json")  # whoever reads it waits for a writer

    def answer() -> None:
        time.sleep(4.0)
        with (run / "status.json").open("w") as file:
            (tmp_path / "status").write_text(text)
            (tmp_path / "status").replace(run / "status.json")
            file.write(text)

    writer = threading.Thread(target=answer)
    writer.start()
    page = open_page(url, wait_for=".state-completed")
    assert page.inner_text(".state") == "completed, step 200 of 200"
    writer.join()
