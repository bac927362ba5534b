"""The first screen of a run: verdict, curves, all prompts with all previews, one answer."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

OpenPage = Callable[..., Any]

NUM_PROMPTS, STEPS = 60, range(0, 401, 20)
WORDS = "Take the number and add it to the running total of the basket.\n" * 50
COLUMN = "\n".join(map(str, range(10, 90)))  # too short to be folded, too tall to be seen at once
CHOSEN = ".row-line[aria-selected=true]"
COUNT = "n => document.querySelectorAll('.row-line').length === n"


def step_rows(last: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"type": "StepDone", "step": n, "train_loss": 3 / n + 0.2, "created_at": 1.7e9 + n}
        for n in range(1, last + 1)
    ]
    rows.append({"type": "EvaluationDone", "step": last, "val_loss": 0.467, "train_loss": 0.3})
    return rows


def write_run(run: Path, helpers: Any, lines: list[dict[str, Any]], **status: Any) -> None:
    run.mkdir()
    helpers.write_lines(run / "previews.jsonl", lines)
    helpers.write_lines(run / "metrics.jsonl", step_rows(400))
    values = {"step": 400, "total_steps": 400, **status}
    (run / "status.json").write_text(json.dumps(helpers.status_of(**values)))


def many_prompts(helpers: Any, steps: range = STEPS) -> list[dict[str, Any]]:
    """Prompt n is right from step 20 n / 3 on; 7 and 8 are lost at 380 and 400, 59 never right."""
    found = []
    for step in steps:
        for number in range(NUM_PROMPTS):
            is_right = step >= 20 * (number // 3) and number != 59 and step > 0
            is_right &= not (number == 7 and step >= 380) and not (number == 8 and step >= 400)
            text = "the answer is 42" if is_right else f"the answer was {step}"
            more = {"golden_answer": "the answer is 42", "matches": is_right, "text": text}
            prompt = f"You are a careful counter. Count number {number}."
            found.append(helpers.preview_of(step, number, prompt=prompt, **more))
    return found


def odd_answers(helpers: Any) -> list[dict[str, Any]]:
    """One step; nothing is right, each for a reason of its own."""
    pairs = [
        ("long", f"{WORDS}In all 59.", f"{WORDS}In all 95."),
        ("lines", COLUMN, COLUMN.replace("88", "99")),
        ("arabic", "عاصمة مصر هي القاهرة", "عاصمة مصر هي الإسكندرية"),
        ("tokyo", "人口は約千万人", "人口は約百万人"),
        ("white", "one\ntwo\nthree", "one two three"),
        ("table", "| a | b |\n|---|---|\n| 1 | 2 |", MARKDOWN),
        ("thought", "4", "<think>\n2 and 2\n</think>\n5"),
    ]
    return [
        helpers.preview_of(400, n, prompt=prompt, golden_answer=golden, text=text, matches=False)
        for n, (prompt, golden, text) in enumerate(pairs)
    ]


MARKDOWN = (
    "| a | b |\n|---|---|\n| 1 | **3** |\n\n<img src='http://192.0.2.1/x.png' onerror=alert(1)>"
    "<script>alert(2)</script>[here](http://192.0.2.1/z) ![x](http://192.0.2.1/y.png)"
    "<form action='http://192.0.2.1'><input name=q></form>"
)


@pytest.fixture(scope="module")
def root(helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("runs")
    write_run(found / "many", helpers, many_prompts(helpers))
    write_run(found / "odd", helpers, odd_answers(helpers))
    ended = [helpers.preview_of(400, n) | {"text": "answer 100"} for n in range(3)]
    summary = {"final_evaluation": {"exact_match": 0.75, "matched": 3, "num_prompts": 4}}
    write_run(found / "ended", helpers, ended, summary=summary)
    final = [helpers.preview_of(400, n, matches=n != 2) for n in range(4)]
    helpers.write_lines(found / "ended" / "final_evaluation.jsonl", final)
    return found


@pytest.fixture(scope="module")
def site(helpers: Any, root: Path) -> Iterator[str]:
    with helpers.program("monitor", str(root), "--port", "0", ready="monitor:") as (_, line):
        yield line.split()[1].rstrip("/")


def chosen(page: Any) -> str:
    page.wait_for_selector(CHOSEN)
    return str(page.locator(CHOSEN).get_attribute("data-row"))


def wait_for_place(page: Any, row: int, step: int) -> None:
    page.wait_for_function(
        """([row, step]) => document.querySelector('.row-line[aria-selected=true]')?.dataset.row
             === String(row) && document.querySelector('.place b')?.innerText === String(step)""",
        arg=[row, step],
    )


def is_in_sight(page: Any, selector: str) -> bool:
    """Whether the middle of the first such element is what one sees there."""
    return bool(
        page.evaluate(
            """selector => {
              const element = document.querySelector(selector);
              const box = element.getClientRects()[0];
              const seen = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
              return element.contains(seen);
            }""",
            selector,
        )
    )


@pytest.mark.parametrize("size", [(1440, 900), (390, 844)])
def test_the_first_screen_says_whether_the_model_gets_better_and_opens_on_the_newest_wrong_answer(
    open_page: OpenPage, site: str, size: tuple[int, int]
) -> None:
    viewport = {"width": size[0], "height": size[1]}
    page = open_page(f"{site}/run/many", wait_for=CHOSEN, viewport=viewport)
    best = "58 at step 380"  # the newest step is not the highest, so it is not "still rising"
    assert page.inner_text(".headline") == f"57 of 60 right, from 0 before training, {best}"
    assert page.inner_text(".headline-rest") == (
        "2 lost, 1 never right. Validation loss 0.467 at step 400."
    )
    assert page.title() == "completed - 57/60 - many"
    assert chosen(page) == "8"  # lost last
    assert page.inner_text(".where") == ", first difference at word 3"
    page.wait_for_timeout(300)
    for selector in (".headline", CHOSEN, ".answer ins"):
        assert is_in_sight(page, selector), selector
    names = page.locator(".row-name").all_inner_texts()
    assert names[:3] == ["8.", "7.", "59."]  # without what all begin with
    if size[0] > 1000:
        left, right = (page.locator(s).bounding_box() for s in (".rows-pane", ".answer-pane"))
        assert left["x"] + left["width"] <= right["x"] + 1
        assert left["y"] == right["y"]


def test_where_no_preview_is_wrong_a_wrong_answer_of_the_final_evaluation_is_open(
    open_page: OpenPage, site: str
) -> None:
    page = open_page(f"{site}/run/ended", wait_for=CHOSEN)
    assert page.inner_text(".headline").startswith("3 of 3 right")
    source = page.get_by_role("button", name="final evaluation 75.0 % (3/4)")
    assert source.get_attribute("aria-pressed") == "true"
    assert chosen(page) == "2"
    legend = page.locator(".legend").bounding_box()
    # The row of sources takes its height from the panes.
    assert legend["y"] + legend["height"] <= page.viewport_size["height"]
    page.get_by_role("button", name="previews").click()
    page.wait_for_function(COUNT, arg=3)
    page = open_page(f"{site}/run/ended?prompt=1", wait_for=CHOSEN)  # somebody's own choice
    assert page.locator(".row-line").count() == 3


def test_chips_and_search_choose_among_prompts_and_only_rows_in_sight_exist(
    open_page: OpenPage, site: str
) -> None:
    page = open_page(f"{site}/run/many", wait_for=CHOSEN)
    chips = [chip.inner_text() for chip in page.locator(".chips .chip").all()]
    assert chips == ["wrong now 3", "lost 2", "never right 1", "right 57", "all 60"]
    assert 3 < page.locator(".row-line").count() < NUM_PROMPTS
    assert page.locator(".row-line").first.get_attribute("aria-setsize") == "60"
    page.get_by_role("button", name="lost 2").click()
    page.wait_for_function(COUNT, arg=2)
    page.get_by_role("button", name="all 60").click()
    page.get_by_role("searchbox", name="search prompts").fill("number 33")
    page.wait_for_function(COUNT, arg=1)
    page.keyboard.type("jn")  # is typed, and moves nothing
    page.get_by_text('no prompt has "number 33jn"').wait_for()
    assert page.locator(".rows-space").evaluate("one => one.clientHeight") == 0


def test_keys_alone_reach_every_prompt_step_and_view(open_page: OpenPage, site: str) -> None:
    page = open_page(f"{site}/run/many", wait_for=CHOSEN)
    wait_for_place(page, 8, 400)
    for key, row, step in [
        *[("j", 7, 400), ("k", 8, 400), ("n", 7, 400), ("n", 59, 400), ("n", 8, 400)],
        *[("ArrowLeft", 8, 380), ("j", 7, 380), ("ArrowRight", 7, 400)],
    ]:
        page.keyboard.press(key)
        wait_for_place(page, row, step)
    page.keyboard.press("?")
    assert page.get_by_role("dialog", name="keys and signs").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("a")
    page.wait_for_function("document.querySelectorAll('.all-table tbody tr').length === 60")
    first = page.locator(".all-table tbody tr").first.inner_text()
    assert "8." in first
    assert "was 400" in first
    page.keyboard.press("ArrowLeft")
    page.get_by_text("All answers of step 380").wait_for()
    page.keyboard.press("a")
    wait_for_place(page, 7, 380)
    # The list is one stop of the tab key; in it the arrows go through prompts.
    prompts = page.get_by_role("listbox", name="prompts")
    assert page.locator(".rows-pane [tabindex='0']").count() == 1
    prompts.focus()
    page.keyboard.press("End")
    page.wait_for_function("document.activeElement.getAttribute('aria-activedescendant')")
    option = page.locator(f"#{prompts.get_attribute('aria-activedescendant')}")
    assert option.get_attribute("aria-posinset") == "60"
    assert option.get_attribute("aria-label").endswith("right since")
    assert is_in_sight(page, CHOSEN)
    page.keyboard.press("ArrowUp")
    page.wait_for_function(
        "document.querySelector('.row-line[aria-selected=true]')?.ariaPosInSet === '59'"
    )


def test_a_click_into_a_curve_or_a_strip_goes_to_its_step(open_page: OpenPage, site: str) -> None:
    page = open_page(f"{site}/run/many", wait_for=CHOSEN)
    wait_for_place(page, 8, 400)
    for canvas in page.locator(".curve canvas").all():
        box = canvas.bounding_box()
        middle = {"x": 40 + (box["width"] - 48) * 0.51, "y": 50}
        canvas.hover(position=middle)
        page.wait_for_function(
            """[...document.querySelectorAll('.curve-now')]
              .every(one => one.innerText.includes('step 20'))"""
        )
        canvas.click(position=middle)
        wait_for_place(page, 8, 200)
        page.keyboard.press("ArrowRight")
        wait_for_place(page, 8, 220)
    page.locator(".row-line").nth(1).locator("canvas").click(position={"x": 8, "y": 8})
    wait_for_place(page, 7, 20)


def test_an_address_shows_the_same_place_after_a_restart_of_the_monitor(
    open_page: OpenPage, site: str, monitor: Callable[..., str], root: Path
) -> None:
    page = open_page(f"{site}/run/many", wait_for=CHOSEN)
    wait_for_place(page, 8, 400)
    page.locator(".row-line[data-row='7']").click(position={"x": 60, "y": 12})
    page.keyboard.press("ArrowLeft")
    wait_for_place(page, 7, 380)
    page.get_by_role("button", name="plain", exact=True).click()
    place = page.url.removeprefix(site)
    assert place == "/run/many?prompt=7&step=380&view=plain"
    page = open_page(monitor(root).rstrip("/") + place, wait_for=CHOSEN)
    wait_for_place(page, 7, 380)
    assert page.locator("[data-view=plain]").get_attribute("aria-pressed") == "true"
    assert page.locator(".answer del").count() == 0


def show_prompt(page: Any, name: str) -> None:
    page.locator(".row-line", has_text=name).click(position={"x": 60, "y": 12})
    page.wait_for_function(
        "name => document.querySelector('.question').innerText === name", arg=name
    )


def test_what_differs_is_marked_on_both_sides_and_in_sight(open_page: OpenPage, site: str) -> None:
    page = open_page(f"{site}/run/odd", wait_for=CHOSEN)
    show_prompt(page, "long")
    page.wait_for_timeout(200)
    assert (page.inner_text(".answer del"), page.inner_text(".answer ins")) == ("59", "95")
    assert is_in_sight(page, ".answer del")
    assert is_in_sight(page, ".answer ins")
    assert page.locator(".fold summary").first.inner_text() == "47 lines that are equal"
    page.locator(".fold summary").first.click()
    assert page.locator(".fold").first.inner_text().count("basket") == 47
    show_prompt(page, "lines")
    page.wait_for_timeout(200)
    assert page.locator(".fold").count() == 0
    assert is_in_sight(page, ".answer del")
    assert is_in_sight(page, ".answer ins")
    show_prompt(page, "arabic")
    direction = "one => getComputedStyle(one).direction"
    assert page.locator(".side .answer").first.evaluate(direction) == "rtl"
    assert page.locator(".question").evaluate(direction) == "ltr"
    show_prompt(page, "tokyo")
    assert page.inner_text(".where") == ", first difference at character 5"
    assert page.inner_text(".answer ins") == "百"
    show_prompt(page, "white")
    assert page.inner_text(".where") == (
        ", only white space differs: 2 fewer line breaks, 2 more spaces"
    )
    show_prompt(page, "thought")
    assert page.inner_text(".answer ins") == "5"
    assert "thoughts" in page.inner_text(".fold summary")


def test_markdown_is_rendered_without_what_loads_runs_or_leads_elsewhere(
    open_page: OpenPage, site: str
) -> None:
    page = open_page(f"{site}/run/odd", wait_for=CHOSEN)
    show_prompt(page, "table")
    page.get_by_role("button", name="rendered").click()
    page.wait_for_selector(".rendered table")
    assert page.locator(".rendered td strong").inner_text() == "3"
    bad = ".rendered :is(img, script, form, input, [href], [src], [onerror], [style], [action])"
    assert page.locator(bad).count() == 0
    assert "here" in page.inner_text(".rendered >> nth=1")


def test_an_answer_is_copied_as_markdown(open_page: OpenPage, site: str) -> None:
    page = open_page(
        f"{site}/run/many", wait_for=CHOSEN, permissions=["clipboard-read", "clipboard-write"]
    )
    wait_for_place(page, 8, 400)
    page.get_by_role("button", name="copy as Markdown").click()
    page.get_by_text("copied", exact=True).wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("**many, step 400**: wrong (first right at step 40, lost at 400)")
    assert "```\nthe answer was 400\n```" in copied
    assert copied.endswith(f"{site}/run/many?prompt=8&step=400")


# 14 cells of 2 pixels, which end before the frame of the step that is shown.
STRIP = """() => { const canvas = document.querySelector('.row-line[data-row="48"] canvas');
  return [...canvas.getContext('2d').getImageData(0, 0, 28, canvas.height).data].join(); }"""

SHIFTS = """window.shift = 0; new PerformanceObserver(list => {
  for (const one of list.getEntries()) window.shift += one.value;
}).observe({type: 'layout-shift', buffered: true});"""


def test_while_previews_arrive_strips_do_not_shift_and_only_new_steps_are_sent(
    open_page: OpenPage, monitor: Callable[..., str], helpers: Any, tmp_path: Path
) -> None:
    run, lines = tmp_path / "run", many_prompts(helpers, range(0, 401, 10))
    # The process that is named must be older than the run, or it is not the run's.
    now = {"state": "training", "phase": "training", "pid": os.getpid(), "total_steps": 4000}
    now |= {"started_at": time.time(), "updated_at": time.time(), "eta_s": 900.0}
    write_run(run, helpers, [one for one in lines if one["step"] <= 300], **now)
    sent: list[str] = []
    url = monitor(run)
    page = open_page(url, wait_for=CHOSEN, at_start=SHIFTS)
    looker = open_page(url, wait_for=CHOSEN)
    wait_for_place(looker, 48, 300)
    # The first that is wrong, now chosen by somebody, so that it stays open when it is right.
    page.locator(".row-line[data-row='48']").click(position={"x": 60, "y": 12})
    page.wait_for_timeout(1500)  # what belongs to the beginning is over
    before, shifted = page.evaluate(STRIP), page.evaluate("window.shift")
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    session.on(
        "Network.webSocketFrameReceived",
        lambda event: sent.append(event["response"]["payloadData"]),
    )
    with (run / "previews.jsonl").open("a") as file:
        for line in lines:
            if line["step"] > 300:
                alert = {"health": ["never_stopped"]} if line["step"] == 400 else {}
                file.write(json.dumps({**line, **alert}) + "\n")
    wait_for_place(page, 48, 400)  # it follows
    # Where nobody chose, a wrong answer is open.
    looker.wait_for_function("document.querySelector('.place b').innerText === '400'")
    looker.wait_for_selector(f"{CHOSEN} .mark-wrong")
    page.wait_for_selector(".alerts-warning")
    assert "60 of 60 previews of step 400 never stop" in page.inner_text(".alerts summary")
    assert page.evaluate(STRIP) == before
    assert page.evaluate("window.shift") - shifted < 0.05
    told = "".join(sent)
    assert "[310," in told  # the first new step
    assert "[290," not in told  # and no old one
    assert "33." not in told  # nor a name
    page.locator(".alerts summary").click()
    page.get_by_role("button", name="never stop").click()
    wait_for_place(page, 0, 400)
