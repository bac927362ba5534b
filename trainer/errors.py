"""The TrainerError family. A message says where, what we got, the rule, and what to do.

    TrainerError                 exit code 1: the run failed
    |-- UserInputError           exit code 2: the user's input is wrong; no traceback
    |   |-- ConfigError          a key, a value, a flag, an environment variable
    |   |-- DataError            a file, a row
    |   |-- ProfileError         an unknown or broken profile
    |   |-- ModelError           a model or tokenizer that is missing or does not fit
    |   |   `-- TemplateError    a chat template whose trained tokens cannot be proved
    |   |-- OutputError          a folder that cannot be written or holds another run
    |   `-- ResumeError          nothing to resume, or state that does not fit the run
    |-- CheckpointError          a checkpoint that is damaged or could not be written
    |-- NonFiniteError           a loss or gradient that is NaN or infinite
    |-- RankError            another process of the run died, hung or failed
    |-- MemoryFullError          a step that did not fit into the memory of the device
    `-- PreviewError             a preview that could not be made (never stops training)

Nothing else lives here: this module imports nothing, so that every layer may import it.
"""

from __future__ import annotations

EXIT_COMPLETED = 0

EXIT_FAILED = 1

EXIT_USER_INPUT = 2

EXIT_SIGHUP = 129

EXIT_SIGINT = 130

EXIT_SIGTERM = 143


class TrainerError(Exception):
    """A failure this program explains itself; `exit_code` is what the process ends with."""

    exit_code = EXIT_FAILED


class StoppedError(BaseException):
    """A signal asked this process to stop; not an Exception, so that no library swallows it."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        """Keep what the process ends with: 129, 130 or 143."""
        super().__init__(message)
        self.exit_code = exit_code


class UserInputError(TrainerError):
    """The user's input is wrong: one clear message, exit code 2, no traceback."""

    exit_code = EXIT_USER_INPUT


class ConfigError(UserInputError):
    """A key, a value, a flag or an environment variable is wrong."""


class DataError(UserInputError):
    """A data file or one of its rows is wrong."""


class ProfileError(UserInputError):
    """A data profile is unknown or broken."""


class ModelError(UserInputError):
    """A model or tokenizer is missing or does not fit the config."""


class TemplateError(ModelError):
    """The trained tokens of a chat template cannot be proved."""


class OutputError(UserInputError):
    """An output folder cannot be written, or it holds another run."""


class ResumeError(UserInputError):
    """There is nothing to resume, or the saved state does not fit this run."""


class CheckpointError(TrainerError):
    """A checkpoint is damaged, incomplete, or could not be written."""


class NonFiniteError(TrainerError):
    """A loss or gradient is NaN or infinite; the weights were not moved."""


class RankError(TrainerError):
    """Another process of the run died, does not answer, or failed."""

    def __init__(
        self, message: str, exit_code: int = EXIT_FAILED, traceback: str | None = None
    ) -> None:
        """Keep what all processes of the run end with, and where the other one failed."""
        super().__init__(message)
        self.exit_code, self.traceback = exit_code, traceback


class MemoryFullError(TrainerError):
    """A step did not fit into the memory of the device; the weights were not moved."""


class PreviewError(TrainerError):
    """A preview could not be made; training goes on without it."""
