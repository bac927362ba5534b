"""Section `data`: which rows are trained on, and how they are read.

No torch, no file access; see `trainer/config/schema.py` for the rules.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    field_serializer,
    model_validator,
)

from trainer.config.section import (
    CombinationError,
    Interval,
    PositiveInt,
    Section,
    Share,
)
from trainer.net import names_without_secrets

MIX_ROUNDING = 0.01
"""How far a sum of probabilities may be from 1: thirds are written as 0.333."""


class DataSection(Section):
    """Which rows are trained on, and how they are read, split and batched."""

    dataset_path: str = ""
    """File of rows (JSONL, JSON, CSV, TSV, Parquet, Arrow; text kinds also packed as .gz, .bz2, .xz
    or .zst), a folder of them, a pattern such as `rows/*.jsonl`, an address (`https://`, `s3://`, `gs://`,
    `hf://`), or a hub id `owner/name` or `owner/name:split`; several with commas between. What is
    secret of an address is written down nowhere. Flag: --dataset."""
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "question_answer",
        "prompt_completion",
        "alpaca",
        "text",
        "tokens",
    ] = "auto"
    """The rows' layout (`tokens`: ids that are trained as they are); `auto` looks at the first row
    of each file and says what it found."""
    text_markers: Literal["turns", "tokens"] = "turns"
    """Rows of format `text` that hold the model's own control tokens: `turns` reads them back into
    the conversation they were made from and trains its answers; `tokens` trains every token."""
    columns: dict[str, str] = {}
    """Other names for the format's keys, such as `question=frage`: its key = the file's."""
    weights: tuple[Annotated[float, Field(gt=0.0)], ...] = ()
    """How often the training rows of each name in `dataset_path` are used: 2 = twice, 0.5 = half of
    them, chosen by content hash. Empty: once each."""
    mix_probabilities: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = ()
    """Share of each file in the rows of an epoch, one number a file, 1 in all; their rows are mixed
    in an order drawn from the seed. With `enable_packing` shares are of packs, each of one file.
    Empty: every file has all of its rows, as often as `weights` says."""
    mix_epoch: Literal["first", "longest"] = "first"
    """When an epoch of `mix_probabilities` ends: once the `first` file runs out, the next epoch
    going on in the others where this one stopped; or once the `longest`, for its share, has been
    seen, the others coming again in a new order."""
    validation_path: str | None = None
    """Held-out rows, named as in `dataset_path`. Empty: `validation_split` of the rows."""
    validation_split: Share = 0.05
    """Share of the rows held out, chosen by a hash of their prompt; 0 = none."""
    max_rows: PositiveInt | None = None
    """Use only the first rows of each name in `dataset_path`."""
    on_bad_row: Literal["strict", "skip"] = "strict"
    """`strict` stops and names the lines; `skip` leaves bad rows out, counts and lists them."""
    max_bad_rows: Interval | None = None
    """With `skip`: stop when more rows than this are bad. Empty: any number."""
    cache: bool = True
    """Keep encoded rows on disk; the next start with the same files and options reads them."""
    cache_dir: str | None = None
    """Folder of encoded rows. Empty: `ultimate-trainer` in $XDG_CACHE_HOME or ~/.cache."""
    cache_max_gib: Annotated[float, Field(gt=0)] | None = 50.0
    """GiB that the entries of that folder may take; those that were longest unused are removed when
    one is written. Empty: any size."""
    encode_processes: PositiveInt | None = None
    """Processes that encode rows. Empty: one for few rows, else as many as there are cores for each
    process of the run. The rows and their order are the same with any number."""
    truncation: Literal["error", "drop", "keep_start", "keep_end", "split"] = "keep_start"
    """Rows longer than hyperparams.max_length: an error, left out, or cut to their first or last
    tokens; `split`: plain text is cut into windows of which none loses a token, and a conversation
    that is longer is an error. The data card counts them."""
    train_on_thinking: bool = True
    """Train the thoughts of answers (`reasoning_content`, or `<think>...</think>` in the content);
    `false` trains only what follows them. An error where no row has a thought."""
    streaming: bool = False
    """Train while the files are still being read and encoded, for more rows than the cache can
    hold: rows that are read ahead lie in a file of at most `cache_max_gib`. Needs
    `hyperparams.max_steps`; see docs/data.md for what is not exact then."""
    shuffle_buffer: PositiveInt | None = None
    """With `streaming`: rows within which the order is drawn, and that are read before the first
    step. Empty: 10,000."""
    shuffle: bool = True
    """A new order of rows every epoch, drawn from the seed."""
    group_by_length: bool = True
    """Batch rows of like length together, so that little is computed on padding."""
    enable_packing: bool = False
    """Fill each training sequence with several whole rows, kept apart, up to `max_length` tokens.
    `batch_size` then counts packs, not rows, so that a step holds more rows and an epoch has fewer
    steps. Refused for models whose rows would see each other, as found at start in batches of the
    run's own size. Flash attention gets the packs of a batch as one long row."""

    @field_serializer("dataset_path")
    def _write_no_secret(self, value: str) -> str:
        return names_without_secrets(value)

    @field_serializer("validation_path")
    def _write_no_secret_of_validation(self, value: str | None) -> str | None:
        return None if value is None else names_without_secrets(value)

    @model_validator(mode="after")
    def _check_mix(self) -> DataSection:
        shares = self.mix_probabilities
        if shares and self.weights:
            raise CombinationError(
                "mix_probabilities and weights both say how often the rows of each file are "
                "trained; set one of them only",
                "data.mix_probabilities",
                "data.weights",
            )
        if shares and abs(sum(shares) - 1) > MIX_ROUNDING:
            raise CombinationError(
                f"mix_probabilities are shares of one epoch and must have 1 as their sum; these "
                f"({', '.join(f'{one:g}' for one in shares)}) have {sum(shares):g}",
                "data.mix_probabilities",
            )
        if self.mix_epoch != "first" and not shares:
            raise CombinationError(
                f"mix_epoch={self.mix_epoch} says when an epoch of mix_probabilities ends, which "
                "is empty; set mix_probabilities, or leave mix_epoch as it is",
                "data.mix_epoch",
                "data.mix_probabilities",
            )
        return self

    @model_validator(mode="after")
    def _check_order(self) -> DataSection:
        if self.group_by_length and not self.shuffle and "group_by_length" in self.model_fields_set:
            raise CombinationError(
                "group_by_length=true changes the order of rows, shuffle=false keeps it; "
                "set one of them only",
                "data.group_by_length",
                "data.shuffle",
            )
        if self.max_bad_rows is not None and self.on_bad_row == "strict":
            raise CombinationError(
                "max_bad_rows limits what on_bad_row=skip leaves out, and on_bad_row is strict; "
                "set on_bad_row=skip or leave max_bad_rows empty",
                "data.max_bad_rows",
                "data.on_bad_row",
            )
        if self.enable_packing and not self.shuffle:
            raise CombinationError(
                "enable_packing=true changes the order of rows, shuffle=false keeps it; "
                "set one of them only",
                "data.enable_packing",
                "data.shuffle",
            )
        if self.shuffle_buffer is not None and not self.streaming:
            raise CombinationError(
                "shuffle_buffer is for rows that are streamed; set streaming=true, or leave it "
                "empty: all rows are shuffled together",
                "data.shuffle_buffer",
                "data.streaming",
            )
        if self.streaming and self.enable_packing:
            raise CombinationError(
                "enable_packing=true forms packs from the lengths of all rows, and streaming=true "
                "does not know them before the end; set one of them only (rows of like length are "
                "batched together in a stream too)",
                "data.streaming",
                "data.enable_packing",
            )
        mix = "weights" if self.weights else "mix_probabilities" if self.mix_probabilities else ""
        if self.streaming and mix:
            raise CombinationError(
                f"{mix} decides by the number of rows of each file, and streaming=true does not "
                "know it; leave it empty, or write the mix into one file",
                "data.streaming",
                f"data.{mix}",
            )
        return self
