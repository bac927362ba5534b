"""TrainingStatusWriter: status.json, metrics.jsonl and previews.jsonl of a run.

status.json is replaced as a whole; the other two grow by whole lines. Trouble with a disk is
reported once per file and never stops training.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import OutputError
from trainer.files import STATUS_NAME, append_lines, remove_stale, replace_file
from trainer.monitoring.events import (
    CheckpointSaved,
    DriftMeasured,
    EvaluationDone,
    Event,
    Notice,
    PhaseChanged,
    PreviewsDone,
    RowShown,
    RunEnded,
    RunStarted,
    ScoreDecided,
    ScoresDone,
    StepDone,
    json_line,
    plain_values,
)
from trainer.monitoring.loss_names import FIELD, PREFIXES, flat_losses, losses_of_line
from trainer.monitoring.status_reader import (
    METRICS_NAME,
    PREVIEWS_NAME,
    RESUMED,
    TrainingStatusReader,
)
from trainer.monitoring.status_schema import (
    LONG_WINDOW,
    NUM_NOTICES,
    SHORT_WINDOW,
    AccuracyStatus,
    DecidingStatus,
    DriftStatus,
    MatchHistory,
    PreviewStatus,
    TrainingStatus,
)
from trainer.preview.base import PreviewResult

CHARS_PER_TOKEN = 4
"""Texts are cut by characters, as many as this for each token allowed: no tokenizer here."""

_TRAINING = {"state": "training", "phase": "training", "phase_progress": ""}

_OF_STEP = (
    "step",
    "total_steps",
    "epoch",
    "train_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
    "eta_s",
    "memory_gib",
)


_OF_THE_PAST = [name for name in _OF_STEP if name not in ("total_steps", "eta_s")]
"""Those that hold at a resume; how many steps are left, and for how long, is another matter."""

_OF_METRICS = StepDone | EvaluationDone | DriftMeasured | ScoresDone | ScoreDecided
"""Events that are lines of metrics.jsonl."""


class StatusBuilder:
    """Keeps the newest value of every field of status.json."""

    def __init__(self, max_output_tokens: int) -> None:
        """Take the longest text, in tokens of about four characters."""
        self.set_limit(max_output_tokens)
        now = time.time()
        self.fields: dict[str, Any] = {"began_at": now, "started_at": now, "pid": os.getpid()}
        self._history = MatchHistory()
        self._odd_reported: set[str] = set()

    def set_limit(self, max_output_tokens: int) -> None:
        """Cut texts that come from now on to this many tokens of about four characters."""
        self._max_chars = CHARS_PER_TOKEN * max_output_tokens

    def build(self) -> TrainingStatus:
        """The status of this moment."""
        values = {
            **self.fields,
            "updated_at": time.time(),
            "accuracy_last_20": self._accuracy(SHORT_WINDOW),
            "accuracy_last_50": self._accuracy(LONG_WINDOW),
            "accuracy_trend": self._history.trend(),
        }
        return TrainingStatus.model_validate(values)

    def set_earlier(self, before: TrainingStatus | None) -> None:
        """Take over the time of the processes before this one; None: there are none."""
        began, earlier_s = self.fields["started_at"], 0.0
        if before is not None and before.started_at == began:
            return  # written by this process
        if before is not None:
            began = before.started_at if before.began_at is None else before.began_at
            earlier_s = before.earlier_s + max(0.0, before.updated_at - before.started_at)
        self.fields.update(began_at=began, earlier_s=earlier_s)

    def apply(self, event: Event) -> None:
        """Take over what an event says."""
        odd: dict[str, str] = {}
        values = plain_values(event, odd)
        match event:
            case RunStarted():
                self.fields.update(values, **_TRAINING)
                self.fields.update(step=event.start_step)
            case PhaseChanged():
                phase, progress = (self._cut(values[name])[0] for name in ("text", "progress"))
                self.fields.update(state=event.state, phase=phase, phase_progress=progress)
            case StepDone():
                self.fields.update({name: values[name] for name in _OF_STEP})
                self._keep_losses("source_losses", values[FIELD])
                self.fields.update(_TRAINING)
            case EvaluationDone():
                self.set_evaluation(values)
            case PreviewsDone():
                if not event.is_superseded:
                    self.set_previews(event.results)
                    self._history.add(event.results)
            case DriftMeasured():
                self.fields["drift"] = {**values, "worst_prompt": self._cut(event.worst_prompt)[0]}
            case ScoresDone():
                self.set_scores(values)
            case ScoreDecided():
                self.fields["deciding"] = values
            case RowShown():
                self.fields["training_row"] = self._cut_texts(values, "prompt", "golden_answer")
            case CheckpointSaved():
                checkpoint = {"step": event.step, "path": values["path"], "saved_at": time.time()}
                self.fields["last_checkpoint"] = checkpoint
            case Notice():
                self.add_notice(event.level, values["text"])
            case RunEnded():
                self._end(values)
        self._report_odd(event, odd)

    def restore(
        self, results: Iterable[PreviewResult], metrics: Iterable[Mapping[str, Any]]
    ) -> None:
        """Take over what the interrupted part of a resumed run had found."""
        known = [result for result in results if not result.is_superseded]
        self._history.clear()
        self._history.add(known)
        if known:
            newest = max(result.step for result in known)
            self.set_previews([result for result in known if result.step == newest])
        for line in metrics:
            if line.get("type") == "StepDone":
                self.fields.update({name: line.get(name) for name in _OF_THE_PAST})
            elif line.get("type") == "EvaluationDone":
                self.set_evaluation(line)
            elif line.get("type") == "ScoresDone":
                self.set_scores(line)
            elif line.get("type") == "ScoreDecided":
                decided = {name: line.get(name) for name in DecidingStatus.model_fields}
                self.fields["deciding"] = decided
            elif line.get("type") == "DriftMeasured":
                self.fields["drift"] = {name: line.get(name) for name in DriftStatus.model_fields}

    def set_evaluation(self, values: Mapping[str, Any]) -> None:
        """Take over an EvaluationDone, as plain values."""
        val_loss, train_loss = values["val_loss"], values["train_loss"]
        is_known = val_loss is not None and train_loss is not None
        gap = val_loss - train_loss if is_known else None
        self.fields.update(val_loss=val_loss, val_step=values["step"], val_gap=gap)
        self._keep_losses("val_source_losses", values.get(FIELD) or losses_of_line(values))

    def _keep_losses(self, name: str, losses: Mapping[str, Any]) -> None:
        """The newest loss of each source: a step need not have tokens of all."""
        self.fields[name] = {**self.fields.get(name, {}), **losses}

    def set_scores(self, values: Mapping[str, Any]) -> None:
        """Take over a ScoresDone, as plain values."""
        name = "preview_scores" if values["source"] == "previews" else "evaluation_scores"
        self.fields[name] = values["figures"]

    def set_previews(self, results: Iterable[PreviewResult]) -> None:
        """Show these results, cut to the limit."""
        shown = []
        for result in results:
            values = plain_values(result)
            values = {name: values[name] for name in PreviewStatus.model_fields if name in values}
            shown.append(
                self._cut_texts(values, "prompt", "golden_answer", "text", "error_message")
            )
        self.fields["last_previews"] = shown

    def add_notice(self, level: str, text: str) -> None:
        """Keep one more notice, and no more than the newest twenty."""
        notice = {"level": level, "text": self._cut(text)[0], "created_at": time.time()}
        self.fields["notices"] = [*self.fields.get("notices", []), notice][-NUM_NOTICES:]

    def _end(self, values: dict[str, Any]) -> None:
        state = values["state"]
        message, _ = self._cut(values["error_message"] or state)
        self.fields.update(state=state, phase=state, phase_progress="", step=values["step"])
        self.fields["eta_s"] = None
        self.fields["summary"] = values["summary"]
        if state == "failed":
            self.fields["error"] = {"type": values["error_type"] or "Error", "message": message}
        elif state == "stopped":
            self.fields["phase"] = message

    def _report_odd(self, event: Event, odd: Mapping[str, str]) -> None:
        """Say once per field that a number which JSON cannot hold was written as null."""
        for where, text in odd.items():
            name = f"{type(event).__name__}.{where}"
            if name not in self._odd_reported:
                self._odd_reported.add(name)
                step = getattr(event, "step", self.fields.get("step", 0))
                said = f"step {step}: {name} is {text}, written as null (said once per field)"
                self.add_notice("warning", said)

    def _accuracy(self, window: int) -> AccuracyStatus | None:
        counts = self._history.counts(window)
        if counts is None:
            return None
        matched, compared = counts
        return AccuracyStatus(num_matched=matched, num_previews=compared, share=matched / compared)

    def _cut_texts(self, values: dict[str, Any], *names: str) -> dict[str, Any]:
        cut = {name: self._cut(values[name]) for name in names if values[name] is not None}
        texts = {name: text for name, (text, _) in cut.items()}
        return {**values, **texts, "truncated": any(was_cut for _, was_cut in cut.values())}

    def _cut(self, text: str) -> tuple[str, bool]:
        return text[: self._max_chars], len(text) > self._max_chars


# ---- TrainingStatusWriter: status.json, metrics.jsonl and previews.jsonl of a run


__all__ = ["TrainingStatusReader", "TrainingStatusWriter"]

logger = logging.getLogger(__name__)


class TrainingStatusWriter:
    """An observer that keeps the files of a run up to date."""

    def __init__(
        self,
        path: str | Path | None,
        *,
        max_output_tokens: int = 2048,
        context_window: int | None = None,
        model_name: str | None = None,
        run_dir: str | Path | None = None,
        status_update_interval: int = 2,
    ) -> None:
        """Take where to write; nothing is written before the first event.

        Args:
            path: the status.json to keep up to date; None: only the one in `run_dir`.
            max_output_tokens: longest text in status.json, four characters to a token.
            context_window: longest row in tokens.
            run_dir: folder that gets a second status.json, metrics.jsonl and previews.jsonl.
            status_update_interval: steps between writes of status.json.
        """
        self.path = Path(path) if path is not None else None
        self.status_update_interval = status_update_interval
        self._settings: dict[str, Any] = {
            "run_dir": run_dir,
            "context_window": context_window,
            "model_name": model_name,
            "max_output_tokens": max_output_tokens,
        }
        self._begin()

    def _begin(self) -> None:
        """Forget the run before, if there was one."""
        self.run_dir: Path | None = None
        self._builder = StatusBuilder(self._settings["max_output_tokens"])
        self._has_events = self._has_unwritten = self._is_ended = False
        self._has_old_lines: dict[str, bool] = {}
        self._prepared: set[Path] = set()
        self._failed: set[Path] = set()
        self.attach(**self._settings)

    @property
    def status(self) -> TrainingStatus:
        """What status.json would say now."""
        return self._builder.build()

    def attach(
        self,
        *,
        run_dir: str | Path | None = None,
        context_window: int | None = None,
        model_name: str | None = None,
        max_output_tokens: int | None = None,
        status_update_interval: int | None = None,
    ) -> None:
        """Set what was not known when the writer was made; None leaves a value as it is."""
        if context_window is not None:
            self._builder.fields["context_window"] = context_window
        if model_name is not None:
            self._builder.fields["model_name"] = model_name
        if max_output_tokens is not None:
            self._builder.set_limit(max_output_tokens)
        if status_update_interval is not None:
            self.status_update_interval = status_update_interval
        if run_dir is not None:
            self.run_dir = Path(run_dir)
            self._builder.fields["output_dir"] = str(self.run_dir)
            for name in (METRICS_NAME, PREVIEWS_NAME):
                self._has_old_lines[name] = _has_content(self.run_dir / name)
            # Before it is replaced. Whether this process goes on with that run is not known yet,
            # and a process that is killed while it loads must not lose the time of those before.
            self._builder.set_earlier(_status_before(self.run_dir))
        if self._has_events:
            self._write_status()

    def on_event(self, event: Event) -> None:
        """Take note of an event and write what it changes; after a RunEnded a new run begins."""
        if self._is_ended:
            self._begin()
        self._is_ended = isinstance(event, RunEnded)
        self._has_events = self._has_unwritten = True
        if isinstance(event, RunStarted):
            self._continue_files(event.start_step)
        self._builder.apply(event)
        if isinstance(event, _OF_METRICS):
            self._append(METRICS_NAME, _metrics_line(event))
        elif isinstance(event, PreviewsDone):
            self._append(PREVIEWS_NAME, "".join(_preview_line(one) for one in event.results))
        if self._is_status_due(event):
            self._write_status()

    def close(self) -> None:
        """Write what is not written yet; may be called twice."""
        if self._has_unwritten:
            self._write_status()

    def _is_status_due(self, event: Event) -> bool:
        if isinstance(event, RowShown):
            return False
        if not isinstance(event, StepDone):
            return True
        is_first = event.step == self._builder.fields.get("start_step", 0) + 1
        is_nth = event.step % self.status_update_interval == 0
        return is_nth or is_first or event.step >= event.total_steps

    def _write_status(self) -> None:
        self._has_unwritten = False
        text = json_line(plain_values(self.status))
        for path in self._status_paths():
            self._try(path, partial(self._replace, path, text), "it shows an older state")

    def _replace(self, path: Path, text: str) -> None:
        if path not in self._prepared:
            self._prepared.add(path)
            remove_stale(path)
        replace_file(path, text)

    def _status_paths(self) -> list[Path]:
        copy = self.run_dir / STATUS_NAME if self.run_dir is not None else None
        paths = [path for path in (self.path, copy) if path is not None]
        # Two spellings of one place are written twice, which does no harm.
        return list({path.absolute(): path for path in paths}.values())

    def _append(self, name: str, text: str) -> None:
        if self.run_dir is not None and text:
            path = self.run_dir / name
            self._try(path, partial(append_lines, path, text), "lines of it are missing")

    def _continue_files(self, start_step: int) -> None:
        """Take over from an earlier process: mark its later lines as superseded, use the others."""
        for name, has_lines in self._has_old_lines.items():
            if has_lines:
                marker = {"type": RESUMED, "step": start_step, "created_at": time.time()}
                self._append(name, json_line(marker))
        if start_step == 0:
            self._builder.set_earlier(None)
        elif self.run_dir is not None:
            self._try(self.run_dir, self._restore, "earlier previews are not counted in accuracy")

    def _restore(self) -> None:
        assert self.run_dir is not None, "restoring needs a run folder"
        reader = TrainingStatusReader(self.run_dir)
        self._builder.restore(reader.previews(), reader.metrics())

    def _try(self, path: Path, action: Callable[[], None], consequence: str) -> None:
        """Do something with a file; say once per file that it failed, and what that means."""
        try:
            if path.parent not in self._prepared:  # once: a folder that vanishes stays away
                path.parent.mkdir(parents=True, exist_ok=True)
                self._prepared.add(path.parent)
            action()
        except OSError as error:
            if path in self._failed:
                return
            self._failed.add(path)
            said = f"{path}: cannot be written ({error}); training goes on, {consequence}"
            logger.warning("%s", said)
            self._builder.add_notice("warning", said)
            self._has_unwritten = True


def _status_before(run_dir: Path) -> TrainingStatus | None:
    """The status that an earlier process left; None where there is none."""
    if not (run_dir / STATUS_NAME).exists():
        return None
    try:
        return TrainingStatusReader(run_dir).read()
    except OutputError as error:
        logger.warning("%s; the time of earlier processes is not counted", error)
        return None


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _metrics_line(
    event: StepDone | EvaluationDone | DriftMeasured | ScoresDone | ScoreDecided,
) -> str:
    odd: dict[str, str] = {}
    kind, values = type(event).__name__, plain_values(event, odd)
    if FIELD in values:
        values = flat_losses(kind, values)
        prefix = PREFIXES[kind]
        odd = {key.replace(f"{FIELD}.", prefix, 1): text for key, text in odd.items()}
    line = {"type": kind, "created_at": time.time(), **values}
    return json_line({**line, "non_finite": odd} if odd else line)


def _preview_line(result: Any) -> str:
    odd: dict[str, str] = {}
    values: Mapping[str, Any] = plain_values(result, odd)
    # A number that JSON cannot hold is left out, so that a reader gets the field's default.
    return json_line({name: value for name, value in values.items() if name not in odd})
