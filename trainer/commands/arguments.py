"""argparse for the small commands: mistakes are one clear line and exit code 2."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from trainer.errors import ConfigError


def at_least(kind: type[int] | type[float], least: float) -> Callable[[str], float]:
    """An argparse type: a finite number of this kind, not below `least`."""

    def read(text: str) -> float:
        try:
            value = kind(text) if text.isascii() and "_" not in text else math.nan
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= least):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {least} up")
        return value

    return read


def port(text: str) -> int:
    """An argparse type: a TCP port, 0 for a free one."""
    if not (text.isascii() and text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give 0 (a free one) to 65535")
    return int(text)


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse words; a mistake is a ConfigError that names the command's own --help.

    Raises:
        ConfigError: an unknown flag, a missing or a wrong value.
    """
    return _strict(parser).parse_args(argv)


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


def step_of_run(text: str) -> str:
    """An argparse type: the number of a step, or `best`."""
    if text != "best" and not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a step nor `best`")
    return text


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
        help="the checkpoint of this step [the final model, else the newest checkpoint]",
    )
    parser.add_argument(
        "--base", metavar="FOLDER", help="where the adapter's base model is now, if it was moved"
    )
