"""ConfigLoader: defaults < file < environment < flags, with the origin of every value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.config.fields import config_fields
from trainer.config.flags import ParsedFlags, parse_flags
from trainer.config.schema import TrainerConfig
from trainer.config.sources import DEFAULT_FILE, read_config_file, read_environment
from trainer.errors import ConfigError

WHOLE_LIST_WORDS = {"all-linear"}
"""Texts that a list field takes instead of a list."""


@dataclass(frozen=True)
class LoadedConfig:
    """A config and where its values come from."""

    config: TrainerConfig
    origins: dict[str, str]
    """Dotted key -> `default`, `file config.json`, `environment TRAINER_...`, `flag --...`."""
    file: Path | None = None


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
        if path is not None:
            _lay_over(merged, origins, read_config_file(path), lambda _: f"file {path}")
        values, names = read_environment(env or {})
        _lay_over(merged, origins, values, lambda key: f"environment {names[key]}")
        _lay_over(merged, origins, _single_words(parsed.values), parsed.origins.__getitem__)
        config = _validate(merged, origins)
        return LoadedConfig(
            config, {key: origins.get(key, "default") for key in config_fields()}, path
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
        raise ConfigError(_explain(error, {})) from error


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
        raise ConfigError(_explain(error, origins)) from error


def _explain(error: ValidationError, origins: dict[str, str]) -> str:
    """Each mistake on a line: origin, key, what we got, the rule."""
    lines: dict[str, str] = {}
    for mistake in error.errors(include_url=False):
        path = [str(part) for part in mistake["loc"]]
        key = ".".join(path[:2])
        rule = mistake["msg"].removeprefix("Value error, ")
        origin = f"{origins[key]}: " if key in origins else ""
        if mistake["type"] == "value_error":
            text = f"{origin}{rule}.{_sources(path, rule, origins)}"
        elif mistake["type"] == "extra_forbidden":
            from trainer.config.fields import unknown_key_text

            text = f"{origin}{unknown_key_text(key)}."
        else:
            got = mistake["input"]
            text = f"{origin}{key}={got!r}: {rule[:1].lower()}{rule[1:]}."
            choices = config_fields()[key].choices if key in config_fields() else ()
            if choices and mistake["type"] == "literal_error":
                text = f"{origin}{key}={got!r} is not one of {', '.join(choices)}."
        lines.setdefault(f"{key}{mistake['type'] == 'value_error' and rule}", text)
    return "\n".join(lines.values())


def _sources(path: list[str], rule: str, origins: dict[str, str]) -> str:
    """Where the fields that a rule names were set; "" where all of them are defaults."""
    named = [
        f"{key} from {origin}"
        for key, origin in origins.items()
        if key.split(".")[1] in rule and (not path or key.split(".")[0] == path[0])
    ]
    return f" Set here: {', '.join(named)}." if named else ""
