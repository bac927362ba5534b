"""What this program does on a GPU, in ten minutes: tests, speed and memory beside TRL, stalls.

    make gpu GPU_PYTHON=python3             # or: python3 benchmarks/gpu.py [--budget 600]
    make gpu GPU_FLAGS=--rehearse           # the same code on the CPU with tiny shapes
    python3 benchmarks/gpu.py --table benchmarks/results/gpu-NAME.json

Nothing is installed and no network is used. Each stage of `benchmarks/gpu_stages.py` has a process
and a limit of its own, and its result is written at once, so that a run that is cut off keeps what
it has. At the end the table in `docs/benchmarks.md` is replaced (`--table` does it from a file).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_wheels import FOLDER, lacking, unpack

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- gpu table -->", "<!-- end of gpu table -->"
NO_TIME = "no time left"
LEAST_S = 10.0
"""A stage with less than this left is not begun."""
LAST_LINES = 15

ANCHORS = (
    "Llama-3 8B LoRA at 4,096 tokens on one H100, NeMo Automodel: 12,473 tokens/s",
    "Qwen3-0.6B full at 8,192 tokens, prime-rl: 26,010 tokens/s",
    "Llama 3.2 3B full on one A100, torchtune, packed and compiled: 8,998 tokens/s",
)
"""Published by others, on other machines and rows."""


@dataclass(frozen=True)
class Runner:
    """Starts stages in processes of their own."""

    work: Path
    site: Path
    """Unpacked wheels."""
    flags: tuple[str, ...]

    def run(self, stage: str, limit_s: float) -> dict[str, Any]:
        """One stage: what it found, or why there is nothing."""
        slug = re.sub(r"\W+", "-", stage)
        out, log = self.work / f"{slug}.json", self.work / f"{slug}.log"
        command = [
            *(sys.executable, str(ROOT / "benchmarks" / "gpu_stages.py"), stage),
            *("--work", str(self.work), "--out", str(out), *self.flags),
        ]
        places = [str(self.site), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(place for place in places if place),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if "--rehearse" in self.flags:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        started = time.monotonic()
        with log.open("wb") as lines:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=lines,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its own children too
                process.wait()
        seconds = round(time.monotonic() - started, 1)
        return {**self._outcome(code, limit_s, out, log), "seconds": seconds}

    def _outcome(self, code: int | None, limit_s: float, out: Path, log: Path) -> dict[str, Any]:
        if code == 0 and out.exists():
            found = json.loads(out.read_text(encoding="utf-8"))
            if "skipped" in found:
                return {"status": "skipped", "reason": found["skipped"]}
            return {"status": "done", "figures": found["figures"]}
        reason = f"over its limit of {limit_s:.0f} s" if code is None else f"exit code {code}"
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return {"status": "failed", "reason": reason, "log": last}


def main() -> int:
    """Run the stages, write the results, print the table."""
    words = arguments()
    if words.table is not None:
        found = json.loads(words.table.read_text(encoding="utf-8"))
        write_page(found)
        return 0
    deadline = time.monotonic() + words.budget
    try:
        import torch

        from benchmarks.gpu_stages import ALIKE, STAGES

        wheels = lacking(FOLDER)
    except (ImportError, ValueError) as error:
        return refuse(f"{sys.executable} cannot run the stages: {error}")
    if not words.rehearse and not torch.cuda.is_available():
        return refuse(
            f"torch {torch.__version__} of {sys.executable} sees no CUDA device. Name a Python "
            "that does (make gpu GPU_PYTHON=...), or add GPU_FLAGS=--rehearse to try the code on "
            "the CPU."
        )
    chosen = {name: limit for name, (_, limit) in STAGES.items() if words.only in name}
    with tempfile.TemporaryDirectory(prefix="gpu-bench-", dir=words.work) as folder:
        runner = Runner(Path(folder), Path(folder) / "site", flags(words))
        unpack(wheels, runner.site)
        machine = runner.run("machine", words.budget)
        if machine["status"] != "done":
            last = (machine.get("log") or [machine.get("reason")])[-1]
            return refuse(
                f"{sys.executable} cannot import `trainer`: {last}. On a machine with a registry, "
                "run make gpu-wheels and copy the folder gpu-wheels here with the checkout."
            )
        found = {
            **machine["figures"],
            "date": dt.date.today().isoformat(),
            "is_rehearsal": words.rehearse,
            "budget_s": words.budget,
            "unpacked": [path.name for path in wheels],
            "stages": {},
        }
        out = words.out or default_out(found["card"], is_rehearsal=words.rehearse)
        for name, limit in chosen.items():
            left = deadline - time.monotonic()
            if words.rehearse and not words.only and name in ALIKE:
                result = {"status": "not run", "reason": "the code of another stage"}
            elif left < LEAST_S:
                result = {"status": "not run", "reason": NO_TIME}
            else:
                result = runner.run(name, min(limit, left))
            found["stages"][name] = result
            write(out, found)
            print(line_of(name, result), flush=True)
    print(f"\n{table(found)}\nresults: {out}")
    if not words.rehearse:
        write_page(found)
    tests = found["stages"].get("gpu tests", {}).get("figures", {})
    failed = any(result["status"] == "failed" for result in found["stages"].values())
    return 1 if failed or tests.get("failed") else 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--budget", type=float, default=600, help="seconds in all")
    parser.add_argument("--data", type=Path, help="rows (question, answer) in place of drawn ones")
    parser.add_argument("--only", default="", help="stages whose name contains this")
    parser.add_argument("--work", type=Path, help="folder with some 8 GiB of room")
    parser.add_argument("--out", type=Path, help="file of the results")
    parser.add_argument("--table", type=Path, help="only write the table of these results")
    return parser.parse_args()


def flags(words: argparse.Namespace) -> tuple[str, ...]:
    """What stages are told."""
    data = () if words.data is None else ("--data", str(words.data.resolve()))
    return (*data, *(("--rehearse",) if words.rehearse else ()))


def refuse(why: str) -> int:
    """Say why nothing ran."""
    print(why, file=sys.stderr)
    return 2


def default_out(card: str, *, is_rehearsal: bool) -> Path:
    """`gpu-NAME.json` of the card; a rehearsal's figures are none, and go to what git ignores."""
    if is_rehearsal:
        return ROOT / "build" / "gpu-rehearsal.json"
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"gpu-{name}.json"


def write(out: Path, found: Mapping[str, Any]) -> None:
    """Replace the file of results."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partly = out.with_suffix(".part")
    partly.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    partly.replace(out)


# ---- the table


def line_of(name: str, result: Mapping[str, Any]) -> str:
    """A stage in one line."""
    if result["status"] != "done":
        return f"{name}: {result['status']} ({result['reason']})"
    figures = result["figures"]
    told = {key: len(value) if isinstance(value, list) else value for key, value in figures.items()}
    return f"{name}: {', '.join(f'{key} {value}' for key, value in told.items())}"


def table(found: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    packages = ", ".join(
        f"{name} {number}" for name, number in found["packages"].items() if number is not None
    )
    card = f"{found['card']}, driver {found.get('driver') or 'unknown'}, torch {found['torch']}"
    lines = [
        f"{found['date']}: {card}, Python {found['python']}, {found['cpu_cores']} CPU cores; "
        f"{packages}.",
        "",
        "| training | tokens/s | peak GiB |",
        "|---|---|---|",
    ]
    others = []
    for name, result in found["stages"].items():
        figures = result.get("figures", {})
        if "tokens_per_s" in figures:
            peak = figures["peak_gib"]
            lines.append(
                f"| {name} | {figures['tokens_per_s']:,} | {'-' if peak is None else peak} |"
            )
        else:
            others.append(f"- {line_of(name, result)}")
    published = [f"- {text}" for text in ANCHORS]
    return "\n".join(
        [
            *lines,
            "",
            *others,
            "",
            "Published by others, on other machines and rows:",
            "",
            *published,
        ]
    )


def write_page(found: Mapping[str, Any]) -> None:
    """Put the table between its marks in docs/benchmarks.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page = f"{before}{BEGIN}\n{table(found)}\n{END}{after}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
