"""One run per folder: refused clearly, locked while it lives, nothing left of a refused start."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.core.resume import environment_manifest
from trainer.core.run_folder import RunFolder
from trainer.errors import OutputError, ResumeError


def test_an_empty_new_or_foreign_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "a" / "b"):
        RunFolder.create(path, resume=False).close()
        assert (path / ".lock").exists()


@pytest.mark.parametrize("name", ["run.json", "status.json", "checkpoints"])
def test_a_folder_that_holds_a_run_is_refused_and_resume_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(OutputError, match="--resume"):
        RunFolder.create(tmp_path, resume=False)
    RunFolder.create(tmp_path, resume=True).close()


def test_resume_without_a_run_is_an_error_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="nothing to resume"):
        RunFolder.create(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_a_path_through_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="another --output"):
        RunFolder.create(tmp_path / "file" / "run", resume=False)


def test_a_second_process_is_refused_by_the_name_of_the_first(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    script = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "from pathlib import Path\n"
        "from trainer.core.run_folder import RunFolder\n"
        f"folder = RunFolder.create(Path({str(tmp_path)!r}), resume=False)\n"
        "print('taken', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(OutputError, match=f"process {other.pid} on "):
            RunFolder.create(tmp_path, resume=False)
        other.kill()
    RunFolder.create(tmp_path, resume=False).close()  # the lock died with its process


def test_a_refused_start_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "new", resume=False)
    folder.discard_if_empty()
    folder.close()
    assert not (tmp_path / "new").exists()
    kept = RunFolder.create(tmp_path, resume=False)
    kept.discard_if_empty()
    kept.close()
    assert tmp_path.exists()


def test_json_files_are_replaced_and_updated_whole(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, resume=False)
    folder.write_json(folder.run_json, {"state": "training", "loss": float("nan")})
    folder.update_json(folder.run_json, {"state": "completed"})
    assert json.loads(folder.run_json.read_text()) == {"state": "completed", "loss": None}
    folder.close()


def test_the_environment_names_versions_and_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-canary")
    found = environment_manifest(torch.device("cpu"))
    assert found["packages"]["torch"]
    assert "secret-canary" not in json.dumps(found)


@pytest.mark.parametrize("state", ["stopped", "training", "failed", None])
@pytest.mark.parametrize("is_trained", [False, True])
def test_a_run_that_ended_before_its_first_step_gives_its_folder_to_the_next(
    tmp_path: Path, is_trained: bool, state: str | None
) -> None:
    if state is not None:  # a run that was killed has no run.json, or one that says nothing
        (tmp_path / "run.json").write_text(json.dumps({"state": state}))
    (tmp_path / "status.json").write_text('{"state": "loading"}')
    (tmp_path / "base_model").mkdir()
    (tmp_path / "checkpoints" / ".tmp-step-00000001-77").mkdir(parents=True)
    (tmp_path / "mine.txt").write_text("mine")
    kind = "StepDone" if is_trained else "Notice"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"type": kind, "step": 0}) + "\n")
    if is_trained:
        with pytest.raises(OutputError, match=r"after step 1, .*trainer train --resume --output"):
            RunFolder.create(tmp_path, resume=False)
    again = RunFolder.create(tmp_path, resume=is_trained)
    if is_trained:
        assert again.begin_anew()
    assert (tmp_path / "metrics.jsonl").exists()  # a start may still be refused
    again.clear_unsaved()
    again.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "mine.txt"]


@pytest.mark.parametrize("name", ["final_model", "checkpoints/step-00000004"])
def test_a_run_that_left_weights_is_never_begun_anew(tmp_path: Path, name: str) -> None:
    (tmp_path / "run.json").write_text('{"state": "training"}')
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(OutputError, match="holds a run already"):
        RunFolder.create(tmp_path, resume=False)
    folder = RunFolder.create(tmp_path, resume=True)
    assert not folder.begin_anew()
    folder.clear_unsaved()
    folder.close()
    assert (tmp_path / name).is_dir()


def test_without_locks_a_run_that_may_be_at_work_keeps_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("trainer.core.run_folder.fcntl.flock", refuse)
    (tmp_path / "run.json").write_text('{"state": "training"}')
    with pytest.raises(OutputError, match="holds a run already"):
        RunFolder.create(tmp_path, resume=False)
    (tmp_path / "run.json").write_text('{"state": "stopped"}')
    RunFolder.create(tmp_path, resume=False).close()
