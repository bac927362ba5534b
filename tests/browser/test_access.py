"""Whoever has a phone, no mouse or no eyes: the same run, with everything that there is to do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

OpenPage = Callable[..., Any]

PHONE = {"width": 390, "height": 844}
CHOSEN = ".row-line[aria-selected=true]"
GOLDEN = (
    "In all there are 4 * 7 = <<4*7=28>>28 boxes.\nAlbert has 28 - 9 = <<28-9=19>>19 left.\n#### 19"
)
WRONG = GOLDEN.replace("28", "38").replace("19", "29")
LONG = "Count one more and put it into the basket of the week.\n" * 40
QUESTION = (
    "Albert packs 4 boxes into each of 7 bags and gives 9 of the boxes away. How many are left?"
)
ALERT = (
    "an alert that is far longer than a phone is wide, and says what to do to the very end of it"
)


def answers(helpers: Any, steps: range, golden: str, wrong: str) -> list[dict[str, Any]]:
    """Prompts that are learned, but for the first two; the newest answers never stop."""
    tokens = {"golden_tokens": ["In", "all"], "golden_logprobs": [-0.1, -2.0]}
    more = {"golden_answer": golden, "golden_probability": 0.3, **tokens}
    return [
        helpers.preview_of(
            step,
            number,
            prompt=f"{QUESTION} ({number})",
            text=golden if step > 100 and number > 1 else wrong,
            matches=step > 100 and number > 1,
            **more,
        )
        for step in steps
        for number in range(12)
    ]


def write_run(run: Path, helpers: Any, lines: list[dict[str, Any]], **status: Any) -> None:
    run.mkdir()
    rows = [{"type": "StepDone", "step": n, "train_loss": 3 / n + 0.2} for n in range(1, 401)]
    helpers.write_lines(run / "metrics.jsonl", rows)
    helpers.write_lines(run / "previews.jsonl", lines)
    values = {"step": 400, "total_steps": 400, "model_name": "tiny", **status}
    (run / "status.json").write_text(json.dumps(helpers.status_of(**values)))


@pytest.fixture(scope="module")
def root(helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that leave the least room: long words of state, headline and final evaluation."""
    found: Path = tmp_path_factory.mktemp("runs")
    lines = answers(helpers, range(0, 401, 20), GOLDEN, WRONG)
    error = {"type": "OSError", "message": ALERT}
    summary = {"final_evaluation": {"exact_match": 0.5, "matched": 1, "num_prompts": 2}}
    ended = {"state": "failed", "error": error, "summary": summary}
    write_run(found / "ended", helpers, lines, **ended)
    helpers.write_lines(found / "ended" / "final_evaluation.jsonl", lines[-2:])
    (found / "ended" / "worker.json").write_text(json.dumps({"url": "http://127.0.0.1:9"}))
    write_run(found / "lost", helpers, lines, state="training", pid=2**22 - 1)
    long = answers(helpers, range(0, 401, 50), f"{LONG}#### 19", f"{LONG}#### 29")
    write_run(found / "long", helpers, long)
    many = answers(helpers, range(0, 2001, 4), GOLDEN, WRONG)
    write_run(found / "many", helpers, many, step=2000, total_steps=2000)
    return found


@pytest.fixture(scope="module")
def site(helpers: Any, root: Path) -> Iterator[str]:
    words = ("monitor", str(root), "--port", "0", "--allow-control")
    with helpers.program(*words, ready="monitor:") as (_, line):
        yield line.split()[1].rstrip("/")


IN_SIGHT = """selector => {
  const box = document.querySelector(selector).getClientRects()[0];
  const seen = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
  return Boolean(seen && document.querySelector(selector).contains(seen));
}"""


@pytest.mark.parametrize("name", ["ended", "lost", "long"])
def test_a_phone_shows_headline_prompt_and_both_answers_without_scrolling(
    open_page: OpenPage, site: str, name: str
) -> None:
    page = open_page(f"{site}/run/{name}", wait_for=CHOSEN, viewport=PHONE)
    page.wait_for_selector(".sides ins")
    page.wait_for_timeout(300)
    for selector in (".headline", ".state", CHOSEN, ".question", ".sides ins", ".sides del"):
        assert page.evaluate(IN_SIGHT, selector), selector


def test_alerts_of_a_phone_are_whole(open_page: OpenPage, site: str) -> None:
    page = open_page(f"{site}/run/ended", wait_for=CHOSEN, viewport=PHONE)
    summary = page.locator(".alerts summary")
    assert summary.inner_text() == "1 alert"
    assert summary.evaluate("one => one.scrollWidth <= one.clientWidth")
    summary.click()
    box = page.locator(".alerts-list .alert").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= PHONE["width"]
    assert page.inner_text(".alerts-list .alert") == f"error: {ALERT}"
    assert page.locator(".alerts-list .alert").evaluate("one => one.scrollWidth <= one.clientWidth")


LAST_PIXELS = """() => { const canvas = document.querySelector('.row-line canvas');
  const seen = canvas.getContext('2d').getImageData(canvas.width - 8, 0, 8, canvas.height).data;
  return seen.some((value, n) => n % 4 === 3 && value > 0); }"""


def test_the_newest_of_501_previews_is_in_sight_on_a_phone(open_page: OpenPage, site: str) -> None:
    page = open_page(f"{site}/run/many", wait_for=CHOSEN, viewport=PHONE)
    page.wait_for_function(LAST_PIXELS)
    box = page.locator(".row-line canvas").first.bounding_box()
    assert box["x"] + box["width"] <= PHONE["width"]
    page.wait_for_function(
        "document.querySelector('.place').innerText === 'step 2,000 (501 of 501)'"
    )


SHIFTS = """window.shift = 0; new PerformanceObserver(list => {
  for (const one of list.getEntries()) window.shift += one.value;
}).observe({type: 'layout-shift', buffered: true});"""


@pytest.mark.parametrize("viewport", [{"width": 1440, "height": 900}, PHONE], ids=["desk", "phone"])
def test_alerts_that_come_and_their_drawer_move_nothing_else(
    open_page: OpenPage,
    monitor: Callable[..., str],
    helpers: Any,
    tmp_path: Path,
    viewport: dict[str, int],
) -> None:
    run, lines = tmp_path / "run", answers(helpers, range(0, 401, 20), GOLDEN, WRONG)
    now = {"state": "training", "phase": "training", "pid": os.getpid(), "total_steps": 4000}
    now |= {"started_at": time.time(), "updated_at": time.time() + 600, "eta_s": 900.0}
    write_run(run, helpers, [one for one in lines if one["step"] < 400], **now)
    page = open_page(monitor(run), wait_for=CHOSEN, at_start=SHIFTS, viewport=viewport)
    assert page.inner_text(".alerts summary") == "no alerts"
    page.wait_for_timeout(1500)  # what belongs to the beginning is over
    before = page.evaluate("window.shift")
    with (run / "previews.jsonl").open("a") as file:
        for line in lines:
            if line["step"] == 400:
                file.write(json.dumps({**line, "health": ["never_stopped"]}) + "\n")
    page.wait_for_selector(".alerts-warning")
    top = page.locator(".panes").bounding_box()
    page.evaluate("document.querySelector('.alerts').open = true")  # a click would not count
    page.locator(".alerts-list .alert").first.wait_for()
    page.wait_for_timeout(600)
    assert page.locator(".panes").bounding_box() == top
    assert page.evaluate("window.shift") - before < 0.05
    # A run that says nothing any more.
    status = json.loads((run / "status.json").read_text())
    status["updated_at"] = time.time() - 60
    (run / "status.json").write_text(json.dumps(status))
    page.locator(".alerts-list .alert", has_text="no update since").wait_for()
    assert "the run hangs" in page.inner_text(".alerts-list")


# Roles that act or show something: without a name a screen reader says the role alone.
NAMED = {
    *("button", "link", "textbox", "searchbox", "checkbox", "switch", "slider", "combobox"),
    *("spinbutton", "listbox", "option", "img", "image", "canvas", "progressbar", "dialog"),
    *("DisclosureTriangle", "tab", "menuitem"),
}


def without_a_name(page: Any, *, least: int = 5) -> list[str]:
    """Of the browser's own accessibility tree, in which at least so many must be found."""
    session = page.context.new_cdp_session(page)
    found, seen = [], 0
    for node in session.send("Accessibility.getFullAXTree")["nodes"]:
        role = node.get("role", {}).get("value", "")
        if node.get("ignored") or role not in NAMED:
            continue
        seen += 1
        if not node.get("name", {}).get("value", "").strip():
            found.append(f"{role}: {node.get('properties')}")
    assert seen >= least
    return found


def test_everything_that_acts_or_is_shown_has_a_name_for_a_screen_reader(
    open_page: OpenPage, site: str
) -> None:
    page = open_page(f"{site}/run/ended", wait_for=CHOSEN)
    page.wait_for_selector("#ask textarea")
    for title in (
        "prompt and raw text",
        "golden tokens",
        "all curves",
        "before training",
        "figures,",
    ):
        page.get_by_text(title).first.click()
    page.locator(".alerts summary").click()
    page.locator(".pairs").first.wait_for()
    assert without_a_name(page) == []
    page.get_by_role("img", name="loss, nats per trained token").wait_for()
    landmarks = page.locator("h1, h2").all_inner_texts()
    assert {"Ask the model now", "Controls"} <= set(landmarks)
    assert (
        page.get_by_role("img", name="right answers, %")
        .get_attribute("aria-label")
        .endswith("from 0 at step 0 to 83 at step 400")
    )
    page.keyboard.press("Escape")
    page.locator("body").press("?")
    page.get_by_role("dialog", name="keys and signs").wait_for()
    assert without_a_name(page, least=2) == []
    page.keyboard.press("Escape")
    page.locator("body").press("a")
    page.wait_for_selector(".all-table td")
    assert without_a_name(page) == []


def test_the_list_and_a_comparison_have_names_for_a_screen_reader_too(
    open_page: OpenPage, site: str
) -> None:
    page = open_page(site, wait_for=".run-table .q-checkbox")
    assert without_a_name(page) == []
    for name in ("ended", "long"):
        page.get_by_role("checkbox", name=f"compare {name}").click()
    page.get_by_role("button", name="Compare the two").click()
    page.wait_for_selector("#figures table")
    assert without_a_name(page, least=4) == []
    for title in ("loss, nats per trained token", "previews that match, %"):
        page.get_by_role("img", name=title).wait_for()


FOCUS = """() => { const one = document.activeElement;
  if (!one || one === document.body) return null;
  const box = one.getBoundingClientRect(), style = getComputedStyle(one);
  return {name: one.getAttribute('aria-label') || one.innerText || one.tagName,
          isShown: box.width > 0 && box.height > 0,
          isMarked: style.outlineStyle !== 'none' || style.boxShadow !== 'none'
            || Boolean(one.closest('.q-field--focused, .q-focusable, .q-checkbox, .q-btn'))}; }"""


def test_the_tab_key_goes_through_the_whole_page_and_what_has_focus_is_marked(
    open_page: OpenPage, site: str
) -> None:
    page = open_page(f"{site}/run/ended", wait_for=CHOSEN)
    page.wait_for_selector("#ask textarea")
    found: list[dict[str, Any]] = []
    for _ in range(80):
        page.keyboard.press("Tab")
        one = page.evaluate(FOCUS)
        if one is None or (found and one["name"] == found[0]["name"]):
            break
        found.append(one)
    names = " | ".join(one["name"].strip() for one in found)
    for wanted in (
        *("all runs", "1 alert", "colours", "previews", "final evaluation", "wrong now 2"),
        *("search prompts", "prompts", "the preview before", "plain", "copy as Markdown"),
        *("prompt and raw text", "Ask the model", "all curves"),
    ):
        assert wanted.lower() in names.lower(), (wanted, names)
    assert len(found) < 80  # nothing holds the focus
    assert [one for one in found if not (one["isShown"] and one["isMarked"])] == []


def test_a_phone_has_the_list_of_runs_as_cards(open_page: OpenPage, site: str) -> None:
    page = open_page(site, wait_for=".run-table .q-checkbox", viewport=PHONE)
    page.get_by_text("10 of 12 right").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    cards = page.locator(".run-table tbody tr")
    for card in cards.all():
        box = card.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
    assert "headline" in cards.first.locator("td[data-label=headline]").evaluate(
        "one => getComputedStyle(one, '::before').content"
    )
