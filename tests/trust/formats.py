"""An independent judge for the chat templates that TRL ships: each family's format as a pattern.

Written by hand from what the formats say. It shares no code with `trainer/data`: every match of a
pattern in the rendered text is an answer, and its group is what the model writes.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

from trainer.models.tiny import load_tiny_tokenizer

FOLDER = files("trl") / "chat_templates"
NAMES = sorted(
    path.name.removesuffix(".jinja")
    for path in FOLDER.iterdir()
    if path.name.endswith(".jinja") and not path.name.endswith("_training.jinja")
)
BAR, LOW = "\N{FULLWIDTH VERTICAL LINE}", "\N{LOWER ONE EIGHTH BLOCK}"
CONTROL = (
    rf"<\|\w+\|>|<{BAR}[^{BAR}\s]+{BAR}>|</?\w+_of_(?:turn|utterance)>|<\|\w+>|<\w+\|>|<\|\"\|>"
    r"|\[gMASK\]|<sop>"
)
IM = r"<\|im_start\|>assistant\n"
HEADER = r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n"
CHATBOT = r"<\|CHATBOT_TOKEN\|>"
RESULT = r"<tool_response\|>(?!<\|tool_response>|<\|turn>)"
CALL = rf"\n<{BAR}tool{LOW}call{LOW}begin{BAR}>"
DEEPSEEK = (
    rf"(?:<{BAR}Assistant{BAR}>|<{BAR}tool{LOW}outputs{LOW}end{BAR}>"
    rf"|<{BAR}tool{LOW}output{LOW}end{BAR}>(?={CALL}))"
)
PATTERNS = {
    "cohere": rf"{CHATBOT}(.*?<\|END_OF_TURN_TOKEN\|>)",
    "cohere2": rf"{CHATBOT}<\|START_RESPONSE\|>(.*?<\|END_OF_TURN_TOKEN\|>)",
    "deepseek": rf"{DEEPSEEK}(.*?<{BAR}end{LOW}of{LOW}sentence{BAR}>)",
    "gemma": r"<start_of_turn>model\n(.*?<end_of_turn>)",
    # Behind a result the prompt has no header, and opens a thought where thinking is on.
    "gemma4": (
        rf"(?:<\|turn>model\n|{RESULT}(?:<\|channel>thought\n)?)"
        r"(.*?(?:<\|tool_response>|<turn\|>))"
    ),
    # Here the row has a header there, which the prompt leaves to the model.
    "diffusion_gemma": (
        r"(?:<tool_response\|>(?!<\|tool_response>)|<\|turn>model\n)"
        r"(.*?(?:<\|tool_response>|<turn\|>))"
    ),
    "glm4moe": r"<\|assistant\|>(?:\n<think></think>)?(.*?(?:<\|user\|>|<\|observation\|>|$))",
    "gptoss": (
        r"<\|start\|>assistant((?:<\|channel\|>analysis.*?<\|end\|><\|start\|>assistant)?"
        r".*?(?:<\|return\|>|<\|call\|>|<\|end\|>))"
    ),
    "idefics3": r"Assistant:(.*?<end_of_utterance>)",
    "lfm2": rf"{IM}(.*?<\|im_end\|>)",
    "llama3": rf"{HEADER}(.*?<\|eot_id\|>)",
    "llava_next": r" \[/INST\](.*?</s>)",
    "muse_glimmer": r"<\|start\|>assistant(.*?<\|eot\|>)",
    "nemotron": rf"{IM}(?:<think></think>|<think>\n)(.*?<\|im_end\|>)",
    "phi3": r"<\|assistant\|>\n(.*?<\|end\|>)",
    "qwen": rf"{IM}(?:<think>\n\n</think>\n\n)?(.*?<\|im_end\|>)",
    "qwen3_5": rf"{IM}(?:<think>\n\n</think>\n\n|<think>\n)?(.*?<\|im_end\|>)",
    "qwen3_6": rf"{IM}(?:<think>\n\n</think>\n\n|<think>\n)?(.*?<\|im_end\|>)",
    "qwen3_8": rf"{IM}(?:<think>\n\n</think>\n\n|<think>\n)?(.*?<\|im_end\|>)",
    "smolvlm": r"Assistant:(.*?<end_of_utterance>)",
}
EOS = {"cohere": "<|END_OF_TURN_TOKEN|>", "cohere2": "<|END_OF_TURN_TOKEN|>",
       "deepseek": f"<{BAR}end{LOW}of{LOW}sentence{BAR}>"}  # fmt: skip
TAKES_PARTS = ("idefics3", "llava_next", "smolvlm")
ARGUMENTS_AS_TEXT = ("deepseek",)


def pattern_of(name: str) -> str:
    """The pattern of the longest family name that the template's begins with."""
    return PATTERNS[max((f for f in PATTERNS if name.startswith(f)), key=len)]


def source_of(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_with(name: str, *, is_plain: bool = False) -> Any:
    """The built-in tokenizer with a shipped template and, unless plain, its control tokens."""
    text = source_of(name)
    tokenizer = load_tiny_tokenizer()
    control = r"<\|im_\w+\|>" if is_plain else CONTROL
    tokens: list[Any] = sorted(set(re.findall(control, text)))
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    eos = next((eos for family, eos in EOS.items() if name.startswith(family)), "</s>")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": eos})
    tokenizer.chat_template = text
    return tokenizer


def text_of(tokenizer: Any, name: str, row: list[Any], *, thinking: bool = False) -> str:
    """What the model's own template makes of a row, spelled by hand as the template wants it."""
    tools = row[0].get("tools")
    turns = [_turn(name, turn) for turn in row]
    text: str = tokenizer.apply_chat_template(
        turns, tools=tools, tokenize=False, enable_thinking=thinking
    )
    return text


def _turn(name: str, turn: dict[str, Any]) -> dict[str, Any]:
    content = turn["content"]
    if name.startswith(TAKES_PARTS):
        content = [{"type": "text", "text": content}]
    return {**turn, "content": content}


def expected_trained(
    tokenizer: Any, name: str, row: list[Any], *, thinking: bool = False
) -> list[int | None]:
    """For each token of the row its id where it must be trained, else None."""
    text = text_of(tokenizer, name, row, thinking=thinking)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ranges = [match.span(1) for match in re.finditer(pattern_of(name), text, re.DOTALL)]
    answers = [turn for turn in row if turn["role"] == "assistant"]
    assert len(ranges) == len(answers), (name, text)
    return [
        token if any(begin < right and left < end for begin, end in ranges) else None
        for token, (left, right) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    ]
