"""The panel of a run page on the server's side: what a page was sent, and what is new since."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from nicegui import __version__, ui
from nicegui.dependencies import esm_modules
from nicegui.element import Element
from nicegui.elements.markdown import prepare_content

from trainer.views.headline import title_words
from trainer.views.page.answer_data import (
    SHOWN_CHARS,
    answer_of,
    answers_of_step,
    final_answer_of,
)
from trainer.views.page.panel_data import CurvesData, final_rows, now_of, rows_of
from trainer.views.run_reader import OVER, RunReader
from trainer.views.verdicts import WRONG

CURVES_GAP_S = 1.0
"""Least seconds between two sendings of curve points."""

MODULE = "trainer-panel"
"""What `panel.js` imports `client/index.js` as."""

MARKDOWN = "fenced-code-blocks tables"

FINAL = "final"


class PanelElement(  # type: ignore[call-arg]  # NiceGUI has no types here
    Element,  # type: ignore[misc]
    component="panel.js",
    esm={MODULE: "client"},
):
    """`client/index.js` in the page; told everything at first, later what is new."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        """Put it here, with what it shows at first."""
        super().__init__()
        ui.add_head_html(_module_links())
        # One string: Vue would watch every member of a list, and that takes seconds.
        self._props["data"] = json.dumps(data)


@cache
def _module_links() -> str:
    """Asks for all files of `client` at once: they would be found one behind the other."""
    [key] = [key for key, one in esm_modules.items() if one.name == MODULE]
    names = sorted(one.name for one in (files("trainer.views.page") / "client").iterdir())
    urls = [f"/_nicegui/{__version__}/esm/{key}/{name}" for name in names if name.endswith(".js")]
    return "".join(f'<link rel="modulepreload" href="{url}">' for url in urls)


class PreviewPanel:
    """One page's panel. `update` sends what changed; everything else answers what the page asks."""

    def __init__(self, reader: RunReader, label: str, query: Mapping[str, str]) -> None:
        """Build it here; the reader's lock is held.

        Args:
            label: name of the run for people.
            query: of the address: `prompt`, `step`, `view`, `source`.
        """
        self.reader, self.label = reader, label
        self.rows, self.curves = rows_of(reader), CurvesData(reader)
        self.shown_step: int | None = None
        self._sent = (0, 0, 0)
        self._curves_at = 0.0
        self._metrics_seen = -1
        rows = self.rows.since(0)
        self._clock = reader.previews.clock
        self._final = final_rows(reader)
        self._head = self._make_head()
        answer = self._first_answer(query, rows["order"] if rows else [])
        self.element = PanelElement(
            {
                "name": label,
                "path": f"/run/{quote(label)}",
                "view": query.get("view", ""),
                "source": answer["source"] if answer else "",
                "rows": rows,
                "final": self._final,
                "curves": self._new_curves(),
                "head": self._head,
                "answer": answer,
            }
        )
        self.element.on("show", self._show)
        self.element.on("all", self._show_all)
        self.element.on("render", self._render)

    # ---- what is sent

    def update(self) -> None:
        """Send what is new; the reader's lock is held."""
        rows = self.rows.since(self._clock)
        if rows is not None:
            self._clock = self.reader.previews.clock
            self._take("takeRows", rows)
        now = time.monotonic()
        version = self.reader.versions.metrics
        if version != self._metrics_seen and now - self._curves_at >= CURVES_GAP_S:
            self._take("takeCurves", self._new_curves())
        final = final_rows(self.reader) if self.reader.final_evaluation else None
        if final is not None and self._final is None:
            self._final = final
            self._take("takeHead", self._make_head())
            self._take("takeFinal", final)
        head = self._make_head()
        if head != self._head:
            self._head = head
            self._take("takeHead", head)

    def choose(self, prompt: int, step: int | None) -> None:
        """Show a prompt at a step."""
        self._take("choose", prompt, step)

    def _take(self, name: str, *values: Any) -> None:
        self.element.run_method("take", name, *values)

    def _new_curves(self) -> dict[str, Any]:
        found = self.curves.since(*self._sent)
        self._sent = (found["count"], found["last"], found["stride"])
        self._curves_at = time.monotonic()
        self._metrics_seen = self.reader.versions.metrics
        return found

    def _make_head(self) -> dict[str, Any]:
        """What the charts and the title need besides points."""
        reader, status = self.reader, self.reader.status
        total = status.total_steps if status is not None else None
        now = now_of(reader)
        state = now.state
        is_over = state in (*OVER, "lost")
        final = reader.final_evaluation
        headline = self.rows.headline()
        # The percentage of a title changes a hundred times, not at every step.
        title = title_words(
            headline, self.label, step=reader.step, total=total, ending=state if is_over else ""
        )
        return {
            "title": title,
            "total": total,
            "is_over": is_over,
            "best": self.rows.best_step(),
            "checkpoints": now.checkpoints,
            "resumed": status.start_step if status is not None else 0,
            "final": final.score_words if final is not None else "",
            "by_kind": final.by_word_words if final is not None else "",
        }

    # ---- what the page asks for

    def _first_answer(self, query: Mapping[str, str], order: list[int]) -> dict[str, Any] | None:
        """What the address names, else the prompt to look at first."""
        is_final = query.get("source") == FINAL or not order
        if not query and self._final is not None:
            # The answers to look at are the wrong ones, wherever they are.
            is_final = is_final or (not self.rows.has_wrong() and _has_wrong(self._final))
        source = FINAL if is_final and self._final is not None else "previews"
        if source == FINAL and self._final is not None:
            order = self._final["order"]
        prompt, step = _whole(query.get("prompt")), _whole(query.get("step"))
        found = self._answer(prompt, step, source) if prompt is not None else None
        return found or (self._answer(order[0], None, source) if order else None)

    def _answer(self, prompt: int, step: int | None, source: str) -> dict[str, Any] | None:
        with self.reader.lock:
            if source == FINAL:
                found = final_answer_of(self.reader, prompt)
            else:
                found = answer_of(self.reader, prompt, step)
        if found is None:
            return None
        self.shown_step = found["step"] if source != FINAL else None
        return {**found, "source": source}

    async def _show(self, event: Any) -> None:
        place = _place(event.args)
        if place is not None:
            # A comparison of long texts takes a moment, in which other pages go on.
            self._take("takeAnswer", await asyncio.to_thread(self._answer, *place))

    async def _show_all(self, event: Any) -> None:
        step = _whole(event.args.get("step")) if isinstance(event.args, dict) else None
        if step is not None:
            found = await asyncio.to_thread(self._all, step)
            self._take("takeAll", step, found)

    def _all(self, step: int) -> list[dict[str, Any]]:
        with self.reader.lock:
            return answers_of_step(self.reader, step)

    async def _render(self, event: Any) -> None:
        """Both texts as HTML; the page takes everything out of it that is no formatting."""
        place = _place(event.args)
        answer = await asyncio.to_thread(self._answer, *place) if place is not None else None
        if answer is None:
            return
        found = {
            name: await asyncio.to_thread(prepare_content, (text or "")[:SHOWN_CHARS], MARKDOWN)
            for name, text in (("golden", answer["golden"]), ("text", answer["text"]))
        }
        self._take("takeRendered", {"prompt": answer["prompt"], "step": answer["step"], **found})


def _has_wrong(final: Mapping[str, Any]) -> bool:
    return any(state in WRONG for _, state, *_ in final["verdicts"])


def _place(values: Any) -> tuple[int, int | None, str] | None:
    """(prompt, step, source) that a page names; None where it names nothing."""
    if not isinstance(values, dict):
        return None
    prompt = _whole(values.get("prompt"))
    source = FINAL if values.get("source") == FINAL else "previews"
    return None if prompt is None else (prompt, _whole(values.get("step")), source)


def _whole(value: Any) -> int | None:
    """A whole number that somebody sent; None where it is none."""
    try:
        return int(value) if 0 <= int(value) < 2**53 else None
    except (TypeError, ValueError, OverflowError):
        return None
