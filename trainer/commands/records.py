"""RunRecords: what the command line adds to a run folder. It can fail without harm to the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from trainer.files import replace_file
from trainer.monitoring.events import Event, RunStarted
from trainer.views.run_reader import MANIFEST_NAME, ORIGINS_NAME, RunReader

logger = logging.getLogger(__name__)


class RunRecords:
    """An observer: where config values came from at the start, the report at the end."""

    def __init__(self, origins: Mapping[str, str], *, is_report: bool) -> None:
        """Take what to write.

        Args:
            origins: dotted config key -> where its value came from; empty: not written.
            is_report: whether `finish` writes the report.
        """
        self._origins, self._is_report = dict(origins), is_report
        self._has_begun = False

    def on_event(self, event: Event) -> None:
        """Write config.origins.json when the first step is about to be made."""
        if not isinstance(event, RunStarted):
            return
        self._has_begun = True
        if self._origins:
            text = json.dumps(self._origins, indent=2) + "\n"
            replace_file(Path(event.output_dir) / ORIGINS_NAME, text)

    def close(self) -> None:
        """Nothing to let go of: the report is written after the run, by `finish`."""

    def finish(self, folder: Path) -> Path | None:
        """Write the report of a run that is over; None when there is none. Never raises.

        A run that was refused wrote nothing: what is in the folder is another one's.
        """
        if not self._is_report or not self._has_begun or not (folder / MANIFEST_NAME).is_file():
            return None
        try:
            # jinja2 is needed by nothing else of a run.
            from trainer.views.report import REPORT_NAME, write_report

            reader = RunReader(folder)
            reader.poll()
            write_report(reader, folder / REPORT_NAME)
        except Exception as error:
            logger.warning(
                "%s: the report could not be written (%s: %s); the run is not touched by that. "
                "Try `trainer report %s`.",
                folder,
                type(error).__name__,
                error,
                folder,
            )
            return None
        return folder / REPORT_NAME
