"""StatusBuilder: events in, TrainingStatus out. No file access."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.monitoring.accuracy import LONG_WINDOW, SHORT_WINDOW, MatchHistory
from trainer.monitoring.events import (
    CheckpointSaved,
    EvaluationDone,
    Event,
    Notice,
    PhaseChanged,
    PreviewsDone,
    RowShown,
    RunEnded,
    RunStarted,
    StepDone,
)
from trainer.monitoring.plain_values import plain_values
from trainer.monitoring.status_schema import (
    NUM_NOTICES,
    AccuracyStatus,
    PreviewStatus,
    TrainingStatus,
)
from trainer.preview.base import PreviewResult

CHARS_PER_TOKEN = 4
"""Texts are cut by characters, as many as this for each token allowed: no tokenizer here."""
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


class StatusBuilder:
    """Keeps the newest value of every field of status.json."""

    def __init__(self, max_output_tokens: int) -> None:
        """Take the longest text, in tokens of about four characters."""
        self.set_limit(max_output_tokens)
        self.fields: dict[str, Any] = {"started_at": time.time(), "pid": os.getpid()}
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

    def apply(self, event: Event) -> None:
        """Take over what an event says."""
        odd: dict[str, str] = {}
        values = plain_values(event, odd)
        match event:
            case RunStarted():
                self.fields.update(values, state="training", phase="training")
                self.fields.update(step=event.start_step)
            case PhaseChanged():
                self.fields.update(state=event.state, phase=self._cut(values["text"])[0])
            case StepDone():
                self.fields.update({name: values[name] for name in _OF_STEP})
                self.fields.update(state="training", phase="training")
            case EvaluationDone():
                self.set_evaluation(values)
            case PreviewsDone():
                if not event.is_superseded:
                    self.set_previews(event.results)
                    self._history.add(event.results)
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
        self, results: Iterable[PreviewResult], evaluation: Mapping[str, Any] | None
    ) -> None:
        """Take over what the interrupted part of a resumed run had found."""
        known = [result for result in results if not result.is_superseded]
        self._history.clear()
        self._history.add(known)
        if known:
            newest = max(result.step for result in known)
            self.set_previews([result for result in known if result.step == newest])
        if evaluation is not None:
            self.set_evaluation(evaluation)

    def set_evaluation(self, values: Mapping[str, Any]) -> None:
        """Take over an EvaluationDone, as plain values."""
        val_loss, train_loss = values["val_loss"], values["train_loss"]
        is_known = val_loss is not None and train_loss is not None
        gap = val_loss - train_loss if is_known else None
        self.fields.update(val_loss=val_loss, val_step=values["step"], val_gap=gap)

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
        self.fields.update(state=state, phase=state, step=values["step"], eta_s=None)
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
