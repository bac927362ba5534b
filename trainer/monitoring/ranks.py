"""A rank's side of the watch over all ranks: its watcher process, what it says and what it hears.

The watchers talk to each other over connections of their own (`trainer.monitoring.beats`). Only
where rank 0's watcher listens goes through the store by which the processes found each other.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from traceback import format_exception
from typing import Any

import torch
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from trainer.child import Child
from trainer.errors import EXIT_FAILED, EXIT_USER_INPUT, StoppedError, TrainerError
from trainer.monitoring.beats import ECHO_S, Fault, Settings

logger = logging.getLogger(__name__)

KEY = "watcher"

SAID = "said"
"""What rank 0 tells the user of the end of the run."""

STORE_TIMEOUT_S = 300

POLL_S = 0.1

AGENT_S = 1.0
"""A rank that died is heard of in less, and its launcher looks ten times a second."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")

REACH_S = 5.0

TOLD_S = 10.0
"""Longest wait until the others know what this rank ended by."""

MAIN_S = 10.0
"""How long rank 0 may take to say what it ends by; after 20 seconds this rank would be killed. It
says so in the store, which outlives it under torchrun only."""

MAX_STARTS = 5
"""Of one rank's watcher: whatever ends it goes on doing so."""

MAX_WORDS, MAX_TRACEBACK = 2000, 20_000
"""Characters of an error that the others are told."""

ECHOES = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Words of exchanges that broke because the process at the other end is gone."""


def is_echo(error: BaseException) -> bool:
    """Whether an exchange between processes broke, which is hardly ever this rank's own fault."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ECHOES)


class RankWatch:
    """The watcher of this rank, started again where it dies."""

    def __init__(
        self, *, timeout_s: float, start_s: float, folder: Path, on_fault: Callable[[Fault], None]
    ) -> None:
        """Start it; the others are found in a thread.

        Args:
            timeout_s: without a beat for so long a rank counts as hanging.
            start_s: how long a rank may take to come here.
            folder: of the run, which this machine may see or not.
            on_fault: called once, in a thread, with what ends the run.
        """
        self.rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._place = _place_of_main() if self.rank == 0 else ("", "")
        self._settings = Settings(
            rank=self.rank,
            world_size=world,
            pid=os.getpid(),
            timeout_s=timeout_s,
            folder=str(folder.absolute()),
            start_s=start_s,
            token=secrets.token_hex(16) if self.rank == 0 else "",
            host=self._place[0],
        )
        self._on_fault = on_fault
        self.fault: Fault | None = None
        """What ended the run; None while it goes on."""
        self.is_told_by_main = False
        """Rank 0 tells the user of the mistake that ended this rank."""
        self._shared: Any = None
        """The store, once it is reached."""
        self._heard, self._lock = threading.Event(), threading.Lock()
        self._is_closed = False
        self._said: list[bytes] = []
        self._child: Child | None = None
        threading.Thread(target=self._run, name="ranks", daemon=True).start()

    def answer(self, error: BaseException, signal: str | None) -> Fault | None:
        """Tell the others of an error that ends this rank, and find out what led to it.

        Args:
            signal: name of the one that the error stands for.
        Returns:
            The fault that led to it, of another rank as a rule; None: it is this rank's own.
        """
        exit_code = getattr(error, "exit_code", EXIT_FAILED)
        own = fault_of(error, self.rank, int(exit_code), signal)
        fault = self._fault_behind(error, own)
        if self.rank == 0:
            self._say(str(fault) if fault is not None else own.what)
        elif own.exit_code == EXIT_USER_INPUT and fault is None:
            said = self._hear_main()
            self.is_told_by_main = said in (own.what, str(own))
        return fault

    def _fault_behind(self, error: BaseException, own: Fault) -> Fault | None:
        is_stop, is_echoed = isinstance(error, StoppedError), is_echo(error)
        if is_stop or is_echoed:
            # A launcher stops the others by signals, too, once one has died: who asked was it?
            fault = self.known(AGENT_S if is_stop else 0.0)
            if fault is not None:
                return fault
        self._send("failed", fault=asdict(own))
        if is_echoed:
            told = self.known(self._settings.timeout_s + ECHO_S + AGENT_S)
            return told if told != own else None
        deadline = time.monotonic() + TOLD_S
        # A main rank that has ended in the same way is told nothing, and tells nothing.
        while not (self._heard.wait(POLL_S) or self._said_by_main()):
            if time.monotonic() > deadline:
                break
        return None

    def known(self, wait_s: float) -> Fault | None:
        """The fault that ended the run, if one is heard of in time."""
        self._heard.wait(wait_s)
        return self.fault

    # ---- what the user is told once

    def _say(self, words: str) -> None:
        if self._shared is not None:
            with contextlib.suppress(RuntimeError):  # of a store whose process is gone
                self._shared.set(SAID, words)

    def _said_by_main(self) -> str | None:
        """None: nothing yet; empty: rank 0 is gone, and the store with it."""
        if self.rank == 0 or self._shared is None:
            return None
        try:
            return str(self._shared.get(SAID).decode()) if self._shared.check([SAID]) else None
        except RuntimeError:
            return ""

    def _hear_main(self) -> str | None:
        """What rank 0 says, which has as good a reason to end as this rank."""
        deadline = time.monotonic() + MAIN_S
        while (said := self._said_by_main()) is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return said

    def close(self) -> None:
        """The rank has ended in order, whatever it ended by; its watcher ends too."""
        self._send("ended")
        with self._lock:
            self._is_closed = True
        if self._child is not None and self._child.wait(TOLD_S) is None:
            self._child.end(0.0)

    # ---- in the thread

    def _run(self) -> None:
        try:
            for _ in range(MAX_STARTS):
                child = self._start()
                if child is None:
                    return
                self._serve(child)
        except Exception as error:
            logger.error("rank %d is not watched (%s: %s)", self.rank, type(error).__name__, error)

    def _start(self) -> Child | None:
        with self._lock:
            if self._is_closed:
                return None
            self._child = Child(["trainer.monitoring.beats"])
            with contextlib.suppress(BrokenPipeError):
                self._child.send(json.dumps(asdict(self._settings)).encode(), *self._said)
            return self._child

    def _serve(self, child: Child) -> None:
        """Find the others, then hear, until the watcher has ended."""
        with contextlib.suppress(EOFError):
            if self.rank == 0 and not self._settings.port:
                port = int(json.loads(child.receive())["port"])
                self._settings = replace(self._settings, port=port)
                place = {"host": self._place[1], "port": port, "token": self._settings.token}
                self._store().set(KEY, json.dumps(place))
            elif self.rank != 0 and not any(b'"join"' in line for line in self._said):
                place = self._find_main()
                self._send("join", **place)
            while True:
                line = json.loads(child.receive())
                if line["kind"] == "fault" and self.fault is None:
                    self.fault = Fault(**line["fault"])
                    self._heard.set()
                    self._on_fault(self.fault)

    def _find_main(self) -> dict[str, Any]:
        store = self._store()
        while not store.check([KEY]):
            time.sleep(POLL_S)
        place: dict[str, Any] = json.loads(store.get(KEY))
        return place

    def _store(self) -> Any:
        # The same store as the process group's, whoever serves it, also before there is a group.
        timeout = timedelta(seconds=STORE_TIMEOUT_S)
        self._kept, _, _ = next(rendezvous("env://", timeout=timeout))
        self._shared = PrefixStore("trainer", self._kept)
        return self._shared

    def _send(self, kind: str, **values: Any) -> None:
        line = json.dumps({"kind": kind, **values}).encode()
        with self._lock:
            self._said.append(line)
            if self._child is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._child.send(line)


def _place_of_main() -> tuple[str, str]:
    """Where rank 0's watcher listens ("": on all interfaces), and by what the others reach it."""
    master = os.environ["MASTER_ADDR"]
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"] or master in LOOPBACK:
        return LOOPBACK[0], LOOPBACK[0]
    try:  # the address of this machine on its way there; that machine may be another one
        address = (master, int(os.environ["MASTER_PORT"]))
        with socket.create_connection(address, timeout=REACH_S) as connection:
            own = str(connection.getsockname()[0])
    except OSError:  # nobody listens yet: then rank 0 is to, at that address
        with contextlib.suppress(OSError):
            own = socket.gethostbyname(master)
    with contextlib.suppress(ValueError, UnboundLocalError):
        if not ipaddress.ip_address(own.partition("%")[0]).is_loopback:
            return own, own
    return "", master  # its own name for itself is loopback, and the others know it by that name


def fault_of(error: BaseException, rank: int, exit_code: int, signal: str | None) -> Fault:
    """What the others are told of an error that ends this rank."""
    name, words = type(error).__name__, " ".join(str(error).split())[:MAX_WORDS]
    is_told = isinstance(error, TrainerError | StoppedError)  # needs no traceback
    return Fault(
        rank,
        f"was stopped by {signal}" if signal else f"raised {name}: {words}",
        error_type=name,
        traceback=None if is_told else "".join(format_exception(error))[-MAX_TRACEBACK:],
        exit_code=exit_code,
        signal=signal,
        is_echo=is_echo(error),
    )
