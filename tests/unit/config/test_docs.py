"""The starter file loads, and docs/configuration.md is what the schema says."""

from __future__ import annotations

from pathlib import Path

from trainer.config import ConfigLoader, TrainerConfig
from trainer.config.docs import DOCS_PATH, docs_page, explain_rows, starter_file
from trainer.config.flags import config_fields


def test_the_configuration_page_is_made_from_the_schema() -> None:
    assert DOCS_PATH.read_text(encoding="utf-8") == docs_page(), "run `make docs`"


def test_every_field_has_a_text_and_stands_on_the_page() -> None:
    page = docs_page()
    for key, field in config_fields().items():
        assert field.description, key
        assert f"| `{field.name}` |" in page


def test_the_starter_file_loads_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(starter_file())
    assert ConfigLoader.load(path).config.model.model_path == "qwen3"


def test_a_dumped_config_validates_to_the_same_config() -> None:
    config = TrainerConfig()
    assert TrainerConfig.model_validate(config.model_dump(mode="json")) == config


def test_monitoring_has_the_fixed_defaults() -> None:
    found = TrainerConfig().monitoring.model_dump()
    fixed = {
        "status_update_interval": 2,
        "prompt_snapshot_interval": 20,
        "micro_eval_interval": 200,
        "inference_interval": 50,
        "num_eval_samples": 4,
        "max_output_tokens": 2048,
        "max_eval_tokens": 2048,
        "preview_backend": "local",
        "preview_max_tokens": 256,
        "preview_temperature": 0.7,
        "remote_3090_host": None,
        "remote_3090_port": 8765,
        "remote_3090_timeout": 30,
        "remote_3090_model_id": None,
    }
    assert {name: found[name] for name in fixed} == fixed


def test_the_default_backend_of_a_sharded_run_is_explained() -> None:
    def origin(*words: str) -> str:
        found = {key: where for key, _, where in explain_rows(ConfigLoader.load(flags=words))}
        return found["monitoring.preview_backend"]

    sharded = ("--distributed.strategy", "fsdp2")
    assert origin() == "default"
    assert "sidecar where it fits" in origin(*sharded)
    assert origin(*sharded, "--preview-backend", "sidecar") == "flag --preview-backend"
