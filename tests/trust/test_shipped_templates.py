"""N9 over the chat templates that TRL ships: trained are answers and one stop.

Conversations of agents, and the formats that write more round an answer: `test_agent_shapes.py`.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import pytest

from trainer.data.encode import RowEncoder
from trainer.data.rows import IGNORE_INDEX, BadRowError
from trainer.models.tiny import load_tiny_tokenizer

FOLDER = files("trl") / "chat_templates"
NAMES = sorted(
    path.name.removesuffix(".jinja")
    for path in FOLDER.iterdir()
    if path.name.endswith(".jinja") and not path.name.endswith("_training.jinja")
)
# What their models write round an answer, or ends it, is in `formats.py`.
WITH_MORE_ROUND_ANSWERS = {"gptoss", "idefics3", "muse_glimmer", "smolvlm"}
NO_SYSTEM = {"gemma": "System role not supported"}
SHAPES = {
    "one": [("user", "what is 12?"), ("assistant", "a dozen eggs")],
    "many": [
        ("user", "first of all"),
        ("assistant", "alpha beta"),
        ("user", "and then"),
        ("assistant", "gamma, delta"),
    ],
    "system": [("system", "be brief now"), ("user", "say"), ("assistant", "pelican")],
}
BAR = "\N{FULLWIDTH VERTICAL LINE}"
CONTROL = rf"<\|\w+\|>|<{BAR}[^{BAR}\s]+{BAR}>|</?\w+_of_turn>|<\|turn>|<turn\|>|\[gMASK\]|<sop>"


def tokenizer_with(name: str) -> Any:
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = load_tiny_tokenizer()
    tokens: list[Any] = sorted(set(re.findall(CONTROL, text)))
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = text
    return tokenizer


def trained_stretches(tokenizer: Any, labels: list[int]) -> list[str]:
    stretches: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORE_INDEX:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(ids) for ids in stretches if ids]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_MORE_ROUND_ANSWERS])
def test_n9_shipped_template_trains_the_answers_and_one_stop(name: str) -> None:
    tokenizer = tokenizer_with(name)
    encoder = RowEncoder(tokenizer, 2048)
    for shape, pairs in SHAPES.items():
        row: list[Any] = [{"role": role, "content": content} for role, content in pairs]
        if shape == "system" and name in NO_SYSTEM:
            with pytest.raises(BadRowError, match=NO_SYSTEM[name]):
                encoder.encode(row)
            continue
        example = encoder.encode(row)
        answers = [content for role, content in pairs if role == "assistant"]
        found = trained_stretches(tokenizer, example.labels)
        assert len(found) == len(answers)
        for text, answer in zip(found, answers, strict=True):
            before, _, after = text.partition(answer)
            assert before.strip() == ""
            assert after.strip() in {*tokenizer.all_special_tokens, ""}
            assert after.strip() or not example.ends_with_stop
