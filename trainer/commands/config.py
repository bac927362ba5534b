"""`trainer config show|explain|schema|validate|init`: everything about configs, without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from trainer.commands.arguments import choose, print_table
from trainer.config import ConfigLoader, LoadedConfig, TrainerConfig, find_config_file, resolve
from trainer.config.docs import as_json, explain_rows, starter_file, starter_yaml
from trainer.config.flags import parse_flags
from trainer.errors import EXIT_COMPLETED, ConfigError, OutputError

YAML = (".yaml", ".yml")

USAGE = """\
usage: trainer config COMMAND [OPTIONS]

  show      print the merged config as JSON; takes the flags of `trainer train`
  explain   print every value with its origin; takes the flags of `trainer train`
  schema    print the JSON schema
  validate  check config files: trainer config validate FILE ...
  init      write a starter file: trainer config init [config.json], or --yaml [config.yaml]"""


def run(argv: list[str]) -> int:
    """Run one subcommand."""
    words = argv[1:]
    asks_help = bool({"-h", "--help"} & {*argv[:1], *words[:1]})
    if asks_help and argv[0] not in ("show", "explain"):
        print(USAGE)
        return EXIT_COMPLETED
    return choose(COMMANDS, argv, "trainer config")(words)


def load_from_words(words: Sequence[str], prog: str) -> LoadedConfig:
    """The config of a command line in this folder and environment."""
    flags = parse_flags(words, prog=prog)
    return ConfigLoader.load(find_config_file(flags, Path.cwd()), os.environ, flags)


def _show(words: list[str]) -> int:
    print(as_json(resolve(load_from_words(words, "trainer config show").config)))
    return EXIT_COMPLETED


def _explain(words: list[str]) -> int:
    """Values that are not defaults stand out by a sign and by colour."""
    loaded = load_from_words(words, "trainer config explain")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "key", "value", "origin"):
        table.add_column(column, overflow="fold")
    for key, value, origin in explain_rows(loaded):
        is_set = not origin.startswith("default")
        style = "bold" if is_set else "dim"
        table.add_row("*" if is_set else "", key, Text(value, style), Text(origin, style))
    if loaded.file is not None:
        print(f"config file: {loaded.file}")
    print_table(table)
    return EXIT_COMPLETED


def _schema(words: list[str]) -> int:
    _refuse(words, "schema")
    print(json.dumps(TrainerConfig.model_json_schema(), indent=2))
    return EXIT_COMPLETED


def _validate(words: list[str]) -> int:
    """Check every file, and say what is wrong with each."""
    _refuse([word for word in words if word.startswith("-")], "validate")
    if not words:
        raise ConfigError("trainer config validate: give one or more config files.")
    mistakes = []
    for word in words:
        try:
            ConfigLoader.load(Path(word))
        except ConfigError as error:
            mistakes.append(str(error))
        else:
            print(f"{word}: ok")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return EXIT_COMPLETED


def _init(words: list[str]) -> int:
    names = [word for word in words if word != "--yaml"]
    flags = [word for word in names if word.startswith("-")]
    _refuse(flags or names[1:], "init")
    is_yaml = len(names) < len(words) or (bool(names) and Path(names[0]).suffix in YAML)
    path = Path(names[0] if names else "config.yaml" if is_yaml else "config.json")
    if path.suffix not in (YAML if is_yaml else (".json",)):
        raise ConfigError(
            f"{path}: `trainer config init` writes JSON, and YAML with --yaml; give a name ending "
            f"in {'.yaml' if is_yaml else '.json or .yaml'}."
        )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter_yaml() if is_yaml else starter_file())
    except FileExistsError as error:
        raise OutputError(
            f"{path}: exists already and is not overwritten; give another name."
        ) from error
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}).") from error
    print(f"wrote {path}; now edit it and run: trainer train --config {path}")
    return EXIT_COMPLETED


def _refuse(words: list[str], name: str) -> None:
    if words:
        kind = "unknown flag" if words[0].startswith("-") else "unexpected word"
        raise ConfigError(f"trainer config {name}: {kind} {words[0]}; see `trainer config --help`.")


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "show": _show,
    "explain": _explain,
    "schema": _schema,
    "validate": _validate,
    "init": _init,
}
