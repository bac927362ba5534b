"""Command-line flags: one dotted flag per field, made from the schema, and short ones.

argparse only cuts the words; values stay text and are checked by pydantic with everything else.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from trainer.config.fields import ConfigField, config_fields, nearest_key, section_names
from trainer.errors import ConfigError

SHORT_FLAGS: dict[str, tuple[str, ...]] = {
    "data.dataset_path": ("--dataset",),
    "model.model_path": ("--model",),
    "output.output_dir": ("--output", "--output-dir", "--output_dir"),
    "profile.name": ("--profile",),
    "hyperparams.batch_size": ("--batch-size", "--batch_size"),
    "hyperparams.gradient_accumulation": ("--gradient-accumulation", "--gradient_accumulation"),
    "hyperparams.learning_rate": ("--learning-rate", "--learning_rate"),
    "hyperparams.num_epochs": ("--epochs", "--num-epochs", "--num_epochs"),
    "hyperparams.max_steps": ("--max-steps", "--max_steps"),
    "hyperparams.max_length": ("--max-length", "--max_length"),
    "monitoring.preview_backend": ("--preview-backend", "--preview_backend"),
    "profile.system_prompt": ("--system-prompt", "--system_prompt"),
}
CONSTANT_FLAGS: dict[str, tuple[str, str, str]] = {
    "--bf16": ("hyperparams.fp_precision", "bf16", "compute in bf16"),
    "--fp16": ("hyperparams.fp_precision", "fp16", "compute in fp16 (GPU only)"),
    "--fp32": ("hyperparams.fp_precision", "fp32", "compute in fp32"),
    "--quiet": ("monitoring.display", "quiet", "print errors, warnings and the end only"),
    "--json": ("monitoring.display", "json", "print one JSON object per event"),
}
RESUME_KEY = "output.resume"


@dataclass
class ParsedFlags:
    """What the command line gave."""

    values: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> text, list of texts, or mapping."""
    origins: dict[str, str] = field(default_factory=dict)
    """Dotted key -> `flag --batch-size`."""
    config_file: Path | None = None
    dry_run: bool = False

    def set(self, key: str, value: Any, flag: str) -> None:
        """Take one flag; lists grow, mappings are merged, all else may be given once.

        Raises:
            ConfigError: two flags give one field different values.
        """
        if key in self.values and isinstance(value, list):
            self.values[key] = [*self.values[key], *value]
        elif key in self.values and isinstance(value, dict):
            self.values[key] = {**self.values[key], **value}
        elif self.values.get(key, value) != value:
            raise ConfigError(
                f"{self.origins[key]} gives {key}={self.values[key]!r}, flag {flag} gives "
                f"{value!r}; give one of them."
            )
        else:
            self.values[key] = value
        self.origins[key] = f"flag {flag}"


class _Store(argparse.Action):
    """Puts a flag into ParsedFlags under its dotted key, as it was typed."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        found: ParsedFlags = namespace.found
        key, flag = self.dest, option_string or self.option_strings[0]
        kind = config_fields()[key].kind
        if self.const is not None and (values is None or values == []):
            values = self.const
        if kind == "list":
            values = [values]
        elif kind == "dict":
            values = _pair(flag, values)
        found.set(key, values, flag)


def _pair(flag: str, text: str) -> dict[str, Any]:
    """`name=value` as a mapping; the value is JSON where it can be, else text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"flag {flag}: got {text!r}; give NAME=VALUE, once per option.")
    try:
        return {name: json.loads(value)}
    except json.JSONDecodeError:
        return {name: value}


def parse_flags(words: Sequence[str], *, prog: str = "trainer train") -> ParsedFlags:
    """Cut a command line into config values.

    Args:
        words: without program and command.
        prog: named in messages and in --help.
    Raises:
        ConfigError: an unknown flag, a missing value, or two values for one field.
        SystemExit: after --help.
    """
    namespace = argparse.Namespace(found=ParsedFlags())
    build_parser(prog).parse_args(list(words), namespace)
    found: ParsedFlags = namespace.found
    found.dry_run = namespace.dry_run
    found.config_file = Path(namespace.config) if namespace.config else None
    return found


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The parser with every flag; also makes --help."""
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        usage=f"{prog} --dataset FILE --model NAME --output FOLDER [OPTIONS]",
        formatter_class=_Formatter,
        description="Every option is a field of the config: defaults < config file < environment "
        "(TRAINER_SECTION__FIELD) < flags.\n`trainer config explain` shows where a value "
        "comes from.\nIn a flag, `_` and `-` may be typed for each other.",
    )
    fields = config_fields()
    short = parser.add_argument_group("what people type")
    short.add_argument(
        "--config", metavar="FILE", help="JSON, YAML or TOML [./config.json if there]"
    )
    short.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    for key, names in SHORT_FLAGS.items():
        _add(short, fields[key], names)
    short.add_argument(
        "--resume",
        dest=RESUME_KEY,
        action=_Store,
        nargs="?",
        const="latest",
        metavar="STEP_DIR",
        default=argparse.SUPPRESS,
        help="continue the run in --output from its newest, or a named, checkpoint",
    )
    for name, (key, value, text) in CONSTANT_FLAGS.items():
        short.add_argument(
            name,
            dest=key,
            action=_Store,
            nargs=0,
            const=value,
            help=text,
            default=argparse.SUPPRESS,
        )
    for section in section_names():
        group = parser.add_argument_group(f"section {section}")
        for option in fields.values():
            if option.section == section:
                _add(group, option, _dotted(option.key))
    return parser


def _dotted(key: str) -> tuple[str, ...]:
    dashed = key.replace("_", "-")
    return (f"--{key}",) if dashed == key else (f"--{key}", f"--{dashed}")


def _add(group: Any, option: ConfigField, names: tuple[str, ...]) -> None:
    """One flag; a boolean may stand alone, which means true."""
    text = option.description.replace("%", "%%")
    default = "" if option.default in (None, "", (), {}) else f" [{_shown(option.default)}]"
    options: dict[str, Any] = {"metavar": "|".join(option.choices) or option.name.upper()}
    if option.kind == "bool":
        options = {"nargs": "?", "const": "true", "metavar": "true|false"}
    elif option.kind == "dict":
        options["metavar"] = "NAME=VALUE"
    group.add_argument(
        *names,
        dest=option.key,
        action=_Store,
        default=argparse.SUPPRESS,
        help=text + default,
        **options,
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows the first spelling of a flag; `_` and `-` may be typed for each other."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings: dict[str, str] = {}
        for name in action.option_strings:
            spellings.setdefault(name.replace("_", "-"), name)
        shown = copy.copy(action)
        shown.option_strings = list(spellings.values())
        return super()._format_action_invocation(shown)


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ConfigErrors with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see `{self.prog} --help`.")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].split("=")[0]
            if not word.startswith("-"):
                self.error(f"unexpected word {word!r}; every value needs a flag before it")
            near = nearest_key(word.lstrip("-"))
            hint = f"; did you mean --{near}?" if near else ""
            self.error(f"unknown flag {word}{hint}")
        return parsed
