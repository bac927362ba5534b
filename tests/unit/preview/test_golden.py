"""The golden answer is what was trained, and an answer that says it matches, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.data_section import DataSection
from trainer.data.dataset import prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.rows import golden_text
from trainer.preview import base, local
from trainer.preview.base import PreviewRequest, PreviewResult, is_match
from trainer.preview.generate import Generation
from trainer.preview.local import LocalPreviewBackend
from trainer.profiles import Message, get_profile

CALLS = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' -}}"
    "{%- if m['role'] == 'assistant' -%}{% generation %}"
    "{%- if m['reasoning_content'] -%}<think>{{- m['reasoning_content'] -}}</think>{%- endif -%}"
    "{{- m['content'] | trim -}}"
    "{%- for c in m['tool_calls'] or [] -%}"
    "<tool_call>{{- c['function']['name'] + ' ' + c['function']['arguments'] | tojson -}}"
    "</tool_call>"
    "{%- endfor -%}{{- '<|im_end|>' -}}{% endgeneration %}"
    "{%- else -%}{{- m['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    "{#- {{ tools }} -#}{%- if tools -%}{{- '' -}}{%- endif -%}"
)
MARKERS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALL_TEXT = '<tool_call>weather {"city": "Oslo"}</tool_call>'


@pytest.fixture(params=["special", "added", "text"])
def caller(request: Any, make_tokenizer: Callable[..., Any]) -> Any:
    """A tokenizer to which the markers of calls and thoughts are special tokens, tokens or text."""
    tokenizer = make_tokenizer(CALLS)
    if request.param != "text":
        tokenizer.add_tokens(MARKERS, special_tokens=request.param == "special")
    return tokenizer


def said(*, content: str = "", calls: bool = False) -> list[Message]:
    answer = Message(role="assistant", content=content)
    if calls:
        answer["tool_calls"] = [CALL]
    return [Message(role="user", content="weather?"), answer]


def encoded(tokenizer: Any, row: list[Message]) -> Any:
    return RowEncoder(tokenizer, 256).encode(row)


@pytest.mark.parametrize(
    ("row", "golden"),
    [
        (said(calls=True), CALL_TEXT),
        (said(content="Let me look.", calls=True), f"Let me look.{CALL_TEXT}"),
        (said(content="It rains."), "It rains."),
        (said(content="  spaced \n"), "spaced"),
        (
            said(content="\u4f60\u597d, na\u00efve \U0001f600 'it s'"),
            "\u4f60\u597d, na\u00efve \U0001f600 'it s'",
        ),
        (said(content="a . b , c ! don 't"), "a . b , c ! don 't"),
    ],
)
def test_golden_is_what_is_trained_without_its_stop(
    caller: Any, row: list[Message], golden: str
) -> None:
    example = encoded(caller, row)
    assert example.golden_answer == golden
    ids = example.golden_ids
    assert ids[-1] == caller.eos_token_id
    assert caller.decode(ids[:-1], clean_up_tokenization_spaces=False) == golden


def test_golden_of_a_row_that_was_cut_ends_where_training_ends(tokenizer: Any) -> None:
    row = said(content="the quick brown fox " * 9)
    example = RowEncoder(tokenizer, 24).encode(row)
    assert row[1]["content"].startswith(example.golden_answer)
    assert 0 < len(example.golden_answer) < len(row[1]["content"]) / 2


def test_golden_of_plain_text_is_the_rest_of_the_row(tokenizer: Any) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    example = RowEncoder(tokenizer, 64).encode([Message(role="text", content=text)])
    assert example.prompt + example.golden_answer == text
    assert example.conversation == ()


# ---- compared


def answered(
    monkeypatch: pytest.MonkeyPatch,
    make_model: Callable[..., Any],
    tokenizer: Any,
    example: Any,
    ids: list[int],
    profile: str = "plain",
) -> PreviewResult:
    """The result of a model that generates `ids` and stops."""
    monkeypatch.setattr(
        local, "generate", lambda *_, **__: [Generation(ids, [*ids, tokenizer.eos_token_id], True)]
    )
    backend = LocalPreviewBackend(
        model=make_model(vocab_size=len(tokenizer)),
        tokenizer=tokenizer,
        profile=get_profile(profile),
    )
    request = PreviewRequest(
        prompt=example.prompt,
        prompt_token_ids=tuple(example.prompt_ids),
        golden_answer=example.golden_answer,
        golden_token_ids=tuple(example.golden_ids),
    )
    [result] = backend.preview_batch([request], 1)
    return result


@pytest.mark.parametrize("profile", ["plain", "regime3", "emoji_think"])
@pytest.mark.parametrize("content", ["", "Let me look."])
def test_a_perfect_call_matches_and_nothing_is_flagged(
    monkeypatch: pytest.MonkeyPatch, make_model: Any, caller: Any, profile: str, content: str
) -> None:
    example = encoded(caller, said(content=content, calls=True))
    right = example.golden_ids[:-1]
    result = answered(monkeypatch, make_model, caller, example, right, profile)
    assert (result.text, result.matches, result.health) == (example.golden_answer, True, ())
    assert result.raw_text == f"{result.text}<|im_end|>"
    for wrong in (" \n\t", "", "weather Oslo", example.golden_answer.replace("Oslo", "Rome")):
        ids = caller(wrong, add_special_tokens=False)["input_ids"]
        result = answered(monkeypatch, make_model, caller, example, ids, profile)
        assert result.matches is False


def test_a_special_token_that_no_golden_answer_has_is_still_a_leak(
    monkeypatch: pytest.MonkeyPatch, make_model: Any, caller: Any
) -> None:
    example = encoded(caller, said(calls=True))
    start = caller.convert_tokens_to_ids("<|im_start|>")
    result = answered(monkeypatch, make_model, caller, example, [start, *example.golden_ids[:-1]])
    assert (result.matches, result.health) == (False, ("template_leak",))


@pytest.mark.parametrize("golden", ["", " ", "\n\t"])
def test_nothing_matches_a_blank_golden_answer(golden: str) -> None:
    for answer in ("", " ", "\n\t", "x", golden):
        request = PreviewRequest(prompt="p", golden_answer=golden, golden_token_ids=(5,))
        assert is_match(request, answer, lambda a, b: a.split() == b.split()) is False
    assert is_match(PreviewRequest(prompt="p"), "x", str.__eq__) is None


def test_previews_ask_with_the_whole_conversation_also_from_the_cache(
    write_rows: Callable[..., Path], caller: Any, tmp_path: Path
) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    turns = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ]
    path = write_rows([{"messages": turns, "tools": tools}])
    for _ in range(2):
        data = prepare_data(
            DataSection(dataset_path=str(path), validation_split=0, cache_dir=str(tmp_path / "c")),
            profile=get_profile("plain"),
            encoder=RowEncoder(_with_tools(caller), 256),
            system_prompt="Be terse.",
            is_prompt_configured=True,
            seed=0,
            num_preview=1,
        )
        [request] = data.preview_prompts
        assert [turn["role"] for turn in request.messages] == ["system", "user"]
        assert request.messages[0]["content"] == "Be terse."
        assert request.messages[1]["tools"] == tools
        assert request.golden_answer == CALL_TEXT
        assert data.train_texts == (("weather?", CALL_TEXT),)
    assert data.card.cache.startswith("read from")


def _with_tools(tokenizer: Any) -> Any:
    """A template that writes the tools, as one that does not is refused for such rows."""
    tokenizer.chat_template = "{{- (tools | tojson) if tools else '' -}}" + CALLS
    return tokenizer


# ---- mutants


def test_mutant_specials_skipped_in_answers_only_is_killed(
    monkeypatch: pytest.MonkeyPatch, make_model: Any, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer(CALLS)
    tokenizer.add_tokens(MARKERS, special_tokens=True)
    init = LocalPreviewBackend.__init__
    monkeypatch.setattr(
        LocalPreviewBackend,
        "__init__",
        lambda self, **options: init(self, **options, with_special_tokens=False),
    )
    with pytest.raises(AssertionError):
        test_a_perfect_call_matches_and_nothing_is_flagged(
            monkeypatch, make_model, tokenizer, "plain", ""
        )


def test_mutant_golden_with_its_stop_token_is_killed(
    monkeypatch: pytest.MonkeyPatch, make_model: Any, make_tokenizer: Callable[..., Any]
) -> None:
    from trainer.data import encode

    monkeypatch.setattr(encode, "golden_text", lambda t, ids, stop_ids: golden_text(t, ids, ()))
    with pytest.raises(AssertionError):
        test_a_perfect_call_matches_and_nothing_is_flagged(
            monkeypatch, make_model, make_tokenizer(CALLS), "plain", ""
        )


def test_mutant_blank_equals_blank_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        globals(), "is_match", lambda request, text, compare: compare(text, request.golden_answer)
    )
    assert base.is_match is not is_match
    with pytest.raises(AssertionError):
        test_nothing_matches_a_blank_golden_answer(" ")
