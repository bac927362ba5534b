"""Light or dark: what charts must be told, as a canvas knows no style sheet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui import ui

SYSTEM_CHANGED = "system_colours_changed"
LOOK = "return document.body.classList.contains('body--dark')"
WATCH_SYSTEM = (
    "matchMedia('(prefers-color-scheme: dark)')"
    f".addEventListener('change', () => emitEvent('{SYSTEM_CHANGED}'))"
)


class Colours:
    """Asks the browser whether the page is dark: at first, after the button, after the system."""

    def __init__(self, dark: Any, on_change: Callable[[], None]) -> None:
        """Watch the current client.

        Args:
            dark: the page's dark-mode element.
            on_change: draws the charts anew; called when `is_dark` has another value.
        """
        self.is_dark = False
        self._on_change = on_change
        ui.timer(0.1, self._start, once=True)
        dark.on_value_change(self._look_soon)
        ui.on(SYSTEM_CHANGED, self._look_soon)

    async def _start(self) -> None:
        ui.run_javascript(WATCH_SYSTEM)
        await self._look()

    def _look_soon(self) -> None:
        ui.timer(0.2, self._look, once=True)  # when the browser has changed the page

    async def _look(self) -> None:
        try:
            is_dark = bool(await ui.run_javascript(LOOK, timeout=5.0))
        except TimeoutError:
            return  # the client went away
        if is_dark != self.is_dark:
            self.is_dark = is_dark
            self._on_change()
