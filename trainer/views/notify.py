"""The process that tells somebody how a run ends: a webhook or a command; and that it is silent.

    python -m trainer.views.notify      started by `trainer.monitoring.notify`

Lines of JSON: NotifySettings (first), then `ended` with the values of a RunEnded; back comes
`trouble` where somebody could not be told. No text of a row is told: what errors quote stays here.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer import errors
from trainer.child import first_line, own_lines
from trainer.errors import PreviewError
from trainer.exchange import BoundedClient
from trainer.files import STATUS_NAME
from trainer.monitoring.beats import Link, Watched
from trainer.monitoring.notify import NotifySettings
from trainer.monitoring.status_reader import METRICS_NAME
from trainer.net import is_loopback
from trainer.views.run_reader import RECENT_STEPS, RunReader
from trainer.views.running_headline import RunningHeadline
from trainer.views.verdicts import counts_of
from trainer.views.words import SILENT_STEPS, duration_words, ending_words, going_on_words

TICK_S = 0.5

AWAY_S = 5.0
"""Between two looks of this process: then it was suspended too, and so was the run."""

WEBHOOK_S, COMMAND_S = 5.0, 10.0
"""How long either may take, each time."""

PAUSE_S = 1.0
"""Before the one retry."""

RANKS_S = 8.0
"""How long the watchers of several processes may take to say which of them failed."""

KEY_VARIABLE = "ULTIMATE_TRAINER_NOTIFY_KEY"
"""Environment variable with what a webhook wants as `Authorization: Bearer`."""

GIVEN_UP = "given_up"

WITHOUT = " without saying why"

ERRORS_THAT_QUOTE = {"DataError", "TemplateError", "ProfileError", "RankError"}

ERRORS_THAT_QUOTE_NO_ROW = {
    *(name for name, one in vars(errors).items() if isinstance(one, type)),
    "OutOfMemoryError",
    "MemoryError",
    "OSError",
} - ERRORS_THAT_QUOTE
"""The messages of others, Python's among them, may hold text of a row."""


class Teller:
    """Looks at one run, and tells."""

    def __init__(
        self, settings: NotifySettings, lines_in: int, tell: Callable[[dict[str, Any]], None]
    ) -> None:
        """Take the run, the descriptor of what it says, and who is told."""
        self.settings, self._tell = settings, tell
        self.reader = RunReader(Path(settings.folder))
        self._watched = Watched(settings.pid)
        self._link: Link | None = Link(lines_in)
        self._stamp: tuple[Any, ...] = ()
        self._heard_at = self._was_here = time.monotonic()
        self._is_silent = False
        os.set_blocking(lines_in, False)

    def run(self) -> None:
        """Until the run has ended and somebody was told."""
        while True:
            self._wait()
            ended = self._ended()
            if ended is not None:
                self._tell_end(ended)
                return
            if self._watched.state() == "gone":
                ended = self._ended()  # what it wrote just before
                self._tell_end(ended) if ended is not None else self._tell_gone()
                return
            self._look()

    def _wait(self) -> None:
        descriptors = [self._watched.descriptor, self._link.descriptor if self._link else -1]
        select.select([one for one in descriptors if one >= 0], [], [], TICK_S)

    def _ended(self) -> dict[str, Any] | None:
        """How the run says that it ended."""
        lines = self._link.read() if self._link is not None else []
        if lines is None:
            self._link = None  # it has ended, or is about to: the system will say
        return next((line for line in lines or [] if line.get("kind") == "ended"), None)

    # ---- silence

    def _look(self) -> None:
        """Whether the files of the run grow."""
        now = time.monotonic()
        if now - self._was_here > AWAY_S:
            self._heard_at = now
        self._was_here = now
        stamp = tuple(map(self._stamp_of, (STATUS_NAME, METRICS_NAME)))
        if stamp != self._stamp:
            waited_s = now - self._heard_at
            self._stamp, self._heard_at = stamp, now
            if self._is_silent:
                self._is_silent = False
                self._say("goes_on", reason=f"after {duration_words(waited_s)} without an update")
        elif 0 < self.settings.silence_s <= now - self._heard_at and not self._is_silent:
            self._look_closely(now - self._heard_at)
        self._was_here = time.monotonic()  # telling takes time too

    def _stamp_of(self, name: str) -> tuple[int, int]:
        try:
            found = os.stat(self.reader.folder / name)
        except OSError:
            return (0, 0)
        return found.st_mtime_ns, found.st_size

    def _look_closely(self, waited_s: float) -> None:
        self.reader.poll()
        recent = self.reader.metrics.last("step_time_s", RECENT_STEPS)
        if len(recent) and waited_s < SILENT_STEPS * float(recent.max()):
            return
        self._is_silent = True
        reason = f"no update for {duration_words(waited_s)}"
        if self._watched.state() == "stopped":
            reason += ", its process is stopped"
        self._say("silent", reason=reason)

    # ---- the end

    def _tell_end(self, ended: dict[str, Any]) -> None:
        if ended["summary"].get("ended_by") == GIVEN_UP:
            return
        self.reader.poll()
        state, words = ended["state"], str(ended["error_message"] or "")
        reason: str | None = words or ended["summary"].get("stop_reason")
        if state == "failed":
            reason = told_reason(ended["error_type"], words)
        self._say(
            "failed" if state == "failed" else "ended",
            state=state,
            step=ended["step"],
            reason=reason,
            error_type=ended["error_type"],
        )

    def _tell_gone(self) -> None:
        """It did not say how it ended: it was killed, or another process of the run says why."""
        how = self._watched.how_it_ended()
        self.reader.poll()
        deadline = time.monotonic() + RANKS_S
        while self.settings.num_processes > 1 and time.monotonic() < deadline:
            status = self.reader.status
            if self.reader.is_over and status is not None and status.error is not None:
                reason = told_reason("RankError", status.error.message)
                self._say("failed", state="failed", reason=reason, error_type=status.error.type)
                return
            time.sleep(TICK_S)
            self.reader.poll()
        if not self._is_own():
            return  # it ended before it had begun: whoever started it has seen that
        reason = f"its process {how.removesuffix(WITHOUT)}{WITHOUT}"
        if how == "died" or "SIGKILL" in how:
            reason += "; the system kills processes where memory is short"
        checkpoint = self.reader.last_checkpoint_step()
        config = self.reader.manifest.get("config")
        reason += f"; {going_on_words(self.settings.folder, checkpoint, config)}"
        self._say("killed", state="lost", reason=reason)

    # ---- what is told

    def _is_own(self) -> bool:
        status = self.reader.status
        if status is None:
            return False
        return status.pid == self.settings.pid and status.updated_at >= self.settings.since

    def _say(
        self,
        event: str,
        *,
        state: str | None = None,
        step: int | None = None,
        reason: str | None = None,
        error_type: str | None = None,
    ) -> None:
        status = self.reader.status if self._is_own() else None
        step = step if step is not None else (self.reader.step if status is not None else 0)
        total = status.total_steps if status is not None else None
        state = state or (status.state if status is not None else "loading")
        if event in ("ended", "failed"):
            words = ending_words(state, step, total, error_type=error_type, reason=reason)
        else:
            of_total = f" of {total}" if total is not None else ""
            words = f"{event.replace('_', ' ')} at step {step}{of_total}: {reason}"
        if event == "ended" and reason and reason not in words:
            words += f" ({reason})"
        so_far = RunningHeadline(
            self.reader.previews, self.reader.metrics.evaluations, self.reader.final_evaluation
        )
        headline = (so_far.sentence() if status is not None else "") or None
        text = f"run {self.reader.name}: {words}" + (f". {headline}" if headline else "")
        self._tell(
            {
                "event": event,
                "run": self.reader.name,
                "step": step,
                "total_steps": total,
                "status": state,
                "reason": reason,
                "headline": headline,
                "figures": figures_of(self.reader) if status is not None else {},
                "host": socket.gethostname(),
                "created_at": time.time(),
                "text": text,
                "content": text,  # what Discord calls it
            }
        )


def told_reason(error_type: str | None, message: str) -> str | None:
    """Why a run failed, without what an error may quote of a row; None where nothing is left."""
    if error_type == "RankError":  # which process, and how it ended, up to what it raised
        return message.partition(" raised ")[0]
    if error_type not in ERRORS_THAT_QUOTE_NO_ROW:
        return None
    return message.split("\n")[0] or None


def figures_of(reader: RunReader) -> dict[str, float | int | None]:
    """What the headline is made of, as numbers; null where a run has none."""
    status, lines = reader.status, reader.previews.timelines.values()
    assert status is not None, "asked of a run that has one"
    counts = counts_of(line.judged for line in lines)
    known = [one.golden_probability for one in reader.previews.newest()]
    golden = [one for one in known if one is not None]
    return {
        "train_loss": status.train_loss,
        "val_loss": status.val_loss,
        "right": counts.right,
        "compared": counts.compared,
        "lost": counts.lost,
        "never_right": counts.never_right,
        "golden_probability": sum(golden) / len(golden) if golden else None,
    }


# ---- the two ways to tell


def tell(notify: tuple[str, ...], message: dict[str, Any], *, is_webhook: bool) -> str | None:
    """Tell it once, and once more where that fails.

    Returns:
        What went wrong, without a secret; None: it was told.
    """
    way = _post if is_webhook else _run
    trouble = way(notify, message)
    if trouble is not None:
        time.sleep(PAUSE_S)
        trouble = way(notify, message)
    return trouble


def _post(notify: tuple[str, ...], message: dict[str, Any]) -> str | None:
    parts = urlsplit(notify[0])
    client = BoundedClient(
        f"{parts.scheme}://{parts.netloc}",
        os.environ.get(KEY_VARIABLE),
        timeout_s=WEBHOOK_S,
        timeout_name="the limit for a webhook",
        kind="receiver",
        key_variable=KEY_VARIABLE,
        trust_env=not is_loopback(parts.hostname or ""),
    )
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    try:
        status = client.post(path, time.monotonic() + WEBHOOK_S, message)
    except PreviewError as error:
        return str(error)
    finally:
        client.close()
    return f"was not told: HTTP {status}" if status >= 300 else None


def _run(notify: tuple[str, ...], message: dict[str, Any]) -> str | None:
    words = [word.replace("{text}", message["text"]) for word in notify]
    told = {"ULTIMATE_TRAINER_EVENT": message["event"], "ULTIMATE_TRAINER_TEXT": message["text"]}
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **told},
            start_new_session=True,
        )
    except OSError as error:
        return f"cannot be started ({error.strerror})"
    try:
        process.communicate(json.dumps(message).encode() + b"\n", timeout=COMMAND_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"took longer than {COMMAND_S:g} s and was ended"
    return f"ended with exit code {process.returncode}" if process.returncode else None


def main() -> None:
    """Tell as the first line says."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # It ends with the run, and not before. Not SIG_IGN, which a command would inherit.
        signal.signal(number, lambda *_: None)
    lines_in, lines_out = own_lines()
    settings = NotifySettings(**json.loads(first_line(lines_in.fileno())))

    def told(message: dict[str, Any]) -> None:
        trouble = tell(tuple(settings.notify), message, is_webhook=settings.is_webhook)
        if trouble is not None:
            with contextlib.suppress(OSError, ValueError):  # the run is gone
                lines_out.write(json.dumps({"trouble": trouble}).encode() + b"\n")
                lines_out.flush()

    Teller(settings, lines_in.fileno(), told).run()


if __name__ == "__main__":
    main()
