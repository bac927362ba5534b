"""Rows encoded by several processes: the same rows, in the same order, as by one.

The processes are children of the run's own (`trainer.child`): they are handed the encoder and the
profile, then batches of rows, and end when the run does, however it does.
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO

from trainer.child import Child, own_lines
from trainer.data.pieces import Piece, piece_of
from trainer.data.preparer import Begun, Conversation, Preparer
from trainer.data.rows import Row
from trainer.errors import ConfigError, TrainerError

PIECE = 256
"""Rows that are handed over at once, at most."""

PIECE_CHARS = 200_000
"""Of them: few rows that are long are enough to keep whoever encodes them busy."""

MIN_BYTES = 20_000_000
"""Of the files; below, processes take longer to start than they save."""

MAX_PROCESSES = 16
"""Chosen by itself: one process reads the files and takes what the others made."""

END_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Batch:
    """Rows that are encoded at once."""

    rows: list[Row]
    is_training: bool
    """They are of the training files, not of the validation files."""


Encoded = tuple[Batch, Piece]


def num_encoders(configured: int | None, num_bytes: int) -> int:
    """How many processes encode the rows: as configured, or by cores and files.

    Args:
        configured: `data.encode_processes`.
        num_bytes: of the rows, about.
    """
    if configured is not None:
        return configured
    # Every process of the run on this machine prepares the rows, and they share its cores.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = min(len(os.sched_getaffinity(0)) // here, MAX_PROCESSES)
    return cores if cores > 1 and num_bytes >= MIN_BYTES else 1


def encode_batches(
    preparer: Preparer, batches: Iterable[Batch], configured: int | None, num_bytes: int
) -> Iterator[Encoded]:
    """What becomes of the rows, in order; no more batches are taken than can be worked on.

    Args:
        preparer: what decides it.
        batches: the rows.
        configured: `data.encode_processes`.
        num_bytes: of all of them, about.
    Raises:
        ConfigError: that says several processes, and the profile is one of this process only.
        TrainerError: a process ended that should not.
    """
    count = num_encoders(configured, num_bytes)
    if count < 2:
        yield from _by_this_process(preparer, batches)
        return
    try:
        job = pickle.dumps(preparer)
    except Exception as error:  # whatever a profile's own state raises
        if configured is not None:
            raise _not_handed_over(preparer, configured, str(error)) from error
        yield from _by_this_process(preparer, batches)
        return
    with Encoders(job, count) as encoders:
        if encoders.is_ready():
            for encoded, counts in encoders.encode(batches):
                preparer.add_report(counts)
                yield encoded
            return
        if configured is not None:
            raise _not_handed_over(preparer, configured, encoders.problem)
    yield from _by_this_process(preparer, batches)


def _by_this_process(preparer: Preparer, batches: Iterable[Batch]) -> Iterator[Encoded]:
    """A thread tokenizes a batch, which needs no lock of Python's, while the next is rendered."""
    waiting: tuple[Batch, Begun] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as pool:
        for batch in batches:
            begun = preparer.begin(_conversations(batch), pool)
            if waiting is not None:
                yield _finished(preparer, *waiting)
            waiting = batch, begun
        if waiting is not None:
            yield _finished(preparer, *waiting)


def _finished(preparer: Preparer, batch: Batch, begun: Begun) -> Encoded:
    return batch, piece_of(preparer.finish(begun))


def _conversations(batch: Batch) -> list[Conversation]:
    return [(row.index, row.messages) for row in batch.rows]


def _not_handed_over(preparer: Preparer, count: int | None, why: str) -> ConfigError:
    return ConfigError(
        f"data.encode_processes={count}, but the profile {preparer.profile.name!r} cannot be "
        f"handed to another process ({why}); put its class into a module that can be imported, or "
        "set encode_processes=1."
    )


class Encoders:
    """Several processes that encode pieces of rows; a context, at whose end they are gone."""

    def __init__(self, job: bytes, count: int) -> None:
        """Start them.

        Args:
            job: what each is handed first.
            count: how many.
        """
        self.problem = ""
        self.children: list[Child] = []
        self._free: SimpleQueue[Child] = SimpleQueue()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="encode")
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        try:
            for _ in range(count):
                child = Child(["trainer.data.encode_processes"], environment=environment)
                self.children.append(child)
                self._free.put(child)
                self._threads.submit(_send, child, job)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Encoders:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def is_ready(self) -> bool:
        """Whether all of them have what they need; else `problem` says what is wrong."""
        for child in self.children:
            answer = pickle.loads(_receive(child))
            self.problem = self.problem or answer
        return not self.problem

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Encoded, dict[str, int]]]:
        """For each batch what it became and what the profile counted, in order.

        Raises:
            TrainerError: one of them ended.
        """
        waiting: deque[tuple[Batch, Future[tuple[Piece, dict[str, int]]]]] = deque()
        for batch in batches:
            waiting.append((batch, self._threads.submit(self._encode, _conversations(batch))))
            if len(waiting) > 2 * len(self.children):
                yield self._next(waiting)
        while waiting:
            yield self._next(waiting)

    def _next(
        self, waiting: deque[tuple[Batch, Future[tuple[Piece, dict[str, int]]]]]
    ) -> tuple[Encoded, dict[str, int]]:
        batch, found = waiting.popleft()
        piece, counts = found.result()
        return (batch, piece), counts

    def _encode(self, rows: list[Conversation]) -> tuple[Piece, dict[str, int]]:
        child = self._free.get()
        try:
            _send(child, pickle.dumps(rows, pickle.HIGHEST_PROTOCOL))
            answer = pickle.loads(_receive(child))
        finally:
            self._free.put(child)
        if isinstance(answer, BaseException):
            raise answer
        found: tuple[Piece, dict[str, int]] = answer
        return found

    def end(self) -> None:
        """End all of them, whatever they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in self.children:
            child.process.kill()  # there is nothing that it could leave half done
        for child in self.children:
            child.end(END_TIMEOUT_S, is_asked=False)
        self._threads.shutdown()
        for child in self.children:
            child.lines.close()


def _send(child: Child, message: bytes) -> None:
    try:
        child.send(b"%d" % len(message), message)
    except BrokenPipeError as error:
        raise _gone(child) from error


def _receive(child: Child) -> bytes:
    try:
        size = int(child.receive())
        message = child.lines.read(size + 1)
    except (EOFError, ValueError) as error:
        raise _gone(child) from error
    if len(message) <= size:
        raise _gone(child)
    return message[:-1]


def _gone(child: Child) -> TrainerError:
    code = child.wait(END_TIMEOUT_S)
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended ({code})"
    return TrainerError(
        f"data.encode_processes: a process that encodes rows (pid {child.pid}) {how}, which the "
        "system does where memory is short. Nothing was kept; start again, with fewer processes "
        "(data.encode_processes=1) if it happens again."
    )


# ---- the other side


def _answer(preparer: Preparer, rows: list[Conversation]) -> bytes:
    try:
        before = preparer.profile.report()
        found = piece_of(preparer.prepare(rows))
        after = preparer.profile.report()
        counts = {what: count - before.get(what, 0) for what, count in after.items()}
        return pickle.dumps((found, counts), pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # the run's own process raises it, as if it had met it
        error.add_note(traceback.format_exc())
        try:
            answer = pickle.dumps(error)
            pickle.loads(answer)
        except Exception:
            answer = pickle.dumps(RuntimeError(traceback.format_exc()))
        return answer


def _messages(lines: IO[bytes]) -> Iterator[bytes]:
    while line := lines.readline():
        yield lines.read(int(line) + 1)[:-1]


def main() -> None:
    """Be one of the processes: take the job, then encode pieces until stdin closes."""
    lines_in, lines_out = own_lines()

    def reply(message: bytes) -> None:
        try:
            lines_out.write(b"%d\n%b\n" % (len(message), message))
            lines_out.flush()
        except BrokenPipeError:  # the run is gone, and nobody is left to be told anything
            os._exit(0)

    messages = _messages(lines_in)
    try:
        preparer = pickle.loads(next(messages))
    except Exception as error:  # a profile whose module is not found, or fails
        reply(pickle.dumps(f"{type(error).__name__}: {error}"))
        return
    reply(pickle.dumps(""))
    for message in messages:
        reply(_answer(preparer, pickle.loads(message)))


if __name__ == "__main__":
    main()
