"""`prepare_data`: the rows of a run, from the cache where they are there, else encoded."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from trainer.config.schema import DataSection
from trainer.data.cache import (
    Arrays,
    CacheEntry,
    DamagedEntryError,
    NotCacheableError,
    cache_folder,
    find_entry,
)
from trainer.data.card import DataCard
from trainer.data.dataset import EncodedDataset, HeldOutPrompt, RunData, encode_data
from trainer.data.encode import RowEncoder
from trainer.data.sources import find_sources
from trainer.profiles import DataProfile

logger = logging.getLogger(__name__)

NO_EFFECT = {"cache", "cache_dir", "shuffle", "group_by_length", "enable_packing"}
"""Options of section `data` that do not change the encoded rows."""


@dataclass(frozen=True)
class _Texts:
    """What is stored beside the arrays."""

    preview_prompts: tuple[HeldOutPrompt, ...]
    final_prompts: tuple[HeldOutPrompt, ...]
    train_texts: tuple[tuple[str, str], ...]
    card: DataCard
    system_prompt: str | None
    file_hashes: dict[str, str]


_TEXTS = TypeAdapter(_Texts)


def prepare_data(
    section: DataSection,
    *,
    profile: DataProfile,
    encoder: RowEncoder,
    system_prompt: str | None,
    is_prompt_configured: bool,
    seed: int,
    num_preview: int,
    num_final: int = 0,
    offline: bool = False,
) -> RunData:
    """Read and encode the rows of section `data`, or take them from the cache.

    Args:
        offline: never ask the hub for a dataset.
    The other arguments and the errors are those of `encode_data`.
    """
    sources = find_sources(section.dataset_path, section.weights, offline=offline)
    held_out = (
        find_sources(section.validation_path, offline=offline)
        if (section.validation_path is not None)
        else []
    )
    options: dict[str, Any] = {
        "profile": profile,
        "encoder": encoder,
        "system_prompt": system_prompt,
        "is_prompt_configured": is_prompt_configured,
        "seed": seed,
        "num_preview": num_preview,
        "num_final": num_final,
    }
    hashes = {source.name: source.content_hash() for source in [*sources, *held_out]}
    entry, note = _find_entry(section, hashes, options)
    if entry is not None:
        data, note = _read(entry, encoder)
        if data is not None:
            return data
    data = encode_data(section, sources, held_out, **options)
    if entry is not None:
        # A file that was written to meanwhile must not be kept under its earlier content.
        is_same = data.file_hashes == hashes
        note = _write(entry, data, note) if is_same else "not written: a file changed while read"
    return replace(data, card=replace(data.card, cache=note))


def _find_entry(
    section: DataSection, hashes: dict[str, str], options: dict[str, Any]
) -> tuple[CacheEntry | None, str]:
    """The cache entry of these rows, or None and the reason."""
    if not section.cache:
        return None, "off (data.cache=false)"
    parts = {
        **options,
        "section": section.model_dump(mode="json", exclude=NO_EFFECT),
        "files": list(hashes.items()),
    }
    try:
        return find_entry(cache_folder(section.cache_dir), Path(next(iter(hashes))).name, parts), ""
    except NotCacheableError as error:
        return None, f"not used: {error}"


def _read(entry: CacheEntry, encoder: RowEncoder) -> tuple[RunData | None, str]:
    """The rows, or None and a notice."""
    try:
        arrays = entry.load()
    except DamagedEntryError as error:
        logger.warning("%s: %s; the rows are encoded again", entry.path, error)
        return None, f"damaged entry replaced ({error}): "
    return (None, "") if arrays is None else (_from_arrays(arrays, entry, encoder), "")


def _write(entry: CacheEntry, data: RunData, note: str) -> str:
    try:
        removed = entry.store(_as_arrays(data))
    except OSError as error:
        logger.warning(
            "%s: cannot be written (%s); the next start encodes again", entry.path, error
        )
        return f"not written: {error.strerror}"
    more = f"; {removed} older entries of this file name removed" if removed else ""
    return f"{note}written to {entry.path}{more}"


def _as_arrays(data: RunData) -> Arrays:
    texts = _Texts(
        preview_prompts=data.preview_prompts,
        final_prompts=data.final_prompts,
        train_texts=data.train_texts,
        card=data.card,
        system_prompt=data.system_prompt,
        file_hashes=data.file_hashes,
    )
    arrays = {"texts": np.frombuffer(_TEXTS.dump_json(texts), dtype=np.uint8)}
    for name, dataset in (("train", data.train), ("validation", data.validation)):
        if dataset is not None:
            arrays |= {f"{name}_{key}": part for key, part in dataset.as_arrays().items()}
    return arrays


def _from_arrays(arrays: Arrays, entry: CacheEntry, encoder: RowEncoder) -> RunData:
    texts = _TEXTS.validate_json(arrays["texts"].tobytes())

    def dataset(name: str) -> EncodedDataset:
        prefix = f"{name}_"
        return EncodedDataset.from_arrays(
            {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
        )

    return RunData(
        train=dataset("train"),
        validation=dataset("validation") if "validation_ids" in arrays else None,
        preview_prompts=texts.preview_prompts,
        final_prompts=texts.final_prompts,
        train_texts=texts.train_texts,
        card=replace(texts.card, cache=f"read from {entry.path}"),
        encoder=encoder,
        system_prompt=texts.system_prompt,
        file_hashes=texts.file_hashes,
    )
