"""Load, split, transform and encode the rows of a run, and draw up the data card."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from trainer.config.schema import DataSection
from trainer.data.card import DataCard
from trainer.data.encode import IGNORE_INDEX, Example, RowEncoder
from trainer.data.rows import BadRowError, Row, RowErrors
from trainer.data.sources import Source, read_sources
from trainer.data.truncation import RowTooLongError
from trainer.data.turns import check_messages, tool_names
from trainer.errors import ConfigError, DataError
from trainer.profiles import DataProfile, Message


class EncodedDataset(Dataset[dict[str, Any]]):
    """Examples in two flat arrays; item i is {"input_ids", "labels"}, int64 tensors (T_i,)."""

    def __init__(self, examples: list[Example]) -> None:
        """Copy ids and labels of the examples; the examples may be dropped afterwards."""
        self.lengths = [len(example.input_ids) for example in examples]
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self._ids = _flat([example.input_ids for example in examples])
        self._labels = _flat([example.labels for example in examples])

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray[Any, Any]]) -> EncodedDataset:
        """The dataset that `as_arrays` was called on."""
        dataset = cls([])
        dataset._starts, dataset._ids = arrays["starts"], arrays["ids"]
        dataset._labels = arrays["labels"]
        dataset.lengths = np.diff(dataset._starts).tolist()
        return dataset

    def as_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """All rows: ids and labels end to end, and where each row starts."""
        return {"starts": self._starts, "ids": self._ids, "labels": self._labels}

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row as tensors."""
        part = slice(self._starts[index], self._starts[index + 1])
        return {
            "input_ids": torch.from_numpy(self._ids[part].astype(np.int64)),
            "labels": torch.from_numpy(self._labels[part].astype(np.int64)),
        }

    def fingerprint(self) -> str:
        """sha256 of all ids, labels and row borders, in order."""
        digest = hashlib.sha256()
        for array in (self._starts, self._ids, self._labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _flat(rows: list[list[int]]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.concatenate(
        [np.asarray(row, dtype=np.int32) for row in rows] or [np.zeros(0, np.int32)]
    )


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt to be answered again and again, with the answer the data gives."""

    prompt: str
    prompt_ids: tuple[int, ...]
    """The prefix of the row's own ids up to its first trained token."""
    golden_answer: str
    prompt_id: str
    """`validation-12` or `train-3`: source and position in the file."""
    is_held_out: bool
    """False when the row is also trained on."""
    golden_ids: tuple[int, ...] = ()
    """The row's trained ids behind that prefix, up to the end of the turn."""


@dataclass(frozen=True)
class RunData:
    """What a run trains on, measures on and shows."""

    train: EncodedDataset
    validation: EncodedDataset | None
    preview_prompts: tuple[HeldOutPrompt, ...]
    """Held-out prompts (training rows where none are held out), always the same ones."""
    final_prompts: tuple[HeldOutPrompt, ...]
    """Prompts of the final evaluation."""
    train_texts: tuple[tuple[str, str], ...]
    """(prompt, golden answer) of each training row."""
    card: DataCard
    encoder: RowEncoder
    system_prompt: str | None
    file_hashes: dict[str, str]
    """sha256 of each data file."""


@dataclass(frozen=True)
class _Encoded:
    row: Row
    key: str
    example: Example


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
) -> RunData:
    """Read the sources and encode every row.

    Args:
        section: format, split and policy.
        sources: of the training rows.
        validation_sources: of `data.validation_path`; empty: some training rows are held out.
        profile: rewrites the rows.
        encoder: tokenizer, template and max_length.
        system_prompt: system turn of rows that bring none.
        is_prompt_configured: the user set it, so that it must have an effect.
        seed: of the split and of the profile's transform.
        num_preview: held-out prompts for previews.
        num_final: held-out prompts for the final evaluation.
    Raises:
        DataError: missing file, bad rows under `strict`, or nothing to train.
        ConfigError: a configured system prompt that no row would use.
    """
    path = section.dataset_path
    errors = RowErrors(section.on_bad_row, section.max_bad_rows)
    rows, format_name = read_sources(sources, section, errors, max_rows=section.max_rows)
    validation_rows, _ = read_sources(validation_sources, section, errors, max_rows=None)
    num_own = sum(row.messages[0]["role"] == "system" for row in rows)
    if is_prompt_configured and rows and num_own == len(rows):
        raise ConfigError(
            f"profile.system_prompt is set, but every row of {path} brings its own system turn, "
            "which is kept; remove the system turns or the option."
        )
    preparer = _Preparer(profile, encoder, system_prompt, seed, errors)
    encoded = preparer.encode(rows)
    held_out = preparer.encode(validation_rows)
    errors.raise_if_strict()
    train, validation, how = _split(section, encoded, held_out, seed)
    if not train:
        raise DataError(
            f"{path}: nothing to train: {len(errors.errors)} rows were rejected "
            f"({'; '.join(errors.errors[:3])}), {preparer.num_dropped} are longer than "
            f"hyperparams.max_length={encoder.max_length} and dropped."
        )
    train_keys = {item.key for item in train}
    train, mix = _weighted(sources, train)
    prompts = sorted(validation or train, key=lambda item: item.key)
    everything = [*train, *validation]
    card = DataCard(
        dataset_path=path,
        format=format_name,
        template=encoder.template.source,
        profile=profile.name,
        num_rows=len(encoded) + len(held_out) + len(errors.errors) + preparer.num_dropped,
        num_train_rows=len(train),
        num_validation_rows=len(validation),
        validation=how,
        num_tokens=sum(len(item.example.input_ids) for item in train),
        num_trained_tokens=sum(item.example.num_trained for item in train),
        longest_row=max(len(item.example.input_ids) for item in everything),
        max_length=encoder.max_length,
        num_truncated=sum(item.example.is_truncated for item in everything),
        truncation=encoder.truncation,
        num_dropped=preparer.num_dropped,
        num_without_stop=sum(not item.example.ends_with_stop for item in everything),
        num_rejected=len(errors.errors),
        rejected=dict(errors.reasons),
        rejected_examples=tuple(errors.errors[:20]),
        system_prompt=system_prompt,
        num_own_system=num_own,
        num_duplicates=len(encoded) - len({item.key for item in encoded}),
        num_stripped=sum(bool(item.example.stripped) for item in everything),
        stripped_example=next(
            (item.example.stripped[0] for item in everything if item.example.stripped), ""
        ),
        num_leaked=sum(item.key in train_keys for item in validation),
        mix=mix,
        profile_report=profile.report(),
        sample=marked_text(encoder.tokenizer, train[0].example.input_ids, train[0].example.labels),
    )
    return RunData(
        train=EncodedDataset([item.example for item in train]),
        validation=EncodedDataset([item.example for item in validation]) if validation else None,
        preview_prompts=_prompts(prompts, num_preview, bool(validation)),
        final_prompts=_prompts(prompts, num_final, bool(validation)),
        train_texts=tuple((item.example.prompt, item.example.golden_answer) for item in train),
        card=card,
        encoder=encoder,
        system_prompt=system_prompt,
        file_hashes={
            source.name: source.content_hash() for source in [*sources, *validation_sources]
        },
    )


class _Preparer:
    """Cleans, transforms, prompts and encodes rows; rejected ones go to `errors`."""

    def __init__(
        self,
        profile: DataProfile,
        encoder: RowEncoder,
        system_prompt: str | None,
        seed: int,
        errors: RowErrors,
    ) -> None:
        self.profile, self.encoder, self.errors = profile, encoder, errors
        self.system_prompt, self.seed = system_prompt, seed
        self.num_dropped = 0

    def encode(self, rows: list[Row]) -> list[_Encoded]:
        usable: list[Row] = []
        conversations: list[list[Message]] = []
        for row in rows:
            try:
                conversations.append(self._conversation(row))
                usable.append(row)
            except BadRowError as error:
                text = f"after profile {self.profile.name!r}: {error}"
                self.errors.add(row.where, text, error.reason)
        encoded = []
        results = self.encoder.encode_all(conversations)
        for row, result in zip(usable, results, strict=True):
            if isinstance(result, RowTooLongError):
                self.num_dropped += 1
            elif isinstance(result, BadRowError):
                self.errors.add(row.where, str(result), result.reason)
            else:
                encoded.append(_Encoded(row, self._key(row), result))
        return encoded

    def _key(self, row: Row) -> str:
        """The key of the cleaned content: rows that are trained alike go to one side."""
        turns = [turn.copy() for turn in row.messages]
        for turn in turns:
            turn["content"] = " ".join(self.profile.clean(turn["content"]).split())
        return content_key(turns, self.seed)

    def _conversation(self, row: Row) -> list[Message]:
        clean = [turn.copy() for turn in row.messages]
        for turn in clean:
            turn["content"] = self.profile.clean(turn["content"])
        turns = self.profile.transform(clean, index=row.index, seed=self.seed)
        if _called(turns) != _called(row.messages):
            raise BadRowError("tool calls were lost or changed", "tool calls lost")
        # A profile can leave nothing to train, such as an answer of which nothing remains.
        return with_system_prompt(check_messages(turns), self.system_prompt)


def _called(messages: list[Message]) -> list[str]:
    return [name for turn in messages for name in tool_names(turn.get("tool_calls", []))]


def with_system_prompt(turns: list[Message], system_prompt: str | None) -> list[Message]:
    """Put the run's system turn first, unless the conversation brings its own."""
    if system_prompt is None or turns[0]["role"] == "system":
        return turns
    return [Message(role="system", content=system_prompt), *turns]


def content_key(messages: list[Message], seed: int) -> str:
    """A hash of a row's content and the seed, hex; equal rows have equal keys."""
    content = json.dumps(messages, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(f"{seed}\n{content}".encode()).hexdigest()


def _split(
    section: DataSection, encoded: list[_Encoded], held_out: list[_Encoded], seed: int
) -> tuple[list[_Encoded], list[_Encoded], str]:
    """Training rows, validation rows, and how they were parted, in words."""
    if section.validation_path is not None:
        if not held_out:
            raise DataError(f"{section.validation_path}: no usable row to validate on.")
        return encoded, held_out, f"all rows of {section.validation_path}"
    if not section.validation_split:
        return encoded, [], "none (data.validation_split=0); previews use training rows"
    # The rows with the smallest hashes: equal rows go together, and the order of the file and
    # rows added to it hardly change who is held out.
    keys = sorted({item.key for item in encoded})
    held_keys = set(keys[: round(section.validation_split * len(keys))])
    validation = [item for item in encoded if item.key in held_keys]
    train = [item for item in encoded if item.key not in held_keys]
    share = f"{section.validation_split:.1%}"
    if len(train) < 2 or len(validation) < 2:
        return (
            encoded,
            [],
            (
                f"none: {share} of {len(encoded)} rows leaves fewer than two on a side; previews "
                "use training rows (data.validation_path or a larger data.validation_split helps)"
            ),
        )
    return train, validation, f"{share} of the rows, by content hash and seed {seed}"


def _weighted(sources: list[Source], train: list[_Encoded]) -> tuple[list[_Encoded], str]:
    """The training rows as often as data.weights says, and that in words."""
    if all(source.weight == 1 for source in sources):
        return train, ""
    chosen: list[_Encoded] = []
    words = []
    for number, source in enumerate(sources):
        own = [item for item in train if item.row.source == number]
        times, share = divmod(source.weight, 1)
        # Which rows are in the part: by content, so that the order of the file does not matter.
        by_key = sorted(range(len(own)), key=lambda index: (own[index].key, index))
        part = sorted(by_key[: round(share * len(own))])
        used = own * int(times) + [own[index] for index in part]
        words.append(f"{source.name} x {source.weight:g} ({len(own):,} -> {len(used):,} rows)")
        chosen += used
    if not chosen:
        raise DataError(
            f"data.weights leaves no training row ({', '.join(words)}); raise a weight."
        )
    return chosen, ", ".join(words)


def _prompts(items: list[_Encoded], count: int, is_held_out: bool) -> tuple[HeldOutPrompt, ...]:
    """The first `count` distinct prompts."""
    source = "validation" if is_held_out else "train"
    chosen: dict[tuple[int, ...], HeldOutPrompt] = {}
    for item in items:
        if len(chosen) == count:
            break
        ids = tuple(item.example.prompt_ids)
        if ids not in chosen:
            chosen[ids] = HeldOutPrompt(
                prompt=item.example.prompt,
                prompt_ids=ids,
                golden_answer=item.example.golden_answer,
                prompt_id=f"{source}-{item.row.index}",
                is_held_out=is_held_out,
                golden_ids=tuple(item.example.golden_ids),
            )
    return tuple(chosen.values())


def marked_text(
    tokenizer: Any, input_ids: list[int], labels: list[int]
) -> tuple[tuple[str, bool], ...]:
    """A row as decoded stretches of equal fate: (text, is trained)."""
    stretches: list[tuple[list[int], bool]] = []
    for token, label in zip(input_ids, labels, strict=True):
        is_trained = label != IGNORE_INDEX
        if not stretches or stretches[-1][1] != is_trained:
            stretches.append(([], is_trained))
        stretches[-1][0].append(token)
    return tuple(
        (tokenizer.decode(ids, clean_up_tokenization_spaces=False), is_trained)
        for ids, is_trained in stretches
    )
