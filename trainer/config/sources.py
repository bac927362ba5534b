"""Config files and environment variables, each as {dotted key: value}."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.fields import config_fields, section_names, unknown_key_text
from trainer.errors import ConfigError

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
