"""The runs below a folder, which may come later than whoever looks."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from trainer.errors import OutputError
from trainer.views.page import store as store_module
from trainer.views.page.store import RunStore


def test_a_store_waits_for_a_folder_finds_runs_in_it_and_says_once_that_it_went_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "FIND_S", 0.0)
    caplog.set_level(logging.WARNING)
    root = tmp_path / "later"
    store = RunStore(root)
    store._refresh()
    assert not store.readers
    assert not caplog.records
    root.mkdir()
    (root / "run.json").write_text(json.dumps({}))
    store._refresh()
    assert store.is_one_run
    (root / "run.json").unlink()
    root.rmdir()
    store._refresh()
    store._refresh()
    assert len(caplog.records) == 1
    assert len(store.readers) == 1


def test_a_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a folder"):
        RunStore(tmp_path / "file")
