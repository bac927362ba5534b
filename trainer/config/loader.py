"""ConfigLoader: defaults < file < environment < flags, with the origin of every value."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trainer.config.flags import (
    ParsedFlags,
    config_fields,
    parse_flags,
    section_names,
    unknown_key_text,
)
from trainer.config.schema import TrainerConfig
from trainer.config.section import CombinationError
from trainer.errors import ConfigError
from trainer.net import CUT

KEEPS_SECRETS = (
    "monitoring.notify",
    "monitoring.openai_base_url",
    "data.dataset_path",
    "data.validation_path",
)
"""Their values are not repeated in messages."""

UNTRAINED_MODEL = "tiny"

LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}

UNTRAINED_LEARNING_RATE = 5e-3
"""The built-in model starts from random weights and must move much further."""


def resolve(config: TrainerConfig) -> TrainerConfig:
    """Fill what depends on other values; doing it twice changes nothing.

    `hyperparams.learning_rate` where it is empty, `~` in `output.output_dir`, and
    `data.group_by_length`, which is off where `data.shuffle` is. `hyperparams.max_length` stays
    as it is: it depends on the model, which is not read here.
    """
    if config.data.group_by_length and not config.data.shuffle:
        data = config.data.model_copy(update={"group_by_length": False})
        config = config.model_copy(update={"data": data})
    folder = os.path.expanduser(config.output.output_dir)
    if folder != config.output.output_dir:
        output = config.output.model_copy(update={"output_dir": folder})
        config = config.model_copy(update={"output": output})
    hyper = config.hyperparams
    if hyper.learning_rate is not None:
        return config
    rate = LEARNING_RATES[hyper.training_mode]
    if config.model.model_path.lower() == UNTRAINED_MODEL and hyper.training_mode == "full":
        rate = UNTRAINED_LEARNING_RATE
    return config.model_copy(
        update={"hyperparams": hyper.model_copy(update={"learning_rate": rate})}
    )


def required_for_training(config: TrainerConfig) -> None:
    """Refuse a config without model or rows.

    Raises:
        ConfigError: model_path or dataset_path is empty; both are named if both are.
    """
    missing = []
    if not config.data.dataset_path:
        missing.append("data.dataset_path is empty; give a JSONL file with --dataset")
    if not config.model.model_path:
        missing.append(
            "model.model_path is empty; give an alias (`trainer models`), a hub id or a folder "
            "with --model"
        )
    if missing:
        raise ConfigError("; ".join(missing) + ".")


# ---- config files and environment variables, each as {dotted key: value}


ENV_PREFIX = "TRAINER_"

SUFFIXES = (".json", ".yaml", ".yml", ".toml")

DEFAULT_FILE = "config.json"


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a JSON (with comments), YAML or TOML file as {dotted key: value}.

    Raises:
        ConfigError: missing, unreadable, of another type, not a mapping of sections, or with
            unknown keys (all of them are named).
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"{path}: config files end in {', '.join(SUFFIXES)}; rename or convert it."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: there is no such config file; `trainer config init` writes a starter."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    return _flatten(_parse(path, text), str(path))


def _parse(path: Path, text: str) -> Any:
    # Each parser is imported only when its kind of file is there: start-up time.
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}.") from error
    if path.suffix == ".json":
        import json5

        try:
            return json5.loads(text, allow_duplicate_keys=False)
        except ValueError as error:
            words = str(error).removeprefix("<string>:")
            raise ConfigError(f"{path}: not valid JSON: line {words}.") from error
    import yaml

    try:
        return yaml.load(text, Loader=_unique_key_loader())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from error


def _unique_key_loader() -> Any:
    """yaml.SafeLoader that refuses a key given twice, of which it would keep the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = {key for key in keys if keys.count(key) > 1}
            if twice:
                raise yaml.YAMLError(f"key {sorted(map(str, twice))[0]!r} is given twice")
            return super().construct_mapping(node, deep)

    return Loader


def _flatten(parsed: Any, where: str) -> dict[str, Any]:
    """{section: {field: value}} -> {dotted key: value}; collects every mistake."""
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise ConfigError(
            f"{where}: the file holds a {type(parsed).__name__}; it must be a mapping of sections "
            f"({', '.join(section_names())})."
        )
    values: dict[str, Any] = {}
    mistakes = []
    for section, part in parsed.items():
        if section not in section_names():
            mistakes.append(unknown_key_text(str(section)))
        elif not isinstance(part, dict):
            mistakes.append(f"section {section!r} holds {part!r}; it must be a mapping of fields")
        else:
            for name, value in part.items():
                key = f"{section}.{name}"
                if key in config_fields():
                    values[key] = value
                else:
                    mistakes.append(unknown_key_text(key))
    if mistakes:
        raise ConfigError("\n".join(f"{where}: {mistake}." for mistake in mistakes))
    return values


def read_environment(environment: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """All TRAINER_SECTION__FIELD variables.

    Lists and mappings are JSON; a list may also be one plain text, which is its only element.

    Returns:
        {dotted key: value} and {dotted key: variable}.
    Raises:
        ConfigError: a TRAINER_ variable that names no field.
    """
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    mistakes = []
    for variable, text in sorted(environment.items()):
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        key = variable[len(ENV_PREFIX) :].lower().replace("__", ".", 1)
        if key not in config_fields():
            mistakes.append(
                f"environment variable {variable}: {unknown_key_text(key)}. The rule is "
                "TRAINER_SECTION__FIELD; unset it if it is not meant for this program."
            )
            continue
        values[key], names[key] = _env_value(key, text, variable), variable
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return values, names


def _env_value(key: str, text: str, variable: str) -> Any:
    kind = config_fields()[key].kind
    if kind in ("bool", "scalar"):
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if kind == "dict" and not isinstance(value, dict):
        raise ConfigError(f"environment variable {variable}={text!r}: must be a JSON object.")
    return value if isinstance(value, (list, dict)) else [text]


# ---- ConfigLoader: defaults < file < environment < flags, with the origin of every value


WHOLE_LIST_WORDS = {"all-linear"}
"""Texts that a list field takes instead of a list."""


NOT_FROM_RUNS = ("monitoring.notify", "monitoring.notify_silence")
"""The config of a run says nothing about these: it may be somebody else's, and has no secrets."""


RESOLVED_NAME = "config.resolved.json"
"""The config of a run as it was written down, in its folder."""


def is_of_run(file: Path) -> bool:
    """Whether a config file was written by a run, or lies in the folder of one."""
    return file.name == RESOLVED_NAME or (file.parent / "run.json").is_file()


@dataclass(frozen=True)
class LoadedConfig:
    """A config and where its values come from."""

    config: TrainerConfig
    origins: dict[str, str]
    """Dotted key -> `default`, `file config.json`, `environment TRAINER_...`, `flag --...`."""
    file: Path | None = None
    left_out: tuple[str, ...] = ()
    """Keys that the file names and that no file of a run may set (`NOT_FROM_RUNS`)."""


class ConfigLoader:
    """Merges the four sources of a config; see `load`."""

    @staticmethod
    def load(
        file: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        flags: Sequence[str] | ParsedFlags = (),
    ) -> LoadedConfig:
        """Merge defaults, file, environment and flags, from the weakest to the strongest.

        Args:
            file: JSON, YAML or TOML; None: no file.
            env: environment variables, such as os.environ; None: none.
            flags: words of a command line, or what `parse_flags` made of them.
        Raises:
            ConfigError: an unknown key, a wrong value, an unreadable file; all that can be told
                at once is told at once.
        """
        parsed = flags if isinstance(flags, ParsedFlags) else parse_flags(flags)
        path = Path(file) if file is not None else parsed.config_file
        merged: dict[str, Any] = {}
        origins: dict[str, str] = {}
        left_out: list[str] = []
        if path is not None:
            in_file = read_config_file(path)
            if is_of_run(path):
                left_out = [key for key in NOT_FROM_RUNS if in_file.pop(key, None)]
            _lay_over(merged, origins, in_file, lambda _: f"file {path}")
        values, names = read_environment(env or {})
        _lay_over(merged, origins, values, lambda key: f"environment {names[key]}")
        _lay_over(merged, origins, _single_words(parsed.values), parsed.origins.__getitem__)
        config = _validate(merged, origins)
        return LoadedConfig(
            config,
            {key: origins.get(key, "default") for key in config_fields()},
            path,
            tuple(key for key in left_out if key not in merged),
        )


def find_config_file(flags: ParsedFlags, folder: Path) -> Path | None:
    """--config, else ./config.json if it is there."""
    if flags.config_file is not None:
        return flags.config_file
    default = folder / DEFAULT_FILE
    return Path(DEFAULT_FILE) if default.is_file() else None


def create_default_config(
    *, model_path: str, dataset_path: str, output_dir: str, **sections: Any
) -> TrainerConfig:
    """A config with defaults, from Python.

    Args:
        **sections: values by section, such as `hyperparams={"max_steps": 5}`.
    Raises:
        ConfigError: an unknown key or a wrong value.
    """
    nested = {name: dict(part) for name, part in sections.items()}
    for section, name, value in (
        ("model", "model_path", model_path),
        ("data", "dataset_path", dataset_path),
        ("output", "output_dir", output_dir),
    ):
        nested.setdefault(section, {})[name] = str(value)
    try:
        return TrainerConfig.model_validate(nested)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


def _lay_over(
    merged: dict[str, Any], origins: dict[str, str], values: dict[str, Any], origin_of: Any
) -> None:
    """Put stronger values over weaker ones; mappings are merged name by name."""
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = {**merged[key], **value}
        merged[key] = value
        origins[key] = origin_of(key)


def _single_words(values: dict[str, Any]) -> dict[str, Any]:
    """`--lora.target_modules all-linear` is a word, not a list of one module."""
    return {
        key: value[0]
        if isinstance(value, list) and len(value) == 1 and value[0] in WHOLE_LIST_WORDS
        else value
        for key, value in values.items()
    }


def _validate(merged: dict[str, Any], origins: dict[str, str]) -> TrainerConfig:
    nested: dict[str, dict[str, Any]] = {}
    for key, value in merged.items():
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    try:
        return TrainerConfig.model_validate(nested)
    except ValidationError as error:
        raise ConfigError(explain(error, origins)) from error


def explain(error: ValidationError, origins: Mapping[str, str] | None = None) -> str:
    """Each mistake on a line: origin, key, what we got, the rule.

    Args:
        origins: dotted key -> where its value was set; keys that are missing are defaults.
    """
    origins = origins or {}
    lines: dict[str, str] = {}
    for mistake in error.errors(include_url=False):
        # What follows the field is its element or the member of its union.
        key = ".".join(str(part) for part in mistake["loc"][:2])
        if mistake["type"] == "value_error":
            broken: CombinationError = mistake["ctx"]["error"]
            lines[str(broken)] = f"{broken}.{_set_here(broken.keys, origins)}"
        else:
            origin = f"{origins[key]}: " if key in origins else ""
            lines.setdefault(key, f"{origin}{_broken_rule(key, mistake)}.")
    return "\n".join(lines.values())


def _broken_rule(key: str, mistake: ErrorDetails) -> str:
    """What is wrong with the value of one option."""
    got, rule = mistake["input"], mistake["msg"]
    if key in KEEPS_SECRETS:
        got = CUT
    if mistake["type"] == "extra_forbidden":
        return unknown_key_text(key)
    choices = config_fields()[key].choices if key in config_fields() else ()
    if choices and mistake["type"] == "literal_error":
        return f"{key}={got!r} is not one of {', '.join(choices)}"
    return f"{key}={got!r}: {rule[:1].lower()}{rule[1:]}"


def _set_here(keys: Sequence[str], origins: Mapping[str, str]) -> str:
    """Where options that break a rule together were set; "" where all of them are defaults."""
    named = [f"{key} from {origins[key]}" for key in keys if key in origins]
    return f" Set here: {', '.join(named)}." if named else ""
