"""A config as text: JSON, a table with origins, a starter file, and docs/configuration.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.flags import (
    CHANGES_KEY,
    CONSTANT_FLAGS,
    RESUME_KEY,
    SHORT_FLAGS,
    ConfigField,
    config_fields,
    section_names,
)
from trainer.config.loader import LoadedConfig
from trainer.config.schema import TrainerConfig

STARTER_KEYS = (
    "model.model_path",
    "data.dataset_path",
    "data.validation_split",
    "data.on_bad_row",
    "output.output_dir",
    "output.checkpoint_interval",
    "profile.name",
    "hyperparams.training_mode",
    "hyperparams.batch_size",
    "hyperparams.gradient_accumulation",
    "hyperparams.learning_rate",
    "hyperparams.num_epochs",
    "hyperparams.max_length",
    "hyperparams.fp_precision",
    "monitoring.inference_interval",
    "monitoring.num_eval_samples",
    "monitoring.preview_max_tokens",
    "monitoring.preview_temperature",
    "environment.seed",
)

STARTER_VALUES = {"model.model_path": "qwen3", "data.dataset_path": "data.jsonl"}

DOCS_PATH = Path(__file__).parents[2] / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

This page is made from the schema by `make docs`; a test keeps it true.

A run has one config. Its values come from four places, the later ones winning:

1. the defaults below;
2. a config file: `--config FILE`, else `./config.json` if there is one (the first line of output
   says so). JSON (`//` comments are fine), YAML or TOML, with one mapping per section;
3. environment variables: `TRAINER_SECTION__FIELD`, such as `TRAINER_HYPERPARAMS__BATCH_SIZE=4`.
   Lists and mappings are JSON: `TRAINER_MONITORING__PREVIEW_PROMPTS='["Hi", "Who are you?"]'`;
4. flags: every field is one, such as `--hyperparams.batch_size 4`; dashes work too. A list flag is
   given once per element, a mapping as `NAME=VALUE`, and a true/false flag may stand alone.

`trainer config explain` takes the same flags and prints every value with its origin. Unknown keys
are errors that name the nearest known one, wherever they stand. `1e-5` is a number however it is
written.

    trainer config init                   # writes a starter config.json with comments
    trainer config validate my.yaml       # checks files, exit code 2 if one is wrong
    trainer config show --batch-size 4    # the merged config as JSON
    trainer config schema                 # JSON schema, for editors
"""


def as_json(config: TrainerConfig) -> str:
    """The whole config as JSON."""
    return json.dumps(config.model_dump(mode="json"), indent=2)


IN_SHORT_RUNS = "; a tenth of the steps in shorter runs, as `train --dry-run` writes down"

WITH_SHARDS = "; as distributed.strategy is fsdp2: sidecar where it fits, else no previews"


def explain_rows(loaded: LoadedConfig) -> Iterator[tuple[str, str, str]]:
    """(key, value as JSON, origin) of every field."""
    dumped = loaded.config.model_dump(mode="json")
    is_adapted = not loaded.config.monitoring.num_score_prompts
    for key, field in config_fields().items():
        origin = loaded.origins[key]
        if key == "monitoring.micro_eval_interval" and origin == "default":
            origin += IN_SHORT_RUNS if is_adapted else ""
        if key == "monitoring.preview_backend" and origin == "default":
            is_sharded = loaded.config.distributed.strategy == "fsdp2"
            origin += WITH_SHARDS if is_sharded else ""
        yield key, json.dumps(dumped[field.section][field.name]), origin


def starter_file() -> str:
    """A config.json with the options that people set first, each with its meaning."""
    lines = ["{", "  // Made by `trainer config init`. All options: docs/configuration.md"]
    for section in dict.fromkeys(key.split(".")[0] for key in STARTER_KEYS):
        lines.append(f'  "{section}": {{')
        for key in STARTER_KEYS:
            field = config_fields()[key]
            if field.section == section:
                value = json.dumps(STARTER_VALUES.get(key, field.default))
                lines += [f"    // {field.description}", f'    "{field.name}": {value},']
        lines[-1] = lines[-1].rstrip(",")
        lines.append("  },")
    lines[-1] = "  }"
    return "\n".join([*lines, "}"]) + "\n"


def starter_yaml() -> str:
    """The same as config.yaml."""
    lines = ["# Made by `trainer config init --yaml`. All options: docs/configuration.md"]
    for section in dict.fromkeys(key.split(".")[0] for key in STARTER_KEYS):
        lines.append(f"{section}:")
        for key in STARTER_KEYS:
            field = config_fields()[key]
            if field.section == section:
                value = json.dumps(STARTER_VALUES.get(key, field.default))  # JSON is YAML
                lines += [f"  # {field.description}", f"  {field.name}: {value}"]
    return "\n".join(lines) + "\n"


def docs_page() -> str:
    """docs/configuration.md."""
    lines = [INTRODUCTION, "## Short flags", "", "| flag | field |", "|---|---|"]
    for key, flags in SHORT_FLAGS.items():
        lines.append(f"| {', '.join(f'`{flag}`' for flag in flags)} | `{key}` |")
    lines.append(f"| `--resume [STEP_DIR]` | `{RESUME_KEY}`; alone it means `latest` |")
    lines.append(f"| `--allow-changes` | `{CHANGES_KEY}=true` |")
    lines += [f"| `{flag}` | `{key}={value}` |" for flag, (key, value, _) in CONSTANT_FLAGS.items()]
    lines.append("| `--dry-run` | check everything, print the sums, train nothing |")
    for section in section_names():
        part: Any = TrainerConfig.model_fields[section].annotation
        lines += ["", f"## `{section}`", "", " ".join((part.__doc__ or "").split()), ""]
        lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
        lines += [
            _docs_row(field) for field in config_fields().values() if field.section == section
        ]
    return "\n".join(lines) + "\n"


def _docs_row(field: ConfigField) -> str:
    default = json.dumps(field.default) if field.default is not None else "empty"
    cells = (f"`{field.name}`", field.type_text, f"`{default}`", field.description)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    DOCS_PATH.write_text(docs_page(), encoding="utf-8")
    print(f"wrote {DOCS_PATH}")
