"""Split, data card, preview prompts: by content, counted, always the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.data_section import DataSection
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.errors import ConfigError, DataError
from trainer.profiles import DataProfile, get_profile


@pytest.fixture
def prepare(tokenizer: Any) -> Callable[..., RunData]:
    def run(
        path: Path, *, profile: str | DataProfile = "plain", max_length: int = 256, **changes: Any
    ) -> RunData:
        options = {
            "system_prompt": None,
            "is_prompt_configured": False,
            "seed": 1,
            "num_preview": 3,
        }
        section = {k: changes.pop(k) for k in list(changes) if k not in options}
        return prepare_data(
            DataSection(dataset_path=str(path), **section),
            profile=get_profile(profile) if isinstance(profile, str) else profile,
            encoder=RowEncoder(tokenizer, max_length),
            **{**options, **changes},
        )

    return run


def rows_of(count: int) -> list[dict[str, str]]:
    return [{"question": f"q{n}", "answer": f"a{n}"} for n in range(count)]


def test_the_split_is_by_content_not_by_position(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path]
) -> None:
    rows = rows_of(60)
    one = prepare(write_rows(rows), validation_split=0.2)
    two = prepare(write_rows(rows[::-1], "reversed.jsonl"), validation_split=0.2)
    assert {p.prompt for p in one.preview_prompts} == {p.prompt for p in two.preview_prompts}
    assert one.card.num_validation_rows == two.card.num_validation_rows > 1


def test_equal_rows_are_never_on_both_sides(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path]
) -> None:
    data = prepare(write_rows(rows_of(30) * 2), validation_split=0.3)
    validation = {
        tuple(data.validation[i]["input_ids"].tolist()) for i in range(len(data.validation))
    }
    train = {tuple(data.train[i]["input_ids"].tolist()) for i in range(len(data.train))}
    assert validation
    assert not validation & train
    assert data.card.num_duplicates == 30


@pytest.mark.parametrize(("count", "num_held_out"), [(1, 0), (2, 0), (3, 0), (4, 2), (40, 20)])
def test_fewer_than_two_held_out_rows_means_none_and_says_so(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path], count: int, num_held_out: int
) -> None:
    data = prepare(write_rows(rows_of(count)), validation_split=0.5)
    assert data.card.num_validation_rows == num_held_out
    assert len(data.train) == count - num_held_out
    assert data.card.validation.startswith("none") == (num_held_out == 0)
    assert all(prompt.held_out == (num_held_out > 0) for prompt in data.preview_prompts)


class Emptying(DataProfile):
    """Leaves nothing of answers that begin with x; of all turns where they begin with y."""

    name = "emptying"

    def clean(self, text: str) -> str:
        return "" if text.startswith("x") else text

    def transform(self, messages: Any, *, index: int, seed: int) -> Any:
        return [] if messages[1]["content"].startswith("y") else messages


def test_a_row_of_which_the_profile_leaves_nothing_to_train_is_rejected_and_named(
    tokenizer: Any, write_rows: Callable[..., Path]
) -> None:
    path = write_rows([{"question": "q", "answer": answer} for answer in ("a", "x", "y", "b")])
    data = prepare_data(
        DataSection(dataset_path=str(path), on_bad_row="skip", validation_split=0, cache=False),
        profile=Emptying(),
        encoder=RowEncoder(tokenizer, 64),
        system_prompt="s",
        is_prompt_configured=False,
        seed=1,
        num_preview=1,
    )
    assert [golden for _, golden in data.train_texts] == ["a", "b"]
    assert data.card.rejected == {"empty assistant turn": 1, "no assistant turn": 1}
    assert data.card.rejected_examples[0].startswith(f"{path}:2: after profile 'emptying': ")


def test_no_usable_row_is_an_error(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match="nothing to train"):
        prepare(write_rows(["nope"]), on_bad_row="skip")


def test_skipped_rows_are_counted_in_the_card(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path]
) -> None:
    card = prepare(write_rows([*rows_of(5), "nope"]), on_bad_row="skip", validation_split=0).card
    assert (card.num_rows, card.num_train_rows, card.num_rejected) == (6, 5, 1)
    assert card.rejected == {"not JSON": 1}
    assert card.rejected_examples[0].split(": ")[0].endswith(":6")


def test_the_card_counts_tokens_as_a_hand_count_does(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path], tokenizer: Any
) -> None:
    data = prepare(write_rows(rows_of(4)), validation_split=0)
    answers = [tokenizer.encode(f"a{n}<|im_end|>", add_special_tokens=False) for n in range(4)]
    assert data.card.num_trained_tokens == sum(map(len, answers))
    assert data.card.num_tokens == sum(data.train.lengths)
    assert data.card.is_stop_trained


def test_the_system_prompt_is_put_before_rows_that_bring_none(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path], tokenizer: Any
) -> None:
    own = {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")]}
    bare = {"messages": own["messages"][1:]}
    data = prepare(write_rows([own, bare]), system_prompt="Be terse.", validation_split=0)
    texts = [tokenizer.decode(data.train[i]["input_ids"]) for i in range(2)]
    assert texts[0].startswith("<|im_start|>system\nsystem<|im_end|>")
    assert texts[1].startswith("<|im_start|>system\nBe terse.<|im_end|>")
    assert data.card.num_own_system == 1


def test_a_configured_system_prompt_that_no_row_would_use_is_an_error(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path]
) -> None:
    own = {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")]}
    with pytest.raises(ConfigError, match="every row"):
        prepare(write_rows([own, own]), system_prompt="x", is_prompt_configured=True)


def test_validation_path_is_used_whole_and_leaks_are_counted(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path]
) -> None:
    held_out = write_rows([*rows_of(2), {"question": "new", "answer": "x"}], "val.jsonl")
    data = prepare(write_rows(rows_of(5)), validation_path=str(held_out))
    assert (len(data.train), len(data.validation)) == (5, 3)
    assert data.card.num_leaked == 2


def test_regime3_rows_are_trained_with_their_markers(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path]
) -> None:
    data = prepare(write_rows(rows_of(3)), profile="regime3", validation_split=0)
    assert data.card.sample[1] == ("<<ANS_START>> a0 <<ANS_END>><|im_end|>", True)


def test_two_preparations_give_the_same_tokens_in_the_same_order(
    prepare: Callable[..., RunData], qa_file: Path
) -> None:
    assert prepare(qa_file).train.fingerprint() == prepare(qa_file).train.fingerprint()
    assert prepare(qa_file).train.fingerprint() != prepare(qa_file, seed=2).train.fingerprint()


TOOLS_TEMPLATE = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' -}}"
    "{%- if m['role'] == 'assistant' -%}{% generation %}{{- m['content'] -}}"
    "{%- for call in m.get('tool_calls', []) -%}{{- 'CALL ' + call['function']['name'] -}}"
    "{{- call['function']['arguments'] | tojson -}}"
    "{%- endfor -%}{{- '<|im_end|>' -}}{% endgeneration %}{{- '\n' -}}"
    "{%- else -%}{{- m['content'] + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "x"}}}
TOOL_ROW = {
    "messages": [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "yes", "name": "weather"},
        {"role": "assistant", "content": "It rains."},
    ]
}


def test_tool_calls_are_trained_and_a_tools_answer_is_not(
    make_tokenizer: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    data = prepare_data(
        DataSection(dataset_path=str(write_rows([TOOL_ROW])), validation_split=0, cache=False),
        profile=get_profile("plain"),
        encoder=RowEncoder(make_tokenizer(TOOLS_TEMPLATE), 256),
        system_prompt=None,
        is_prompt_configured=False,
        seed=1,
        num_preview=1,
    )
    trained = [text for text, is_trained in data.card.sample if is_trained]
    assert trained == ['CALL weather{"place": "x"}<|im_end|>', "It rains.<|im_end|>"]


class ForgetfulProfile(DataProfile):
    """Makes new turns and forgets what else they brought."""

    def transform(self, messages: list[Any], *, index: int, seed: int) -> list[Any]:
        return [{"role": turn["role"], "content": turn["content"] or "."} for turn in messages]


def test_tool_calls_that_the_template_or_the_profile_loses_are_bad_rows(
    prepare: Callable[..., RunData], write_rows: Callable[..., Path]
) -> None:
    path = write_rows([TOOL_ROW])
    with pytest.raises(DataError, match="does not write"):
        prepare(path)
    with pytest.raises(DataError, match="tool calls were lost"):
        prepare(path, profile=ForgetfulProfile())


def test_rows_that_differ_in_spacing_only_stand_on_one_side(
    prepare: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    rows = rows_of(30)
    spaced = [{key: f" {text}  " for key, text in row.items()} for row in rows]
    data = prepare(write_rows([*rows, *spaced]), validation_split=0.3)
    held_out = len(data.validation)
    assert held_out == 2 * round(0.3 * 30)
    assert data.card.num_duplicates == 30

    def words(dataset: Any) -> set[str]:
        decode = data.encoder.tokenizer.decode
        return {
            "".join(decode(dataset[i]["input_ids"].tolist()).split()) for i in range(len(dataset))
        }

    assert not words(data.validation) & words(data.train)
