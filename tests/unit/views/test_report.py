"""The report: the numbers of the files, hostile text as text, no script, no network."""

from __future__ import annotations

import html
import json
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main
from trainer.monitoring.events import PreviewsDone
from trainer.monitoring.status_reader import TrainingStatusReader
from trainer.preview.base import PreviewResult
from trainer.views.headline import headline_of
from trainer.views.metrics import short_number
from trainer.views.report import RunRecords, render_report
from trainer.views.report_prompts import strip_of

MakeRun = Callable[..., Any]
OLD_RUN = Path(__file__).parents[2] / "data" / "run_before_semantics" / "run"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 913 * 917 }}"


class Elements(HTMLParser):
    """Names of elements and attributes, and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_it_shows_the_numbers_of_the_files(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.steps(1, 100, train_loss=2.3456)
    run.evaluate(50, 1.2345)
    run.evaluate(100, 1.5432)
    run.preview(0, [False, False])
    run.preview(100, [True, False])
    run.end("completed", 100)
    text = Elements(render_report(run.read())).text
    whole = TrainingStatusReader(run.folder)
    assert f"{whole.read().train_loss:.4f}" in text
    losses = [one["val_loss"] for one in whole.metrics() if one["type"] == "EvaluationDone"]
    assert len(losses) == 2
    for loss in losses:
        assert f"{loss:.4f}" in text
    assert "1 of 2 match at step 100" in text
    assert "First right at step 100, right since" in text
    assert "completed, step 100 of 1000" in text


def test_curves_are_at_the_places_of_their_values(made_up_run: MakeRun) -> None:
    run = made_up_run()
    for step, loss in [(1, 4.0), (2, 2.0), (3, 3.0)]:
        run.step(step, train_loss=loss)
    page = render_report(run.read())
    path = re.search(r'<path class="train" d="M([^"]+)"', page)
    assert path is not None
    ys = [float(pair.split()[1]) for pair in path[1].split("L")]
    assert ys[0] < ys[2] < ys[1]  # on a screen y grows downwards
    assert ys[1] - ys[2] == pytest.approx(ys[2] - ys[0], abs=0.2)


def test_hostile_text_is_text_everywhere(made_up_run: MakeRun, tmp_path: Path) -> None:
    run = made_up_run()
    texts = {
        "prompt": HOSTILE,
        "text": HOSTILE,
        "golden_answer": HOSTILE,
        "raw_text": HOSTILE + "!",
    }
    run.preview(0, [False], **texts)
    run.preview(5, [None], **{**texts, "text": ""}, error_message=HOSTILE, health=(HOSTILE,))
    run.preview(
        9, [False], **texts, golden_tokens=(HOSTILE,), golden_logprobs=(-0.5,), backend_type=HOSTILE
    )
    run.end("failed", 9, error_type="X", error_message=HOSTILE, summary={"traceback": HOSTILE})
    card = {"dataset_path": HOSTILE, "sample": [[HOSTILE, True]], "rejected": {HOSTILE: 1}}
    (run.folder / "run.json").write_text(
        json.dumps(
            {
                "data_card": card,
                "data_card_lines": [[HOSTILE, HOSTILE], HOSTILE, [HOSTILE]],
                "config": {HOSTILE: {HOSTILE: HOSTILE}},
                "environment": {HOSTILE: HOSTILE},
                "data_files_sha256": {HOSTILE: HOSTILE},
                "system_prompt": HOSTILE,
            }
        )
    )
    hostile_folder = tmp_path / "<img src=x onerror=alert(3)>"
    run.folder.rename(hostile_folder)
    reader = type(run.reader)(hostile_folder)
    reader.poll()
    page = render_report(reader)
    found = Elements(page)
    assert not found.tags & {"script", "img", "iframe", "object", "link", "base", "form"}
    assert not {name for name in found.attributes if name.startswith("on")}
    assert found.text.count(HOSTILE) >= 12
    assert "837221" not in found.text
    assert html.escape("<img src=x onerror=alert(3)>") in page


def test_a_run_whose_card_has_no_recorded_lines_is_shown_by_the_recorded_values(
    made_up_run: MakeRun,
) -> None:
    run = made_up_run()
    manifest = json.loads((OLD_RUN / "run.json").read_text())
    assert "data_card_lines" not in manifest
    (run.folder / "run.json").write_text(json.dumps(manifest))
    text = Elements(render_report(run.read())).text
    for label, value in (
        ("num train rows", "19"),
        ("num validation rows", "5"),
        ("num dropped", "0"),
        ("is stop trained", "true"),
        ("validation", "20.0% of the rows, by content hash and seed 42"),
    ):
        assert f"\n{label}{value}\n" in text
    assert "what is 0 plus 0?" in text  # the sample row


def test_it_asks_for_nothing_from_outside(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.preview(0, [False])
    page = render_report(run.read())
    assert re.findall(r"""(?:src|href)\s*=\s*["']?([^#"'][^"'> ]*)""", page) == []
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_equal_answers_in_a_row_are_shown_once(made_up_run: MakeRun) -> None:
    run = made_up_run()
    for step in range(0, 500, 10):
        run.preview(step, [step >= 100], text="4" if step >= 100 else "five")
    text = Elements(render_report(run.read())).text
    assert "steps 0 to 90" in text
    assert "steps 100 to 490" in text


def test_answers_of_white_space_alone_are_told_in_words(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.preview(0, [False, False], text="\n" * 32)
    page = render_report(run.read())
    assert page.count("(only white space: 32 line breaks)") == 2
    assert "\n" * 8 not in page


def test_it_says_the_headline_and_opens_the_newest_wrong_answers(made_up_run: MakeRun) -> None:
    run = made_up_run()
    run.evaluate(50, 1.5)
    golden = "the answer is 42 and nothing else"
    for step, right in [(0, 0), (50, 4), (100, 3)]:
        answers = [index < right for index in range(8)]
        run.preview(step, answers, golden_answer=golden, text=golden.replace("42", "17"))
    reader = run.read()
    page = render_report(reader)
    headline = headline_of(reader.previews, reader.metrics.evaluations)
    text = " ".join(Elements(page).text.split())
    assert headline.sentence in text
    assert text.index(headline.sentence) < text.index("Previews: 5 wrong now (1 lost, 4 never")
    opened = re.findall(r'<details id="prompt-(\d+)"( open)?>', page)
    assert [number for number, is_open in opened if is_open] == ["1", "2", "3"]
    assert len(opened) == 8
    [first] = re.findall(r'<details id="prompt-1".*?<details id="prompt-2"', page, re.DOTALL)
    assert "lost at 100" in first
    assert "the answer is <del>42</del> and" in first
    assert "the answer is <ins>17</ins> and" in first
    assert "first difference at word 4" in first


def test_the_strip_has_a_bar_for_every_preview_step(made_up_run: MakeRun) -> None:
    run = made_up_run()
    for step in range(0, 600, 2):
        run.preview(step, [step >= 400], golden_probability=0.05)
    line = next(iter(run.read().previews.timelines.values()))
    steps = line.steps
    assert len(steps) == 300
    paths = dict(strip_of(line, steps))
    assert paths["good"] == "M200 0h100v20h-100z"
    [low] = [path for kind, path in paths.items() if kind.startswith("bad-")]
    assert low.startswith("M0 1")
    assert "h200v" in low
    few = dict(strip_of(line, steps[198:202]))
    assert [path.count("M") for path in few.values()] == [2, 2]


def test_a_hundred_prompts_fit_into_a_file_for_mail(made_up_run: MakeRun) -> None:
    """Answers as long as GSM8K's, right and wrong by turns, which is the most there is to show."""
    run, draw = made_up_run(), random.Random(5)
    words = [f"w{number}" for number in range(60)]
    wrong = [*words[:9], "17", *words[10:40], "x", *words[41:]]
    results = tuple(
        PreviewResult(
            step=step,
            prompt_id=f"validation-{number}",
            prompt=f"question {number}",
            golden_answer=" ".join(words),
            text=" ".join(wrong),
            matches=draw.random() < 0.5,
        )
        for step in range(0, 2050, 50)
        for number in range(100)
    )
    run.writer.on_event(PreviewsDone(step=2000, results=results, duration_s=0.1))
    page = render_report(run.read())
    assert page.count('<details id="prompt-') == 100
    assert len(page.encode()) <= 1_500_000
    assert "more turning points are in previews.jsonl" in page


@pytest.mark.parametrize("kind", ["running", "nothing but run.json", "without previews"])
def test_it_is_written_of_any_run(made_up_run: MakeRun, kind: str) -> None:
    run = made_up_run()
    run.step(1)
    if kind == "nothing but run.json":
        for path in run.folder.iterdir():
            path.unlink()
        (run.folder / "run.json").write_text("{}")
    assert main(["report", str(run.folder)]) == 0
    assert "<h1>run</h1>" in (run.folder / "report.html").read_text()


def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, made_up_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    run = made_up_run()
    assert main(["report", str(run.folder), "--output", str(tmp_path / "no" / "x.html")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


def test_a_report_that_cannot_be_written_does_not_fail_the_run(
    made_up_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = made_up_run()
    (run.folder / "run.json").write_text("{}")
    (run.folder / "report.html").mkdir()  # in the way
    records = RunRecords({}, is_report=True)
    assert records.finish(run.folder) is None  # this process began no run there
    assert caplog.text == ""
    records.on_event(run.started)
    assert records.finish(run.folder) is None
    assert "could not be written" in caplog.text


def test_config_values_come_with_their_origin(made_up_run: MakeRun) -> None:
    from trainer.monitoring.events import RunStarted

    run = made_up_run()
    (run.folder / "run.json").write_text(json.dumps({"config": {"data": {"max_rows": 7}}}))
    started = RunStarted(
        model_name="tiny",
        total_steps=1,
        start_step=0,
        num_epochs=1,
        num_train_rows=1,
        num_validation_rows=0,
        context_window=8,
        effective_batch_size=1,
        output_dir=str(run.folder),
    )
    RunRecords({"data.max_rows": "flag --data.max_rows"}, is_report=False).on_event(started)
    text = Elements(render_report(run.read())).text
    assert re.search(r"data\.max_rows\s*7\s*flag --data\.max_rows", text)


@pytest.mark.parametrize("step", [5e-5, 2.5e-6, 0.02, 2500.0])
def test_the_ticks_of_an_axis_have_labels_of_their_own(step: float) -> None:
    labels = [short_number(nth * step) for nth in range(6)]
    assert [float(label.replace("k", "e3")) for label in labels] == pytest.approx(
        [nth * step for nth in range(6)]
    )
