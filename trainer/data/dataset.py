"""`prepare_data`: the rows of a run, from the cache or read, encoded and split, and packed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from trainer.config.data_section import DataSection
from trainer.counts import counted
from trainer.data.batches import EncodedDataset, PackedDataset
from trainer.data.cache import entry_of
from trainer.data.card import DataCard, draw_card
from trainer.data.encode import RowEncoder
from trainer.data.encoded import EncodedRows, RowReader, Tally
from trainer.data.file_arrays import Blocks, FileArray, blocks_of
from trainer.data.preparer import Preparer
from trainer.data.read_progress import ReadProgress
from trainer.data.reading import Reading
from trainer.data.rows import PreviewRequest
from trainer.data.sides import Sides, choose_prompts, part_rows
from trainer.data.sources import Source, find_sources
from trainer.data.spool import Spool, rows_in_blocks
from trainer.data.stream_rows import StreamedTexts
from trainer.data.train_texts import TrainTexts
from trainer.errors import ConfigError, DataError
from trainer.net import names_without_secrets
from trainer.profiles import DataProfile, get_profile

Array = np.ndarray[Any, Any]

AnyArray = Array | FileArray


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
    source_names: tuple[str, ...]
    """As `data.dataset_path` names them."""
    validation_names: tuple[str, ...]
    """The same of the sources of held-out rows."""


@dataclass(frozen=True)
class RunData(_Texts):
    """What a run trains on, measures on and shows."""

    train: EncodedDataset
    validation: EncodedDataset | None
    train_texts: TrainTexts | StreamedTexts
    """(prompt, golden answer) of each training row."""
    train_sources: Array
    """Of each row in `train`, before any packing: which of `source_names` it is from."""
    validation_sources: Array
    """The same of each row in `validation`, and `validation_names`."""
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
    progress: Callable[[str], None] | None = None,
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
        offline: never ask another machine for a file, nor the hub for a dataset.
        progress: told in words how far a file is that takes longer than two seconds.
    Raises:
        DataError: missing file, bad rows under `strict`, or nothing to train.
        ConfigError: an option that would have no effect on these rows.
    """
    if section.streaming:
        raise ConfigError("data.streaming=true: rows are streamed by `prepare_stream`.")
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
    texts, arrays_of_rows = encode_rows(section, sources, held_out, **options, progress=progress)
    if entry is not None:
        # A file that was written to meanwhile must not be kept under its earlier content.
        is_same = texts.file_hashes == hashes
        is_written, note = (
            entry.write(arrays_of_rows, note, _about(texts.card))
            if is_same
            else (False, "not written: a file changed while read")
        )
        if is_written:
            with contextlib.suppress(OSError):  # another run removed it already
                arrays = entry.arrays()
                del arrays_of_rows  # and with it what was kept of the rows while they were read
                return _with_note(_from_arrays(arrays, encoder), note)
    return _with_note(_from_arrays(kept_arrays(arrays_of_rows), encoder), note)


def _with_note(data: RunData, note: str) -> RunData:
    """The data with what its card says of the cache."""
    return replace(data, card=replace(data.card, cache=note))


def pack_training_rows(data: RunData) -> RunData:
    """The same data with its training rows packed; a pack goes by its first row's text."""
    assert isinstance(data.train_texts, TrainTexts), "streamed rows are not packed"
    packed = PackedDataset(data.train, data.encoder.max_length)
    first = [pack[0] for pack in packed.packs]
    return replace(
        data,
        train=packed,
        train_texts=data.train_texts.of(first),
        card=replace(data.card, num_packs=len(packed.packs)),
    )


# ---- reading, encoding and splitting


def encode_rows(
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
    progress: Callable[[str], None] | None = None,
) -> tuple[_Texts, dict[str, Array | Blocks]]:
    """Read the sources and encode every row; the rest is as in `prepare_data`.

    Args:
        sources: of the training rows.
        validation_sources: of `data.validation_path`; empty: some training rows are held out.
    Returns:
        What is said of the rows, and all that a cache entry holds, which is made when it is read.
    """
    preparer = Preparer(profile, encoder, system_prompt, seed)
    reading = Reading(section, preparer, with_columns=with_columns)
    shown = names_without_secrets(section.dataset_path)
    reading.read(
        sources, validation_sources, None if progress is None else ReadProgress(progress, shown)
    )
    check_fit(section, reading.tally, profile, is_prompt_configured=is_prompt_configured)
    errors = reading.errors()
    errors.raise_if_strict()
    rows = reading.store.finish()
    sides = part_rows(section, sources, rows, seed)
    if sides is None:
        raise DataError(
            f"{shown}: nothing to train: {counted(errors.count, 'row')} rejected "
            f"({'; '.join(errors.errors[:3])}), {reading.dropped.num_rows} longer than "
            f"hyperparams.max_length={encoder.max_length} and dropped."
        )
    _check_thoughts(section, rows)
    reader = RowReader(rows)
    files = [*sources, *validation_sources]
    card = draw_card(
        section,
        rows,
        sides,
        reader,
        reading.tally,
        formats=reading.formats,
        encoder=encoder,
        profile=profile,
        profile_report=preparer.report(),
        system_prompt=system_prompt,
        rejected=errors,
        dropped=reading.dropped,
        left_out=[name for source in files for name in source.found.left_out],
    )

    counts = (num_preview, num_score, num_final)
    asked = choose_prompts(rows, sides, reader, counts, encoder.sayer)
    card = replace(card, num_final_asked=asked.num_final_asked)
    texts = _Texts(
        preview_prompts=asked.previews,
        final_prompts=asked.final,
        score_prompts=asked.scores,
        card=card,
        system_prompt=system_prompt,
        file_hashes={source.name: source.content_hash() for source in files},
        source_names=tuple(source.name for source in sources),
        validation_names=tuple(source.name for source in validation_sources or sources),
    )
    return texts, _as_arrays(texts, rows, sides)


def _check_thoughts(section: DataSection, rows: EncodedRows) -> None:
    """Refuse data.train_on_thinking=false where no row has a thought."""
    if not section.train_on_thinking and not rows.num_thoughts.any():
        raise ConfigError(
            "data.train_on_thinking=false, but no row of "
            f"{names_without_secrets(section.dataset_path)} has a thought "
            "in its tokens; remove the option."
        )


def check_fit(
    section: DataSection, tally: Tally, profile: DataProfile, *, is_prompt_configured: bool
) -> None:
    """Refuse a system prompt or a profile that these rows would ignore.

    Raises:
        ConfigError: names the option.
    """
    path = names_without_secrets(section.dataset_path)
    num_text = tally.num_text + tally.num_tokens
    what = "plain text" if not tally.num_tokens else "tokens" if not tally.num_text else "no turns"
    if section.truncation == "split" and tally.num_read and not num_text:
        raise ConfigError(
            f"data.truncation=split cuts plain text, and every row of {path} is a conversation, "
            "of which a part is none; use keep_start, keep_end, drop or error, or raise "
            "hyperparams.max_length."
        )
    if is_prompt_configured and 0 < tally.num_read == tally.num_own_system + num_text:
        raise ConfigError(
            f"profile.system_prompt is set, but every row of {path} brings its own system turn, "
            f"which is kept, or is {what}, which has none; remove the system turns or the option."
        )
    if num_text and type(profile).transform is not DataProfile.transform:
        raise ConfigError(
            f"profile.name={profile.name!r} rewrites turns, and in {path} "
            f"{counted(num_text, 'row is', 'rows are')} "
            f"{what}, which has none; use the profile plain, or another data.format."
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


def _as_arrays(texts: _Texts, rows: EncodedRows, sides: Sides) -> dict[str, Array | Blocks]:
    """The run's rows as they are kept, each array made while it is written."""
    train, starts = sides.train, rows.starts("prompts_bytes")
    prompts = rows.spool.array("prompts", np.uint8)
    sizes = rows.prompts_bytes[train]
    arrays: dict[str, Array | Blocks] = {
        "texts": np.frombuffer(_TEXTS.dump_json(texts), dtype=np.uint8),
        "text_prompts": Blocks(
            "u1", int(sizes.sum(dtype=np.int64)), partial(rows_in_blocks, prompts, starts, train)
        ),
        "text_starts": np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
        "text_prompt_lengths": rows.prompt_lengths[train],
        "text_is_plain_text": rows.is_plain_text()[train],
        "sources": rows.source[train],
        "sources_held_out": rows.source[sides.validation],
        **dataset_arrays("train", rows, train),
    }
    if len(sides.validation):
        arrays |= dataset_arrays("validation", rows, sides.validation)
    return arrays


def dataset_arrays(
    name: str, rows: EncodedRows, order: Array, *, with_weights: bool = False
) -> dict[str, Array | Blocks]:
    """What `EncodedDataset.from_arrays` takes, of some rows, under names of its own.

    Args:
        with_weights: have loss weights, also where none differs from 1.
    """
    lengths = rows.lengths[order]
    starts, size = rows.starts("lengths"), int(lengths.sum(dtype=np.int64))
    arrays: dict[str, Array | Blocks] = {
        f"{name}_starts": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        f"{name}_ids": Blocks("<i4", size, partial(rows_in_blocks, rows.ids(), starts, order)),
        f"{name}_labels": Blocks(
            "<i4", size, partial(rows_in_blocks, rows.labels(), starts, order)
        ),
    }
    if with_weights or rows.num_weights[order].any():
        arrays[f"{name}_weights"] = Blocks("<f4", size, partial(rows.weights_in_blocks, order))
    return arrays


def kept_arrays(arrays: Mapping[str, Array | Blocks]) -> dict[str, AnyArray]:
    """The arrays without a cache: in memory, or in nameless files where they are large."""
    spool = Spool(Path(tempfile.gettempdir()))
    for name, array in arrays.items():
        for block in blocks_of(array):
            spool.append(name, block)
    kinds = {
        name: array.kind if isinstance(array, Blocks) else array.dtype
        for name, array in arrays.items()
    }
    return {name: spool.array(name, kind) for name, kind in kinds.items()}


def _from_arrays(arrays: Mapping[str, AnyArray], encoder: RowEncoder) -> RunData:
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
        train_sources=np.asarray(arrays["sources"][:]),
        validation_sources=np.asarray(arrays["sources_held_out"][:]),
        validation=dataset("validation") if "validation_ids" in arrays else None,
        encoder=encoder,
    )
