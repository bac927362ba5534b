"""PreviewBook: the previews of a run as one time-line per prompt."""

from __future__ import annotations

from collections import Counter

from trainer.monitor.timeline import Timeline
from trainer.monitoring.accuracy import LONG_WINDOW, SHORT_WINDOW, MatchHistory
from trainer.monitoring.text import MARK_ERROR, MARK_SUPERSEDED
from trainer.monitoring.text import mark_of as sign_of
from trainer.preview.base import PreviewResult

MARK_WORDS = {
    "=": "matches golden",
    "x": "does not match",
    ".": "nothing to compare with",
    MARK_ERROR: "no answer",
    MARK_SUPERSEDED: "a newer step took its place",
}


class PreviewBook:
    """Answers by prompt, prompts in the order in which they first appeared."""

    def __init__(self) -> None:
        """Start empty."""
        self.timelines: dict[str, Timeline] = {}
        self._num_at: Counter[int] = Counter()

    def clear(self) -> None:
        """Forget everything."""
        self.timelines.clear()
        self._num_at.clear()

    def add(self, result: PreviewResult) -> None:
        """Take one answer; a second one by the same prompt and step replaces the first."""
        key = result.prompt_id or result.prompt
        timeline = self.timelines.setdefault(key, Timeline(key))
        if timeline.of_step(result.step) is None:
            self._num_at[result.step] += 1
        timeline.add(result)

    def drop_after(self, step: int) -> None:
        """Forget the answers above `step`: a resumed run makes them again."""
        if not any(one > step for one in self._num_at):
            return
        for timeline in self.timelines.values():
            timeline.drop_after(step)
        self.timelines = {key: one for key, one in self.timelines.items() if len(one)}
        self._num_at = Counter({one: n for one, n in self._num_at.items() if one <= step})

    def __len__(self) -> int:
        """How many answers there are."""
        return sum(self._num_at.values())

    @property
    def steps(self) -> list[int]:
        """Steps with an answer, in order."""
        return sorted(self._num_at)

    def of_step(self, step: int) -> list[PreviewResult]:
        """The answers by the weights of `step`, in the order of the prompts."""
        found = (timeline.of_step(step) for timeline in self.timelines.values())
        return [result for result in found if result is not None]

    def newest(self) -> list[PreviewResult]:
        """The answers of the newest step."""
        return self.of_step(max(self._num_at)) if self._num_at else []

    def accuracy(self) -> dict[int, tuple[int, int]]:
        """Step -> (answers that match, answers compared); steps with nothing compared are out."""
        found = {}
        for step in self.steps:
            compared = [r.matches for r in self.of_step(step) if r.matches is not None]
            if compared:
                found[step] = (sum(compared), len(compared))
        return found

    def history(self) -> MatchHistory:
        """The newest comparisons, as status.json counts them."""
        history = MatchHistory()
        for step in self.steps[-max(2 * SHORT_WINDOW, LONG_WINDOW) :]:
            history.add(self.of_step(step))
        return history

    def grid_steps(self, most: int) -> list[int]:
        """At most `most` steps for a table, first and last among them, the others evenly spread."""
        steps = self.steps
        if len(steps) <= most:
            return steps
        last = len(steps) - 1
        return [steps[round(i * last / (most - 1))] for i in range(most)]


def mark_of(result: PreviewResult | None) -> str:
    """The sign of an answer; a blank where there is none."""
    return " " if result is None else sign_of(result)
