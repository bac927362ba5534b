"""What TensorBoard gets, read back with TensorBoard's own reader."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from trainer.errors import ConfigError
from trainer.monitoring.events import DriftMeasured
from trainer.monitoring.tracker_texts import keep_console_out, table_of
from trainer.monitoring.tracking import (
    TensorBoardPreviews,
    check_trackers,
    guard_trackers,
    preview_markdown,
    summary_writer,
    tensorboard_callback,
)
from trainer.preview.base import PreviewResult, PreviewSample

torch.set_num_threads(1)

HOSTILE = "```\n</code></pre><script>alert(1)</script>\n\n# head\n[x](http://a.example)\x1b[0m\r\n"


def read_back(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_previews_go_in_as_text_and_accuracy_and_validation_as_curves(
    tmp_path, previews, evaluated, step_done
):
    tracker = TensorBoardPreviews(tmp_path, with_texts=True)
    for event in (step_done(1), previews(10, [True, False, None]), evaluated(10, 2.5)):
        tracker.on_event(event)
    tracker.close()
    events = read_back(tmp_path)
    (accuracy,), (val_loss,) = events.Scalars("preview_accuracy"), events.Scalars("val_loss")
    assert (accuracy.step, accuracy.value) == (10, 0.5)
    assert (val_loss.step, val_loss.value) == (10, 2.5)
    (text,) = events.Tensors("previews/validation-0/text_summary")
    assert text.step == 10
    assert text.tensor_proto.string_val[0].decode().startswith("step 10: matches")
    assert len(events.Tags()["tensors"]) == 3


def test_texts_stay_text_when_tensorboard_renders_them(previews):
    (result,) = previews(3, [False], text=HOSTILE, prompt=HOSTILE, golden_answer=HOSTILE).results
    page = markdown_to_safe_html(preview_markdown(result))
    assert page.count("<pre><code>") == page.count("</code></pre>") == 3
    assert not any(tag in page for tag in ("<script", "<h1", "<a ", "\x1b"))
    assert page.count("&lt;script&gt;") == 3


def test_the_callback_of_transformers_writes_into_the_same_file(tmp_path, previews):
    callback, tracker = tensorboard_callback(tmp_path)
    assert callback.tb_writer is tracker.writer
    callback.tb_writer.add_scalar("train/loss", 1.5, 1)
    callback.on_train_end(None, None, None)  # closes the file; late previews open another
    tracker.on_event(previews(2, [True]))
    tracker.close()
    events = read_back(tmp_path)
    assert events.Scalars("train/loss")[0].value == 1.5
    assert events.Scalars("preview_accuracy")[0].step == 2


def test_a_resumed_run_replaces_what_came_after_its_step(tmp_path, evaluated):
    for start_step, value in ((0, 1.0), (4, 2.0)):
        if start_step:  # event files are read in the order of their names, which tell seconds
            time.sleep(1.1)
        writer = summary_writer(tmp_path, start_step=start_step)
        tracker = TensorBoardPreviews(writer)
        for step in range(start_step + 1, 7):
            tracker.on_event(evaluated(step, value))
        writer.close()
    found = [(point.step, point.value) for point in read_back(tmp_path).Scalars("val_loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0)]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(ConfigError, match=r"logs: TensorBoard's folder cannot be written"):
        summary_writer(tmp_path / "logs")


def test_without_tensorboard_the_install_line_is_given(tmp_path):
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "from trainer.monitoring.tracking import summary_writer\n"
        "from trainer.errors import ConfigError\n"
        "try:\n    summary_writer(sys.argv[1])\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "`pip install tensorboard`" in done.stdout


@pytest.mark.parametrize("names", [("tensorboard",), ("none",), ()])
def test_trackers_that_are_here_are_taken(names):
    check_trackers(names)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("tensorbord",), "Did you mean 'tensorboard'?"),
        (("all",), "'all', which is not a known tracker"),
        (("",), "'', which is not a known tracker"),
        (("none", "tensorboard"), "'none', which is not a known tracker"),
        (("dvclive",), "pip install dvclive"),
    ],
)
def test_a_tracker_that_is_not_here_is_refused(names, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        check_trackers(names)


def test_a_tracker_that_fails_later_is_reported_once_and_one_that_cannot_start_raises(
    tmp_path, caplog
):
    callback, tracker = tensorboard_callback(tmp_path)
    handler = SimpleNamespace(callbacks=[callback])
    guard_trackers(SimpleNamespace(callback_handler=handler))
    callback.tb_writer = object()  # has nothing that a writer has
    state = SimpleNamespace(is_world_process_zero=True, is_hyper_param_search=False, global_step=1)
    for _ in range(2):
        callback.on_log(None, state, None, logs={"loss": 1.0})
    assert caplog.text.count("TensorBoardCallback failed") == 1
    with pytest.raises(AttributeError):
        callback.on_train_begin(SimpleNamespace(output_dir="x"), state, None)
    tracker.close()


def test_scores_of_answers_stand_beside_their_texts_in_tables_and_text():
    answers = [
        PreviewResult(
            step=4, prompt="p", text="t", golden_answer="g", scores={"f1": 0.5, "json": None}
        ),
        PreviewResult(step=4, prompt="q", text="", error_message="too slow"),
        PreviewResult(step=4, prompt="r", text="x" * 10_000, matches=True),
    ]
    columns, rows = table_of(answers)
    assert columns[-1] == "score.f1"
    assert [dict(zip(columns, row, strict=True))["score.f1"] for row in rows] == [0.5, None, None]
    first = dict(zip(columns, rows[0], strict=True))
    assert [first[name] for name in ("step", "prompt", "golden", "generated")] == [4, "p", "g", "t"]
    assert [row[columns.index("matches")] for row in rows] == ["", "", "yes"]
    assert rows[1][columns.index("error")] == "too slow"
    assert len(rows[2][columns.index("generated")]) == 8192
    assert preview_markdown(answers[0]).startswith("step 4: not compared, f1 0.5\n")


def test_each_sample_has_its_row_and_its_text():
    said = (
        PreviewSample(text="5", matches=True, scores={"f1": 1.0}),
        PreviewSample(text="", error_message="no luck"),
    )
    first = PreviewResult(step=4, prompt="p", text="4", matches=False, samples=said)
    columns, rows = table_of([first.model_copy(update={"scores": {"f1": 0.0}})])
    names = ("sample", "generated", "matches", "error", "score.f1")
    assert [[row[columns.index(name)] for name in names] for row in rows] == [
        [0, "4", "no", "", 0.0],
        [1, "5", "yes", "", 1.0],
        [2, "", "", "no luck", None],
    ]
    text = preview_markdown(first)
    assert "sample 1: matches\n\n    5" in text
    assert "sample 2: failed\n\n    no luck" in text


def test_without_texts_tensorboard_gets_numbers_only(tmp_path, previews):
    tracker = TensorBoardPreviews(tmp_path)
    tracker.on_event(previews(10, [True, False]))
    tracker.on_event(
        DriftMeasured(
            step=10,
            kl=0.25,
            num_changed=3,
            num_prompts=20,
            worst_prompt="zebra",
            worst_kl=0.5,
            duration_s=0.1,
        )
    )
    tracker.close()
    events = read_back(tmp_path)
    assert events.Tags()["tensors"] == []
    assert events.Scalars("preview_accuracy")[0].value == 0.5
    assert events.Scalars("drift/kl")[0].value == 0.25
    assert events.Scalars("drift/changed_answers")[0].value == 3


def test_what_is_printed_is_kept_from_wandb_whatever_was_asked_for(monkeypatch):
    monkeypatch.delenv("WANDB_CONSOLE", raising=False)
    assert keep_console_out() is None
    assert os.environ["WANDB_CONSOLE"] == "off"
    monkeypatch.setenv("WANDB_CONSOLE", "wrap")
    assert "WANDB_CONSOLE=wrap" in str(keep_console_out())
    assert os.environ["WANDB_CONSOLE"] == "off"
