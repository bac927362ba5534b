"""Preparation of many rows: against rendering and tokenizing alone, by answers, processes, memory.

    python benchmarks/bench_rows.py --gsm8k PATH [--blocks 5] [--tokens N] [--rows 10000 100000]
        [--only speed processes memory] [--template qwen3] [--out FILE.json]

`speed`: one process prepares conversations of 1, 8 and 32 answers of GSM8K, nothing cached; `alone`
is a plain loop: `apply_chat_template` row by row, then the tokenizer on 256 texts at once. Ratios
are block by block, the arms take turns. `processes`: the same rows by one process, by one that has
one core, and by two. `memory`: for each number of rows, in a process
of its own, the highest resident memory of the preparation above that before the first row, the
time, then the second start from the cache, with the time of hashing the file told apart. Imports
and the loading of the tokenizer are in none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MAX_LENGTH = 32_768
KINDS = ("speed", "processes", "memory")
Figures = dict[str, list[float]]


def main() -> None:
    """Parse arguments, measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gsm8k", type=Path, required=True, help="gsm8k_train.jsonl")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="about, of each file")
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--template", help="of those that TRL ships [ChatML with markers]")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    rows = [json.loads(line) for line in words.gsm8k.read_text().splitlines()]
    if words.child:
        print(json.dumps(memory_of(words.child, tokenizer_for(rows, words.template))))
        return
    figures: dict[str, Any] = {}
    print(f"{os.cpu_count()} CPUs, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "speed" in words.only:
            figures["speed"] = speed(folder, rows, words)
        if "processes" in words.only:
            figures["processes"] = processes(folder, rows, words)
        if "memory" in words.only:
            figures["memory"] = [memory(folder, rows, count, words) for count in words.rows]
    if words.out:
        words.out.write_text(json.dumps(figures, indent=2))


def tokenizer_for(rows: Sequence[dict[str, str]], template: str | None) -> Any:
    """An 8,000-token BPE of the rows' texts, with a template that TRL ships or our own."""
    from benchmarks.bench_train import make_tokenizer

    tokenizer = make_tokenizer([row[key] for row in rows for key in ("question", "answer")])
    if template:
        path = files("trl") / "chat_templates" / f"{template}.jinja"
        tokenizer.chat_template = path.read_text()
    return tokenizer


def conversations(
    rows: Sequence[dict[str, str]], count: int, answers: int
) -> list[list[dict[str, str]]]:
    """Conversations of so many questions with answers, drawn with one seed; none twice."""
    draw = random.Random(answers)
    made = []
    for number in range(count):
        turns: list[dict[str, str]] = []
        for row in draw.sample(rows, answers):
            turns.append({"role": "user", "content": f"{row['question']} {number}"})
            turns.append({"role": "assistant", "content": row["answer"]})
        made.append(turns)
    return made


def write(path: Path, made: Sequence[list[dict[str, str]]]) -> Path:
    """The conversations as a JSONL file."""
    with path.open("w") as file:
        file.writelines(json.dumps({"messages": turns}) + "\n" for turns in made)
    return path


def prepare(path: Path, tokenizer: Any, **section: Any) -> Any:
    """The rows of a file as the engine prepares them; by one process unless told."""
    from trainer.config.data_section import DataSection
    from trainer.data.dataset import prepare_data
    from trainer.data.encode import RowEncoder

    options = {"encode_processes": 1, "cache": False, **section}
    return prepare_data(
        DataSection(dataset_path=str(path), validation_split=0.01, **options),
        encoder=RowEncoder(tokenizer, MAX_LENGTH),
        num_preview=4,
    )


def alone(made: Sequence[list[dict[str, str]]], tokenizer: Any) -> int:
    """Render and tokenize; the number of tokens."""
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in made]
    pieces = [texts[start : start + 256] for start in range(0, len(texts), 256)]
    found = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    return sum(len(ids) for piece in found for ids in piece)


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long a piece of work takes, and what it returns."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def told(name: str, values: Sequence[float], unit: str = "") -> None:
    """One line: the median and the range."""
    middle, low, high = statistics.median(values), min(values), max(values)
    print(f"{name:<44}{middle:9.2f} {unit} ({low:.2f}-{high:.2f})", flush=True)


def speed(folder: Path, rows: list[dict[str, str]], words: argparse.Namespace) -> Figures:
    """Preparation over rendering and tokenizing alone, for 1, 8 and 32 answers a row."""
    tokenizer = tokenizer_for(rows, words.template)
    sets = {}
    for answers in (1, 8, 32):
        count = max(words.tokens // (165 * answers), 1)
        made = conversations(rows, count, answers)
        sets[answers] = (made, write(folder / f"{answers}.jsonl", made))
    figures: Figures = {f"{name} {n}": [] for n in sets for name in ("alone", "trainer")}
    tokens = {}
    for block in range(words.blocks):
        for answers, (made, path) in sets.items():
            arms: dict[str, Callable[[], Any]] = {
                "alone": lambda made=made: alone(made, tokenizer),  # type: ignore[misc]
                "trainer": lambda path=path: prepare(path, tokenizer),  # type: ignore[misc]
            }
            for name in list(arms) if block % 2 == 0 else list(arms)[::-1]:
                spent, result = seconds_of(arms[name])
                figures[f"{name} {answers}"].append(spent)
                if name == "alone":
                    tokens[answers] = result
    for answers in sets:
        told(f"{answers} answers: alone", figures[f"alone {answers}"], "s")
        told(f"{answers} answers: trainer", figures[f"trainer {answers}"], "s")
        told(
            f"{answers} answers: trainer / alone",
            ratios(figures, f"trainer {answers}", f"alone {answers}"),
        )
    scale = tokens[8] / tokens[32]
    per_token = [ratio * scale for ratio in ratios(figures, "trainer 32", "trainer 8")]
    told("time per token, 32 answers / 8", per_token)
    return figures


def ratios(figures: Figures, over: str, under: str) -> list[float]:
    """Block by block."""
    return [a / b for a, b in zip(figures[over], figures[under], strict=True)]


def processes(folder: Path, rows: list[dict[str, str]], words: argparse.Namespace) -> Figures:
    """One process over two, their start and the reading of the file included."""
    tokenizer = tokenizer_for(rows, words.template)
    made = conversations(rows, max(5 * words.tokens // 165, 1), 1)
    path = write(folder / "processes.jsonl", made)
    every = os.sched_getaffinity(0)
    first = {min(every)}
    arms = {
        "one": (1, "true", every),
        "one on one core": (1, "false", first),
        "two": (2, "false", every),
    }
    figures: Figures = {name: [] for name in arms}
    prints = set()
    for block in range(words.blocks):
        for name in list(arms) if block % 2 == 0 else list(arms)[::-1]:
            count, has_threads, cores = arms[name]
            os.environ["TOKENIZERS_PARALLELISM"] = has_threads
            os.sched_setaffinity(0, cores)
            spent, data = seconds_of(lambda n=count: prepare(path, tokenizer, encode_processes=n))  # type: ignore[misc]
            os.sched_setaffinity(0, every)
            figures[name].append(spent)
            prints.add(data.train.fingerprint())
    if len(prints) != 1:
        raise SystemExit("the rows differ between one process and two")
    for name in arms:
        told(f"{len(made):,} rows: {name}", figures[name], "s")
    told("one / two", ratios(figures, "one", "two"))
    told("one on one core / two", ratios(figures, "one on one core", "two"))
    return figures


def memory(
    folder: Path, rows: list[dict[str, str]], count: int, words: argparse.Namespace
) -> dict[str, Any]:
    """Peak memory, time and second start of so many rows, in a process of its own."""
    path = folder / f"{count}.jsonl"
    with path.open("w") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            row = {"question": f"{row['question']} {number}", "answer": row["answer"]}
            file.write(json.dumps(row) + "\n")
    command = [sys.executable, __file__, "--gsm8k", str(words.gsm8k), "--child", str(path)]
    if words.template:
        command += ["--template", words.template]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{count:,} rows: " + ", ".join(f"{k} {v:,.1f}" for k, v in found.items()), flush=True)
    path.unlink()
    return {"rows": count, **found}


def memory_of(path: Path, tokenizer: Any) -> dict[str, float]:
    """In the child: what preparing a file takes, cold, then from the cache."""
    from trainer.data.sources import find_sources

    small = path.with_suffix(".small.jsonl")
    with path.open() as file:
        small.write_text("".join(line for line, _ in zip(file, range(100), strict=False)))
    prepare(small, tokenizer)  # what is imported late is in the process before the first row
    cache = path.with_suffix(".cache")
    options: dict[str, Any] = {"cache": True, "cache_dir": str(cache)}
    found = {"MiB before": resident("VmRSS")}
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    found["cold s"], data = seconds_of(lambda: prepare(path, tokenizer, **options))
    found["MiB above"] = resident("VmHWM") - found["MiB before"]
    del data
    found["hashing s"], _ = seconds_of(lambda: find_sources(str(path))[0].content_hash())
    second, data = seconds_of(lambda: prepare(path, tokenizer, **options))
    if not data.card.cache.startswith("read from"):
        raise SystemExit(f"the second start was none: {data.card.cache}")
    found["second start less hashing s"] = second - found["hashing s"]
    return found


def resident(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
