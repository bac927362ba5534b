"""The page of one run: verdict, curves, answers, ask, controls, data and config."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from nicegui import ui

from trainer.counts import counted
from trainer.views.facts import (
    Alert,
    card_rows,
    card_sample,
    environment_rows,
    report_figures,
)
from trainer.views.metrics import SMOOTHING_SHARE, is_spread_wide
from trainer.views.page.actions import ActBox
from trainer.views.page.ask import AskBox
from trainer.views.page.charts import (
    drift_chart,
    loss_chart,
    match_chart,
    metric_chart,
    source_chart,
)
from trainer.views.page.elements import (
    Colours,
    answer,
    box,
    dark_button,
    empty_chart,
    mark,
    open_page,
    pairs,
    section,
    set_options,
    text,
)
from trainer.views.page.panel import PreviewPanel
from trainer.views.page.panel_data import Now, now_of, rows_of
from trainer.views.page.store import PageOptions
from trainer.views.run_reader import RunReader, Versions, config_rows
from trainer.views.timeline import mark_of

TICK_S = 0.5

CHART_GAP_S = 1.0
"""Least seconds between two drawings of the charts."""

NO_ALERTS = "no alerts"

SMALL_CHARTS = {
    "tokens_per_s": "throughput, tokens/s",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "memory_gib": "memory, GiB",
}


# Asked after a click only; browsers without notifications, or without https elsewhere, have none.
ASK_PERMISSION = """async () => {
  emit('Notification' in window ? await Notification.requestPermission() : 'missing');
}"""


class RunPage:
    """Builds the page in the current client and keeps it up to date."""

    def __init__(
        self,
        reader: RunReader,
        label: str,
        options: PageOptions,
        query: Mapping[str, str],
        *,
        is_alone: bool,
    ):
        """Build everything; the run was read before.

        Args:
            label: name of the run for people.
            query: of the address: what is shown at first.
            is_alone: there is no list of runs to go back to.
        """
        self.reader, self.options = reader, options
        self._seen = Versions(-1, -1, -1, -1)
        self._alerts_shown: list[Alert] | None = None
        self._announced, self._is_told, self._label = "", False, label
        self._state_shown: tuple[int, int, str, bool] | None = None
        self._charts_at, self._has_charts = 0.0, False
        self._dark = open_page(label)
        self._colours = Colours(self._dark, self._draw_charts)
        with box("div", "page run-page"):
            self._build_top(label, is_alone)
            with reader.lock:
                self._panel = PreviewPanel(reader, label, query)
            with section("Ask the model now", "ask"):
                self._ask = AskBox(reader, options.worker_hosts, options.own_server)
            with section("Controls", "act"):
                self._act = ActBox(
                    reader, lambda: self._panel.shown_step, is_allowed=options.is_control_allowed
                )
            self._build_background()
        self.update()
        ui.timer(TICK_S, self.update)

    # ---- parts

    def _build_top(self, label: str, is_alone: bool) -> None:
        with box("header", "top"):
            if not is_alone:
                ui.link("\N{LEFTWARDS ARROW} all runs", "/")
            text("h1", label)
            self._state = text("span", "", "state")
            # Only what the state is, not its countdown, is read aloud.
            self._aloud = text("span", "", "unseen").props("role=status")
            self._line = text("span", "", "figures-line dim")
            box("span", "grow")
            self._alerts = box("details", "alerts")
            with self._alerts:
                with box("summary"):
                    self._alerts_count = text("span", NO_ALERTS)
                    self._alerts_first = text("span", "", "alert-first")
                with box("div", "alerts-list"):
                    self._alerts_list = box("div").props("aria-live=polite")
                    self._bell = ui.button("notify me in this browser when it ends or hangs")
                    self._bell.props("flat dense no-caps")
                    self._bell.on("click", self._be_told, js_handler=ASK_PERMISSION)
            dark_button(self._dark)
        self._bar = ui.linear_progress(0.0, show_value=False, size="4px")
        self._bar.props('aria-label="progress" instant-feedback')
        with box("div", "verdict-box"):
            self._main = text("h2", "", "headline", id="headline")
            self._rest = text("p", "", "headline-rest dim")

    def _build_charts(self) -> None:
        with box("div", "charts"):
            with box("div", "chart-big"):
                with box("div", "chart-head"):
                    text("h3", "loss, nats per trained token")
                    self._log = ui.switch("log scale", value=is_spread_wide(self.reader.metrics))
                    self._log.on_value_change(self._draw_charts)
                    text("span", "smoothing, % of the run", "dim")
                    self._smoothing = ui.slider(
                        min=0,
                        max=20,
                        step=0.5,
                        value=100 * SMOOTHING_SHARE,
                        on_change=self._draw_charts,
                    )
                    self._smoothing.props('label aria-label="smoothing, % of the run"')
                self._loss = empty_chart("loss, nats per trained token")
            self._source_box = box("div").props("id=source-losses")
            with self._source_box:
                text("h3", "loss of each source, smoothed; dashed: validation")
                self._sources = empty_chart("loss of each source, nats per trained token")
            self._match_box = box("div")
            with self._match_box:
                text("h3", "previews that match, golden tokens and scores, %")
                self._matches = empty_chart("previews that match, golden tokens and scores, %")
            self._drift_box = box("div")
            with self._drift_box:
                text("h3", "drift from the answers before training, nats per token")
                self._drift = empty_chart("drift, nats per token")
            self._small: dict[str, tuple[Any, Any]] = {}
            for name, title in SMALL_CHARTS.items():
                with box("div") as frame:
                    text("h3", title)
                    self._small[name] = (frame, empty_chart(title))

    def _build_background(self) -> None:
        with section("Data, config and more curves", "about"):
            self._curves = ui.expansion("all curves").props("id=curves")
            self._card = ui.expansion("before training: data card and first answers")
            self._facts = ui.expansion("figures, config, environment")
            self._notices = ui.expansion("notices")
        # Filled and drawn when they are opened: hundreds of cells and points that few look at, and
        # a library of a megabyte that draws them.
        self._curves.on_value_change(self._open_curves)
        self._card.on_value_change(self._show_background)
        self._facts.on_value_change(self._show_background)

    # ---- keeping it up to date

    def update(self) -> None:
        """Show what changed since the last look."""
        with self.reader.lock:
            now, seen = self.reader.versions.copy(), self._seen
            said = now_of(self.reader)
            self._state.set_text(said.words)
            self._state.classes("state-silent" if said.is_silent else "", remove="state-silent")
            self._show_alerts(said.alerts)
            shown = (now.status, now.metrics, said.state, said.is_silent)
            if shown != self._state_shown:
                self._state_shown = shown
                self._show_state(said)
                self._act.refresh()
            if now != seen:
                self._show_headline()
            self._panel.update()
            if now.manifest != seen.manifest:
                self._show_background()
            if now.status != seen.status:
                self._ask.refresh()
                self._show_notices()
            if now.metrics != seen.metrics or now.previews != seen.previews:
                if time.monotonic() - self._charts_at < CHART_GAP_S:
                    now.metrics = seen.metrics  # draw them at one of the next ticks
                else:
                    self._draw_charts()
            self._seen = now

    def _show_state(self, now: Now) -> None:
        reader, state = self.reader, now.state
        for name in ("completed", "failed", "lost", "stopped"):
            self._state.classes(f"state-{name}" if state == name else "", remove=f"state-{name}")
        said = "no update for a while" if now.is_silent else state
        if said != self._announced:
            self._notify(now)
            self._announced = said
            self._aloud.set_text(now.words if reader.is_over else said)
        total = reader.status.total_steps if reader.status is not None else None
        self._bar.set_value(round(reader.step / total, 3) if total else 0.0)
        self._line.set_text(" \N{MIDDLE DOT} ".join(now.bar))

    def _be_told(self, event: Any) -> None:
        """What the browser answered to the question whether it may show notifications."""
        self._is_told = event.args == "granted"
        self._bell.set_text(
            "this browser notifies you while the page stays open"
            if self._is_told
            else "this browser does not allow notifications from this page"
        )

    def _notify(self, now: Now) -> None:
        """Show a notification of an end or of silence that came while the page was open."""
        if self._is_told and self._announced and (self.reader.is_over or now.is_silent):
            words = f"{json.dumps(self._label)}, {{body: {json.dumps(now.words)}}}"
            ui.run_javascript(f"new Notification({words})")

    def _show_headline(self) -> None:
        headline = rows_of(self.reader).headline()
        # A number and its sign stay on one line.
        self._main.set_text(headline.main.replace(" %", "\N{NO-BREAK SPACE}%"))
        self._rest.set_text(headline.rest)

    def _show_alerts(self, alerts: list[Alert]) -> None:
        if alerts == self._alerts_shown:  # what is drawn again is read out again
            return
        self._alerts_shown = alerts
        self._alerts_count.set_text(counted(len(alerts), "alert") if alerts else NO_ALERTS)
        # The first one where there is place: nothing on the page moves for it.
        self._alerts_first.set_text(f": {alerts[0].text}" if alerts else "")
        level = alerts[0].level if alerts else "none"
        self._alerts.classes(replace=f"alerts alerts-{level}")
        self._alerts_list.clear()
        with self._alerts_list:
            for alert in alerts:
                self._draw_alert(alert)
            if not alerts:
                text("p", "Nothing to look at.", "dim")

    def _draw_alert(self, alert: Alert) -> None:
        words = f"{alert.level}: {alert.text}"
        place = self._place_of(alert)
        if place is None:
            text("div", words, f"alert alert-{alert.level}")
            return
        shown = text("button", words, f"alert alert-{alert.level}", type="button")
        shown.on("click", lambda: self._panel.choose(*place))

    def _place_of(self, alert: Alert) -> tuple[int, int | None] | None:
        """(prompt, step) that an alert speaks of; None where it is about none."""
        keys = list(self.reader.previews.timelines)
        return (keys.index(alert.prompt), alert.step) if alert.prompt in keys else None

    def _open_curves(self) -> None:
        if self._curves.value and not self._has_charts:
            with self._curves, self.reader.lock:
                self._build_charts()
            self._has_charts = True
        self._draw_charts()

    def _draw_charts(self) -> None:
        if not (self._curves.value and self._has_charts):
            return
        self._charts_at = time.monotonic()
        reader, is_dark = self.reader, self._colours.is_dark
        with reader.lock:
            set_options(
                self._loss,
                loss_chart(
                    reader,
                    smoothing=float(self._smoothing.value or 0.0) / 100,
                    is_log=bool(self._log.value),
                    is_dark=is_dark,
                ),
            )
            metrics = reader.metrics
            self._source_box.set_visibility(
                bool(metrics.source_losses or metrics.source_val_losses)
            )
            smoothing = float(self._smoothing.value or 0.0) / 100
            set_options(self._sources, source_chart(reader, smoothing=smoothing, is_dark=is_dark))
            # A frame without data only asks what is wrong with it.
            has_any = bool(reader.previews.accuracy() or reader.metrics.scores)
            self._match_box.set_visibility(has_any)
            set_options(self._matches, match_chart(reader, is_dark=is_dark))
            self._drift_box.set_visibility(bool(reader.metrics.drift_points()))
            set_options(self._drift, drift_chart(reader, is_dark=is_dark))
            for name, (frame, chart) in self._small.items():
                frame.set_visibility(reader.metrics.has(name))
                set_options(chart, metric_chart(reader, name, is_dark=is_dark))

    def _show_background(self) -> None:
        """Fill what is open."""
        with self.reader.lock:
            for expansion, fill in ((self._card, self._fill_card), (self._facts, self._fill_facts)):
                expansion.clear()
                if expansion.value:
                    with expansion:
                        fill()

    def _fill_card(self) -> None:
        manifest = self.reader.manifest
        pairs(card_rows(manifest))
        sample = card_sample(manifest)
        if sample:
            text("p", "The first row; green underlined text is trained on:", "dim")
            with box("div", "answer"):
                for content, is_trained in sample:
                    text("span", content, "trained" if is_trained else "")
        self._show_first_answers()

    def _fill_facts(self) -> None:
        pairs(report_figures(self.reader))
        with box("div", "wide"), box("table", "lined"):
            for row in [("key", "value", "origin"), *config_rows(self.reader)]:
                with box("tr"):
                    for cell in row:
                        text("td", cell)
        pairs(environment_rows(self.reader.manifest))

    def _show_first_answers(self) -> None:
        results = self.reader.previews.of_step(0)
        if not results:
            return
        text("h3", "What the model said before training")
        for result in results:
            with box("div", "said"):
                mark(mark_of(result))
                text("span", f" {result.prompt}")
                with box("div", "side-by-side"):
                    with box("div", "said"):
                        text("div", "golden", "label")
                        answer(result.golden_answer or "-")
                    with box("div", "said"):
                        text("div", "step 0", "label")
                        answer(result.text if result.ok else result.error_message or "")

    def _show_notices(self) -> None:
        notices = self.reader.status.notices if self.reader.status is not None else ()
        self._notices.clear()
        with self._notices:
            for notice in notices:
                text("p", f"{notice.level}: {notice.text}", "answer")
            if not notices:
                text("p", "None.", "dim")
