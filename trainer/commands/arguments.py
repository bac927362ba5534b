"""argparse for the small commands: mistakes are one clear line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trainer.errors import ConfigError, OutputError
from trainer.files import require_folder
from trainer.monitoring.events import Waits

if TYPE_CHECKING:
    from rich.table import Table

Command = Callable[[list[str]], int]

RUN_FILES = ("run.json", "status.json")

MAX_SEED = 2**32 - 1

WIDE = 100_000
"""Columns of an output that is no terminal."""

_WHOLE = re.compile(r"[0-9]{1,18}", re.ASCII)
_NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)


def whole_number(least: int, most: int | None = None, *, note: str = "") -> Callable[[str], int]:
    """An argparse type: decimal digits only, from `least` to `most`.

    int() alone takes more than anybody means: spaces, underscores, signs and other scripts' digits.

    Args:
        note: said after the rule, such as what 0 means.
    """
    upwards = "or more" if most is None else f"to {most}"

    def read(text: str) -> int:
        value = int(text) if _WHOLE.fullmatch(text) else -1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(
                f"{_shown(text)} is not a whole number ({least} {upwards}{note})"
            )
        return value

    return read


port = whole_number(0, 65535, note="; 0 picks a free port")


def number(least: float) -> Callable[[str], float]:
    """An argparse type: a finite decimal number, not below `least`."""

    def read(text: str) -> float:
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not (math.isfinite(value) and value >= least):
            raise argparse.ArgumentTypeError(f"{_shown(text)} is not a number ({least:g} or more)")
        return value

    return read


def step_of_run(text: str) -> str:
    """An argparse type: the number of a step, without leading zeros, or `best`."""
    if text == "best":
        return text
    if not _WHOLE.fullmatch(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{_shown(text)} is neither the number of a step (1 or more) nor `best`"
        )
    return str(int(text))


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 40 else f"{text[:37]!r}..."


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse words; a mistake is a ConfigError that names the command's own --help.

    Raises:
        ConfigError: an unknown flag, a missing or a wrong value.
    """
    words, unknown = parse_known(parser, argv)
    if unknown:
        word = unknown[0].split("=")[0]
        kind = "unknown flag" if word.startswith("-") else "unexpected word"
        parser.error(f"{kind} {word}")
    return words


def parse_known(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parse the words that the parser knows, and return the others.

    Raises:
        ConfigError: a missing or a wrong value.
    """
    return _strict(parser).parse_known_args(argv)


def _strict(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{parser.prog}: {message}; see `{parser.prog} --help`.")

    parser.error = refuse  # type: ignore[method-assign]  # argparse's own prints and exits
    return parser


def run_folder(text: str) -> Path:
    """The folder of a run that began to write, as `watch` and `report` take it.

    Raises:
        OutputError: it is no such folder.
    """
    advice = "give the folder of a run (--output of `trainer train`)."
    path = require_folder(Path(text), advice)
    if not any((path / name).is_file() for name in RUN_FILES):
        raise OutputError(f"{path}: holds no run (no {' and no '.join(RUN_FILES)}); {advice}")
    return path


def choose(commands: Mapping[str, Command], argv: list[str], prog: str) -> Command:
    """The command of a command that the first word names.

    Raises:
        ConfigError: there is no such command, or no word.
    """
    if not argv:
        raise ConfigError(f"{prog}: give a command: {', '.join(commands)}; see `{prog} --help`.")
    if argv[0] not in commands:
        kind = "flag" if argv[0].startswith("-") else "command"
        raise ConfigError(
            f"{prog}: unknown {kind} {argv[0]}; commands: {', '.join(commands)}; "
            f"see `{prog} --help`."
        )
    return commands[argv[0]]


def words_while_loading(display: str = "plain") -> contextlib.AbstractContextManager[None]:
    """Say that the libraries are loading, again and again; not for programs, and once of ranks."""
    if display in ("quiet", "json") or os.environ.get("RANK", "0") != "0":
        return contextlib.nullcontext()
    return Waits.of("loading the libraries", lambda text: print(text, flush=True))


def print_table(table: Table) -> None:
    """Print a table; off a terminal each row is one line, for grep and for people's logs."""
    from rich.console import Console  # a server needs no rich

    if sys.stdout.isatty():
        Console(highlight=False).print(table)
        return
    written = io.StringIO()
    Console(file=written, width=WIDE, highlight=False, color_system=None).print(table)
    for line in written.getvalue().splitlines():
        print(line.rstrip())


def add_weights_flags(parser: argparse.ArgumentParser, *, is_run_optional: bool = False) -> None:
    """RUN, --step and --base: which weights `chat`, `export` and `serve` take."""
    parser.add_argument(
        "run",
        metavar="RUN",
        nargs="?" if is_run_optional else None,
        help="folder of the run (--output of trainer train), of a checkpoint, or of a model",
    )
    parser.add_argument(
        "--step",
        type=step_of_run,
        metavar="N|best",
        help="checkpoint of this step [the final model, else the newest checkpoint]",
    )
    parser.add_argument(
        "--base", metavar="FOLDER", help="the adapter's base model, if it was moved"
    )


def add_allow_code_flag(parser: argparse.ArgumentParser) -> None:
    """--allow-code, for the commands that may run what the record of a run names."""
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="run code that the run names: its own profile, and files of the model",
    )
