"""An independent judge for the chat templates that TRL ships: each family's format as a pattern.

Written by hand from what the formats say. It shares no code with `trainer/data`: every match of a
pattern in the rendered text is an answer, and its group is what the model writes.
"""

from __future__ import annotations

import json
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
NO_PLACE_FOR_THOUGHTS = (
    *("cohere", "gemma3", "idefics3", "llama3", "llava_next", "phi3", "qwen2_5"),
    *("qwen3_instruct", "qwen3_vl", "smolvlm"),
)  # fmt: skip
NO_PLACE_EXACTLY = {"gemma", "lfm2", "lfm2_v2"}


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
    has_place = not name.startswith(NO_PLACE_FOR_THOUGHTS) and name not in NO_PLACE_EXACTLY
    if "reasoning_content" in turn and not has_place:
        behind = f"\n\n{content}" if content else ""
        content = f"<think>\n{turn['reasoning_content']}\n</think>{behind}"
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


# ---- conversations as agents have them


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, arguments: Any, number: int = 1) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call0000{number}", "type": "function", "function": function}


def result(content: str, name: str, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "content": content, "name": name, "tool_call_id": f"call0000{number}"}


WEATHER = call("weather", {"city": "Oslo", "days": 2})
CLOCK = call("clock", {"city": "Rome"}, 2)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": "look it up", "parameters": PARAMETERS},
    }
    for name in ("weather", "clock")
]
ASKED = [user("rain in Oslo?"), says("", tool_calls=[WEATHER]), result("drizzle", "weather")]
AGENT = [*ASKED, says("A light drizzle."), user("and so?"), says("Take a coat.")]
CALLING: dict[str, list[Any]] = {
    "agent": AGENT,
    "system": [{"role": "system", "content": "be brief"}, *AGENT],
    "tools": [{**AGENT[0], "tools": TOOLS}, *AGENT[1:]],
    "parallel": [
        user("both?"),
        says("", tool_calls=[WEATHER, CLOCK]),
        result("drizzle", "weather"),
        result("noon", "clock", 2),
        says("Drizzle at noon."),
    ],
    "sequence": [
        *ASKED,
        says("", tool_calls=[CLOCK]),
        result("noon", "clock", 2),
        says("Drizzle at noon."),
    ],
    "words": [
        user("rain?"),
        says("Let me look.", tool_calls=[WEATHER]),
        result("drizzle", "weather"),
        says("Drizzle."),
    ],
    "ends with a call": ASKED[:2],
}
TALKING: dict[str, list[Any]] = {
    "many": [user("hi"), says("hello there"), user("bye"), says("so long")],
    "two in a row": [user("first"), says("alpha beta"), says("gamma"), user("then"), says("delta")],
}
THINKING: dict[str, list[Any]] = {
    "thought": [user("a sum"), says("twelve", reasoning_content="five and seven")],
    "thoughts": [
        user("first sum"),
        says("twelve", reasoning_content="five and seven"),
        user("second sum"),
        says("sixteen", reasoning_content="nine and seven"),
    ],
    "thought and call": [
        user("rain?"),
        says("", tool_calls=[WEATHER], reasoning_content="I must look"),
        result("drizzle", "weather"),
        says("Drizzle.", reasoning_content="seen it"),
    ],
}
SHAPES = {**CALLING, **TALKING, **THINKING}


def spelled(row: list[Any], form: str) -> list[Any]:
    """The row with the arguments of its calls as an object or as JSON text."""
    turns = []
    for turn in row:
        if form == "text" and "tool_calls" in turn:
            turn = {**turn, "tool_calls": [_as_text(one) for one in turn["tool_calls"]]}
        turns.append(turn)
    return turns


def _as_text(one: dict[str, Any]) -> dict[str, Any]:
    function = one["function"]
    return {**one, "function": {**function, "arguments": json.dumps(function["arguments"])}}


NO_CALLS = {
    *("cohere", "cohere2", "deepseek_r1_distill", "gemma", "gemma3", "idefics3", "lfm2", "llama3"),
    *("llava_next", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm"),
}
ALTERNATING = {"cohere", "cohere2", "gemma", "gemma3"}
WORDS_BEHIND_RESULTS = {"diffusion_gemma", "gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5"}
DROPS_LAST_THOUGHT = {"deepseek_r1_distill", "deepseekv3", "gemma4", "gemma4_v2", "gemma4_v3",
                      "gemma4_v4"}  # fmt: skip


def refusal_of(name: str, shape: str) -> str | None:
    """What the refusal of a row must say; None where it must be trained."""
    if shape in THINKING and name in DROPS_LAST_THOUGHT:
        return "has a thought, which the model's chat template does not write there"
    if name in NO_CALLS and (shape in CALLING or shape == "thought and call"):
        return "does not write|refuses these turns: (Conversation|Only user|System role)"
    known = {
        "parallel": ({"gptoss", "llama3_1", "llama3_2"}, r"does not write \(call 2\)|single tool-"),
        "words": (WORDS_BEHIND_RESULTS, "after the turns that follow it"),
        "tools": ({"deepseekv3"}, "defines the tools 'clock', which the model's chat template"),
        "thought and call": ({"diffusion_gemma"}, "not a prefix of the whole row"),
        "two in a row": (ALTERNATING, "roles must alternate"),
    }
    names, words = known.get(shape, (set(), ""))
    return words if name in names else None


# Where the second of two answers in a row has no header of its own.
IN_A_ROW = {
    "diffusion_gemma": "alpha betagamma<turn|>delta<turn|>",
    "gemma4": "alpha beta<turn|>gamma<turn|>delta<turn|>",
    "gemma4_v3": "alpha beta<turn|>gamma<turn|>delta<turn|>",
    "gemma4_v4": "alpha beta<turn|>gamma<turn|>delta<turn|>",
    "gemma4_v5": "alpha betagamma<turn|>delta<turn|>",
    "glm4moe": "\nalpha beta\ngamma<|user|>\ndelta",
    "llava_next": " alpha beta</s> gamma</s> delta</s>",
}
