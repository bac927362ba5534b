"""Who is told: what `monitoring.notify` may hold, and that no secret of it is written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.commands.train import load_config
from trainer.config import ConfigLoader
from trainer.config.flags import parse_flags
from trainer.config.receiver import shown_notify
from trainer.core.run_folder import resolved_config
from trainer.errors import ConfigError

HOOK = "https://hooks.example.com/services/T0/SECRET"


@pytest.mark.parametrize(
    ("notify", "shown"),
    [
        ((), []),
        ((HOOK,), ["https://hooks.example.com/***"]),
        (("https://user:pw@hooks.example.com:8443",), ["https://hooks.example.com:8443/***"]),
        (("https://example.com?token=SECRET",), ["https://example.com/***"]),
        (("http://127.0.0.1:9000",), ["http://127.0.0.1:9000"]),
        (("curl", "-H", "Authorization: SECRET", HOOK), ["curl", "***", "***", "***"]),
        (("/home/me/tell.sh",), ["/home/me/tell.sh"]),
    ],
)
def test_nothing_that_may_be_a_secret_is_written_down(
    notify: tuple[str, ...], shown: list[str]
) -> None:
    assert shown_notify(notify) == shown
    words = [f"--monitoring.notify={text}" for text in notify]
    config = load_config(parse_flags(words)).config
    assert config.monitoring.notify == notify
    assert resolved_config(config)["monitoring"]["notify"] == shown


@pytest.mark.parametrize(
    ("notify", "words"),
    [
        ([""], "names no program"),
        (["ftp://example.com/SECRET"], "neither http"),
        (["https://"], "without a host"),
        (["https://example.com:port/SECRET"], "without a host"),
        ([HOOK, HOOK], "one address alone"),
        (["curl", "***"], "written down without its secrets"),
        ({"url": HOOK}, "tuple"),
    ],
)
def test_what_cannot_be_told_is_refused_without_repeating_it(
    notify: object, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"monitoring": {"notify": notify}}))
    with pytest.raises(ConfigError, match=words) as caught:
        ConfigLoader.load(path)
    assert "SECRET" not in str(caught.value)
    assert "monitoring.notify" in str(caught.value)


@pytest.mark.parametrize("name", ["config.resolved.json", "mine.json"])
def test_the_folder_of_a_run_cannot_name_who_is_told(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be somebody else's: neither its command nor its address is used."""
    (tmp_path / "run.json").write_text("{}")
    path = tmp_path / name
    section = {"notify": ["sh", "-c", "evil"], "notify_silence": 5, "scores": ["exact"]}
    path.write_text(json.dumps({"monitoring": section}))
    config = load_config(parse_flags(["--config", str(path)])).config
    assert (config.monitoring.notify, config.monitoring.notify_silence) == ((), 600)
    assert config.monitoring.scores == ("exact",)
    assert "nobody is told how this run ends" in capsys.readouterr().err
    own = ["--config", str(path), "--monitoring.notify", HOOK]
    assert load_config(parse_flags(own)).config.monitoring.notify == (HOOK,)
    assert capsys.readouterr().err == ""


def test_ones_own_config_names_who_is_told(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"monitoring": {"notify": ["notify-send", "{text}"]}}))
    assert ConfigLoader.load(path).config.monitoring.notify == ("notify-send", "{text}")
    environment = {"TRAINER_MONITORING__NOTIFY": HOOK}
    assert ConfigLoader.load(path, environment).config.monitoring.notify == (HOOK,)
