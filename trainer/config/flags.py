"""The fields of TrainerConfig by dotted name, and the command-line flags made from them."""

from __future__ import annotations

import argparse
import copy
import difflib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic.fields import FieldInfo

from trainer.config.schema import TrainerConfig
from trainer.errors import ConfigError


@dataclass(frozen=True)
class ConfigField:
    """One option."""

    section: str
    name: str
    info: FieldInfo

    @property
    def key(self) -> str:
        """Dotted name, `section.field`."""
        return f"{self.section}.{self.name}"

    @property
    def default(self) -> Any:
        """Value when nobody sets it."""
        return self.info.get_default(call_default_factory=True)

    @property
    def kind(self) -> Literal["bool", "list", "dict", "scalar"]:
        """How it is written on a command line."""
        found = _kinds(self.info.annotation)
        if found & {tuple, list}:
            return "list"
        if dict in found:
            return "dict"
        return "bool" if bool in found else "scalar"

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal; empty for other types."""
        return tuple(str(value) for value in _literals(self.info.annotation))

    @property
    def type_text(self) -> str:
        """The type for people, such as `float` or `cpu | cuda`."""
        return _type_text(self.info.annotation)

    @property
    def description(self) -> str:
        """The text under the field in the schema, on one line."""
        return " ".join((self.info.description or "").split())


@cache
def config_fields() -> dict[str, ConfigField]:
    """All fields by dotted name, in the order of the schema."""
    return {
        f"{section}.{name}": ConfigField(section, name, info)
        for section, part in TrainerConfig.model_fields.items()
        for name, info in part.annotation.model_fields.items()  # type: ignore[union-attr]
    }


def section_names() -> tuple[str, ...]:
    """The sections in the order of the schema."""
    return tuple(TrainerConfig.model_fields)


OTHER_NAMES = {
    "bs": "batch_size",
    "epochs": "num_epochs",
    "gradient_accumulation_steps": "gradient_accumulation",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "max_seq_length": "max_length",
    "model_name_or_path": "model_path",
    "per_device_train_batch_size": "batch_size",
}
"""Words of other programs for fields of ours, for hints only."""


def nearest_key(wrong: str) -> str | None:
    """The field that `wrong` was probably meant to be.

    A field's own name in another section wins over a similar spelling.
    """
    fields = config_fields()
    plain = wrong.replace("-", "_").lower()
    leaf = plain.rsplit(".", 1)[-1]
    leaf = OTHER_NAMES.get(leaf, leaf)
    for key, one in fields.items():
        if one.name == leaf:
            return key
    by_spelling = {key: key for key in fields} | {
        one.name.replace("_", ""): key for key, one in fields.items()
    }
    for attempt in (plain, leaf.replace("_", "")):
        near = difflib.get_close_matches(attempt, by_spelling, n=1, cutoff=0.7)
        if near:
            return by_spelling[near[0]]
    return None


def unknown_key_text(wrong: str) -> str:
    """`unknown key 'x'; did you mean 'a.b'?`"""
    sections = [] if "." in wrong else difflib.get_close_matches(wrong, section_names(), n=1)
    near = sections[0] if sections else nearest_key(wrong)
    hint = f"; did you mean {near!r}?" if near else "; `trainer config schema` lists all keys"
    return f"unknown key {wrong!r}{hint}"


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, without `Annotated`."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(part for arg in typing.get_args(annotation) for part in _parts(arg))
    return (annotation,)


def _kinds(annotation: Any) -> set[Any]:
    return {typing.get_origin(part) or part for part in _parts(annotation)}


def _literals(annotation: Any) -> list[Any]:
    return [
        value
        for part in _parts(annotation)
        if typing.get_origin(part) is Literal
        for value in typing.get_args(part)
    ]


def _type_text(annotation: Any) -> str:
    names = []
    for part in _parts(annotation):
        origin = typing.get_origin(part)
        if part is type(None):
            names.append("empty")
        elif origin is Literal:
            names.extend(str(value) for value in typing.get_args(part))
        elif origin is tuple:
            names.append(f"list of {_type_text(typing.get_args(part)[0])}")
        elif origin is dict:
            names.append("mapping")
        else:
            names.append(
                {
                    "str": "text",
                    "int": "whole number",
                    "float": "number",
                    "bool": "true or false",
                }.get(part.__name__, part.__name__)
            )
    return " or ".join(names)


# ---- command-line flags: one dotted flag per field, made from the schema, and short ones
#
# argparse only cuts the words; values stay text and are checked by pydantic with everything else.


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
    "monitoring.display": ("--display",),
}

CONSTANT_FLAGS: dict[str, tuple[str, str, str]] = {
    "--bf16": ("hyperparams.fp_precision", "bf16", "compute in bf16"),
    "--fp16": ("hyperparams.fp_precision", "fp16", "compute in fp16 (GPU only)"),
    "--fp32": ("hyperparams.fp_precision", "fp32", "compute in fp32"),
    "--quiet": ("monitoring.display", "quiet", "print errors, warnings and the end only"),
    "--json": ("monitoring.display", "json", "print one JSON object per event"),
}

RESUME_KEY = "output.resume"

CHANGES_KEY = "output.allow_changes"


@dataclass
class ParsedFlags:
    """What the command line gave."""

    values: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> text, list of texts, or mapping."""
    origins: dict[str, str] = field(default_factory=dict)
    """Dotted key -> `flag --batch-size`."""
    config_file: Path | None = None
    dry_run: bool = False
    allow_code: bool = False
    """Code that the config of a run names may run."""

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
    found.dry_run, found.allow_code = namespace.dry_run, namespace.allow_code
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
    short.add_argument(
        "--allow-code",
        action="store_true",
        help="run code that the config of a run names: score functions, a profile, files of the "
        "model (--resume, or --config in its folder)",
    )
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
    short.add_argument(
        "--allow-changes",
        "--allow_changes",
        dest=CHANGES_KEY,
        action=_Store,
        nargs=0,
        const="true",
        default=argparse.SUPPRESS,
        help="with --resume: learning rate, scheduler and warm-up may be changed from here on",
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
