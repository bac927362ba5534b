"""How far a file is read: said while it takes, by whom it concerns, and not of quick files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests.collected import collected
from trainer.config.data_section import DataSection
from trainer.data.data_files import LocalFile
from trainer.data.read_progress import EVERY_ROWS, ReadProgress
from trainer.data.row_files import raw_rows
from trainer.data.rows import RowErrors
from trainer.data.sources import find_sources, read_rows
from trainer.monitoring.events import TRAINING, Observers, PhaseChanged, Waits
from trainer.monitoring.status_writer import StatusBuilder
from trainer.views.run_reader import RunReader
from trainer.views.terminal import JsonDisplay, PlainDisplay, SafeStream
from trainer.views.terminal_rich import LiveView


class Clock:
    """Goes on by `pace` whenever it is looked at."""

    def __init__(self, pace: float = 0.0) -> None:
        self.now, self.pace = 0.0, pace

    def __call__(self) -> float:
        self.now += self.pace
        return self.now


def write(path: Path, count: int, first: int = 0) -> Path:
    rows = ({"question": f"q{n:06}", "answer": "a"} for n in range(first, first + count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def told_of(name: str, pace: float, known: str = "") -> list[str]:
    told: list[str] = []
    progress = ReadProgress(told.append, known, Clock(pace))
    section = DataSection(dataset_path=name)
    collected(
        read_rows(
            find_sources(name), section, RowErrors("strict"), max_rows=None, progress=progress
        )
    )
    return told


def test_a_quick_file_is_not_spoken_of_and_a_slow_one_at_most_once_a_second(
    tmp_path: Path,
) -> None:
    path = str(write(tmp_path / "a.jsonl", 50 * EVERY_ROWS))
    assert told_of(path, pace=1.9 / 50) == []
    told = told_of(path, pace=0.125)
    assert len(told) == 5  # of 6.25 seconds, from the second one on
    assert told[0] == f"{path}: 1,024 rows, 512 rows/s, 4 s left"
    assert told_of(path, pace=0.125, known=path)[0] == "1,024 rows, 512 rows/s, 4 s left"


def test_each_file_of_a_folder_is_named_with_its_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", 50 * EVERY_ROWS)
    told = told_of(str(tmp_path), pace=1.0, known=str(tmp_path))
    assert {words.split(":")[0] for words in told} == {
        f"{tmp_path}/a.jsonl (file 1 of 2)",
        f"{tmp_path}/b.jsonl (file 2 of 2)",
    }


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet", "arrow"])
def test_the_share_of_a_file_that_is_read_grows_from_nothing_to_all(
    tmp_path: Path, kind: str
) -> None:
    file = LocalFile(_written(tmp_path / f"rows.{kind}"))
    shares = []
    for number, _ in enumerate(raw_rows(file)):
        if number % 2000 == 0:
            shares.append(file.position.share(file.size()) or 0.0)
    shares.append(file.position.share(file.size()) or 0.0)
    assert shares == sorted(shares)
    assert shares[0] < 0.4
    assert shares[-1] == 1.0
    assert len(set(shares)) > 3


def _written(path: Path) -> Path:
    import gzip
    import hashlib

    import pyarrow
    import zstandard
    from pyarrow import csv, parquet

    rows = [
        {"question": hashlib.sha256(b"%d" % n).hexdigest(), "answer": "a"} for n in range(20_000)
    ]
    table = pyarrow.Table.from_pylist(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    match path.name.removeprefix("rows."):
        case "csv":
            csv.write_csv(table, str(path))
        case "parquet":
            parquet.write_table(table, str(path))
        case "arrow":
            with (
                pyarrow.OSFile(str(path), "wb") as file,
                pyarrow.ipc.new_stream(file, table.schema) as writer,
            ):
                writer.write_table(table, max_chunksize=1000)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case "jsonl.zst":
            path.write_bytes(zstandard.compress(lines))
        case _:
            path.write_bytes(lines)
    return path


# ---- who hears of it


def test_a_wait_is_told_with_how_far_it_is_and_as_rarely_as_ever() -> None:
    clock, told = Clock(), list[str]()
    waits = Waits(told.append, clock)
    waits.note(PhaseChanged(state="loading", text="encoding a"))

    def second(progress: str) -> str | None:
        clock.now += 1.0
        waits.note(PhaseChanged(state="loading", text="encoding a", progress=progress))
        return waits.words()

    words = [second(f"{n} rows") for n in range(1, 61)]
    found = [text for text in words if text]
    assert found[0] == "encoding a, 2 s: 2 rows"
    assert len(found) < 30
    assert found[-1].startswith("encoding a, 5")


def test_a_terminal_shows_it_beside_the_time_that_the_phase_has_taken() -> None:
    clock = Clock()
    view = LiveView(clock)
    view.set_phase(PhaseChanged(state="loading", text="encoding a"))
    clock.now = 7.0
    view.set_phase(PhaseChanged(state="loading", text="encoding a", progress="5 rows"))
    assert view.phase_elapsed_s() == 7.0
    assert view._headline_words("loading") == "encoding a, 7.0 s: 5 rows"


def test_logs_of_text_and_of_events_get_no_line_for_it() -> None:
    for kind in (PlainDisplay, JsonDisplay):
        stream = io.StringIO()
        observers = Observers([kind(SafeStream(stream))])
        for n in range(100):
            observers.emit(
                PhaseChanged(state="loading", text="encoding a", progress=f"{n} rows" if n else "")
            )
        observers.close()
        [line] = stream.getvalue().splitlines()
        assert "encoding a" in line


def test_the_status_has_it_until_the_phase_is_over() -> None:
    builder = StatusBuilder(100)
    for text, progress in (("encoding a", ""), ("encoding a", "5 rows"), ("encoding b", "")):
        builder.apply(PhaseChanged(state="loading", text=text, progress=progress))
        status = builder.build()
        assert (status.phase, status.phase_progress) == (text, progress)
    builder.apply(PhaseChanged(state="loading", text="encoding b", progress="5 rows"))
    builder.apply(PhaseChanged(state="training", text=TRAINING))
    assert builder.build().phase_progress == ""


def test_the_words_of_a_run_have_it(tmp_path: Path) -> None:
    builder = StatusBuilder(100)
    builder.apply(PhaseChanged(state="loading", text="encoding a", progress="5 rows"))
    (tmp_path / "status.json").write_text(builder.build().model_dump_json())
    reader = RunReader(tmp_path)
    reader.poll_summary()
    assert reader.words() == "encoding a: 5 rows"
