"""An independent judge of what is trained: finds answers in the rendered TEXT, by their headers.

It shares no code with `trainer/data`: the text is searched with `str.find`, and characters become
tokens through the tokenizer's own offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.models.tiny import load_tiny_tokenizer

TEMPLATES = Path(__file__).with_name("chat_templates")


@dataclass(frozen=True)
class Family:
    """What a family's public format says, written down by hand."""

    name: str
    headers: tuple[str, ...]
    """What stands in the prompt right before an answer, the longest first."""
    stop: str
    special: tuple[str, ...] = ()
    eos: str = "</s>"
    bos: str | None = None
    takes_tools: bool = True
    keeps_thought: str = "all"
    """`all`, `last` (answer only) or `none`."""
    last_stop: bool = True
    """Whether the last answer is followed by a stop token."""

    def tokenizer(self) -> Any:
        """The built-in tokenizer with this family's tokens and template."""
        tokenizer = load_tiny_tokenizer()
        tokens: list[Any] = [*self.special, self.stop]
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        named = {"eos_token": self.eos, **({"bos_token": self.bos} if self.bos else {})}
        tokenizer.add_special_tokens(named)
        tokenizer.chat_template = (TEMPLATES / f"{self.name}.jinja").read_text()
        return tokenizer


IM = ("<|im_start|>assistant\n",)
FAMILIES = (
    Family("chatml", IM, "<|im_end|>", eos="<|endoftext|>"),
    Family("chatml_markers", IM, "<|im_end|>", eos="<|im_end|>"),
    Family(
        "qwen3",
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", *IM),
        "<|im_end|>",
        eos="<|im_end|>",
        keeps_thought="last",
    ),
    Family("llama2", (" [/INST]",), "</s>", bos="<s>", takes_tools=False),
    Family(
        "llama3",
        ("<|start_header_id|>assistant<|end_header_id|>\n\n",),
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
        eos="<|end_of_text|>",
        bos="<|begin_of_text|>",
    ),
    Family(
        "gemma",
        ("<start_of_turn>model\n",),
        "<end_of_turn>",
        ("<start_of_turn>",),
        eos="<eos>",
        bos="<bos>",
    ),
    Family(
        "mistral",
        ("[/INST]", "[/TOOL_RESULTS]"),
        "</s>",
        ("[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        bos="<s>",
    ),
    Family(
        "phi3",
        ("<|assistant|>\n",),
        "<|end|>",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"),
        eos="<|endoftext|>",
    ),
    Family("zephyr", ("<|assistant|>\n",), "</s>", bos="<s>"),
    Family("deepseek", ("<Assistant>",), "<end>", ("<User>", "<Assistant>"), eos="<end>",
           bos="<begin>", keeps_thought="none"),
    Family("vicuna", ("ASSISTANT:",), "</s>", bos="<s>"),
    Family(
        "command_r",
        ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",),
        "<|END_OF_TURN_TOKEN|>",
        ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        eos="<EOS>",
        bos="<BOS>",
    ),
    Family(
        "glm4",
        ("<|assistant|>\n",),
        "<|user|>",
        ("[gMASK]", "<sop>", "<|assistant|>", "<|system|>", "<|observation|>"),
        eos="<|endoftext|>",
        last_stop=False,
    ),
    Family(
        "granite",
        ("<|start_of_role|>assistant<|end_of_role|>",),
        "<|end_of_text|>",
        ("<|start_of_role|>", "<|end_of_role|>"),
        eos="<|end_of_text|>",
    ),
)  # fmt: skip


def turn(role: str, content: str) -> Any:
    return {"role": role, "content": content}


THOUGHT = "<think>\nseven and nine?\n</think>\n\nsixteen it is"
SHAPES: dict[str, list[Any]] = {
    "one": [turn("user", "what is 12?"), turn("assistant", "a dozen eggs")],
    "many": [
        turn("user", "first of all"),
        turn("assistant", "alpha beta"),
        turn("user", "and then"),
        turn("assistant", "gamma, delta"),
        turn("user", "at last"),
        turn("assistant", "omega 99"),
    ],
    "system": [
        turn("system", "be brief now"),
        turn("user", "say the word"),
        turn("assistant", "pelican"),
    ],
    "tools": [
        turn("user", "rain in Oslo?"),
        turn("assistant", "call weather(Oslo)"),
        turn("tool", "drizzle, 7 degrees"),
        turn("assistant", "a light drizzle"),
    ],
    "think": [
        turn("user", "first sum"),
        turn("assistant", THOUGHT.replace("sixteen", "twelve").replace("nine", "five")),
        turn("user", "second sum"),
        turn("assistant", THOUGHT),
    ],
}


def answer_of(family: Family, content: str, is_last: bool) -> str:
    """The part of an answer that the family's format keeps."""
    kept = {"all": True, "last": is_last, "none": False}[family.keeps_thought]
    return content if kept or "</think>" not in content else content.split("</think>")[1].strip()


def character_ranges(family: Family, text: str, row: Sequence[Any]) -> list[tuple[int, int]]:
    """Where the model must write: from the end of a header to the end of the stop token."""
    ranges, at = [], 0
    last = len(row) - 1
    for position, message in enumerate(row):
        if message["role"] != "assistant":
            continue
        answer = answer_of(family, message["content"], position == last)
        start = text.find(answer, at)
        assert start >= 0, f"{family.name}: {answer!r} is not in {text[at:]!r}"
        end = start + len(answer)
        begin = max(
            start - (len(gap) - len(gap.lstrip()))
            for header in family.headers
            if (gap := _gap(text[:start], header)) is not None
        )
        if position != last or family.last_stop:
            stop = family.stop if not _next_is_tool(row, position) else _tool_stop(family)
            end = text.index(stop, end) + len(stop)
        ranges.append((begin, end))
        at = end - (len(family.stop) if not family.last_stop else 0)
    return ranges


def _next_is_tool(row: Sequence[Any], position: int) -> bool:
    return position + 1 < len(row) and row[position + 1]["role"] == "tool"


def _tool_stop(family: Family) -> str:
    return family.stop if family.last_stop else "<|observation|>"


def _gap(before: str, header: str) -> str | None:
    """The spacing between a header and an answer; None if the header does not come last."""
    at = before.rfind(header)
    gap = before[at + len(header) :] if at >= 0 else None
    return gap if gap is not None and not gap.strip() else None


def expected_trained(family: Family, tokenizer: Any, row: list[Any]) -> list[int | None]:
    """For each token of the row its id where it must be trained, else None."""
    text = tokenizer.apply_chat_template(row, tokenize=False, enable_thinking=False)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ranges = character_ranges(family, text, row)
    return [
        token if any(begin < right and left < end for begin, end in ranges) else None
        for token, (left, right) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    ]
