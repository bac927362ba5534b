"""The live view: what stands in it, that it fits, and how it behaves in a real terminal."""

from __future__ import annotations

import io
import os
import pty
import random
import re
import select
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from trainer.monitoring.events import EvaluationDone, PhaseChanged, RunEnded, ScoresDone
from trainer.scores.figures import GOLDEN_PROBABILITY, ScoreDifference, ScoreFigure
from trainer.views.score_words import scores_words
from trainer.views.terminal import create_display
from trainer.views.terminal_rich import LiveView, preview_lines


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def drawn(view: LiveView, width: int = 80, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(view)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.fixture
def view(step_done, previews) -> LiveView:
    view = LiveView(Clock())
    view.set_step(step_done(42))
    view.set_previews(previews(40, [True, False]))
    return view


def test_the_headline_is_in_words(view, evaluated):
    view.evaluation = evaluated(40, 3.25)
    lines = drawn(view)
    assert lines[0].endswith("training, step 42 of 100, 3 min left")
    assert lines[1].endswith(" 42 %")
    assert lines[2] == (
        "loss 2.5000   val loss 3.2500   lr 1.00e-03   tokens/s 12,345   memory 1.2 GiB"
    )


def test_previews_name_the_step_whose_weights_made_them(view):
    lines = drawn(view)
    assert "previews at step 40: 1 of 2 match" in lines
    at = lines.index("= max of 4 and 2?")
    assert lines[at + 1 : at + 3] == ["  golden     4", "  generated  4"]
    assert "x max of 4 and 2?" in lines


def test_a_wide_view_has_golden_and_generated_side_by_side(view, previews):
    view.set_previews(previews(40, [False], golden_answer="yes", text="no"))
    lines = drawn(view, width=120)
    assert [part.strip() for part in lines[-1].split(" | ")] == ["yes", "no"]
    assert [part.strip() for part in lines[-3].split(" | ")] == ["golden", "generated"]


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (99, 12), (100, 8), (40, 10), (12, 6)])
@pytest.mark.parametrize("num_prompts", [1, 4, 30])
@pytest.mark.parametrize("text", ["short", "\u4f60\N{GRINNING FACE}\n" * 500, "word " * 900])
def test_the_view_is_never_larger_than_the_terminal(view, previews, size, num_prompts, text):
    width, height = size
    event = previews(40, [False] * num_prompts, text=text, golden_answer=text[:-3], prompt=text)
    view.set_previews(event)
    lines = drawn(view, width, height)
    assert len(lines) < height
    assert max(map(cell_len, lines)) <= width
    if num_prompts == 30 and height >= 24:
        assert "more prompts in previews.jsonl" in lines[-1]


def coloured(lines, style):
    return [
        line.plain[span.start : span.end]
        for line in lines
        for span in line.spans
        if span.style == style
    ]


def test_only_the_words_that_differ_are_coloured(previews):
    (result,) = previews(1, [False], golden_answer="abc def 7", text="abc xyz 7").results
    lines = preview_lines((result,), 80, 20)[1:]
    assert coloured(lines, "bold green") == ["def"]
    assert coloured(lines, "bold red") == ["xyz"]
    (result,) = previews(1, [True], golden_answer="abc", text="abc.").results
    lines = preview_lines((result,), 80, 20)[1:]
    assert coloured(lines, "bold green") == coloured(lines, "bold red") == []


@pytest.mark.parametrize("size", [(80, 24), (140, 40)])
@pytest.mark.parametrize("num_pairs", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_answers_that_differ_in_one_number_look_different(previews, size, num_pairs):
    """Real answers with their other words in the way, four prompts at a time, as on the screen."""
    draw, rows = random.Random(7), gsm8k_answers(num_pairs)
    for at in range(0, num_pairs, 4):
        pairs = [(golden, with_another_number(golden, draw)) for golden in rows[at : at + 4]]
        view = LiveView(Clock())
        results = tuple(
            result
            for golden, text in pairs
            for result in previews(
                1, [False], golden_answer=golden, text=text, prompt="How many? " * 30
            ).results
        )
        view.set_previews(replace(previews(1, [False]), results=results))
        lines = drawn(view, *size)
        assert sides_that_look_alike(lines, is_wide=size[0] >= 100) == []


def gsm8k_answers(count):
    """Answers in the manner of GSM8K: steps of a calculation, and the result behind ####."""
    draw = random.Random(3)
    names = ["James", "Natalia", "The farmer", "Each of the girls"]
    found = []
    for _ in range(count):
        steps = []
        for _ in range(draw.randint(2, 7)):
            a, b = draw.randint(2, 99), draw.randint(2, 99)
            words = draw.choice([" clips in May and June", "", " dollars for the tickets", " * 2"])
            steps.append(f"{draw.choice(names)} has {a}*{b}=<<{a}*{b}={a * b}>>{a * b}{words}.")
        found.append("\n".join([*steps, f"#### {a * b}"]))
    return found


def with_another_number(text, draw):
    at = draw.choice(list(re.finditer(r"\d+", text)))
    number = str(int(at.group()) + draw.choice([1, 10, 300]))
    return text[: at.start()] + number + text[at.end() :]


def sides_that_look_alike(lines, *, is_wide):
    """Prompts whose golden and generated text are the same on the screen."""
    blocks = []
    for line in lines:
        if line.startswith("x "):
            blocks.append(["", ""])
            side = 0
        elif blocks and is_wide:
            for index, part in enumerate(line[2:].split(" | ", 1)):
                blocks[-1][index] += part.strip()
        elif blocks:
            side = {"golden": 0, "generated": 1}.get(line[2:11].strip(), side)
            blocks[-1][side] += line[13:].strip()
    assert len(blocks) == 4
    return [golden for golden, text in blocks if golden == text]


def scores(count, num_prompts=16):
    """The golden token probability, and means of as many scores, with all there is to say."""
    first = ScoreDifference(
        step=0, mean=0.004, difference=0.16, low=0.1, high=0.2, is_clear=True, num_prompts=16
    )
    names = [GOLDEN_PROBABILITY, *(f"score.{'long' * 4}-{n}" for n in range(count))]
    figures = [
        ScoreFigure(
            name=name,
            step=40,
            mean=0.166,
            is_share=True,
            low=0.121,
            high=0.22,
            num_prompts=num_prompts,
            first=first,
            best=first.model_copy(update={"step": 20, "is_clear": False}),
        )
        for name in names
    ]
    return ScoresDone(step=40, source="previews", figures=tuple(figures))


@pytest.mark.parametrize("size", [(80, 24), (140, 40)])
def test_means_have_a_bar_and_where_they_came_from_on_any_terminal(view, size):
    view.set_scores(scores(2))
    lines = [line for line in drawn(view, *size) if "[##--------] 0.4 -> 16.6 %" in line]
    assert [line.split(" [")[0] for line in lines] == [
        "golden token probability",
        "longlonglonglong-0",
        "longlonglonglong-1",
    ]
    assert all(cell_len(line) <= size[0] for line in lines)


def test_means_in_a_log_are_a_line_each_where_one_line_would_be_too_long():
    told = scores_words(scores(10)).split("\n")
    assert told[0] == "scores at step 40, 16 previews:"
    assert len(told) == 12
    assert told[1] == (
        "  golden token probability [##--------] 0.4 -> 16.6 % (12.1 to 22.0 % at 95 %, "
        "clearly above step 0, no clear difference from step 20)"
    )
    assert max(map(len, told)) <= 160
    assert scores_words(scores(1, num_prompts=1)) == (
        "scores at step 40, 1 preview: golden token probability [##--------] 0.4 -> 16.6 %, "
        "longlonglonglong-0 [##--------] 0.4 -> 16.6 % (too few prompts)"
    )


@pytest.mark.parametrize("width", [80, 120])
def test_wide_characters_do_not_push_out_the_end_of_an_answer(previews, width):
    text = "\u4f60" * 2000 + " #### 72"
    lines = preview_lines(previews(1, [False], text=text, golden_answer=text).results, width, 20)
    assert sum("#### 72" in line.plain for line in lines) == (2 if width == 80 else 1)
    assert max(cell_len(line.plain) for line in lines) <= width


def test_markup_in_texts_is_text(previews):
    lines = preview_lines(previews(1, [False], text="[red]x[/red] :smile:").results, 80, 20)
    assert "  generated  [red]x[/red] :smile:" in [line.plain for line in lines]


def test_a_long_phase_gets_a_spinner_and_its_time():
    clock = Clock()
    view = LiveView(clock)
    view.set_phase(PhaseChanged(state="loading", text="loading tiny"))
    clock.now = 1.9
    assert drawn(view) == ["loading tiny"]
    clock.now = 12.0
    assert drawn(view)[0].endswith(" loading tiny, 12 s")
    assert not drawn(view)[0].startswith("loading")


def test_time_left_runs_down_between_steps_and_a_long_silence_is_said(view):
    view._clock.now = 19.0
    assert drawn(view)[0].endswith("training, step 42 of 100, 3 min left")
    view._clock.now = 61.0
    words = "no update for 1 min (a step takes 0.1 s); training, step 42 of 100"
    assert drawn(view)[0].endswith(words)


def test_a_pause_between_steps_is_named_and_over_when_training_goes_on(view):
    text = "making the previews of step 42 (4 prompts, 256 tokens)"
    view.set_phase(PhaseChanged(state="training", text=text))
    view._clock.now = 61.0
    assert drawn(view)[0].endswith(f"{text}, 1 min")
    view.set_phase(PhaseChanged(state="training", text="training"))
    view._clock.now = 62.0
    assert drawn(view)[0].endswith("training, step 42 of 100, 3 min left")


def test_the_final_view_stands_still(view):
    view.set_end(RunEnded(state="completed", step=42))
    assert drawn(view)[0] == "completed, step 42 of 100"


def test_the_last_view_stays_and_a_summary_follows(step_done, previews, started):
    stream = io.StringIO()
    display = create_display("rich", stream)
    for event in (
        started(),
        previews(0, [True]),
        step_done(1),
        EvaluationDone(
            step=1, val_loss=2.0, train_loss=2.5, num_rows=4, num_trained_tokens=9, duration_s=0.1
        ),
        RunEnded(state="failed", step=1, error_type="DataError", error_message="line 3: bad"),
    ):
        display.on_event(event)
    display.close()
    text = stream.getvalue()
    order = ["training tiny", "failed, step 1 of 100\n", "golden"]
    order.append("failed, step 1 of 100, loss 2.5000, val loss 2.0000")
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)


IN_TERMINAL = """
import logging, sys
handler = logging.StreamHandler()  # holds the real standard error, as early handlers do
logging.getLogger("early").addHandler(handler)
from trainer.monitoring.events import Notice, PhaseChanged, RunEnded
from trainer.views.score_words import scores_words
from trainer.views.terminal import create_display

out, err = sys.stdout, sys.stderr
display = create_display("auto")
display.on_event(PhaseChanged(state="loading", text="loading tiny"))
logging.getLogger("early").warning("from an early handler")
print("from a bare print")
display.on_event(Notice(text="from a notice"))
display.on_event(RunEnded(state="completed", step=0))
display.close()
assert (sys.stdout, sys.stderr, handler.stream) == (out, err, err), "not given back"
print("the end")
"""


def test_in_a_real_terminal_other_output_goes_above_the_view():
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL], stdout=child, stderr=child, env=environment
    )
    os.close(child)
    data = b""
    while select.select([parent], [], [], 60)[0]:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        data += piece
    os.close(parent)
    assert process.wait() == 0, data.decode()
    text = data.decode()
    for part in ("from an early handler\r\n", "from a bare print\r\n", "from a notice\r\n"):
        # The view is erased first and drawn again below.
        assert text.count("\r\x1b[2K" + part) == text.count(part) == 1
        assert text.index(part) < text.index("completed")
    assert text.index("\x1b[?25h") > text.index("\x1b[?25l"), "the cursor is shown again"
    assert text.rstrip().endswith("the end")
