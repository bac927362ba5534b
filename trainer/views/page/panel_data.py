"""What the panel of a run page shows, as compact plain data that many pages share.

The rows are one string a preview step, one sign a prompt, so that a new step is one short string.
Everything is asked for `since` a clock and answered with what changed; a page that knows nothing
asks since 0.
"""

from __future__ import annotations

import math
import time
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.files import CHECKPOINTS_NAME, checkpoint_steps
from trainer.monitoring.events import printable
from trainer.scores.statistics import interval_of
from trainer.views.facts import Alert, alerts_of, bar_figures
from trainer.views.headline import Headline, headline_of
from trainer.views.metrics import SMOOTHING_SHARE, centred, is_spread_wide, pick_points, window_half
from trainer.views.page.answer_data import SHOWN_CHARS
from trainer.views.run_reader import RunReader, Versions
from trainer.views.timeline import Timeline, mark_of
from trainer.views.verdicts import WRONG, common_start, in_order, level_of, verdict_of

NAME_CHARS = 160

CURVE_POINTS = 800
"""Of the raw loss; more would be less than a pixel each."""

SMOOTH_POINTS = 400

DIGITS = 5

NOW_GAP_S = 0.45
"""Alerts and words of a run are made anew after so long: a little less than a page's tick."""


class RowsData:
    """One row a prompt, one column a preview step; built once however many pages are open."""

    def __init__(self, reader: RunReader) -> None:
        """Of the previews of a run; nothing is built yet."""
        self.reader = reader
        self._clock = -1
        self._columns: dict[int, list[Any]] = {}
        self._verdicts: list[list[Any]] = []
        self._verdict_at: list[int] = []
        self._names: list[str] = []
        self._names_at = 0
        self._prefix = ""
        self._order: list[int] = []
        self._headline: tuple[tuple[int, int, bool], Headline] | None = None

    def headline(self) -> Headline:
        """The verdict on the run; made once for all pages."""
        reader = self.reader
        key = (
            reader.previews.clock,
            len(reader.metrics.evaluations),
            reader.final_evaluation is not None,
        )
        if self._headline is None or self._headline[0] != key:
            found = headline_of(
                reader.previews, reader.metrics.evaluations, reader.final_evaluation
            )
            self._headline = key, found
        return self._headline[1]

    def best_step(self) -> int | None:
        """The step with most right answers, the first of equal ones; None without comparisons."""
        self._build()
        right = {step: one[2] for step, one in self._columns.items() if one[3]}
        return max(right, key=lambda step: (right[step], -step)) if any(right.values()) else None

    def has_wrong(self) -> bool:
        """Whether a prompt is wrong now."""
        self._build()
        return any(state in WRONG for state, *_ in self._verdicts)

    def shares(self) -> list[float]:
        """Share of right answers by preview step, from 0 to 1.

        Of golden tokens' probability, where nothing is right yet.
        """
        self._build()
        columns = [self._columns[step] for step in sorted(self._columns)]
        if any(one[2] for one in columns):
            return [one[2] / one[3] for one in columns if one[3]]
        return [one[6] / 100 for one in columns if one[6] is not None]

    def since(self, clock: int) -> dict[str, Any] | None:
        """What changed after `clock`, or everything; None where nothing did.

        The reader's lock is held by the caller.
        """
        book = self.reader.previews
        if clock >= book.clock:
            return None
        self._build()
        is_whole = clock <= book.dropped_at
        steps = [step for step, at in book.changed_at.items() if is_whole or at > clock]
        is_named_anew = is_whole or self._names_at > clock
        return {
            "clock": book.clock,
            "whole": is_whole,
            "columns": [[step, *self._columns[step]] for step in sorted(steps)],
            "names": self._names if is_named_anew else None,
            "prefix": self._prefix,
            "verdicts": [
                [number, *verdict]
                for number, verdict in enumerate(self._verdicts)
                if is_whole or self._verdict_at[number] > clock
            ],
            "order": self._order,
            "planned": self._planned(),
        }

    def _build(self) -> None:
        book = self.reader.previews
        if self._clock == book.clock:
            return
        lines = list(book.timelines.values())
        known = -1 if book.dropped_at > self._clock else self._clock
        if known < 0:
            self._columns, self._verdicts, self._verdict_at, self._names = {}, [], [], []
        for step, at in book.changed_at.items():
            if at > known:
                self._columns[step] = _column(lines, step)
        if len(lines) != len(self._names):
            names = [printable(line.prompt, SHOWN_CHARS) for line in lines]
            start = common_start(names)
            self._prefix = names[0][:start][:NAME_CHARS]
            self._names = [_name(name, start) for name in names]
            self._names_at = book.clock
        judged = [line.judged for line in lines]
        for number, one in enumerate(judged):
            row = [one.state, one.short, one.words]
            if number == len(self._verdicts):
                self._verdicts.append(row)
                self._verdict_at.append(book.clock)
            elif row != self._verdicts[number]:
                self._verdicts[number], self._verdict_at[number] = row, book.clock
        self._order = in_order(judged)
        self._clock = book.clock

    def _planned(self) -> int:
        """Preview steps of the whole run, so that the width of a cell is known from the start.

        0 where nothing tells.
        """
        steps = self.reader.previews.steps
        status = self.reader.status
        total = status.total_steps if status is not None else None
        every = self.reader.config_value("monitoring", "inference_interval")
        if not isinstance(every, int) or every <= 0:
            gaps = np.diff(steps[-50:])
            every = int(np.median(gaps)) if len(gaps) else 0
        return max(math.ceil(total / every) + 1, len(steps)) if total and every > 0 else 0


def _column(lines: list[Timeline], step: int) -> list[Any]:
    """[marks, shades, right, compared, low, high, golden probability] of a step, one sign a prompt.

    The last three are in percent, null where unknown.
    """
    results = [line.of_step(step) for line in lines]
    levels = (level_of(one.golden_probability) if one is not None else None for one in results)
    matches = [float(one.matches) for one in results if one is not None and one.matches is not None]
    known = [
        one.golden_probability
        for one in results
        if one is not None and one.golden_probability is not None
    ]
    low, high = interval_of(matches) or (None, None)
    return [
        "".join(map(mark_of, results)),
        "".join(" " if level is None else str(level) for level in levels) if known else "",
        int(sum(matches)),
        len(matches),
        _percent(low),
        _percent(high),
        _percent(sum(known) / len(known)) if known else None,
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def _name(name: str, start: int) -> str:
    short = name[start : start + NAME_CHARS].strip()
    return short or name[:NAME_CHARS]


def final_rows(reader: RunReader) -> dict[str, Any] | None:
    """The final evaluation in the form of `RowsData.since`, as one step; None without one."""
    final = reader.final_evaluation
    if final is None or not final.answers:
        return None
    names = [printable(one.prompt, SHOWN_CHARS) for one in final.answers]
    start = common_start(names)
    judged = [verdict_of([one]) for one in final.answers]
    # Nobody says of one evaluation what was before it: right or wrong, nothing else.
    short = {"right": "right", "never right": "wrong"}
    marks = "".join(map(mark_of, final.answers))
    compared = sum(one.matches is not None for one in final.answers)
    return {
        "clock": 0,
        "whole": True,
        "columns": [[final.answers[0].step, marks, "", final.matched, compared, None, None, None]],
        "names": [_name(name, start) for name in names],
        "prefix": names[0][:start][:NAME_CHARS],
        "verdicts": [
            [number, one.state, short.get(one.state, one.state), short.get(one.state, one.state)]
            for number, one in enumerate(judged)
        ],
        "order": in_order(judged),
        "planned": 1,
        "words": final.score_words,
        "by_kind": final.by_word_words,
    }


# ---- the curves of the first screen


class CurvesData:
    """The loss of a run, raw and smoothed, and its validation loss, bit by bit."""

    def __init__(self, reader: RunReader) -> None:
        """Of the metrics of a run."""
        self.reader = reader

    def since(self, num_sent: int, last_step: int, stride: int) -> dict[str, Any]:
        """The points after those that a page has, or all of them.

        Args:
            num_sent: steps with a loss that the page has.
            last_step: the last of them; another one there now means that the run was resumed.
            stride: between the page's smoothed points.
        """
        steps, values = self.reader.metrics.known("train_loss")
        count = len(values)
        grid = _stride(count, SMOOTH_POINTS)
        is_whole = num_sent == 0 or count < num_sent or steps[num_sent - 1] != last_step
        new = slice(0 if is_whole else num_sent, count)
        picked = pick_points(values[new], CURVE_POINTS)
        at = np.unique(np.append(np.arange(0, count, grid), max(count - 1, 0)))[: count or None]
        is_log = is_spread_wide(self.reader.metrics)
        half = window_half(count, SMOOTHING_SHARE)
        # The window of a point near the end was cut short: it is better known now.
        is_smooth_whole = is_whole or stride != grid
        at = at if count else at[:0]
        if not is_smooth_whole:
            at = at[at >= max(0, num_sent - 1 - 2 * half - grid)]
        smooth = centred(values, at, half, is_log=is_log) if half else values[at]
        return {
            "whole": is_whole,
            "count": count,
            "last": int(steps[-1]) if count else 0,
            "stride": grid,
            "is_log": is_log,
            "raw": _points(steps[new][picked], values[new][picked]),
            "smooth_whole": is_smooth_whole,
            "smooth": _points(steps[at], smooth),
            "validation": [
                [one.step, _short(one.val_loss)]
                for one in self.reader.metrics.evaluations[-CURVE_POINTS:]
                if math.isfinite(one.val_loss)
            ],
        }


def _stride(count: int, most: int) -> int:
    """A power of two, so that points stay where they are while a run grows."""
    return 1 << max(0, math.ceil(math.log2(max(count, 1) / most)))


def _points(steps: Any, values: Any) -> list[list[float]]:
    pairs = zip(steps.tolist(), values.tolist(), strict=True)
    return [[step, _short(value)] for step, value in pairs if math.isfinite(value)]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


@dataclass(frozen=True)
class Now:
    """What a page says of a run at this moment besides its answers."""

    words: str
    state: str
    is_silent: bool
    bar: list[str]
    alerts: list[Alert]
    checkpoints: list[int]


class NowData:
    """Made at most once in NOW_GAP_S, however many pages ask for it."""

    def __init__(self, reader: RunReader) -> None:
        """Of a run; nothing is made yet."""
        self.reader = reader
        self._made: Now | None = None
        self._made_at = 0.0
        self._seen: Versions | None = None

    def get(self) -> Now:
        """The newest; the reader's lock is held by the caller."""
        now = time.monotonic()
        if self._made is not None and now - self._made_at < NOW_GAP_S:
            return self._made
        reader = self.reader
        old = self._made if self._seen == reader.versions else None
        self._made = Now(
            words=reader.words(),
            state=reader.state(),
            is_silent=reader.is_silent(),
            bar=old.bar if old else bar_figures(reader),
            alerts=alerts_of(reader),
            checkpoints=self._checkpoints(),
        )
        self._made_at, self._seen = now, reader.versions.copy()
        return self._made

    def _checkpoints(self) -> list[int]:
        try:
            return sorted(checkpoint_steps(self.reader.folder / CHECKPOINTS_NAME))
        except OSError:
            return []


_ROWS: weakref.WeakKeyDictionary[RunReader, RowsData] = weakref.WeakKeyDictionary()

_NOW: weakref.WeakKeyDictionary[RunReader, NowData] = weakref.WeakKeyDictionary()


def rows_of(reader: RunReader) -> RowsData:
    """The rows of a run, shared by all pages that show it."""
    return _ROWS.setdefault(reader, RowsData(reader))


def now_of(reader: RunReader) -> Now:
    """What pages say of a run now, made once for all of them."""
    return _NOW.setdefault(reader, NowData(reader)).get()
