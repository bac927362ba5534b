"""Load, split, transform and encode the rows of a run, and draw up the data card."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from trainer.config.schema import DataSection
from trainer.data.batches import EncodedDataset, marked_text
from trainer.data.card import DataCard
from trainer.data.content import check_text_row, is_text
from trainer.data.encode import RowEncoder
from trainer.data.formats import check_markers_used, read_back
from trainer.data.rows import BadRowError, Row, RowErrors, RowTooLongError
from trainer.data.sources import (
    EncodedRow,
    HeldOutPrompt,
    Source,
    content_key,
    first_prompts,
    read_sources,
    shared_prompts,
    split_rows,
    trained_groups,
    weigh_rows,
)
from trainer.data.tools import tool_names, tools_of
from trainer.data.turns import assistant_turns, check_messages, num_openings
from trainer.errors import ConfigError, DataError
from trainer.profiles import DataProfile, Message

MAX_NAMED = 5
"""Prompts that the card names, of each kind."""


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
    errors = RowErrors(section.on_bad_row, section.max_bad_rows)
    rows, format_name = read_sources(sources, section, errors, max_rows=section.max_rows)
    validation_rows, _ = read_sources(validation_sources, section, errors, max_rows=None)
    rows = read_back(rows, encoder, errors, section.text_markers)
    validation_rows = read_back(validation_rows, encoder, errors, section.text_markers)
    check_markers_used([*rows, *validation_rows], section.text_markers)
    _check_fit(section.dataset_path, rows, profile, is_prompt_configured=is_prompt_configured)
    preparer = _Preparer(profile, encoder, system_prompt, seed, errors)
    encoded = preparer.encode(rows)
    held_out = preparer.encode(validation_rows)
    errors.raise_if_strict()
    train, validation, how = split_rows(section, encoded, held_out, seed)
    if not train:
        raise DataError(
            f"{section.dataset_path}: nothing to train: {len(errors.errors)} rows were rejected "
            f"({'; '.join(errors.errors[:3])}), {preparer.num_dropped} are longer than "
            f"hyperparams.max_length={encoder.max_length} and dropped."
        )
    trained = trained_groups(validation, train)
    shared = shared_prompts(section, encoded) if validation else ()
    leaked = [item for item in validation if item.group in trained]
    mixed, mix = weigh_rows(sources, train)
    card = DataCard(
        dataset_path=section.dataset_path,
        format=format_name,
        template=_mask_source(encoder, sum(is_text(row.messages) for row in rows), len(rows)),
        num_own_system=_num_own_system(rows),
        num_duplicates=len(encoded) - len({item.key for item in encoded}),
        num_leaked=len(leaked),
        leaked_prompts=tuple(dict.fromkeys(item.example.prompt for item in leaked))[:MAX_NAMED],
        shared_prompts=shared[:MAX_NAMED],
        num_shared_prompts=len(shared),
        validation=how,
        mix=mix,
        **preparer.counts(encoded, held_out),
        **_row_counts([*encoded, *held_out]),
        **_token_counts(mixed, validation),
        **_thought_fields(section, encoder, [*encoded, *held_out]),
        sample=marked_text(encoder.tokenizer, mixed[0].example.input_ids, mixed[0].example.labels),
    )
    prompts = sorted(validation or mixed, key=lambda item: (item.group, item.key))
    return RunData(
        train=EncodedDataset([item.example for item in mixed]),
        validation=EncodedDataset([item.example for item in validation]) if validation else None,
        preview_prompts=first_prompts(prompts, num_preview, bool(validation), trained=trained),
        final_prompts=first_prompts(prompts, num_final, bool(validation), trained=trained),
        train_texts=tuple((item.example.prompt, item.example.golden_answer) for item in mixed),
        card=card,
        encoder=encoder,
        system_prompt=system_prompt,
        file_hashes={
            source.name: source.content_hash() for source in [*sources, *validation_sources]
        },
    )


def _check_fit(
    path: str, rows: list[Row], profile: DataProfile, *, is_prompt_configured: bool
) -> None:
    """Refuse a system prompt or a profile that these rows would ignore."""
    num_text = sum(is_text(row.messages) for row in rows)
    if is_prompt_configured and rows and _num_own_system(rows) + num_text == len(rows):
        raise ConfigError(
            f"profile.system_prompt is set, but every row of {path} brings its own system turn, "
            "which is kept, or is plain text, which has none; remove the system turns or the "
            "option."
        )
    if num_text and type(profile).transform is not DataProfile.transform:
        raise ConfigError(
            f"profile.name={profile.name!r} rewrites turns, and {num_text} rows of {path} are "
            "plain text, which has none; use the profile plain, or another data.format."
        )


def _num_own_system(rows: list[Row]) -> int:
    return sum(row.messages[0]["role"] == "system" for row in rows)


def _row_counts(kept: list[EncodedRow]) -> dict[str, Any]:
    """Fields of the data card that tell what the rows bring beside plain turns."""
    unused: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for item in kept:
        unused.update(item.row.notes.unused)
        for turn in item.row.messages:
            weight = turn.get("weight", 1.0)
            weights["untrained" if weight == 0 else "weighted"] += weight != 1
    return {
        "num_untrained_turns": weights["untrained"],
        "num_weighted_turns": weights["weighted"],
        "num_openings": sum(num_openings(item.row.messages) > 0 for item in kept),
        "unused_keys": dict(sorted(unused.items())),
        "num_as_text": sum(item.row.notes.num_as_text for item in kept),
        "num_rendered": sum(item.row.is_rendered for item in kept),
    }


def _token_counts(train: list[EncodedRow], validation: list[EncodedRow]) -> dict[str, Any]:
    """Fields of the data card that count tokens of what is trained and measured."""
    examples = [item.example for item in [*train, *validation]]
    stripped = [example.stripped[0] for example in examples if example.stripped]
    return {
        "num_train_rows": len(train),
        "num_validation_rows": len(validation),
        "num_tokens": sum(len(item.example.input_ids) for item in train),
        "num_trained_tokens": sum(item.example.num_trained for item in train),
        "longest_row": max(len(example.input_ids) for example in examples),
        "num_truncated": sum(example.is_truncated for example in examples),
        "num_without_stop": sum(not example.ends_with_stop for example in examples),
        "num_stripped": len(stripped),
        "stripped_example": stripped[0] if stripped else "",
        "num_thoughts": sum(example.num_thoughts for example in examples),
        "num_opened": sum(example.is_opened for example in examples),
    }


def _thought_fields(
    section: DataSection, encoder: RowEncoder, encoded: list[EncodedRow]
) -> dict[str, Any]:
    """Fields of the data card about thoughts.

    Raises:
        ConfigError: thoughts are not to be trained, and there are none.
    """
    if not section.train_on_thinking and not any(item.example.num_thoughts for item in encoded):
        raise ConfigError(
            f"data.train_on_thinking=false, but no row of {section.dataset_path} has a thought "
            "in its tokens; remove the option."
        )
    return {
        "thoughts": encoder.template.thought_words(is_trained=section.train_on_thinking),
        "opening": encoder.template.opening,
    }


def _mask_source(encoder: RowEncoder, num_text: int, num_rows: int) -> str:
    """Where the trained tokens are known from, in words."""
    texts = "every token of plain text and its end-of-text token"
    if num_text == num_rows:
        return texts
    return encoder.template.source + (f"; {texts}" if num_text else "")


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
        self.num_dropped = self.num_dropped_tokens = 0

    def encode(self, rows: list[Row]) -> list[EncodedRow]:
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
                self.num_dropped_tokens += result.num_tokens
            elif isinstance(result, BadRowError):
                self.errors.add(row.where, str(result), result.reason)
            else:
                encoded.append(EncodedRow(row, self._key(row), result, self._group(row)))
        return encoded

    def counts(self, encoded: list[EncodedRow], held_out: list[EncodedRow]) -> dict[str, Any]:
        """Fields of the data card that tell what became of the rows on their way."""
        errors, kept = self.errors.errors, [*encoded, *held_out]
        return {
            "profile": self.profile.name,
            "profile_report": self.profile.report(),
            "system_prompt": self.system_prompt,
            "num_rows": len(kept) + len(errors) + self.num_dropped,
            "num_rejected": len(errors),
            "rejected": dict(self.errors.reasons),
            "rejected_examples": tuple(errors[:20]),
            "max_length": self.encoder.max_length,
            "truncation": self.encoder.truncation,
            "num_dropped": self.num_dropped,
            "num_cut_tokens": self.num_dropped_tokens
            + sum(item.example.num_removed for item in kept),
        }

    def _key(self, row: Row) -> str:
        """The key of the cleaned content: rows that are trained alike go to one side."""
        return content_key(self._words(row.messages), self.seed)

    def _group(self, row: Row) -> str:
        """The key of the cleaned turns before the first answer, or of a plain text.

        Flags and greetings make no difference: rows that differ in what is trained stand together.
        """
        turns = self._words(row.messages)
        for turn in turns:
            turn.pop("weight", None)
        answers = assistant_turns(turns)
        prompt = turns[: answers[0]] if answers else turns
        own = self._words([Message(role="system", content=self.system_prompt or "")])
        # A system turn like the run's asks the same as none.
        return content_key(prompt[1:] if prompt[:1] == own else prompt, self.seed)

    def _words(self, messages: list[Message]) -> list[Message]:
        turns = [turn.copy() for turn in messages]
        for turn in turns:
            turn["content"] = " ".join(self.profile.clean(turn["content"]).split())
        return turns

    def _conversation(self, row: Row) -> list[Message]:
        clean = [turn.copy() for turn in row.messages]
        for turn in clean:
            turn["content"] = self.profile.clean(turn["content"])
            if "reasoning_content" in turn:
                turn["reasoning_content"] = self.profile.clean(turn["reasoning_content"])
        if is_text(clean):
            return [turn for turn in clean if check_text_row(turn["content"])]
        turns = self.profile.transform(clean, index=row.index, seed=self.seed)
        if _called(turns) != _called(row.messages):
            raise BadRowError("tool calls were lost or changed", "tool calls lost")
        if _weights(turns) != _weights(row.messages):
            raise BadRowError(
                "the flags that say which turns are trained were lost; a profile's transform must "
                "copy the turns that it changes",
                "flags lost",
            )
        if tools_of(turns) != tools_of(row.messages):
            raise BadRowError("the row's tools were lost or changed", "tools lost")
        if _num_thoughts(turns) < _num_thoughts(clean) and not self.profile.drops_thoughts:
            raise BadRowError("thoughts were lost (`reasoning_content`)", "thoughts lost")
        # A profile can leave nothing to train, such as an answer of which nothing remains.
        return with_system_prompt(check_messages(turns), self.system_prompt)


def _called(messages: list[Message]) -> list[str]:
    return [name for turn in messages for name in tool_names(turn.get("tool_calls", []))]


def _num_thoughts(messages: list[Message]) -> int:
    return sum(bool(turn.get("reasoning_content", "").strip()) for turn in messages)


def _weights(messages: list[Message]) -> list[float]:
    """Of the assistant's turns; empty where each is trained like any other."""
    weights = [turn.get("weight", 1.0) for turn in messages if turn["role"] == "assistant"]
    return weights if any(weight != 1 for weight in weights) else []


def with_system_prompt(turns: list[Message], system_prompt: str | None) -> list[Message]:
    """Put the run's system turn first, unless the conversation brings its own."""
    if system_prompt is None or turns[0]["role"] == "system":
        return turns
    return [Message(role="system", content=system_prompt), *turns]
