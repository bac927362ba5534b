"""What of an address may be written down."""

from __future__ import annotations

import json

import pytest

from trainer.config import create_default_config
from trainer.errors import ConfigError
from trainer.net import is_cut, without_secrets


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://h:8000/v1", "http://h:8000/v1"),
        ("https://user:pass@h/v1", "https://***@h/v1"),
        ("https://sk-123@h/v1", "https://***@h/v1"),
        ("https://a@b:c@h/v1", "https://***@h/v1"),
        ("https://h/v1?key=abc&v=2", "https://h/v1?key=***&v=2"),
        ("https://h/v1?access_token=abc", "https://h/v1?access_token=***"),
        ("https://h/v1?api-version=2024-01-01", "https://h/v1?api-version=2024-01-01"),
        ("https://h/v1?code=a%20b&q=a%20b", "https://h/v1?code=***&q=a%20b"),
        ("http://user:pass@[::1/v1?key=x", "http://***@[::1/v1"),
    ],
)
def test_passwords_and_keys_are_cut_out(address: str, shown: str) -> None:
    assert without_secrets(address) == shown
    assert is_cut(shown) == ("***" in shown)
    assert without_secrets(shown) == shown


def test_a_dumped_config_has_no_secret_and_is_not_taken_for_the_whole_address() -> None:
    def config(url: str) -> object:
        monitoring = {"preview_backend": "openai", "openai_base_url": url}
        return create_default_config(
            model_path="m", dataset_path="d", output_dir="o", monitoring=monitoring
        )

    made = config("https://me:s3cr3t@h/v1")
    for mode in ("json", "python"):
        assert "s3cr3t" not in json.dumps(made.model_dump(mode=mode), default=str)  # type: ignore[attr-defined]
    assert made.monitoring.openai_base_url == "https://me:s3cr3t@h/v1"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="written down without its password"):
        config("https://***@h/v1")
