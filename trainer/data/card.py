"""The data card: what will be trained, in numbers and in one row."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


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
    """Validation rows whose content is also trained on (only with data.validation_path)."""
    mix: str = ""
    """How often the training rows of each file are used; empty: once each."""
    cache: str = ""
    """Whether the encoded rows were read from the cache, or why not."""
    num_packs: int = 0
    """Packed training sequences; 0 without data.enable_packing."""
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
    if card.num_packs:
        fill = 100 * card.num_tokens / (card.num_packs * card.max_length)
        lines.append(("packing", f"{card.num_packs:,} packs, {fill:.1f} % full"))
    lines += [("profile", f"{count:,} {what}") for what, count in card.profile_report.items()]
    if card.num_duplicates:
        lines.append(("duplicates", f"{card.num_duplicates:,} rows repeat an earlier one (kept)"))
    if card.num_leaked:
        lines.append(("leak", f"{card.num_leaked:,} validation rows are also trained on"))
    if card.cache:
        lines.append(("cache", card.cache))
    return lines


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
