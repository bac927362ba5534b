"""`prepare_data`: the rows of a run, from the cache or read, split and encoded, and packed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from trainer.config.schema import DataSection
from trainer.counts import counted
from trainer.data.batches import EncodedDataset, PackedDataset
from trainer.data.cache import Arrays, FileArrays, entry_of
from trainer.data.card import DataCard, draw_card, num_own_system
from trainer.data.encode import RowEncoder
from trainer.data.encode_processes import prepare_rows
from trainer.data.preparer import Preparer
from trainer.data.rendered import check_markers_used, read_back
from trainer.data.rows import PreviewRequest, Row, RowErrors, RowTooLongError, is_text
from trainer.data.sources import (
    EncodedRow,
    Sides,
    Source,
    find_sources,
    first_prompts,
    read_sources,
    split_rows,
    trained_groups,
    weigh_rows,
)
from trainer.data.train_texts import TrainTexts
from trainer.errors import ConfigError, DataError
from trainer.profiles import DataProfile, get_profile


@dataclass(frozen=True)
class _Texts:
    """The part of a run's data that the cache holds as JSON."""

    preview_prompts: tuple[PreviewRequest, ...]
    """Held-out prompts (training rows where none are held out), always the same ones."""
    final_prompts: tuple[PreviewRequest, ...]
    """Prompts of the final evaluation."""
    score_prompts: tuple[PreviewRequest, ...]
    """Held-out prompts that are answered for scores only: none of the preview prompts."""
    card: DataCard
    system_prompt: str | None
    file_hashes: dict[str, str]
    """sha256 of each data file."""


@dataclass(frozen=True)
class RunData(_Texts):
    """What a run trains on, measures on and shows."""

    train: EncodedDataset
    validation: EncodedDataset | None
    train_texts: TrainTexts
    """(prompt, golden answer) of each training row."""
    encoder: RowEncoder


_TEXTS = TypeAdapter(_Texts)


def prepare_data(
    section: DataSection,
    *,
    encoder: RowEncoder,
    profile: DataProfile | None = None,
    system_prompt: str | None = None,
    is_prompt_configured: bool = False,
    seed: int = 42,
    num_preview: int = 0,
    num_final: int = 0,
    num_score: int = 0,
    with_columns: bool = False,
    offline: bool = False,
) -> RunData:
    """Read, split and encode the rows of section `data`, or take them from the cache.

    Args:
        section: files, format, split and policy.
        encoder: tokenizer, template and max_length.
        profile: rewrites the rows; None: `plain`, which leaves them as they are.
        system_prompt: system turn of rows that bring none.
        is_prompt_configured: the user set it, so that it must have an effect.
        seed: of the split and of the profile's transform.
        num_preview: held-out prompts for previews.
        num_final: held-out prompts for the final evaluation.
        num_score: held-out prompts for scores, others than those of previews.
        with_columns: prompts keep all that the file says of their row.
        offline: never ask the hub for a dataset.
    Raises:
        DataError: missing file, bad rows under `strict`, or nothing to train.
        ConfigError: an option that would have no effect on these rows.
    """
    sources = find_sources(section.dataset_path, section.weights, offline=offline)
    held_out: list[Source] = []
    if section.validation_path is not None:
        held_out = find_sources(section.validation_path, offline=offline)
    options: dict[str, Any] = {
        "profile": profile or get_profile("plain"),
        "encoder": encoder,
        "system_prompt": system_prompt,
        "is_prompt_configured": is_prompt_configured,
        "seed": seed,
        "num_preview": num_preview,
        "num_final": num_final,
        "num_score": num_score,
        "with_columns": with_columns,
    }
    hashes = {source.name: source.content_hash() for source in [*sources, *held_out]}
    entry, note = entry_of(section, hashes, options)
    if entry is not None:
        arrays, note = entry.read()
        if arrays is not None:
            return _with_note(_from_arrays(arrays, encoder), note)
    with _rows_unscanned():
        data = encode_data(section, sources, held_out, **options)
    if entry is not None:
        # A file that was written to meanwhile must not be kept under its earlier content.
        is_same = data.file_hashes == hashes
        changed = "not written: a file changed while read"
        is_written, note = (
            entry.write(_as_arrays(data), note, _about(data.card)) if is_same else (False, changed)
        )
        if is_written:  # from here on the rows are in the file, and no longer in memory
            with contextlib.suppress(OSError):  # another run removed it already
                data = _from_arrays(entry.arrays(), encoder)
    return _with_note(data, note)


@contextlib.contextmanager
def _rows_unscanned() -> Iterator[None]:
    """Rows pile up, and none of them is garbage: looking through all of them again and again would
    take a fifth of the time."""
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, 2**30)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)


def _with_note(data: RunData, note: str) -> RunData:
    """The data with what its card says of the cache."""
    return replace(data, card=replace(data.card, cache=note))


def pack_training_rows(data: RunData) -> RunData:
    """The same data with its training rows packed; a pack goes by its first row's text."""
    packed = PackedDataset(data.train, data.encoder.max_length)
    return replace(
        data,
        train=packed,
        train_texts=data.train_texts.of([pack[0] for pack in packed.packs]),
        card=replace(data.card, num_packs=len(packed.packs)),
    )


# ---- reading, splitting and encoding


def encode_data(
    section: DataSection,
    sources: list[Source],
    validation_sources: list[Source],
    *,
    profile: DataProfile,
    encoder: RowEncoder,
    system_prompt: str | None,
    is_prompt_configured: bool,
    seed: int,
    num_preview: int,
    num_final: int = 0,
    num_score: int = 0,
    with_columns: bool = False,
) -> RunData:
    """Read the sources and encode every row; the rest is as in `prepare_data`.

    Args:
        sources: of the training rows.
        validation_sources: of `data.validation_path`; empty: some training rows are held out.
    """
    errors = RowErrors(section.on_bad_row, section.max_bad_rows)
    rows, validation_rows, formats = _read(
        section, sources, validation_sources, encoder, errors, with_columns=with_columns
    )
    _check_fit(section.dataset_path, rows, profile, is_prompt_configured=is_prompt_configured)
    preparer = Preparer(profile, encoder, system_prompt, seed)
    dropped: list[int] = []
    encoded, held_out = _encoded(section, [rows, validation_rows], preparer, errors, dropped)
    errors.raise_if_strict()
    sides = _sides(section, sources, encoded, held_out, seed=seed)
    if sides is None:
        raise DataError(
            f"{section.dataset_path}: nothing to train: {counted(len(errors.errors), 'row')} "
            f"rejected ({'; '.join(errors.errors[:3])}), {len(dropped)} longer than "
            f"hyperparams.max_length={encoder.max_length} and dropped."
        )
    _check_thoughts(section, [*encoded, *held_out])
    card = draw_card(
        section,
        rows,
        sides,
        formats=formats,
        encoder=encoder,
        profile=profile,
        profile_report=preparer.report(),
        system_prompt=system_prompt,
        rejected=errors,
        dropped=dropped,
    )
    train = [item.example for item in sides.train]
    validation = [item.example for item in sides.validation]
    files = [*sources, *validation_sources]
    dataset = EncodedDataset(train)
    return RunData(
        train=dataset,
        validation=EncodedDataset(validation) if validation else None,
        preview_prompts=_prompts(sides, num_preview),
        final_prompts=_prompts(sides, num_final),
        score_prompts=_prompts(sides, num_preview + num_score)[num_preview:] if num_score else (),
        train_texts=TrainTexts.from_examples(train, dataset, encoder),
        card=card,
        encoder=encoder,
        system_prompt=system_prompt,
        file_hashes={source.name: source.content_hash() for source in files},
    )


def _read(
    section: DataSection,
    sources: list[Source],
    validation_sources: list[Source],
    encoder: RowEncoder,
    errors: RowErrors,
    *,
    with_columns: bool,
) -> tuple[list[Row], list[Row], str]:
    """Rows to train, rows of the validation files, and the layouts of the former."""
    kept = {"with_columns": with_columns}
    rows, formats = read_sources(sources, section, errors, max_rows=section.max_rows, **kept)
    held_out, _ = read_sources(validation_sources, section, errors, max_rows=None, **kept)
    rows = read_back(rows, encoder, errors, section.text_markers)
    held_out = read_back(held_out, encoder, errors, section.text_markers)
    check_markers_used([*rows, *held_out], section.text_markers)
    return rows, held_out, formats


def _encoded(
    section: DataSection,
    sides: list[list[Row]],
    preparer: Preparer,
    errors: RowErrors,
    dropped: list[int],
) -> list[list[EncodedRow]]:
    """The usable rows of each side, encoded.

    Args:
        errors: receives the rows that cannot be used.
        dropped: receives the length in tokens of each row that is dropped for its length.
    """
    rows = [(row.index, row.messages) for side in sides for row in side]
    outcomes = iter(prepare_rows(preparer, rows, section.encode_processes))
    encoded = []
    for side in sides:
        found = [(row, next(outcomes)) for row in side]
        for is_profiles in (True, False):
            for row, outcome in found:
                error = outcome.error
                if error is None or outcome.is_profiles != is_profiles:
                    continue
                if isinstance(error, RowTooLongError):
                    dropped.append(error.num_tokens)
                else:
                    errors.add(row.where, str(error), error.reason)
        encoded.append(
            [
                EncodedRow(row, outcome.key, outcome.example, outcome.group)
                for row, outcome in found
                if outcome.example is not None
            ]
        )
    return encoded


def _sides(
    section: DataSection,
    sources: list[Source],
    encoded: list[EncodedRow],
    held_out: list[EncodedRow],
    *,
    seed: int,
) -> Sides | None:
    """Hold rows out and repeat the others; None where no row is left to train."""
    train, validation, how = split_rows(section, encoded, held_out, seed)
    if not train:
        return None
    mixed, mix = weigh_rows(sources, train)
    return Sides(encoded, held_out, mixed, validation, how, mix, trained_groups(validation, train))


def _prompts(sides: Sides, count: int) -> tuple[PreviewRequest, ...]:
    """Prompts of held-out rows, or of training rows where none are held out; always the same."""
    items = sorted(sides.validation or sides.train, key=lambda item: (item.group, item.key))
    return first_prompts(
        items,
        count,
        bool(sides.validation),
        trained=frozenset(item.group for item in sides.train),
        also_trained=sides.trained_groups,
    )


def _check_thoughts(section: DataSection, encoded: list[EncodedRow]) -> None:
    """Refuse data.train_on_thinking=false where no row has a thought."""
    if not section.train_on_thinking and not any(item.example.num_thoughts for item in encoded):
        raise ConfigError(
            f"data.train_on_thinking=false, but no row of {section.dataset_path} has a thought "
            "in its tokens; remove the option."
        )


def _check_fit(
    path: str, rows: list[Row], profile: DataProfile, *, is_prompt_configured: bool
) -> None:
    """Refuse a system prompt or a profile that these rows would ignore."""
    num_text = sum(is_text(row.messages) for row in rows)
    if is_prompt_configured and rows and num_own_system(rows) + num_text == len(rows):
        raise ConfigError(
            f"profile.system_prompt is set, but every row of {path} brings its own system turn, "
            "which is kept, or is plain text, which has none; remove the system turns or the "
            "option."
        )
    if num_text and type(profile).transform is not DataProfile.transform:
        raise ConfigError(
            f"profile.name={profile.name!r} rewrites turns, and in {path} "
            f"{counted(num_text, 'row is', 'rows are')} "
            "plain text, which has none; use the profile plain, or another data.format."
        )


# ---- the same as arrays for the cache


def _about(card: DataCard) -> dict[str, Any]:
    """What `trainer data cache show` says of an entry."""
    return {
        "data": card.dataset_path,
        "rows": card.num_train_rows + card.num_validation_rows,
        "tokens": card.num_tokens,
        "max_length": card.max_length,
        "profile": card.profile,
    }


def _as_arrays(data: RunData) -> Arrays:
    arrays: dict[str, Any] = {"texts": np.frombuffer(_TEXTS.dump_json(data), dtype=np.uint8)}
    arrays |= {f"text_{name}": part for name, part in data.train_texts.arrays.items()}
    for name, dataset in (("train", data.train), ("validation", data.validation)):
        if dataset is not None:
            arrays |= {f"{name}_{key}": part for key, part in dataset.as_arrays().items()}
    return arrays


def _from_arrays(arrays: FileArrays, encoder: RowEncoder) -> RunData:
    texts = _TEXTS.validate_json(arrays["texts"][:].tobytes())

    def dataset(name: str) -> EncodedDataset:
        prefix = f"{name}_"
        return EncodedDataset.from_arrays(
            {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
        )

    train, own = dataset("train"), "text_"
    return RunData(
        **vars(texts),
        train=train,
        train_texts=TrainTexts(
            {key.removeprefix(own): a for key, a in arrays.items() if key.startswith(own)},
            train,
            encoder,
        ),
        validation=dataset("validation") if "validation_ids" in arrays else None,
        encoder=encoder,
    )
