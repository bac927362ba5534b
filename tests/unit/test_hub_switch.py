"""One switch keeps every client of the model hub quiet, and is put back afterwards."""

from __future__ import annotations

import os
import socket

import pytest
from huggingface_hub import constants

from trainer.net import go_offline, hub_answers, hub_is_offline, hub_setting


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the user's environment allowed the hub; the suite's own switch is put back."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_hub_that_cannot_be_reached_is_asked_once_and_then_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as closed:  # a port that nobody listens on
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        put_back = hub_setting()
        assert not hub_answers()
        assert not hub_answers()
        assert constants.HF_HUB_OFFLINE
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        put_back()
    assert caplog.text.count("does not answer") == 1
    assert not constants.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.parametrize(("value", "is_offline"), [("1", True), ("0", False)])
def test_a_setting_of_the_user_stays(
    value: str, is_offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    put_back = hub_setting()
    go_offline()
    put_back()
    assert hub_is_offline() is is_offline
    assert os.environ["HF_HUB_OFFLINE"] == value
