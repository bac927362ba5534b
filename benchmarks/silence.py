"""The longest silences of commands, as a person at a terminal sees them.

    python benchmarks/silence.py                      # everything below, tiny models only
    python benchmarks/silence.py --only train resume  # some of it
    python benchmarks/silence.py -- trainer train --model qwen3 --dataset rows.jsonl

Each command has a terminal of its own (a pty). What it writes is time-stamped; a silence is the
time between two writes, from the start of the process to its end. Cursor movements without a
visible change count as silence: a spinner that turns is a change.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]

TRAINER = [sys.executable, "-m", "trainer"]

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>]")

SHOWN = 5
"""Silences that are listed of each command."""

LIMIT_S = 900.0


@dataclass
class Told:
    """What a command wrote, and when."""

    started: float
    writes: list[tuple[float, str]] = field(default_factory=list)
    """(seconds since the start, visible text)."""
    ended_s: float = 0.0
    code: int | None = None

    def silences(self) -> list[tuple[float, float, str, str]]:
        """(seconds, from when, what stood there before, what came after), the longest first."""
        points = [(0.0, "(start)"), *self.writes, (self.ended_s, "(end)")]
        found = [
            (after - before, before, _last(words), _first(next_words))
            for (before, words), (after, next_words) in itertools.pairwise(points)
        ]
        return sorted(found, reverse=True)


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:70] if lines else ""


def _first(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:70] if lines else ""


def record(
    words: Sequence[str],
    *,
    cwd: Path,
    typed: Sequence[tuple[str, str]] = (),
    stop_at: str | None = None,
) -> Told:
    """Run a command in a terminal and note when it says something.

    Args:
        typed: (what is waited for, what is typed then), in order.
        stop_at: SIGINT is sent when this was said.
    """
    main_end, its_end = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    environment |= {"COLUMNS": "120", "LINES": "40"}
    told = Told(time.monotonic())
    process = subprocess.Popen(
        words, cwd=cwd, stdin=its_end, stdout=its_end, stderr=its_end, env=environment
    )
    os.close(its_end)
    waiting, seen, is_stopped = list(typed), "", False
    try:
        while time.monotonic() - told.started < LIMIT_S:
            if not select.select([main_end], [], [], 0.05)[0]:
                if process.poll() is not None:
                    break
                continue
            try:
                data = os.read(main_end, 1 << 16)
            except OSError:  # nobody holds the other end any more
                break
            if not data:
                break
            text = ESCAPES.sub("", data.decode("utf-8", "replace"))
            now = time.monotonic() - told.started
            if text.strip():
                told.writes.append((now, text))
                seen = (seen + text)[-4000:]
            if waiting and waiting[0][0] in seen:
                os.write(main_end, waiting.pop(0)[1].encode())
                seen = ""
            if stop_at is not None and not is_stopped and stop_at in seen:
                process.send_signal(signal.SIGINT)
                is_stopped = True
    finally:
        if process.poll() is None:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        told.code, told.ended_s = process.wait(), time.monotonic() - told.started
        os.close(main_end)
    return told


# ---- what is measured


def make_rows(folder: Path) -> Path:
    """Eighty sums as questions and answers."""
    path = folder / "rows.jsonl"
    rows = [{"question": f"what is {n} plus 3?", "answer": f"It is {n + 3}."} for n in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_gguf(folder: Path) -> Path:
    """A small Qwen3 with random weights, as llama.cpp's converter writes it."""
    # torch, for this case only.
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.integration.test_gguf import write_gguf
    from trainer.config.training_sections import ModelSection
    from trainer.models.load import load_tokenizer

    tokenizer = load_tokenizer(ModelSection(model_path="tiny"))
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads))
    write_gguf(model, tokenizer, folder / "small.gguf")
    return folder / "small.gguf"


Case = Callable[[Path], Told]

FINAL = [
    *("--monitoring.final_eval_prompts", "8", "--data.validation_split", "0.3"),
    *("--monitoring.max_eval_tokens", "16", "--monitoring.preview_max_tokens", "16"),
]

SHORT = ["--batch-size", "4", "--monitoring.inference_interval", "6"]


def _train(
    here: Path, *more: str, model: str = "tiny", steps: int = 12, stop_at: str | None = None
) -> Told:
    words = ["train", "--dataset", str(make_rows(here)), "--model", model, "--output", "out"]
    words += ["--max-steps", str(steps)]
    return record([*TRAINER, *words, *SHORT, *FINAL, *more], cwd=here, stop_at=stop_at)


def _needs_run(here: Path, *more: str) -> None:
    if not (here / "out" / "final_model").is_dir():
        _train(here, *more)


def case_demo(here: Path) -> Told:
    """`trainer demo`, a few steps."""
    return record([*TRAINER, "demo", "--steps", "6"], cwd=here)


def case_train(here: Path) -> Told:
    """`trainer train` with a final evaluation."""
    return _train(here)


def case_sidecar(here: Path) -> Told:
    """The same with a sidecar."""
    return _train(here, "--monitoring.preview_backend", "sidecar")


def case_gguf(here: Path) -> Told:
    """LoRA on a .gguf file with a final evaluation."""
    model = str(make_gguf(here))
    return _train(here, "--hyperparams.training_mode", "lora", "--fp32", model=model)


def case_resume(here: Path) -> Told:
    """`--resume` of a run that was stopped by Ctrl-C."""
    stopped = _train(here, steps=60, stop_at="step 6")
    if stopped.code == 0:
        raise SystemExit("the run that is resumed was not stopped")
    return record([*TRAINER, "train", "--resume", "--output", "out"], cwd=here)


def case_export(here: Path) -> Told:
    """`trainer export --merge` of an adapter."""
    _needs_run(here, "--hyperparams.training_mode", "lora")
    return record([*TRAINER, "export", "out", "--merge", "--output", "merged"], cwd=here)


def case_serve(here: Path) -> Told:
    """`trainer serve RUN` until it is ready."""
    _needs_run(here)
    return record([*TRAINER, "serve", "out", "--port", "0"], cwd=here, stop_at="ready:")


def case_chat(here: Path) -> Told:
    """`trainer chat RUN`, one question."""
    _needs_run(here)
    typed = [("you>", "what is 3 plus 3?\n"), ("you>", "/quit\n")]
    return record([*TRAINER, "chat", "out", "--max-new-tokens", "8"], cwd=here, typed=typed)


def case_dry_run(here: Path) -> Told:
    """`trainer train --dry-run`."""
    return _train(here, "--dry-run")


def case_inspect(here: Path) -> Told:
    """`trainer data inspect`."""
    words = ["data", "inspect", str(make_rows(here)), "--model", "tiny"]
    return record([*TRAINER, *words], cwd=here)


def case_doctor(here: Path) -> Told:
    """`trainer doctor`."""
    return record([*TRAINER, "doctor"], cwd=here)


def case_monitor(here: Path) -> Told:
    """`trainer monitor` until it listens."""
    return record([*TRAINER, "monitor", "out", "--port", "0"], cwd=here, stop_at="Ctrl-C ends it")


CASES: dict[str, Case] = {
    name.removeprefix("case_"): value
    for name, value in list(globals().items())
    if name.startswith("case_")
}


def show(name: str, told: Told) -> None:
    """The longest silences of one command."""
    found = told.silences()
    longest, whole = found[0][0], told.ended_s
    print(f"{name}: longest silence {longest:.1f} s of {whole:.1f} s, exit code {told.code}")
    for seconds, since, before, after in found[:SHOWN]:
        if seconds >= 0.5:
            print(f"  {seconds:5.1f} s from {since:5.1f} s on: {before!r} ... {after!r}")


def main() -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument("--keep", action="store_true", help="print all that was said, with times")
    parser.add_argument("command", nargs="*", help="a command of your own, after --")
    words = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended
    # A shell starts background jobs with SIGINT ignored, and they would hand that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name in ["yours"] if words.command else words.only:
        with tempfile.TemporaryDirectory() as folder:
            here = Path.cwd() if words.command else Path(folder)
            told = record(words.command, cwd=here) if words.command else CASES[name](here)
        show(name, told)
        if words.keep:
            for at, text in told.writes:
                print(f"    {at:7.2f} {' | '.join(text.split(chr(10)))[:160]!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
