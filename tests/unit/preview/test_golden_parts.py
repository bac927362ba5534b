"""Golden tokens have their ids, bytes and part; profiles compared on one file ask the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.data_section import DataSection
from trainer.data.card_text import card_lines
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.streaming import prepare_stream
from trainer.preview.base import golden_figures
from trainer.preview.golden import golden_parts
from trainer.profiles import DataProfile, get_profile

ANSWER = "<<ANS_START>> caf\u00e9 \u2705 <<ANS_END>>"


def test_golden_tokens_carry_ids_bytes_and_which_of_them_are_the_frame(tokenizer: Any) -> None:
    ids = [*tokenizer.encode(ANSWER), tokenizer.eos_token_id]
    found = golden_parts(tokenizer, get_profile("regime3"), ids)
    assert found["golden_token_ids"] == tuple(ids)
    pieces = [bytes.fromhex(piece) for piece in found["golden_token_bytes"]]
    assert b"".join(pieces) == (ANSWER + "<|im_end|>").encode()
    assert "\u2705".encode() not in pieces  # it takes several tokens, whose texts cannot be read
    inner = [piece for piece, is_frame in zip(pieces, found["golden_is_frame"], strict=True)]
    said = b"".join(
        piece
        for piece, is_frame in zip(inner, found["golden_is_frame"], strict=True)
        if not is_frame
    )
    assert said.decode() == "caf\u00e9 \u2705", "spaces beside markers are of the frame"
    assert found["golden_is_frame"][-1] is True
    plain = golden_parts(tokenizer, get_profile("plain"), ids)
    assert sum(plain["golden_is_frame"]) == 1  # the end of the turn


def test_emoji_around_an_answer_are_its_frame(tokenizer: Any) -> None:
    profile = get_profile("emoji_think", {"think_range": [2, 2], "stop_range": [2, 2]})
    turns: list[Any] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    [_, answer] = profile.transform(turns, index=0, seed=0)
    ids = tokenizer.encode(answer["content"])
    found = golden_parts(tokenizer, profile, ids)
    kept = [
        one for one, is_frame in zip(ids, found["golden_is_frame"], strict=True) if not is_frame
    ]
    assert tokenizer.decode(kept).strip() == "yes"


@pytest.mark.parametrize("piece", ["<0xE2>", "\u2581word"])
def test_tokens_of_sentencepiece_are_bytes_too(piece: str) -> None:
    from types import SimpleNamespace

    from trainer.preview.golden import token_bytes

    tokenizer = SimpleNamespace(
        added_tokens_decoder={},
        convert_ids_to_tokens=lambda token: piece,
        backend_tokenizer=SimpleNamespace(decoder="Sequence(...)"),
    )
    assert token_bytes(tokenizer, 0) == {"<0xE2>": b"\xe2", "\u2581word": b" word"}[piece]


class OnePrompt(DataProfile):
    """Rewrites every second question to one and the same."""

    name = "one"

    def transform(self, messages: list[Any], *, index: int, seed: int) -> list[Any]:
        turns = [turn.copy() for turn in messages]
        if index % 2:
            turns[0]["content"] = "the same for all"
        return turns


def test_profiles_compared_on_one_file_are_asked_the_same_rows(
    write_rows: Callable[..., Path], tokenizer: Any
) -> None:
    rows = [{"question": f"what is {n}?", "answer": f"it is {n}"} for n in range(60)]
    section = DataSection(dataset_path=str(write_rows(rows)), validation_split=0.5, cache=False)

    def asked(profile: DataProfile) -> list[list[str]]:
        data = prepare_data(
            section,
            profile=profile,
            encoder=RowEncoder(tokenizer, 256),
            num_preview=6,
            num_score=6,
            num_final=20,
        )
        parts = (data.preview_prompts, data.score_prompts, data.final_prompts)
        return [[one.prompt_id for one in part] for part in parts]

    expected = asked(get_profile("plain"))
    assert [len(part) for part in expected] == [6, 6, 20]
    assert len({one for part in expected for one in part}) >= 30, "nothing is asked twice"
    assert asked(get_profile("regime3")) == expected
    assert asked(OnePrompt()) == expected


def test_the_golden_probability_is_that_of_what_the_answer_says() -> None:
    nats = [-0.0, -1.0, -2.0, -0.0]
    framed = golden_figures(nats, [True, False, False, True])
    assert framed["golden_probability"] == pytest.approx((math.exp(-1) + math.exp(-2)) / 2)
    assert framed["golden_logprobs"] == tuple(nats)
    assert golden_figures(nats, [True] * 4) == golden_figures(nats)


def test_the_final_evaluation_asks_what_nothing_else_asked_and_says_where_it_cannot(
    write_rows: Callable[..., Path], tokenizer: Any
) -> None:
    rows = [{"question": f"what is {n}?", "answer": f"it is {n}"} for n in range(60)]
    section = DataSection(dataset_path=str(write_rows(rows)), validation_split=0.5, cache=False)

    def prepared(num_final: int) -> RunData:
        encoder = RowEncoder(tokenizer, 256)
        return prepare_data(
            section, encoder=encoder, num_preview=6, num_score=6, num_final=num_final
        )

    few, many = prepared(10), prepared(25)
    asked = {one.prompt_id for one in (*few.preview_prompts, *few.score_prompts)}
    assert not asked & {one.prompt_id for one in few.final_prompts}
    assert few.card.num_final_asked == 0
    assert len(many.final_prompts) == 25
    assert many.card.num_final_asked == len(asked & {one.prompt_id for one in many.final_prompts})
    assert many.card.num_final_asked == 25 - (30 - 12)
    assert any(label == "final" for label, _ in card_lines(many.card))


def test_the_final_evaluation_of_a_stream_asks_what_nothing_else_asked(
    write_rows: Callable[..., Path], tokenizer: Any
) -> None:
    rows = [{"question": f"what is {n}?", "answer": f"it is {n}"} for n in range(60)]
    section = DataSection(dataset_path=str(write_rows(rows)), validation_split=0.5, cache=False)

    def prepared(num_final: int) -> tuple[int, int, int]:
        data = prepare_stream(
            section,
            encoder=RowEncoder(tokenizer, 256),
            num_preview=3,
            num_score=3,
            num_final=num_final,
        )
        asked = {one.prompt_id for one in (*data.preview_prompts, *data.score_prompts)}
        num_asked = len(asked & {one.prompt_id for one in data.final_prompts})
        return len(data.final_prompts), num_asked, data.card.num_final_asked

    assert prepared(5) == (5, 0, 0)
    num_final, num_asked, told = prepared(60)
    assert num_final < 60  # the held-out rows are fewer
    assert num_asked == told == 6


def test_rows_whose_question_is_blank_are_counted_on_the_card(
    write_rows: Callable[..., Path], tokenizer: Any
) -> None:
    rows = [
        {"question": "" if n < 3 else f"what is {n}?", "answer": f"it is {n}"} for n in range(9)
    ]
    section = DataSection(dataset_path=str(write_rows(rows)), cache=False)
    card = prepare_data(section, encoder=RowEncoder(tokenizer, 256)).card
    assert card.num_blank_questions == 3
    assert dict(card_lines(card))["blank"].startswith("3 rows with a user turn without text")
