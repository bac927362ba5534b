"""N28: rows are trained as their flags say, and nothing that stands in a row is left out unsaid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.collected import collected
from trainer.config.data_section import DataSection
from trainer.data import dataset, encode, layouts, rendered, rows, turns
from trainer.data.dataset import RunData
from trainer.data.encode import RowEncoder
from trainer.data.row_files import to_rows
from trainer.data.rows import IGNORE_INDEX, RowErrors
from trainer.models.tiny import load_tiny_tokenizer
from trainer.profiles import DataProfile, Message, get_profile

TALK = [
    ("user", "first of all", {}),
    ("assistant", "alpha beta", {"train": False}),
    ("user", "and then", {}),
    ("assistant", "gamma delta", {"weight": 0.5}),
    ("user", "at last", {}),
    ("assistant", "omega", {}),
]
ROW: dict[str, Any] = {
    "messages": [{"role": role, "content": text, **flags} for role, text, flags in TALK]
}


def encoded(row: dict[str, Any], *, max_length: int = 256, **options: Any) -> Any:
    errors = RowErrors("strict")
    found, _ = collected(to_rows([("f:1", row)], "f", "auto", errors, None))
    errors.raise_if_strict()
    return RowEncoder(load_tiny_tokenizer(), max_length, **options).encode(found[0].messages)


def by_hand(
    talk: list[tuple[str, str, dict[str, Any]]],
) -> tuple[list[int], list[int], list[float]]:
    """Ids, labels and weights of a ChatML conversation, written down without the package."""
    tokenizer = load_tiny_tokenizer()
    ids: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    for role, text, flags in talk:
        head = tokenizer(f"<|im_start|>{role}\n", add_special_tokens=False)["input_ids"]
        body = tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"]
        tail = tokenizer("\n", add_special_tokens=False)["input_ids"]
        weight = flags.get("weight", float(flags.get("train", role == "assistant")))
        ids += head + body + tail
        trained = body if weight else [IGNORE_INDEX] * len(body)
        labels += [IGNORE_INDEX] * len(head) + trained + [IGNORE_INDEX] * len(tail)
        weights += [0.0] * len(head) + [weight] * len(body) + [0.0] * len(tail)
    return ids, labels, weights


def check_weights() -> None:
    """Labels and loss weights of each token are those written down by hand, cut or not."""
    ids, labels, weights = by_hand(TALK)
    example = encoded(ROW)
    assert (example.input_ids, example.labels, example.weights) == (ids, labels, weights)
    kept = encoded(ROW, max_length=len(ids) - 3, truncation="keep_end")
    assert (kept.labels, kept.weights) == (labels[3:], weights[3:])


def test_n28_flags_and_fractions_become_labels_and_weights() -> None:
    check_weights()


def check_golden() -> None:
    """The golden answer is the first one that is trained; what stands before it is its prompt."""
    example = encoded(ROW)
    ids, labels, _ = by_hand(TALK)
    first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    assert example.prompt_ids == ids[:first]
    assert (example.prompt, example.golden_answer) == ("and then", "gamma delta")
    assert load_tiny_tokenizer().decode(example.golden_ids) == "gamma delta<|im_end|>"


def test_n28_the_golden_answer_is_a_trained_one() -> None:
    check_golden()


def check_same_without_flags() -> None:
    """Rows without flags, or with flags that are all on, have no weights at all."""
    bare = [(role, text, {}) for role, text, _ in TALK]
    row = {"messages": [{"role": role, "content": text} for role, text, _ in bare]}
    for given in (row, {**row, "loss_mask": [1, 1, 1]}, {**row, "weight": 1.0}):
        example = encoded(given)
        assert (example.labels, example.weights) == (by_hand(bare)[1], None)


def test_n28_without_flags_every_answer_counts_alike() -> None:
    check_same_without_flags()


def test_n28_a_texts_weight_is_on_each_of_its_tokens() -> None:
    example = encoded({"text": "alpha beta gamma", "weight": 0.25})
    trained = [label != IGNORE_INDEX for label in example.labels]
    assert trained == [False, *[True] * (len(trained) - 1)]
    assert example.weights == [0.25 * is_trained for is_trained in trained]


SYSTEM = {"question": "who?", "answer": "me", "system_prompt": "pirate", "seen": 1, "id": "x"}


def prepared(path: Path, profile: str | DataProfile = "plain", **data: Any) -> RunData:
    return dataset.prepare_data(
        DataSection(dataset_path=str(path), cache=False, **{"validation_split": 0, **data}),
        profile=get_profile(profile) if isinstance(profile, str) else profile,
        encoder=RowEncoder(load_tiny_tokenizer(), 256),
        system_prompt=None,
        is_prompt_configured=False,
        seed=1,
        num_preview=2,
    )


def check_nothing_unsaid(path: Path) -> None:
    """Every value of a row is in its text, or its key is named on the card with its count."""
    data = prepared(path)
    text = "".join(part for part, _ in data.card.sample)
    for key, value in SYSTEM.items():
        assert str(value) in text or data.card.unused_keys.get(key) == 2, key


@pytest.fixture
def two_rows(write_rows: Callable[..., Path]) -> Path:
    return write_rows([SYSTEM, {**SYSTEM, "answer": "you"}])


def test_n28_every_value_of_a_row_is_trained_read_or_named(two_rows: Path) -> None:
    check_nothing_unsaid(two_rows)


# ---- mutants


def killed(check: Callable[[], None]) -> None:
    with pytest.raises(AssertionError):
        check()


def test_mutant_n28_flags_ignored_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "turn_weight", lambda *args: None)
    killed(check_weights)


def test_mutant_n28_flags_obeyed_backwards_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = turns.turn_weight

    def backwards(*args: Any) -> float | None:
        weight = original(*args)
        return None if weight is None else 1 - weight

    monkeypatch.setattr(turns, "turn_weight", backwards)
    killed(check_weights)


def test_mutant_n28_fractions_forgotten_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "kept_weights", lambda *args: None)
    killed(check_weights)


def test_mutant_n28_weights_cut_at_the_wrong_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = encode.cut

    def shifted(ids: Any, labels: Any, length: int, how: str) -> Any:
        kept_ids, kept_labels = original(ids, labels, length, how)
        return kept_ids, [*kept_labels[1:], IGNORE_INDEX]

    monkeypatch.setattr(encode, "cut", shifted)
    killed(check_weights)


def test_mutant_n28_an_untrained_golden_answer_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_of_all(trained: Any, labels: Any, removed: int) -> tuple[int, int]:
        return 1, trained[0][1] - 20

    monkeypatch.setattr(encode, "_first_whole_answer", first_of_all)
    killed(check_golden)


def test_mutant_n28_weights_of_one_kept_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        encode, "kept_weights", lambda weights, labels: weights or [1.0] * len(labels)
    )
    killed(check_same_without_flags)


def test_mutant_n28_system_of_a_row_dropped_is_killed(
    two_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "_with_system", lambda row, messages, notes: messages)
    killed(lambda: check_nothing_unsaid(two_rows))


def test_mutant_n28_unused_keys_in_silence_is_killed(
    two_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows.RowNotes, "note_unused", lambda self, key: None)
    killed(lambda: check_nothing_unsaid(two_rows))


# ---- rendered text


def check_rendered() -> None:
    """Text that the template wrote gives the ids and labels of the turns it was made of."""
    tokenizer = load_tiny_tokenizer()
    encoder = RowEncoder(tokenizer, 256)
    talk = [Message(role=role, content=text) for role, text, _ in TALK]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    found = rendered.TemplateReader(encoder).read(text, "<|im_end|>")
    one, two = encoder.encode(found), encoder.encode(talk)
    assert (one.input_ids, one.labels) == (two.input_ids, two.labels)


def test_n28_rendered_text_is_trained_as_its_turns() -> None:
    check_rendered()


def test_mutant_n28_roles_of_rendered_text_shifted_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = rendered.TemplateReader.read

    def shifted(self: Any, text: str, token: str) -> list[Message]:
        found = original(self, text, token)
        names = {"user": "assistant", "assistant": "user"}
        moved = [Message(role=names[turn["role"]], content=turn["content"]) for turn in found]
        return [found[0], *moved]

    monkeypatch.setattr(rendered.TemplateReader, "read", shifted)
    killed(check_rendered)
