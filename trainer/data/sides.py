"""Which encoded rows are trained on, how often, which are held out, and which are asked.

All of it is decided from a few numbers of each row, for any number of rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.config.data_section import DataSection
from trainer.counts import counted
from trainer.data.encoded import EncodedRows, RowReader
from trainer.data.rows import PreviewRequest, golden_ids
from trainer.data.sources import Source
from trainer.errors import DataError
from trainer.net import names_without_secrets

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sides:
    """Numbers of examples among all of a run, and how they were parted."""

    train: Array
    """As often as data.weights says."""
    validation: Array
    how: str
    """How rows were held out, in words."""
    mix: str
    """How often the rows of each file are trained, in words; empty: once each."""
    is_trained_too: Array
    """Of each held-out example: its prompt is trained on too, with whatever answer."""


def part_rows(
    section: DataSection, sources: list[Source], rows: EncodedRows, seed: int
) -> Sides | None:
    """Hold rows out and repeat the others; None where no row is left to train.

    Raises:
        DataError: nothing is left to train or to validate on where something must be.
    """
    train, validation, how = split_rows(section, rows, seed)
    if not len(train):
        return None
    mixed, mix = weigh_rows(sources, rows, train)
    return Sides(mixed, validation, how, mix, trained_too(rows, validation, train))


def is_in(values: Array, wanted: Array) -> Array:
    """Whether each value is one of those wanted; numpy's own takes several times the memory."""
    if not len(wanted):
        return np.zeros(len(values), bool)
    ordered = np.sort(wanted)
    places = np.searchsorted(ordered, values)
    np.minimum(places, len(ordered) - 1, out=places)
    found: Array = ordered[places] == values
    return found


def is_first(rows: EncodedRows) -> Array:
    """Whether each example is the first one of its row: a text can be several (windows)."""
    found = np.ones(len(rows), bool)
    np.not_equal(rows.row[1:], rows.row[:-1], out=found[1:])
    return found


def num_rows(rows: EncodedRows, examples: Array) -> int:
    """How many rows some examples are of, each as often as its first one is there."""
    return int(is_first(rows)[examples].sum())


def split_rows(section: DataSection, rows: EncodedRows, seed: int) -> tuple[Array, Array, str]:
    """Training examples, validation examples, and how they were parted, in words."""
    of_training = np.arange(rows.num_of_training)
    none = of_training[:0]
    if section.validation_path is not None:
        name = names_without_secrets(section.validation_path)
        held_out = np.arange(rows.num_of_training, len(rows))
        if not len(held_out):
            raise DataError(f"{name}: no usable row to validate on.")
        return of_training, held_out, f"all rows of {name}"
    if not section.validation_split:
        return of_training, none, "none (data.validation_split=0); previews use training prompts"
    is_held = _is_held(section, rows)
    train, validation = of_training[~is_held], of_training[is_held]
    share = f"{section.validation_split:.1%}"
    if min(num_rows(rows, train), num_rows(rows, validation)) < 2:
        count = num_rows(rows, of_training)
        why = (
            f"none: {share} of {counted(count, 'row')} would leave fewer than two for "
            "training or for validation; previews use training prompts (set "
            "data.validation_path, or raise data.validation_split)"
        )
        return of_training, none, why
    return (
        train,
        validation,
        f"{share} of the rows, chosen by a hash of the prompt and seed {seed}; rows with the same "
        "prompt stay together",
    )


def _wanted(section: DataSection, count: int) -> float:
    """How many of so many rows are to be held out."""
    return round(section.validation_split * count, 6)


def largest_unit(section: DataSection, count: int) -> float:
    """Rows that may move to one side together: more would decide the share by chance."""
    return max(_wanted(section, count) / 2, 1)


def _is_held(section: DataSection, rows: EncodedRows) -> Array:
    """Whether each example is held out: units with the smallest hashes, up to the wanted number.

    So the order of the file does not matter, and rows added to it hardly change who is held out. A
    unit is what goes to one side together: rows of one prompt, or, where too many share one, of
    one content.
    """
    keys, groups = rows.keys[: rows.num_of_training], rows.groups[: rows.num_of_training]
    starts = is_first(rows)[: rows.num_of_training]
    has_windows = not starts.all()
    if has_windows:  # rows are parted, and their windows stay with them
        keys, groups = keys[starts], groups[starts]
    count = len(keys)
    wanted, largest = _wanted(section, count), largest_unit(section, count)
    different, sizes = np.unique(groups, return_counts=True)
    units = np.where(is_in(groups, different[sizes > largest]), keys, groups)
    different, sizes = np.unique(units, return_counts=True)
    is_small = sizes <= largest  # others are the same row again and again
    different, sizes = different[is_small], sizes[is_small]
    taken = np.cumsum(sizes) - sizes  # before each
    is_enough = taken + sizes / 2 >= wanted
    num_held = int(np.argmax(is_enough)) if is_enough.any() else len(different)
    is_held = is_in(units, different[:num_held])
    return is_held[np.cumsum(starts) - 1] if has_windows else is_held


def shared_prompts(section: DataSection, rows: EncodedRows) -> tuple[Array, Array]:
    """Prompts that too many rows share to stand on one side, most rows first.

    Returns:
        How many rows each has, and its first example.
    """
    if section.validation_path is not None or not section.validation_split:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    groups, starts = rows.groups[: rows.num_of_training], is_first(rows)[: rows.num_of_training]
    has_windows = not starts.all()
    if has_windows:
        groups = groups[starts]
    _, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    large = np.flatnonzero(sizes > largest_unit(section, len(groups)))
    if has_windows:
        first = np.flatnonzero(starts)[first]
    order = large[np.lexsort((first[large], -sizes[large]))]
    return sizes[order], first[order]


def trained_too(rows: EncodedRows, validation: Array, train: Array) -> Array:
    """Whether the prompt of each held-out example is trained on too, with whatever answer."""
    groups, asked, is_text = rows.groups, rows.asked, rows.is_plain_text()
    found = is_in(groups[validation], groups[train])
    # Prompts of other turns can be the same tokens: cut at max_length, or rewritten by a profile.
    ours, theirs = validation[~is_text[validation]], train[~is_text[train]]
    same = ours[is_in(asked[ours], asked[theirs])]
    return found | is_in(groups[validation], groups[same])


def weigh_rows(sources: list[Source], rows: EncodedRows, train: Array) -> tuple[Array, str]:
    """The training examples as often as data.weights says, and that in words."""
    if all(source.weight == 1 for source in sources):
        return train, ""
    starts = is_first(rows)
    chosen, words = [], []
    for number, source in enumerate(sources):
        own = train[rows.source[train] == number]
        times, share = divmod(source.weight, 1)
        # Which rows are in the part: by content, so that the order of the file does not matter.
        first = own[starts[own]]
        by_key = first[np.argsort(rows.keys[first], kind="stable")]
        part = own[is_in(rows.row[own], rows.row[by_key[: round(share * len(first))]])]
        used = [*[own] * int(times), part]
        count = sum(int(starts[each].sum()) for each in used)
        rows_words = counted(count, "row")
        words.append(f"{source.name} x {source.weight:g} ({len(first):,} -> {rows_words})")
        chosen += used
    if not sum(map(len, chosen)):
        raise DataError(
            f"data.weights leaves no training row ({', '.join(words)}); raise a weight."
        )
    return np.concatenate(chosen), ", ".join(words)


@dataclass(frozen=True)
class AskedPrompts:
    """The prompts of a run, each of one row."""

    previews: tuple[PreviewRequest, ...]
    scores: tuple[PreviewRequest, ...]
    """Others than those of the previews."""
    final: tuple[PreviewRequest, ...]
    num_final_asked: int
    """Of the final evaluation: how many previews or scores ask too, as there are no others."""


def choose_prompts(
    rows: EncodedRows,
    sides: Sides,
    reader: RowReader,
    counts: tuple[int, int, int],
    sayer: Callable[..., Callable[[list[int]], str]],
) -> AskedPrompts:
    """The prompts of previews, scores and the final evaluation.

    The last one asks what nobody has looked at yet, as far as there are rows for that.

    Args:
        counts: of previews, scores and the final evaluation.
        sayer: as `RowEncoder.sayer`.
    """
    num_preview, num_score, num_final = counts
    found = first_prompts(rows, sides, reader, sum(counts), sayer)
    before, left = found[: num_preview + num_score], found[num_preview + num_score :]
    return AskedPrompts(
        previews=before[:num_preview],
        scores=before[num_preview:],
        final=(*left, *before)[:num_final],
        num_final_asked=min(max(num_final - len(left), 0), len(before)),
    )


def first_prompts(
    rows: EncodedRows,
    sides: Sides,
    reader: RowReader,
    count: int,
    sayer: Callable[..., Callable[[list[int]], str]],
) -> tuple[PreviewRequest, ...]:
    """The first `count` distinct prompts, those that are nowhere trained on before the others.

    They are of held-out rows, or of training rows where none are held out; always the same. Which
    these are is decided by the rows as they are in the file: profiles that are compared on one file
    are asked the same rows, also where one of them rewrites two prompts to the same.

    Args:
        sayer: as `RowEncoder.sayer`.
    """
    is_held_out = len(sides.validation) > 0
    items = sides.validation if is_held_out else np.unique(sides.train)
    groups = rows.groups
    is_trained = is_in(groups[items], groups[sides.train])
    order = np.lexsort((items, rows.keys[items], groups[items], is_trained))
    _, first = np.unique(groups[items[order]], return_index=True)
    chosen = order[np.sort(first)[:count]]
    is_also = sides.is_trained_too if is_held_out else np.zeros(len(items), bool)
    source = "validation" if is_held_out else "train"
    prompts = []
    for place in chosen.tolist():
        number = int(items[place])
        ids = reader.ids(number)
        length = int(rows.prompt_lengths[number])
        golden = golden_ids(reader.labels(number), length)
        conversation = reader.conversation(number)
        prompts.append(
            PreviewRequest(
                prompt=reader.prompt(number),
                prompt_token_ids=tuple(ids[:length]),
                golden_answer=sayer(is_plain_text=not conversation)(golden),
                prompt_id=f"{source}-{rows.index[number]}",
                held_out=is_held_out and not (is_trained[place] or is_also[place]),
                golden_token_ids=tuple(golden) or None,
                messages=tuple(dict(turn) for turn in conversation),
                row=json.loads(json.dumps(reader.columns(number), default=str)),
            )
        )
    return tuple(prompts)
