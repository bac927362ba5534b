"""Pieces of a stream add up to the whole text, whatever the tokens and stop strings are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.server.completions import safe_length, stop_position
from trainer.server.token_watch import TextPieces


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def streamed(tokenizer: Any, ids: Sequence[int]) -> str:
    pieces = TextPieces(tokenizer)
    return "".join(pieces.next(ids[:count]) for count in range(1, len(ids) + 1))


@given(st.lists(st.integers(0, 299), max_size=40))
@settings(max_examples=100, deadline=None)
def test_what_was_sent_is_always_the_beginning_of_the_whole(tokenizer: Any, ids: list[int]) -> None:
    assert decoded(tokenizer, ids).startswith(streamed(tokenizer, ids))


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_text_is_sent_whole_and_never_with_half_a_character(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    pieces = TextPieces(tokenizer)
    sent = [pieces.next(ids[:count]) for count in range(1, len(ids) + 1)]
    assert "".join(sent) == decoded(tokenizer, ids).rstrip("\ufffd")
    assert not any("\ufffd" in piece for piece in sent if "\ufffd" not in text)


@pytest.fixture(scope="module")
def byte_fallback() -> Any:
    """A tokenizer as Llama's: marked spaces, and bytes for characters that it does not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    vocab = {name: index for index, name in enumerate(names)}
    merges = [("\u2581", "a")]
    core = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@given(st.lists(st.integers(1, 260), max_size=30))
@settings(max_examples=150, deadline=None)
def test_bytes_that_turn_out_wrong_later_are_not_sent_early(
    byte_fallback: Any, ids: list[int]
) -> None:
    assert decoded(byte_fallback, ids).startswith(streamed(byte_fallback, ids))


STOPS = st.lists(st.text("ab\u00e9", min_size=1, max_size=3), max_size=3)


@given(st.lists(st.text("ab\u00e9", max_size=3), max_size=12), STOPS)
@settings(max_examples=200, deadline=None)
def test_nothing_behind_the_beginning_of_a_stop_string_is_sent(
    pieces: list[str], stops: list[str]
) -> None:
    whole = "".join(pieces)
    end, text, sent = stop_position(whole, stops), "", 0
    for piece in pieces:
        text += piece
        if any(stop in text for stop in stops):
            whole, end = text, stop_position(text, stops)
        now = safe_length(text, stops)
        assert now >= sent or not stops
        sent = max(sent, now)
        if any(stop in text for stop in stops):
            break  # generation ends with the token that completes a stop string
    assert sent <= end
    assert whole[:sent] == whole[:end][:sent]


def test_stop_strings_are_cut_and_their_beginnings_held_back() -> None:
    assert stop_position("one two one", ["two", "one"]) == 0
    assert stop_position("abc", ["x"]) == 3
    assert safe_length("hello wor", ["world"]) == 6
    assert safe_length("hello world!", ["world"]) == 6
    assert safe_length("hello", []) == 5
