"""The data card: what will be trained, in numbers and in one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_KEYS_SHOWN = 30

MAX_KEY_CHARS = 60


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
    mix: str = ""
    """How often the training rows of each file are used; empty: once each."""
    cache: str = ""
    """Whether the encoded rows were read from the cache, or why not."""
    num_packs: int = 0
    """Packed training sequences; 0 without data.enable_packing."""
    num_untrained_turns: int = 0
    """Assistant turns of rows in use that are read and not trained, by flags or by their place."""
    num_weighted_turns: int = 0
    """Turns and texts that count with another weight than 0 and 1 in the loss."""
    num_openings: int = 0
    """Rows that begin with an assistant turn, which is read and not trained."""
    unused_keys: dict[str, int] = field(default_factory=dict)
    """Key of rows, or `list[].key` of turns, that nothing is done with -> how many have it."""
    num_as_text: int = 0
    """Numbers, booleans and JSON that were taken as their JSON text."""
    num_rendered: int = 0
    """Rows of text with the chat template's markers that were read back into turns."""
    profile_report: dict[str, int] = field(default_factory=dict)
    """What the profile counted while it rewrote the rows."""
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

    def as_json(self) -> dict[str, Any]:
        """The card as plain JSON values."""
        return {
            **asdict(self),
            "trained_pct": round(self.trained_pct, 2),
            "is_stop_trained": self.is_stop_trained,
            "row_lines": _row_lines(self),
        }


def card_lines(card: DataCard) -> list[tuple[str, str]]:
    """The card as (label, value) lines, for the terminal."""
    lines = [
        ("data", f"{card.dataset_path} ({card.format}, profile {card.profile})"),
        (
            "rows",
            f"{card.num_train_rows:,} train, {card.num_validation_rows:,} validation"
            f" of {card.num_rows:,} in the file",
        ),
        ("validation", card.validation),
        (
            "tokens",
            f"{card.num_tokens:,}, of them trained {card.num_trained_tokens:,}"
            f" ({card.trained_pct:.1f} %)",
        ),
        ("longest row", f"{card.longest_row:,} of at most {card.max_length:,} tokens"),
        (
            "truncated",
            _truncated_text(card),
        ),
        ("rejected", _rejected_text(card)),
        (
            "stop token",
            "trained"
            if card.is_stop_trained
            else f"NOT trained in {card.num_without_stop:,} rows: the model may never stop",
        ),
        ("mask", card.template),
        ("system prompt", _system_text(card)),
    ]
    if card.mix:
        lines.append(("weights", card.mix))
    if card.num_stripped:
        text = repr(card.stripped_example[:60])
        lines.append(
            ("stripped", f"the template leaves out text of {card.num_stripped:,} rows: {text}")
        )
    if card.num_thoughts:
        lines.append(("thoughts", f"of {card.num_thoughts:,} answers: {card.thoughts}"))
    if card.num_opened:
        lines.append(
            (
                "prompt",
                f"a server will add {card.opening!r} to the prompt, which {card.num_opened:,} rows "
                "do not have; they are trained and previewed without it",
            )
        )
    lines += _row_lines(card)
    if card.num_packs:
        fill = 100 * card.num_tokens / (card.num_packs * card.max_length)
        lines.append(("packing", f"{card.num_packs:,} packs, {fill:.1f} % full"))
    lines += [("profile", f"{count:,} {what}") for what, count in card.profile_report.items()]
    if card.num_duplicates:
        lines.append(("duplicates", f"{card.num_duplicates:,} rows repeat an earlier one (kept)"))
    if card.shared_prompts:
        count, prompt = card.shared_prompts[0]
        others = card.num_shared_prompts - 1
        more = f", and {others:,} more prompts have too many rows" if others else ""
        words = (
            f"{count:,} rows share one prompt, {_short(prompt)}{more}; these rows are held out by "
            "their answers (data.validation_path, or a larger data.validation_split, parts prompts)"
        )
        lines.append(("shared", words))
    if card.num_leaked:
        prompts = ", ".join(map(_short, card.leaked_prompts))
        words = f"{card.num_leaked:,} validation rows have a prompt that is also trained: {prompts}"
        lines.append(("leak", words))
    if card.cache:
        lines.append(("cache", card.cache))
    return lines


def _row_lines(card: DataCard) -> list[tuple[str, str]]:
    """What rows bring beside plain turns, as (label, value) lines; what they do not is left out."""
    counts = (
        (card.num_untrained_turns, "untrained", "assistant turns are read, not trained"),
        (card.num_weighted_turns, "loss weights", "turns count with another weight than 1 or 0"),
        (
            card.num_openings,
            "openings",
            "rows begin with the assistant: read where the template takes it, not trained",
        ),
        (
            card.num_rendered,
            "rendered text",
            "rows of text hold the template's markers: read as turns, their answers are trained",
        ),
        (card.num_as_text, "as text", "values that are no text are taken as their JSON text"),
    )
    lines = [(label, f"{count:,} {words}") for count, label, words in counts if count]
    if card.unused_keys:
        lines.append(("unused keys", _unused_text(card.unused_keys)))
    return lines


def _unused_text(unused: Mapping[str, int]) -> str:
    ordered = sorted(unused.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [f"{_shown_key(key)} ({count:,})" for key, count in ordered[:MAX_KEYS_SHOWN]]
    more = len(ordered) - MAX_KEYS_SHOWN
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


def _shown_key(key: str) -> str:
    """A key from a file, which may hold anything, in one bounded word."""
    return key[:MAX_KEY_CHARS] if key.isprintable() else ascii(key[:MAX_KEY_CHARS])


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _truncated_text(card: DataCard) -> str:
    tokens = f" ({card.num_cut_tokens:,} tokens)"
    if card.num_dropped:
        return f"{card.num_dropped:,} rows dropped: longer than {card.max_length:,} tokens{tokens}"
    end = "start" if card.truncation == "keep_end" else "end"
    return f"{card.num_truncated:,} rows lose their {end}{tokens}" if card.num_truncated else "none"


def _rejected_text(card: DataCard) -> str:
    if not card.num_rejected:
        return "none"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in card.rejected.items())
    return f"{card.num_rejected:,} rows: {reasons}"


def _system_text(card: DataCard) -> str:
    own = f"; {card.num_own_system:,} rows keep their own" if card.num_own_system else ""
    return (repr(card.system_prompt) if card.system_prompt else "none") + own
