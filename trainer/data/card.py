"""The data card: what will be trained, in numbers and in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from trainer.config.data_section import DataSection
from trainer.counts import counted
from trainer.data.batches import marked_text
from trainer.data.encode import RowEncoder
from trainer.data.encoded import EncodedRows, RowReader, Tally
from trainer.data.mixing import SourceShare
from trainer.data.pieces import BY_SHAPE, OPENED, STOPS, STRIPPED, TRUNCATED
from trainer.data.rows import Dropped, RowErrors
from trainer.data.sides import Sides, is_first, num_rows, shared_prompts
from trainer.net import names_without_secrets
from trainer.profiles import DataProfile

MAX_NAMED = 5
"""Prompts that the card names, of each kind."""

MAX_REJECTED_SHOWN = 20


@dataclass(frozen=True)
class DataCard:
    """Numbers about the rows of a run; goes to the terminal and to run.json."""

    dataset_path: str
    format: str
    template: str
    """Where the trained tokens are known from."""
    profile: str
    num_rows: int
    """Rows in the file, bad ones included."""
    num_train_rows: int
    num_validation_rows: int
    validation: str
    """How rows were held out, or why none were."""
    num_tokens: int
    """Of the training rows."""
    num_trained_tokens: int
    longest_row: int
    max_length: int
    num_truncated: int
    """Rows, training and validation, that lost an end to max_length."""
    num_cut_tokens: int
    """Tokens that max_length took: what truncated rows lost, and all of dropped rows."""
    num_without_stop: int
    """Rows with an answer that does not end in the stop token."""
    num_rejected: int
    rejected: dict[str, int] = field(default_factory=dict)
    """Reason -> rows left out."""
    rejected_examples: tuple[str, ...] = ()
    system_prompt: str | None = None
    num_own_system: int = 0
    """Rows that bring their own system turn, which is kept."""
    num_duplicates: int = 0
    """Rows whose content occurs earlier in the file."""
    truncation: str = "keep_start"
    """What becomes of rows longer than max_length (data.truncation)."""
    num_dropped: int = 0
    """Rows left out because they are longer (data.truncation=drop)."""
    num_split: int = 0
    """Texts that are longer and cut into windows (data.truncation=split)."""
    num_windows: int = 0
    """Of these."""
    num_stripped: int = 0
    """Rows with text that the chat template leaves out of the tokens."""
    stripped_example: str = ""
    """The first such text."""
    num_thoughts: int = 0
    """Answers whose thought stands in the tokens."""
    thoughts: str = ""
    """What becomes of thoughts, where rows have any."""
    num_opened: int = 0
    """Rows without a thought under a template whose prompt opens one."""
    opening: str = ""
    """What that prompt opens it with."""
    num_leaked: int = 0
    """Validation rows whose prompt is also trained on, with whatever answer."""
    leaked_prompts: tuple[str, ...] = ()
    """The first prompts of these."""
    shared_prompts: tuple[tuple[int, str], ...] = ()
    """(rows, prompt) where too many rows share a prompt to be held out together; the first."""
    num_shared_prompts: int = 0
    """How many prompts that is."""
    num_left_out: int = 0
    """Files in folders that are of no known kind."""
    left_out: tuple[str, ...] = ()
    """The first of these."""
    mix: str = ""
    """How often the training rows of each file are used; empty: once each."""
    streaming: str = ""
    """What the figures are of, and what is not known, where rows are streamed."""
    cache: str = ""
    """Whether the encoded rows were read from the cache, or why not."""
    num_packs: int = 0
    """Packed training sequences; 0 without data.enable_packing."""
    num_untrained_turns: int = 0
    """Assistant turns of rows in use that are read and not trained, by flags or by their place."""
    num_weighted_turns: int = 0
    """Turns and texts that count with another weight than 0 and 1 in the loss."""
    num_final_asked: int = 0
    """Prompts of the final evaluation that previews or scores ask too."""
    num_blank_questions: int = 0
    """Rows with a user turn that says nothing."""
    num_openings: int = 0
    """Rows that begin with an assistant turn, which is read and not trained."""
    unused_keys: dict[str, int] = field(default_factory=dict)
    """Key of rows, or `list[].key` of turns, that nothing is done with -> how many have it."""
    num_as_text: int = 0
    """Numbers, booleans and JSON that were taken as their JSON text."""
    num_rendered: int = 0
    """Rows of text with the chat template's markers that were read back into turns."""
    num_one_by_one: int = 0
    """Rows whose turns were located by marks of their own, which takes several renderings."""
    profile_report: dict[str, int] = field(default_factory=dict)
    """What the profile counted while it rewrote the rows."""
    sources: tuple[SourceShare, ...] = ()
    """What each source has of the training rows, where there are several."""
    mix_epoch: str = ""
    """When an epoch ends, where data.mix_probabilities mixes the sources."""
    sample: tuple[tuple[str, bool], ...] = ()
    """The first training row as (text, is trained) stretches."""

    @property
    def trained_pct(self) -> float:
        """Share of tokens that are trained, in percent."""
        return 100 * self.num_trained_tokens / max(self.num_tokens, 1)

    @property
    def is_stop_trained(self) -> bool:
        """Whether answers that were not cut off end with a trained stop token."""
        return self.num_without_stop == 0

    @property
    def num_epoch_tokens(self) -> int:
        """Tokens of an epoch; in the mean, where sources are mixed by shares."""
        if not self.mix_epoch:
            return self.num_tokens
        return sum(source.num_epoch_tokens for source in self.sources)

    @property
    def num_unique_rows(self) -> int:
        """Training rows before data.weights repeats or leaves out some."""
        unused = self.num_rejected + self.num_dropped + self.num_validation_rows
        return self.num_rows - unused

    def as_json(self) -> dict[str, Any]:
        """The card as plain JSON values."""
        return {
            **asdict(self),
            "trained_pct": round(self.trained_pct, 2),
            "is_stop_trained": self.is_stop_trained,
        }


def draw_card(
    section: DataSection,
    rows: EncodedRows,
    sides: Sides,
    reader: RowReader,
    tally: Tally,
    *,
    formats: str,
    encoder: RowEncoder,
    profile: DataProfile,
    profile_report: dict[str, int],
    system_prompt: str | None,
    rejected: RowErrors,
    dropped: Dropped,
    left_out: Sequence[str] = (),
) -> DataCard:
    """Count what is trained, held out, left out and changed.

    Args:
        section: format, split and policy.
        rows: all encoded rows.
        sides: which of them are trained and held out.
        reader: of the rows.
        tally: what was counted while they were read.
        formats: the layouts that the files have.
        encoder: that encoded the rows.
        profile: that rewrote them.
        profile_report: what it counted meanwhile.
        system_prompt: system turn of rows that bring none.
        rejected: rows that could not be used.
        dropped: rows that data.truncation=drop left out.
        left_out: files of folders that are not read.
    """
    first = int(sides.train[0])
    return DataCard(
        dataset_path=names_without_secrets(section.dataset_path),
        format=formats,
        template=_trained_words(encoder, tally),
        profile=profile.name,
        profile_report=profile_report,
        system_prompt=system_prompt,
        num_rows=tally.num_used + rejected.count + dropped.num_rows,
        num_rejected=rejected.count,
        rejected=rejected.reasons,
        rejected_examples=tuple(rejected.errors[:MAX_REJECTED_SHOWN]),
        max_length=encoder.max_length,
        truncation=encoder.truncation,
        num_left_out=len(left_out),
        left_out=tuple(left_out[:MAX_NAMED]),
        num_dropped=dropped.num_rows,
        num_cut_tokens=dropped.num_tokens + int(rows.num_removed.sum(dtype=np.int64)),
        thoughts=encoder.template.thought_words(is_trained=section.train_on_thinking),
        opening=encoder.template.opening,
        sample=marked_text(encoder.tokenizer, reader.ids(first), reader.labels(first)),
        num_one_by_one=int((rows.flags & BY_SHAPE == 0).sum()),
        **tally.card_counts(),
        **_split_facts(section, rows, sides, reader),
        **_token_counts(rows, sides, reader),
    )


def _split_facts(
    section: DataSection, rows: EncodedRows, sides: Sides, reader: RowReader
) -> dict[str, Any]:
    """Fields of the data card that tell which rows are held out, and what the sides share."""
    leaked = sides.validation[sides.is_trained_too]
    sizes, first_of = shared_prompts(section, rows) if len(sides.validation) else ((), ())
    shared = [
        (int(size), reader.prompt(int(number)))
        for size, number in zip(sizes[:MAX_NAMED], first_of[:MAX_NAMED], strict=True)
    ]
    num_of_training = int(rows.row[rows.num_of_training - 1]) + 1
    keys = rows.keys[: rows.num_of_training]
    return {
        "validation": sides.how,
        "mix": sides.mix,
        "num_train_rows": num_rows(rows, sides.train),
        "num_validation_rows": num_rows(rows, sides.validation),
        "num_duplicates": num_of_training - len(np.unique(keys)),
        "num_leaked": num_rows(rows, leaked),
        "leaked_prompts": _different_prompts(reader, leaked),
        "shared_prompts": tuple(shared),
        "num_shared_prompts": len(sizes),
    }


def _different_prompts(reader: RowReader, numbers: np.ndarray[Any, Any]) -> tuple[str, ...]:
    """The first MAX_NAMED prompts of some rows, each once."""
    found: dict[str, None] = {}
    for number in numbers.tolist():
        found[reader.prompt(number)] = None
        if len(found) == MAX_NAMED:
            break
    return tuple(found)


def _token_counts(rows: EncodedRows, sides: Sides, reader: RowReader) -> dict[str, Any]:
    """Fields of the data card that count tokens of what is trained and measured."""
    both = np.concatenate([sides.train, sides.validation])
    flags, lengths = rows.flags[both], rows.lengths
    stripped = both[flags & STRIPPED > 0]
    return {
        **_window_counts(rows, sides),
        "num_tokens": int(lengths[sides.train].sum(dtype=np.int64)),
        "num_trained_tokens": int(rows.num_trained[sides.train].sum(dtype=np.int64)),
        "longest_row": int(lengths[both].max()),
        "num_truncated": int((flags & TRUNCATED > 0).sum()),
        "num_without_stop": int((flags & STOPS == 0).sum()),
        "num_stripped": len(stripped),
        "stripped_example": reader.stripped(int(stripped[0])) if len(stripped) else "",
        "num_thoughts": int(rows.num_thoughts[both].sum(dtype=np.int64)),
        "num_opened": int((flags & OPENED > 0).sum()),
    }


def _window_counts(rows: EncodedRows, sides: Sides) -> dict[str, int]:
    """Rows in use that are several examples, and how many."""
    if is_first(rows).all():
        return {}
    used = np.unique(np.concatenate([sides.train, sides.validation]))
    sizes = np.bincount(rows.row[used])
    return {"num_split": int((sizes > 1).sum()), "num_windows": int(sizes[sizes > 1].sum())}


def _trained_words(encoder: RowEncoder, tally: Tally) -> str:
    """Which tokens are trained, and how they are located."""
    words = []
    if tally.num_text + tally.num_tokens < tally.num_read:
        words.append(encoder.template.source)
    if tally.num_text:
        words.append("every token of plain text and its end-of-text token")
    if tally.num_tokens:
        words.append(
            f"{counted(tally.num_tokens, 'row is', 'rows are')} tokens already (input_ids), "
            "trained as they are where their labels or masks say so, else every token"
        )
    return "; ".join(words)
