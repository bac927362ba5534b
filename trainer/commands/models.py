"""`trainer models`: the short names of models."""

from __future__ import annotations

import argparse

from rich.table import Table

from trainer.commands.arguments import parse, print_table
from trainer.models import ALIASES


def run(argv: list[str]) -> int:
    """Print the aliases."""
    parser = argparse.ArgumentParser(
        prog="trainer models", description="List the short names that --model takes."
    )
    parse(parser, argv)
    table = Table("alias", "stands for", "size", "note", box=None, pad_edge=False)
    for name, alias in ALIASES.items():
        table.add_row(name, alias.path, alias.size, alias.note)
    print_table(table)
    print("\n--model also takes any hub id (Qwen/Qwen3-0.6B), any model folder and .gguf files.")
    return 0
