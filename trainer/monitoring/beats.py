"""The process beside each rank that tells the others whether that rank is alive. No torch here.

    python -m trainer.monitoring.beats      started by `trainer.monitoring.ranks`

A process, not a thread: while C code holds Python's lock no thread of the rank runs, and a rank
that is busy for minutes must not be taken for dead. Whether the rank is stopped or gone this one
asks the system. And it outlives a rank that is killed, so that somebody can say so.

The watcher of rank 0 hears all others and decides once, for all, who failed first. Lines of JSON:

    -> Settings (first line) -> join {host, port, token}
    -> failed {fault}     -> ended          from the rank
    <- port {port}           <- fault {fault}                        to the rank
    hello {token, rank}, beat {is_stopped}, failed, fault, ended     between watchers
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from trainer.child import first_line, own_lines
from trainer.errors import EXIT_FAILED
from trainer.files import LOCK, STATUS_NAME, read_json_object, replace_file

TICK_S = 0.25
"""Seconds between two looks at the rank."""

MAX_BEAT_S = 2.0
"""Seconds between two beats; less where the limit is low."""

ECHO_S = 3.0
"""How long a broken exchange may wait for the fault that broke it."""

KILL_S = 20.0
"""Seconds after a fault in which a rank may end by itself; then it is killed."""

KILL_STOPPED_S = 90.0
"""The same after a signal, for which launchers have limits of their own."""

SEND_S = 1.0

LOCK_S = 5.0

ABSENT_S = 1.5
"""A watcher that was away for longer (all of a job is suspended, now and then) has heard nobody."""

MAX_LINE = 1 << 18

TO_CONTINUE = "; continue with the same launch command and --resume"

ENDED_STATES = ("completed", "stopped", "failed")


@dataclass(frozen=True)
class Fault:
    """What one rank did, after which the others cannot go on."""

    rank: int
    what: str
    """In words that follow its name, such as `died (SIGKILL)`."""
    error_type: str = "RankError"
    traceback: str | None = None
    exit_code: int = EXIT_FAILED
    """For all ranks."""
    signal: str | None = None
    """It was stopped by this one, and did not fail."""
    is_echo: bool = False
    """Its exchange with others broke: what broke it is another's fault, if that is heard of."""

    def __str__(self) -> str:
        return f"rank {self.rank} {self.what}"


@dataclass(frozen=True)
class Settings:
    """What a watcher is started with."""

    rank: int
    world_size: int
    pid: int
    """Of the rank."""
    timeout_s: float
    """Without a beat for so long a rank counts as hanging."""
    folder: str
    """Of the run."""
    start_s: float = 1800.0
    """How long it may take to begin: it loads libraries first."""
    token: str = ""
    host: str = ""
    """Where the watcher of rank 0 listens; empty: on all interfaces."""
    port: int = 0
    """0: any, and this is the first watcher of its rank."""


class Watched:
    """The process of the rank, as the system sees it."""

    def __init__(self, pid: int) -> None:
        """Take its number."""
        self.pid = pid
        self.descriptor = -1
        self._process: psutil.Process | None = None
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            self._process = psutil.Process(pid)
            if hasattr(os, "pidfd_open"):  # Linux: it can be waited for
                self.descriptor = os.pidfd_open(pid)

    def state(self) -> str:
        """`runs`, `stopped` or `gone`; one that has ended and was not waited for is gone."""
        try:
            if self._process is None or not self._process.is_running():
                return "gone"
            status = self._process.status()
        except psutil.NoSuchProcess:
            return "gone"
        if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return "gone"
        is_stopped = status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        return "stopped" if is_stopped else "runs"

    def kill(self) -> None:
        """End it, also when it is stopped."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._process is not None:
                self._process.kill()  # not another one that has its number by now

    def how_it_ended(self) -> str:
        """In words; the system tells it only until somebody has waited for the process."""
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text()
            code = int(text.rpartition(")")[2].split()[49])
        except (OSError, IndexError, ValueError):
            return "died"
        if code & 0x7F:
            with contextlib.suppress(ValueError):
                return f"died ({signal.Signals(code & 0x7F).name})"
        return f"ended with exit code {code >> 8} without saying why" if code else "died"


class Link:
    """Lines of JSON from and to one socket or pipe."""

    def __init__(self, descriptor: int, connection: socket.socket | None = None) -> None:
        """Take what is read from."""
        self.descriptor, self.connection = descriptor, connection
        self.rank: int | None = None
        """Whose watcher is at the other end, once it has said so."""
        self._rest = b""

    def read(self) -> list[dict[str, Any]] | None:
        """What has come; None: the other end is closed, or speaks something else."""
        try:
            data = os.read(self.descriptor, MAX_LINE)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > MAX_LINE:
            return None
        try:
            values = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return values if all(isinstance(one, dict) for one in values) else None

    def send(self, kind: str, **values: Any) -> bool:
        """Whether it could be sent."""
        assert self.connection is not None, "only sockets are written to"
        line = json.dumps({"kind": kind, **values}).encode() + b"\n"
        try:
            self.connection.sendall(line)
        except OSError:
            return False
        return True


@dataclass
class Heard:
    """What rank 0's watcher knows of another rank, or another's of rank 0."""

    at: float
    """When it was last heard to run."""
    is_stopped: bool = False
    has_joined: bool = False
    is_ended: bool = False


@dataclass
class _Own:
    """What the rank of this watcher has said or done."""

    ran_at: float = field(default_factory=time.monotonic)
    is_stopped: bool = False
    is_gone: bool = False
    has_ended: bool = False
    has_failed: bool = False


class Watcher:
    """Watches one rank, and talks to the watchers of the others."""

    def __init__(self, settings: Settings, lines_in: int, tell: Callable[..., None]) -> None:
        """Listen, on rank 0, and look at the rank.

        Args:
            lines_in: descriptor of what the rank says.
            tell: sends the rank a line.
        """
        self.settings, self._tell_rank = settings, tell
        self.is_main = settings.rank == 0
        self.began, self.began_at = time.monotonic(), time.time()
        self.watched = Watched(settings.pid)
        self.own = _Own()
        self.fault: Fault | None = None
        """What was decided."""
        self._was_here = self.began
        self._decided = self._next_look = self._next_beat = 0.0
        self._pending: Fault | None = None
        """Of this rank, until rank 0's watcher has decided."""
        self._echo: tuple[float, Fault] | None = None
        self._selector = selectors.DefaultSelector()
        self._links: list[Link] = []
        self._main_at: tuple[str, int, str] | None = None
        others = range(1, settings.world_size) if self.is_main else [0]
        self.heard = {rank: Heard(self.began) for rank in others}
        self._rank_link: Link | None = Link(lines_in)
        self._watch(self._rank_link, self._from_rank)
        if self.watched.descriptor >= 0:
            self._selector.register(
                self.watched.descriptor, selectors.EVENT_READ, self._look_at_rank
            )
        if self.is_main:
            family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
            place = (settings.host, settings.port)
            self._server = socket.create_server(place, family=family, backlog=512)
            self._selector.register(self._server, selectors.EVENT_READ, self._accept)
            self._tell_rank("port", port=self._server.getsockname()[1])

    def run(self) -> None:
        """Watch until the rank has ended."""
        while not self._is_over():
            for key, _ in self._selector.select(TICK_S):
                key.data()
            now = time.monotonic()
            if now - self._was_here > min(ABSENT_S, self.settings.timeout_s / 2):
                self.own.ran_at = now
                for heard in self.heard.values():
                    heard.at = now
            self._was_here = now
            if now >= self._next_look:
                self._next_look = now + TICK_S
                self._look_at_rank()
                self._look_at_others()
            if now >= self._next_beat:
                self._next_beat = now + min(MAX_BEAT_S, self.settings.timeout_s / 10)
                self._send_all("beat", is_stopped=self.own.is_stopped)
            if self._echo is not None and time.monotonic() > self._echo[0]:
                self._decide(self._echo[1])
        if self.own.has_ended:
            self._send_all("ended")
        is_untold = not self.own.has_ended if self.is_main else True
        if self.fault is not None and is_untold and (self.is_main or self.fault.rank == 0):
            write_end(Path(self.settings.folder), self.fault, since=self.began_at)

    # ---- what is seen and heard

    def _watch(self, link: Link, act: Callable[[Link], None]) -> None:
        os.set_blocking(link.descriptor, False)
        self._selector.register(link.descriptor, selectors.EVENT_READ, lambda: act(link))

    def _from_rank(self, link: Link) -> None:
        lines = link.read()
        if lines is None:
            self._selector.unregister(link.descriptor)
            self._rank_link = None
            return  # it has ended, or is about to: the system will say
        for line in lines:
            if line["kind"] == "join":
                self._main_at = (line["host"], line["port"], line["token"])
            elif line["kind"] == "failed":
                self.own.has_failed = True
                self._take(Fault(**line["fault"]))
            elif line["kind"] == "ended":
                self.own.has_ended = True

    def _look_at_rank(self) -> None:
        own, now = self.own, time.monotonic()
        state = self.watched.state()
        own.is_stopped = state == "stopped"
        if state == "runs":
            own.ran_at = now
        if state == "gone" and not own.is_gone:
            how = self.watched.how_it_ended()
            own.is_gone = True
            if self.watched.descriptor >= 0:
                self._selector.unregister(self.watched.descriptor)
            if self._rank_link is not None:  # what it wrote just before it ended
                self._from_rank(self._rank_link)
            if not (own.has_ended or own.has_failed or self.fault):
                self._take(Fault(self.settings.rank, how))
        if self.is_main and own.is_stopped and now - own.ran_at > self.settings.timeout_s:
            self._decide(self._silent(0, is_stopped=True))
        if self.fault is not None and not own.is_gone:
            limit = KILL_STOPPED_S if self.fault.signal else KILL_S
            if own.is_stopped or now - self._decided > limit:
                self.watched.kill()

    def _look_at_others(self) -> None:
        now, limit = time.monotonic(), self.settings.timeout_s
        if self._main_at is not None and not self._links and not self.heard[0].is_ended:
            self._connect(*self._main_at)
        for rank, heard in self.heard.items():
            if heard.is_ended or self.fault is not None:
                continue
            if heard.has_joined and now - heard.at > limit:
                self._decide(self._silent(rank, is_stopped=heard.is_stopped))
            is_again = self.settings.port > 0  # then ranks may have ended before
            if not (heard.has_joined or is_again) and now - self.began > self.settings.start_s:
                self._decide(Fault(rank, f"did not begin within {self.settings.start_s:g} s"))

    def _silent(self, rank: int, *, is_stopped: bool) -> Fault:
        why = "its process is stopped" if is_stopped else "nothing comes from its machine"
        return Fault(rank, f"did not answer for {self.settings.timeout_s:g} s ({why})")

    # ---- between watchers

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        self._keep(connection, self._from_other)

    def _connect(self, host: str, port: int, token: str) -> None:
        try:
            connection = socket.create_connection((host, port), timeout=SEND_S)
        except OSError:
            return  # at the next look again
        link = self._keep(connection, self._from_other)
        link.rank = 0
        self.heard[0].has_joined, self.heard[0].at = True, time.monotonic()
        link.send("hello", token=token, rank=self.settings.rank)
        if self._pending is not None:
            link.send("failed", fault=asdict(self._pending))

    def _keep(self, connection: socket.socket, act: Callable[[Link], None]) -> Link:
        link = Link(connection.fileno(), connection)
        self._links.append(link)
        self._watch(link, act)
        connection.settimeout(SEND_S)
        return link

    def _drop(self, link: Link) -> None:
        if link in self._links:
            self._links.remove(link)
            self._selector.unregister(link.descriptor)
            assert link.connection is not None, "a socket"
            link.connection.close()

    def _from_other(self, link: Link) -> None:
        lines = link.read()
        for line in lines or []:
            if link.rank is None and not self._is_greeted(link, line):
                lines = None
                break
            self._hear(link, line)
        if lines is None:
            self._drop(link)

    def _is_greeted(self, link: Link, line: dict[str, Any]) -> bool:
        rank, token = line.get("rank"), str(line.get("token")).encode()
        if not secrets.compare_digest(token, self.settings.token.encode()):
            return False
        if rank not in self.heard:
            return False
        link.rank = rank
        if self.fault is not None:
            link.send("fault", fault=asdict(self.fault))
        return True

    def _hear(self, link: Link, line: dict[str, Any]) -> None:
        assert link.rank is not None, "greeted"
        heard, kind = self.heard[link.rank], line.get("kind")
        heard.has_joined = True
        heard.is_stopped = bool(line.get("is_stopped"))
        if not heard.is_stopped:
            heard.at = time.monotonic()
        if kind == "failed":
            self._take(Fault(**line["fault"]))
        elif kind == "fault":
            self._decide(Fault(**line["fault"]))
        elif kind == "ended":
            heard.is_ended = True

    def _send_all(self, kind: str, **values: Any) -> None:
        for link in list(self._links):
            if link.rank is not None and not link.send(kind, **values):
                self._drop(link)

    # ---- what is decided

    def _take(self, fault: Fault) -> None:
        """A fault of this rank, or one that another watcher tells rank 0's."""
        if not self.is_main:
            self._pending = fault
            self._send_all("failed", fault=asdict(fault))
        elif not fault.is_echo:
            self._decide(fault)
        elif self._echo is None:
            self._echo = (time.monotonic() + ECHO_S, fault)

    def _decide(self, fault: Fault) -> None:
        """The first is the run's; all are told."""
        if self.fault is not None:
            return
        self.fault, self._decided = fault, time.monotonic()
        if self.is_main:
            self._send_all("fault", fault=asdict(fault))
        self._tell_rank("fault", fault=asdict(fault))

    def _is_over(self) -> bool:
        if self.own.has_ended:
            return True
        if not self.own.is_gone:
            return False
        return self.fault is not None or time.monotonic() - self.own.ran_at > 2 * ECHO_S


def write_end(folder: Path, fault: Fault, *, since: float) -> None:
    """Say in a run's status.json and run.json that it failed, where nobody has and nobody else can.

    Args:
        since: seconds since the epoch: a status that was written before is another run's.
    """
    status_json, run_json = folder / STATUS_NAME, folder / "run.json"
    try:
        with (folder / LOCK).open("r+") as lock:
            _take_lock(lock.fileno())
            status, run = read_json_object(status_json), read_json_object(run_json)
            if status is None or status["state"] in ENDED_STATES or status["updated_at"] < since:
                return
            is_saved = status["last_checkpoint"] is not None
            message = str(fault) + (TO_CONTINUE if is_saved else "")
            error = {"type": fault.error_type, "message": message}
            status |= {"state": "failed", "phase": "failed", "eta_s": None, "error": error}
            status["updated_at"] = time.time()
            replace_file(status_json, json.dumps(status) + "\n")
            if run is not None:
                summary = {"ended_by": "error", "error_type": fault.error_type}
                run |= {"state": "failed", "exit_code": fault.exit_code, "summary": summary}
                replace_file(run_json, json.dumps(run, indent=2) + "\n")
    except OSError:
        return  # no such folder here, or another process runs in it


def _take_lock(descriptor: int) -> None:
    """Wait a little for the lock: a killed process keeps it until its last thread is gone.

    Raises:
        OSError: another process keeps it.
    """
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(TICK_S)


def main() -> None:
    """Watch as the command line says."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its rank, and not before
    lines_in, lines_out = own_lines()
    settings = Settings(**json.loads(first_line(lines_in.fileno())))

    def tell(kind: str, **values: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # the rank is gone
            lines_out.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
            lines_out.flush()

    Watcher(settings, lines_in.fileno(), tell).run()


if __name__ == "__main__":
    main()
