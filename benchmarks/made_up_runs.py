"""Run folders that no training made, to look at and to measure the page with.

    python benchmarks/made_up_runs.py FOLDER                  # one of each kind
    python benchmarks/made_up_runs.py FOLDER --live 100 \
        --rate 5 --every 25 --seconds 60                      # one that grows for so long

The kinds: `word_problems` (nothing right yet, golden tokens ever more probable), `hundred_prompts`
(100 prompts, 41 preview steps, 4 wrong), `long` (501 preview steps), `not_a_number`, `hung`,
`killed`, `scripts` (Arabic, Chinese, code, LaTeX, 3,000 characters that differ in one number),
`own_prompts` (no golden answers).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NAMES = ("Natalia", "Weng", "Betty", "Julie", "James", "Mark", "Albert", "Ken", "Alexis", "Tina")
THINGS = ("clips", "apples", "books", "letters", "flowers", "pizzas", "boxes", "stickers", "pens")
STEP_S = 2.0
HUNG_S = 600.0
"""Nothing has come from the hung run for so long."""


def problem(number: int, slip: int = 0) -> tuple[str, str]:
    """A word problem and its worked answer, whose product is wrong by `slip`."""
    draw = random.Random(number)
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    each, count, given = draw.randint(3, 20), draw.randint(3, 12), draw.randint(2, 9)
    total = each * count + slip
    question = (
        f"{name} packs {each} {thing} into each of {count} bags and then gives {given} of the "
        f"{thing} to a friend. How many {thing} are left?"
    )
    answer = (
        f"In all there are {each} * {count} = <<{each}*{count}={total}>>{total} {thing}.\n"
        f"After giving {given} away, {name} has {total} - {given} = "
        f"<<{total}-{given}={total - given}>>{total - given} {thing} left.\n#### {total - given}"
    )
    return question, answer


def wrong_answer(number: int, draw: random.Random) -> str:
    """The worked answer with a slip in its first line, carried on to the end."""
    return problem(number, draw.choice((1, 2, 10, 20)))[1]


def step_row(step: int, total: int, started: float, draw: random.Random) -> Row:
    """A line of metrics.jsonl."""
    return {
        "type": "StepDone",
        "created_at": started + STEP_S * step,
        "step": step,
        "total_steps": total,
        "epoch": 3 * step / total,
        "train_loss": 0.3 + 2.5 * math.exp(-6 * step / total) + draw.gauss(0, 0.05),
        "learning_rate": 5e-5 * (1 - step / (total + 1)),
        "grad_norm": 1.5 * draw.random(),
        "tokens_per_s": 15_000 + 1_500 * draw.random(),
        "num_tokens": 2_944,
        "num_trained_tokens": 1_088,
        "step_time_s": STEP_S,
        "eta_s": STEP_S * (total - step),
        "memory_gib": 61.3,
    }


def metric_rows(done: int, total: int, started: float) -> list[Row]:
    """All lines of metrics.jsonl up to a step, with an evaluation ten times a run."""
    draw, rows = random.Random(0), []
    for step in range(1, done + 1):
        rows.append(step_row(step, total, started, draw))
        if step % max(1, total // 10) == 0:
            loss = 0.45 + 2.5 * math.exp(-5 * step / total)
            more = {"num_rows": 64, "num_trained_tokens": 4_000, "duration_s": 1.0}
            row = {"type": "EvaluationDone", "created_at": started + STEP_S * step, "step": step}
            rows.append({**row, "val_loss": loss, "train_loss": 0.3, **more})
    return rows


def preview(step: int, number: int, prompt: str, text: str, golden: str | None, **more: Any) -> Row:
    """A line of previews.jsonl."""
    values = {
        "step": step,
        "prompt": prompt,
        "text": text,
        "raw_text": f"{text}<|im_end|>",
        "golden_answer": golden,
        "matches": None if golden is None else text == golden,
        "prompt_id": f"validation-{number}",
        "tokens_generated": len(text) // 4 + 1,
        "tokens_per_sec": 312.0,
        "generation_time_sec": 0.8,
        "weights": "in_process",
    }
    return {**values, **more}


def write(
    folder: Path, metrics: list[Row], previews: list[Row], *, started: float, **status: Any
) -> None:
    """One run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("metrics.jsonl", metrics), ("previews.jsonl", previews)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(lines, encoding="utf-8")
    step = max([row["step"] for row in metrics] or [0])
    values = {
        "schema_version": 1,
        "state": "completed",
        "phase": "completed",
        "step": step,
        "total_steps": step,
        "started_at": started,
        "updated_at": started + STEP_S * step,
        "pid": os.getpid(),
        "model_name": "Qwen/Qwen3-8B",
        "output_dir": str(folder),
    }
    (folder / "status.json").write_text(json.dumps({**values, **status}))


def learned(num_prompts: int, steps: range, *, wrong_at_end: int | None = None) -> list[Row]:
    """Previews of a run that gets ever more prompts right."""
    draw, found = random.Random(1), []
    last = steps[-1]
    for step in steps:
        for number in range(num_prompts):
            prompt, golden = problem(number)
            is_right = draw.random() < min(0.97, 1.2 * step / last)
            if step == last and wrong_at_end is not None:
                is_right = number >= wrong_at_end
            text = golden if is_right else wrong_answer(number, draw)
            found.append(preview(step, number, prompt, text, golden))
    return found


def unlearned(steps: range, total: int) -> list[Row]:
    """Nothing is right, and the golden answer becomes ever more probable."""
    draw, found = random.Random(2), []
    for step in steps:
        for number in range(6):
            prompt, golden = problem(number)
            chance = 0.004 + 0.16 * (step / total) * (0.8 + 0.05 * number)
            tokens = golden.split(" ")
            nats = [math.log(min(0.99, chance * 2 * draw.random() + 1e-4)) for _ in tokens]
            more = {
                "golden_probability": chance,
                "golden_tokens": [f"{token} " for token in tokens],
                "golden_logprobs": nats,
                "health": ["repeats", "never_stopped"] if step < total else ["never_stopped"],
            }
            text = " ".join(["The", *["t", "the"] * (3 + step // 20), golden[:30]])
            found.append(preview(step, number, prompt, text, golden, **more))
        found.append(preview(step, 9, "Who are you?", "the the t", None))
    return found


def script_rows() -> list[tuple[str, str, str]]:
    """(prompt, golden, generated) in other scripts, in markup, and long."""
    count = [f"Step {n}: take the number {n} and add it to the basket." for n in range(1, 60)]
    other = [*count[:-1], "Step 59: take the number 95 and add it to the basket."]
    code = "```python\ndef double(n: int) -> int:\n    return {}\n```\n\nIt runs in $O(1)$."
    table = "| planet | moons |\n|---|---:|\n| Mercury | {} |\n| **Mars** | 2 |\n"
    root = "The roots of $ax^2+bx+c=0$ are\n$$x = \\frac{{-b \\pm \\sqrt{{b^2{}4ac}}}}{{2a}}.$$"
    capital = "عاصمة مصر هي {}، وعدد سكانها نحو {} ملايين نسمة (2023)."
    tokyo = "東京都の人口は約{}万人です。23区だけで約970万人が住んでいます。"
    return [
        ("Count the basket, step by step.", "\n".join(count), "\n".join(other)),
        (
            "ما عاصمة مصر وكم عدد سكانها؟",
            capital.format("القاهرة", 10),
            capital.format("الإسكندرية", 5),
        ),
        ("東京の人口を教えてください。", tokyo.format("1,400"), tokyo.format("1,300")),
        ("Write a function that doubles.", code.format("2 * n"), code.format("n + n + n")),
        ("State the quadratic formula in LaTeX.", root.format("-"), root.format("+")),
        ("Make a table of planets.", table.format(0), table.format(1)),
        ("List the steps.", "one\ntwo\nthree\n", "one two three"),
    ]


def scripts(steps: range) -> list[Row]:
    """Some of them become right half-way."""
    found = []
    for step in steps:
        for number, (prompt, golden, generated) in enumerate(script_rows()):
            is_right = number % 3 == 1 and step >= steps[-1] // 2
            text = golden if is_right else generated
            found.append(preview(step, number, prompt, text, golden))
    return found


def make_all(root: Path) -> None:
    """One run of each kind."""
    before = time.time() - 7_200

    def put(
        name: str,
        previews: list[Row],
        done: int,
        total: int,
        *,
        begun: float = before,
        **status: Any,
    ) -> None:
        rows = metric_rows(done, total, begun)
        write(root / name, rows, previews, started=begun, **{"total_steps": total, **status})

    put("word_problems", unlearned(range(0, 161, 10), 160), 160, 160)
    put("hundred_prompts", learned(100, range(0, 2_001, 50), wrong_at_end=4), 2_000, 2_000)
    put("long", learned(8, range(0, 2_001, 4)), 2_000, 2_000)
    error = {
        "type": "NonFiniteError",
        "message": "step 81: the loss is nan. Lower the learning rate.",
    }
    put(
        "not_a_number",
        learned(12, range(0, 81, 20), wrong_at_end=1),
        80,
        400,
        state="failed",
        error=error,
    )
    # Process 1 lives and is older than the run, as the process of a hung run is.
    hung: Row = {"state": "training", "phase": "training", "pid": 1, "eta_s": 400.0}
    hung_at = time.time() - HUNG_S - 200 * STEP_S
    put("hung", learned(12, range(0, 201, 50), wrong_at_end=2), 200, 400, begun=hung_at, **hung)
    dead: Row = {"state": "training", "pid": 2**22 - 1}
    put("killed", learned(12, range(0, 151, 50), wrong_at_end=2), 170, 400, **dead)
    put("scripts", scripts(range(0, 401, 50)), 400, 400)
    own = [
        preview(step, n, prompt, f"I am a model at step {step}.", None, prompt_id=f"own-{n}")
        for step in range(0, 401, 50)
        for n, prompt in enumerate(("Who are you?", "Tell me a joke.", "What is 2+2?"))
    ]
    put("own_prompts", own, 400, 400)


def grow(root: Path, num_prompts: int, rate: float, every: int, seconds: float) -> None:
    """A run that grows in real time."""
    started, total, draw = time.time(), int(seconds * rate), random.Random(0)
    root.mkdir(parents=True, exist_ok=True)
    steps = range(0, total + 1, every)
    by_step: dict[int, list[Row]] = {}
    for row in learned(num_prompts, steps):
        by_step.setdefault(row["step"], []).append(row)
    with (root / "metrics.jsonl").open("w") as metrics, (root / "previews.jsonl").open("w") as file:
        for step in range(total + 1):
            time.sleep(max(0.0, started + step / rate - time.time()))
            if step:
                row = step_row(step, total, started, draw)
                row |= {"created_at": time.time(), "step_time_s": 1 / rate}
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
            file.writelines(json.dumps(row) + "\n" for row in by_step.get(step, []))
            file.flush()
            for status in _live_status(root, step, total, started, rate):
                os.replace(status, root / "status.json")


def _live_status(root: Path, step: int, total: int, started: float, rate: float) -> Iterator[Path]:
    """A new status.json beside the old one, every other step and at the end."""
    if step % 2 and step != total:
        return
    state = "completed" if step == total else "training"
    values = {
        "schema_version": 1,
        "state": state,
        "phase": state,
        "step": step,
        "total_steps": total,
        "started_at": started,
        "updated_at": time.time(),
        "pid": os.getpid(),
        "model_name": "Qwen/Qwen3-8B",
        "eta_s": (total - step) / rate,
    }
    path = root / ".status"
    path.write_text(json.dumps(values))
    yield path


def main() -> int:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--live", type=int, metavar="PROMPTS", help="one run that grows")
    parser.add_argument("--rate", type=float, default=5.0, help="steps a second [5]")
    parser.add_argument("--every", type=int, default=25, help="steps between previews [25]")
    parser.add_argument("--seconds", type=float, default=60.0)
    words = parser.parse_args()
    if words.live is None:
        make_all(words.folder)
    else:
        grow(words.folder, words.live, words.rate, words.every, words.seconds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
