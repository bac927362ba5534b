"""Score functions as users write them, good ones and bad ones."""

from __future__ import annotations

import asyncio
import os
import sys
import time
import zlib
from typing import Any


def is_short(completion: str, golden_answer: str) -> bool:
    return len(completion) <= len(golden_answer)


def everything(
    completion: str, golden_answer: str, prompt: str, messages: Any, row: Any, step: int
) -> float:
    assert messages[-1]["content"] == prompt
    assert (completion, golden_answer) == ("it is 4", "4")
    return float(step + row["points"])


def trl_reward(
    completions: list[list[dict[str, str]]], prompts: Any, solution: list[str], **kwargs: Any
) -> list[float | None]:
    assert len(prompts) == len(completions) == len(kwargs["points"])
    contents = [completion[0]["content"] for completion in completions]
    return [float(s in text) if s else None for text, s in zip(contents, solution, strict=True)]


async def trl_async(completions: Any, **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return [0.5] * len(completions)


async def correct_answer(completion: Any, answer: str, state: dict[str, Any]) -> float:
    """As verifiers has it: a rubric's reward function."""
    await asyncio.sleep(0)
    assert state["prompt"][-1]["role"] == "user"
    response = completion[-1]["content"]
    return 1.0 if answer in response else 0.0


def no_score(completion: str) -> None:
    return None


def no_number(completion: str) -> Any:
    return "good"


def not_finite(completion: str) -> float:
    return float("nan")


def unknown(completion: str, temperature: float) -> float:
    return temperature


# ---- what goes wrong


def raises(completion: str) -> float:
    raise KeyError("no such thing")


def hangs(completion: str) -> float:
    while True:
        time.sleep(1)


def forks(completion: str, step: int) -> float:
    os.fork()
    return float(step)


def forks_and_stays(completion: str) -> float:
    if os.fork() == 0:
        time.sleep(1000)
    return 0.25


def forks_and_exits(completion: str) -> float:
    if os.fork() == 0:
        time.sleep(1000)  # it holds the pipe that the score would come by
    os._exit(3)


def prints(completion: str) -> float:
    print("x" * 10_000_000)
    sys.stderr.write("y" * 10_000_000)
    os.write(1, b"z" * 10_000_000)
    return 0.75


def exits(completion: str) -> float:
    os._exit(7)


def exits_politely(completion: str) -> float:
    sys.exit(3)


SHARES = {0: 0, 2: 0, 4: 50, 6: 100}
"""Step -> percent of the prompts that `planned` calls right; the last one from there on."""


def planned(prompt: str, step: int) -> bool:
    """Right for more prompts at later steps, whatever the answer is."""
    share = SHARES.get(step, 100)
    return zlib.crc32(prompt.encode()) % 100 < share


def planned_slowly(prompt: str, step: int) -> bool:
    time.sleep(0.03)
    return planned(prompt, step)


def planned_with_a_gap(prompt: str, step: int) -> bool:
    """As `planned`, but it fails at step 8."""
    if step == 8:
        raise ValueError("nothing at step 8")
    return planned(prompt, step)
