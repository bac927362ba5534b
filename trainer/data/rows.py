"""A row of a file as messages, and the rows that could not be used, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.errors import DataError
from trainer.profiles import Message

MAX_ERRORS_SHOWN = 20


@dataclass
class RowNotes:
    """What is to be said about a row that is used; the data card sums it up."""

    unused: dict[str, int] = field(default_factory=dict)
    """Key that nothing was done with -> how often it stands in the row."""
    num_as_text: int = 0
    """Numbers and booleans that were taken as their JSON text."""

    def note_unused(self, key: str) -> None:
        """Count one key that nothing is done with."""
        self.unused[key] = self.unused.get(key, 0) + 1


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    where: str
    """`file:line` for text files, `file[index]` for arrays and tables."""
    index: int
    """Position among all rows of the run's files from 0, bad rows counted."""
    messages: list[Message]
    source: int = 0
    """Which of the run's files it is from."""
    notes: RowNotes = field(default_factory=RowNotes)
    is_rendered: bool = False
    """It was text with the chat template's markers, and was read back into these turns."""


@dataclass
class RowErrors:
    """Rows that could not be used, and why."""

    policy: str
    """`strict` or `skip` (data.on_bad_row)."""
    max_bad_rows: int | None = None
    """More bad rows than this stop the run under `skip` too."""
    errors: list[str] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, where: str, message: str, reason: str) -> None:
        """Note one bad row."""
        self.errors.append(f"{where}: {message}")
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def raise_if_strict(self) -> None:
        """Stop with the first 20 errors when the policy says so.

        Raises:
            DataError: there is a bad row and the policy is strict, or there are more than
                `max_bad_rows`.
        """
        if self.policy == "strict":
            if self.errors:
                raise DataError(
                    f"{len(self.errors)} bad rows:{self._shown()}\n"
                    "Mend them, or set data.on_bad_row=skip to leave them out and count them."
                )
        elif self.max_bad_rows is not None and len(self.errors) > self.max_bad_rows:
            raise DataError(
                f"{len(self.errors)} bad rows, data.max_bad_rows={self.max_bad_rows}:"
                f"{self._shown()}\nMend them, or raise data.max_bad_rows."
            )

    def _shown(self) -> str:
        shown = "".join(f"\n  {error}" for error in self.errors[:MAX_ERRORS_SHOWN])
        more = len(self.errors) - MAX_ERRORS_SHOWN
        return shown + (f"\n  ... and {more} more" if more > 0 else "")


class BadRowError(ValueError):
    """One row is wrong; `reason` is the short name under which it is counted."""

    def __init__(self, message: str, reason: str) -> None:
        """Keep the message for the user and the reason for the count."""
        super().__init__(message)
        self.reason = reason
