"""The prompts of `monitoring.canary_set`: a built-in set, and files of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.counts import counted
from trainer.data.row_files import raw_rows
from trainer.data.rows import BadRowError
from trainer.errors import ConfigError, DataError
from trainer.preview.drift import MAX_PROMPTS
from trainer.profiles import Message

OFF, GENERAL = "off", "general"

GENERAL_PROMPTS = (
    "What is the capital of Portugal?",
    "Who wrote the play Hamlet?",
    "At what temperature does water boil at sea level?",
    "Which planet is the largest in the solar system?",
    "Why does the moon have phases? Answer in two sentences.",
    "What is 17 + 26?",
    "A train goes 60 km in 45 minutes. How many kilometres does it go in an hour?",
    "What is 15 % of 240?",
    "Translate into French: Where is the nearest train station?",
    "Translate into English: Der Hund schläft unter dem Tisch.",
    "¿Cuál es la capital de Italia?",
    "List three things that one needs to bake bread.",
    "Give the opposite of each word: hot, early, empty.",
    "Rewrite this politely: Send me the report now.",
    "Sum up in one sentence: The shop opened late, because its owner had missed the bus in the "
    "rain.",
    "Write a Python function that returns the largest number of a list.",
    "What does this shell command do: ls -l | wc -l",
    'Write a JSON object with the keys "name" and "age".',
    "Hi! How are you today?",
    "I slept badly and have a long day ahead. Any advice?",
)
"""The built-in set: facts, arithmetic, languages, instructions, code and small talk."""


def read_canary_set(name: str) -> list[list[Message]]:
    """The conversations to be answered; none where the set is `off`.

    Args:
        name: `off`, `general`, or a file of rows, each a JSON text, or an object with `prompt`,
            `question` or `messages`, whose last answers are left away.
    Raises:
        ConfigError: the file is not there, or a row of it is no prompt.
    """
    if name == OFF:
        return []
    if name == GENERAL:
        return [[Message(role="user", content=text)] for text in GENERAL_PROMPTS]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"monitoring.canary_set={name}: no such file. Give `off`, `general`, or a JSONL file "
            "of prompts."
        )
    try:
        found = [_conversation(row, where) for where, row in raw_rows(path)]
    except DataError as error:
        raise ConfigError(f"monitoring.canary_set: {error}") from error
    if not 0 < len(found) <= MAX_PROMPTS:
        raise ConfigError(
            f"monitoring.canary_set={name}: has {counted(len(found), 'prompt')}; give 1 to "
            f"{MAX_PROMPTS}."
        )
    return found


def _conversation(row: Any, where: str) -> list[Message]:
    """The turns of one row, up to the last one that is to be answered.

    Raises:
        ConfigError: it is no prompt.
    """
    if isinstance(row, BadRowError):
        raise ConfigError(f"monitoring.canary_set, {where}: {row}.")
    if isinstance(row, str):
        row = {"prompt": row}
    if isinstance(row, Mapping):
        text = row.get("prompt") or row.get("question")
        if isinstance(text, str) and text.strip():
            return [Message(role="user", content=text)]
        turns = row.get("messages")
        if isinstance(turns, list) and all(map(_is_turn, turns)):
            asked = [Message(role=one["role"], content=one["content"]) for one in turns]
            while asked and asked[-1]["role"] == "assistant":
                asked.pop()
            if asked:
                return asked
    raise ConfigError(
        f"monitoring.canary_set, {where}: no prompt. Give a JSON text, or an object with "
        '"prompt", "question" or "messages" (turns with a "role" and a text as "content").'
    )


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, Mapping)
        and turn.get("role") in ("system", "user", "assistant")
        and isinstance(turn.get("content"), str)
    )
