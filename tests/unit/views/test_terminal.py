"""The line displays: how much they say, and that hostile text and streams do no harm."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from trainer.errors import ConfigError
from trainer.files import SafeStream
from trainer.monitoring.events import CheckpointSaved, Notice, PhaseChanged, RowShown, RunEnded
from trainer.views.terminal import PlainDisplay, create_display
from trainer.views.terminal_rich import RichDisplay

HOSTILE = "\x1b[2J\x9b1A\rcompleted, step 1\nerror: forged\x85\u2028[red]x[/red] \u202e"


def shown(kind, *events) -> str:
    stream = io.StringIO()
    display = create_display(kind, stream)
    for event in events:
        display.on_event(event)
    display.close()
    display.close()
    return stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_auto_is_rich_on_a_terminal_and_plain_elsewhere():
    assert isinstance(create_display("auto", io.StringIO()), PlainDisplay)
    assert isinstance(create_display("auto", Terminal()), RichDisplay)


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(ConfigError, match="auto, rich, plain, json or quiet"):
        create_display("fancy", io.StringIO())


def test_plain_shows_golden_beside_generated_with_a_sign(previews):
    lines = shown("plain", previews(50, [True, False, None])).splitlines()
    assert lines[0] == "previews at step 50: 1 of 2 match"
    assert lines[1] == "  = max of 4 and 2?  golden: 4 | generated: 4"
    assert [line[2] for line in lines[1:]] == ["=", "x", "."]
    failed = shown("plain", previews(50, [None], error_message="timed out", text=""))
    assert "  ! max of 4 and 2?  golden: 4 | failed: timed out" in failed
    assert "1 without an answer" in failed


def test_plain_gives_a_prompt_the_room_that_its_answers_leave(previews):
    event = previews(50, [True])
    [one] = event.results

    def line(prompt: str, answer: str) -> str:
        update = {"prompt": prompt, "text": answer, "golden_answer": answer}
        again = replace(event, results=(one.model_copy(update=update),))
        return shown("plain", again).splitlines()[1]

    assert "p" * 300 in line("p" * 300, "4")
    assert len(line("p" * 900, "w" * 900)) < 360
    assert line("p" * 900, "w" * 900).count("p") > 70


def test_plain_tells_the_whole_story(started, step_done, evaluated):
    text = shown(
        "plain",
        PhaseChanged(state="loading", text="loading tiny"),
        started(start_step=40),
        step_done(41),
        evaluated(41, 2.0, 1.5),
        CheckpointSaved(step=41, path="outputs/checkpoints/step-00000041", duration_s=0.2),
        Notice(text="a row was cut", level="warning"),
        RowShown(step=41, prompt="p", golden_answer="g"),
        RunEnded(state="failed", step=41, error_type="DataError", error_message="line 3: bad"),
    )
    assert text.splitlines() == [
        "loading tiny",
        "training tiny: 100 steps of 8 rows, 800 rows and 40 held out, from step 40; "
        "folder outputs",
        "step  41/100  loss 2.5000  lr 1.00e-03  grad 0.50  tokens/s 12,345  memory 1.2 GiB  "
        "3 min left",
        "validation at step 41: loss 2.0000 (training 1.5000, gap +0.5000), 40 rows, 0.5 s",
        "checkpoint of step 41: outputs/checkpoints/step-00000041, 0.2 s",
        "warning: a row was cut",
        "failed, step 41 of 100, loss 2.5000, val loss 2.0000, 0.0 s since step 40, folder outputs",
        "Validation loss 2.000 at step 41.",
    ]


@pytest.mark.parametrize(
    ("total", "step_s", "most"),
    [(20, 0.01, 21), (1000, 0.01, 21), (2000, 0.1, 21 + 100), (40_000, 1.0, 21 + 667)],
)
def test_plain_says_enough_and_not_too_much(step_done, total, step_s, most):
    stream, now = io.StringIO(), 0.0
    display = PlainDisplay(SafeStream(stream), clock=lambda: now)
    for step in range(1, total + 1):
        now = step * step_s
        display.on_event(step_done(step, total_steps=total, eta_s=(total - step) * step_s))
    steps = [int(line.split("/")[0].split()[1]) for line in stream.getvalue().splitlines()]
    assert (steps[0], steps[-1]) == (1, total)
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    assert max(gaps) <= total / 20  # at least one line in each 5 % of the steps
    assert len(steps) <= most
    seldom = [gap for gap in gaps if gap * step_s < 2.0]
    assert len(seldom) <= 21  # only the 5 % marks come sooner than 2 s after a line


@pytest.mark.parametrize("kind", ["plain", "rich", "quiet", "json"])
def test_hostile_text_cannot_drive_a_terminal_or_forge_a_line(kind, previews, started):
    results = previews(1, [False], text=HOSTILE, prompt=HOSTILE, golden_answer=HOSTILE)
    failed = previews(1, [None], error_message=HOSTILE)
    text = shown(
        kind,
        PhaseChanged(state="loading", text=HOSTILE),
        started(model_name=HOSTILE, output_dir=HOSTILE),
        results,
        failed,
        Notice(text=HOSTILE, level="warning"),
        RunEnded(state="failed", step=1, error_type="E", error_message=HOSTILE),
    )
    assert not set(text) & set("\x1b\x9b\r\x85\u2028\u202e")
    assert not any(line.startswith(("error: forged", "completed")) for line in text.splitlines())


@pytest.mark.parametrize("kind", ["plain", "rich", "quiet", "json"])
def test_a_stream_of_ascii_takes_any_text(kind, previews, started):
    raw = io.BytesIO()
    display = create_display(kind, io.TextIOWrapper(raw, encoding="ascii"))
    events = [started(), previews(1, [True], text="\u4f60 \N{GRINNING FACE} \ud800")]
    events += [
        Notice(text="\u00e9", level="error"),
        RunEnded(state="completed", step=1),
    ]
    for event in events:
        display.on_event(event)
    display.close()
    expected = rb'"text": "\u00e9"' if kind == "json" else b"error: ?"
    assert expected in raw.getvalue()
    assert any(b"completed" in line for line in raw.getvalue().splitlines()[-2:])


def test_json_has_one_strict_object_per_event(started, step_done, previews):
    events = [started(), step_done(1, grad_norm=float("nan")), previews(1, [True, None])]
    lines = shown("json", *events, RunEnded(state="completed", step=1)).splitlines()

    def refuse(name):
        raise ValueError(name)

    found = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [line["event"] for line in found] == [
        "RunStarted",
        "StepDone",
        "PreviewsDone",
        "RunEnded",
    ]
    assert (found[1]["grad_norm"], found[1]["non_finite"]) == (None, {"grad_norm": "nan"})
    assert [result["matches"] for result in found[2]["results"]] == [True, None]


def test_the_closing_line_of_a_resumed_run_has_its_total_and_counts_its_time_from_there(started):
    text = shown("quiet", started(start_step=60), RunEnded(state="completed", step=100))
    assert text == "completed, step 100 of 100, 0.0 s since step 60, folder outputs\n"


def test_quiet_says_warnings_and_the_end(started, step_done, previews, evaluated):
    text = shown(
        "quiet",
        PhaseChanged(state="loading", text="loading tiny"),
        started(),
        Notice(text="precision: fp32"),
        Notice(text="a row was cut", level="warning"),
        step_done(1),
        previews(1, [True]),
        evaluated(1, 2.0),
        RunEnded(state="completed", step=1),
    )
    assert text.splitlines() == [
        "warning: a row was cut",
        "completed, step 1 of 100, loss 2.5000, val loss 2.0000, 0.0 s, folder outputs",
    ]


def test_lines_of_a_notice_cannot_pose_as_other_messages():
    text = shown("plain", Notice(text="the card:\nrows 5\nerror: no"))
    assert text == "the card:\n    rows 5\n    error: no\n"


BROKEN_PIPE = """
import sys
from trainer.monitoring.events import Notice, PhaseChanged, RunEnded
from trainer.views.terminal import create_display

display = create_display(sys.argv[1])
for number in range(3000):
    display.on_event(Notice(text=f"notice {number}" + "." * 100, level="warning"))
display.on_event(PhaseChanged(state="loading", text="loading"))
display.on_event(RunEnded(state="completed", step=1))
display.close()
print("survived", file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["plain", "rich", "quiet", "json"])
def test_a_reader_that_goes_away_does_not_stop_training(kind):
    process = subprocess.Popen(
        [sys.executable, "-c", BROKEN_PIPE, kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert "notice" in process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    process.wait()
    process.stderr.close()
    assert "survived" in said
    assert said.count("broke off") == 1


@pytest.mark.parametrize("module", ["views.terminal", "views.terminal_rich", "monitoring.tracking"])
def test_importing_a_display_loads_no_torch(module):
    code = f"import sys, trainer.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_reason_that_all_prompts_share_is_one_line(previews):
    text = shown("plain", previews(50, [None, None], error_message="nobody there", text=""))
    assert text == "no previews of step 50: nobody there\n"
