"""S17: hostile text in everything that a run writes is shown as text and runs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.views.report import write_report
from trainer.views.run_reader import RunReader

NAME = "<img src=x onerror=alert(1)>"
HOSTILE = (
    "<script>alert('ran')</script></script><script>alert(2)</script>"
    "<img src='http://192.0.2.1/x.png' onerror=alert(3)>{{ constructor.constructor('alert(4)')() }}"
    "<svg/onload=alert(5)>`${alert(6)}` \u202e\x1b[31m <!-- --> ]]> &lt;b&gt; javascript:alert(7)"
)


@pytest.fixture
def hostile_folder(tmp_path: Path, helpers: Any) -> Path:
    """Two runs, with hostile text in names, prompts, answers, errors, notices, cards and config."""
    for name in (NAME, f"{NAME}2"):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        texts = {"prompt": HOSTILE, "raw_text": HOSTILE, "golden_answer": f"gold {HOSTILE}"}
        golden = {"golden_tokens": [HOSTILE], "golden_logprobs": [-0.5]}
        lines = [
            helpers.preview_of(0, 0, **texts, text=f"zero {HOSTILE}", health=[HOSTILE], **golden),
            helpers.preview_of(9, 0, **{**texts, "text": HOSTILE, "backend_type": HOSTILE}),
            helpers.preview_of(9, 1, **texts, text="", error_message=HOSTILE, matches=None),
        ]
        for number, line in enumerate(lines):
            line["prompt_id"] = f"{HOSTILE}{number // 2}"
            line["prompt"] = f"{HOSTILE} prompt {number // 2}"
        lines[1]["matches"] = name == NAME  # what the two disagree on is compared
        helpers.write_lines(run / "previews.jsonl", lines)
        row = {"type": "StepDone", "step": 9, "train_loss": None, "non_finite": {HOSTILE: HOSTILE}}
        helpers.write_lines(run / "metrics.jsonl", [row])
        notice = {"level": "warning", "text": HOSTILE, "created_at": 1.0}
        status = helpers.status_of(
            state="failed",
            step=9,
            total_steps=10,
            phase=HOSTILE,
            model_name=HOSTILE,
            output_dir=HOSTILE,
            notices=[notice],
            error={"type": HOSTILE, "message": HOSTILE},
            summary={"traceback": HOSTILE, "stop_reason": HOSTILE},
        )
        (run / "status.json").write_text(json.dumps(status))
        card = {"dataset_path": HOSTILE, "sample": [[HOSTILE, True]], "validation": HOSTILE}
        manifest = {
            "data_card": card,
            "data_card_lines": [[HOSTILE, HOSTILE]],
            "config": {HOSTILE: {HOSTILE: HOSTILE}},
            "environment": {HOSTILE: HOSTILE},
            "system_prompt": HOSTILE,
        }
        (run / "run.json").write_text(json.dumps(manifest))
        (run / "worker.json").write_text(json.dumps({"url": HOSTILE}))
    return tmp_path / "runs"


def test_the_page_shows_hostile_text_as_text(
    open_page: Callable[..., Any], monitor: Callable[..., str], hostile_folder: Path
) -> None:
    page = open_page(monitor(hostile_folder, "--allow-control"), wait_for="table .q-checkbox")
    assert NAME in page.locator("table").inner_text()
    for box in page.get_by_role("checkbox").all():
        box.click()
    page.get_by_role("button", name="Compare the two").click()
    page.wait_for_selector("#previews .answer")
    assert HOSTILE[:60] in page.locator("#previews").inner_text()
    assert page.locator(".page :is(script, img, [onload], [onerror])").count() == 0
    page.goto(page.url.split("/compare")[0] + "/")
    page.get_by_role("link", name=NAME).first.click()
    page.wait_for_selector(".row-line")
    page.locator(".row-line[data-row='0']").click(position={"x": 60, "y": 12})
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("document.body.innerText.includes('zero <script>')")
    page.get_by_role("button", name="rendered").click()
    page.wait_for_selector(".answer.rendered")
    for title in ("prompt and raw text", "before training: data", "figures, config", "notices"):
        page.get_by_text(title).first.click()
    page.get_by_role("button", name="diff").click()
    page.locator(".alerts summary").click()
    page.keyboard.press("a")
    page.wait_for_selector(".all-table td")
    assert page.locator(".all-table :is(script, img, [onload], [onerror])").count() == 0
    page.keyboard.press("a")
    page.locator(".row-line", has=page.locator(".mark-error")).click()
    page.wait_for_selector(".answer-pane .mark-error")
    page.mouse.move(400, 200)
    page.wait_for_timeout(500)
    shown = page.locator(".page").inner_text()
    assert shown.count("<script>alert('ran')</script>") >= 8
    assert page.locator(".page :is(script, img, [onload], [onerror])").count() == 0
    assert "worker.json is not a valid worker file" in shown or "no usable address" in shown


def test_the_report_of_a_hostile_run_shows_it_as_text(
    open_page: Callable[..., Any], hostile_folder: Path, tmp_path: Path
) -> None:
    reader = RunReader(hostile_folder / NAME)
    reader.poll()
    write_report(reader, tmp_path / "report.html")
    page = open_page((tmp_path / "report.html").as_uri(), wait_for="h1", offline=True)
    assert page.locator("h1").inner_text() == NAME
    for summary in page.locator("summary").all():
        if summary.is_visible():
            summary.click()
    assert page.locator("script, img, iframe, object").count() == 0
    assert page.locator("body").inner_text().count("<script>alert('ran')</script>") >= 8


def test_a_report_opens_without_network_and_runs_no_script(
    open_page: Callable[..., Any], helpers: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"type": "StepDone", "step": n, "train_loss": 2 / n} for n in range(1, 90)]
    helpers.write_lines(run / "metrics.jsonl", rows)
    helpers.write_lines(run / "previews.jsonl", [helpers.preview_of(n, 0) for n in (0, 100)])
    (run / "status.json").write_text(json.dumps(helpers.status_of(step=89, total_steps=89)))
    reader = RunReader(run)
    reader.poll()
    write_report(reader, tmp_path / "report.html")
    url = (tmp_path / "report.html").as_uri()
    page = open_page(url, wait_for="h1", offline=True, java_script_enabled=False)
    box = page.locator("svg path.train").first.bounding_box()
    assert box is not None
    assert box["width"] > 300
    line = page.locator(".prompts > details").first
    was_open = line.get_attribute("open") is not None
    line.locator("summary").first.click()
    assert (line.get_attribute("open") is not None) != was_open


# In pixels, of what is drawn.
SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll('body *')]
  .filter(one => one.getClientRects().length
    && [...one.childNodes].some(child => child.nodeType === 3 && child.textContent.trim()))
  .map(one => parseFloat(getComputedStyle(one).fontSize)))"""


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1440, 900)])
def test_the_first_screen_of_a_report_has_headline_newest_step_and_first_difference(
    open_page: Callable[..., Any], helpers: Any, tmp_path: Path, width: int, height: int
) -> None:
    """Of a hundred prompts at 41 steps, on a phone and on a desk, without JavaScript."""
    run = tmp_path / "run"
    run.mkdir()
    golden = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n" * 6 + "#### 72"
    lines = [
        helpers.preview_of(
            step,
            number,
            golden_answer=golden,
            text=golden.replace("24 clips", "42 clips", 1) if number < 4 else golden,
            matches=number >= 4 and step >= 500,
        )
        for step in range(0, 2050, 50)
        for number in range(100)
    ]
    helpers.write_lines(run / "previews.jsonl", lines)
    status = helpers.status_of(state="completed", step=2000, total_steps=2000)
    (run / "status.json").write_text(json.dumps(status))
    reader = RunReader(run)
    reader.poll()
    write_report(reader, tmp_path / "report.html")
    page = open_page(
        (tmp_path / "report.html").as_uri(),
        wait_for="h1",
        java_script_enabled=False,
        viewport={"width": width, "height": height},
    )
    assert "96 of 100 right, from 0 before training" in page.locator(".headline").inner_text()
    strip = page.locator(".strip").first.bounding_box()
    assert strip is not None
    assert strip["x"] + strip["width"] <= width
    difference = page.locator("ins").first.bounding_box()
    assert difference is not None
    assert difference["y"] + difference["height"] < height
    body = page.locator("body").bounding_box()
    assert body is not None
    assert page.locator(".turns").first.bounding_box()["width"] <= body["width"] <= width
    page.mouse.wheel(500, 0)
    assert page.locator("h1").bounding_box()["x"] >= 0  # nothing to scroll sideways
    assert page.evaluate(SMALLEST_TEXT) >= 11
