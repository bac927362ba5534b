"""`trainer data inspect|cache`: what would be trained, without training; the cache of rows."""

from __future__ import annotations

import argparse
import datetime as dt
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.commands.arguments import choose, parse, parse_known, whole_number, words_while_loading
from trainer.commands.train import load_config
from trainer.config import ConfigLoader, TrainerConfig, find_config_file
from trainer.config.flags import parse_flags
from trainer.core.early_checks import check_early
from trainer.counts import counted
from trainer.errors import EXIT_COMPLETED

if TYPE_CHECKING:
    from trainer.data.batches import EncodedDataset
    from trainer.data.dataset import RunData

USAGE = """\
usage: trainer data COMMAND [OPTIONS]

  inspect   print the data card and rows with their trained tokens marked, and train nothing:
            trainer data inspect data.jsonl --model qwen3 [--rows 3] [flags of `trainer train`]
  cache     show or clear the cache of encoded rows: trainer data cache show|clear"""

DEFAULT_ROWS = 3

MAX_TEXT_CHARS = 100_000
"""Of one stretch of a row; its middle is left out above that, as " ... "."""


def run(argv: list[str]) -> int:
    """Run one subcommand."""
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return EXIT_COMPLETED
    return choose(COMMANDS, argv, "trainer data")(argv[1:])


# ---- inspect


def _inspect(words: list[str]) -> int:
    """The card, then rows of the training part and of the held-out part."""
    parser = argparse.ArgumentParser(
        prog="trainer data inspect",
        usage="trainer data inspect FILE --model NAME [--rows N] [OPTIONS]",
        description="Print the data card and rows with their trained tokens in [ ] and in colour; "
        "nothing is trained. Every flag of `trainer train` is taken.",
        allow_abbrev=False,
    )
    parser.add_argument("--rows", type=whole_number(0), default=DEFAULT_ROWS, metavar="N")
    known, rest = parse_known(parser, words)
    if rest and not rest[0].startswith("-"):
        rest = ["--dataset", *rest]
    flags = parse_flags(rest, prog="trainer data inspect")
    config = load_config(flags).config
    check_early(config)
    console = Console(highlight=False)
    _print_data(console, _prepare(config), known.rows)
    return EXIT_COMPLETED


def _prepare(config: TrainerConfig) -> RunData:
    """The rows as a run with this config would have them; no run folder is made."""
    # torch takes seconds to load; mistakes on the command line are told before.
    with words_while_loading():
        from trainer.core.engine import TrainerEngine

    return TrainerEngine().inspect_data(config)


def _print_data(console: Console, data: RunData, count: int) -> None:
    from trainer.data.card_text import card_lines

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in card_lines(data.card):
        table.add_row(label, Text(text))
    console.print(table)
    for error in data.card.rejected_examples:
        console.print(Text(f"rejected  {_plain(error)}", "yellow"), soft_wrap=True)
    tokenizer = data.encoder.tokenizer
    parts = [("training", data.train), ("validation", data.validation)]
    for name, dataset in parts:
        if dataset is not None:
            for index in range(min(count, len(dataset))):
                _print_row(console, dataset, index, name, tokenizer)
    if count:
        console.print("\n[ ] = trained; nothing was trained now", markup=False)


def _print_row(
    console: Console, dataset: EncodedDataset, index: int, name: str, tokenizer: Any
) -> None:
    from trainer.data.batches import marked_text

    row = dataset[index]
    labels = row["labels"].tolist()
    stretches = marked_text(tokenizer, row["input_ids"].tolist(), labels)
    trained = sum(label >= 0 for label in labels)
    console.print(
        f"\n{name} row {index + 1}: {counted(len(labels), 'token')}, {trained:,} trained",
        style="bold",
    )
    line = Text()
    for text, is_trained in stretches:
        line.append(f"[{_plain(text)}]" if is_trained else _plain(text), _style(is_trained))
    console.print(line, soft_wrap=True)


def _style(is_trained: bool) -> str:
    return "green" if is_trained else "dim"


def _plain(text: str) -> str:
    """Data must not drive the terminal: control characters, line ends too, become visible."""
    from trainer.monitoring.events import printable

    return printable(text, MAX_TEXT_CHARS)


# ---- cache


def _cache(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="trainer data cache", description=_cache.__doc__)
    parser.add_argument("action", choices=("show", "clear"))
    parser.add_argument("--dir", help="folder of the cache [that of the config]")
    asked = parse(parser, words)
    folder = Path(asked.dir).expanduser() if asked.dir else _configured_folder()
    from trainer.data.cache import about_entry, entries

    found = entries(folder)
    size = sum(path.stat().st_size for path in found)
    if asked.action == "show":
        for path in found:
            stat = path.stat()
            when = dt.datetime.fromtimestamp(stat.st_mtime).isoformat(" ", "minutes")
            print(f"{when}  {stat.st_size / 2**20:8.1f} MiB  {path.name}")
            about = ", ".join(f"{what} {value}" for what, value in about_entry(path).items())
            if about:
                print(f"    {_plain(about)}")
        print(f"{counted(len(found), 'entry', 'entries')}, {size / 2**20:.1f} MiB in {folder}")
        return EXIT_COMPLETED
    for path in found:
        path.unlink(missing_ok=True)
    print(
        f"removed {counted(len(found), 'entry', 'entries')}, {size / 2**20:.1f} MiB, from {folder}"
    )
    return EXIT_COMPLETED


def _configured_folder() -> Path:
    """`data.cache_dir` of this folder's config and of the environment, else the default."""
    from trainer.data.cache import cache_folder

    flags = parse_flags([], prog="trainer data cache")
    loaded = ConfigLoader.load(find_config_file(flags, Path.cwd()), os.environ, flags)
    return cache_folder(loaded.config.data.cache_dir)


COMMANDS: dict[str, Callable[[list[str]], int]] = {"inspect": _inspect, "cache": _cache}
