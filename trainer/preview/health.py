"""Text-health flags: what is visibly wrong with an answer, golden or not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

REPEATS_MIN_TOKENS = 24
"""Shorter answers are not called repetitive."""
REPEATS_SHARE = 0.5
"""An answer repeats itself when at most this share of its 4-token windows are different ones."""
COPY_MIN_CHARS = 24


def health_flags(
    *,
    text: str,
    token_ids: list[int],
    prompt: str,
    golden: str | None,
    is_stopped: bool,
    leak_ids: Collection[int],
) -> tuple[str, ...]:
    """Name what is wrong with an answer.

    Args:
        text: the answer without special tokens.
        token_ids: its tokens, the stop token excluded.
        golden: the golden answer; what it does as well is no fault.
        is_stopped: the answer ended by itself.
        leak_ids: control tokens that belong to the template, not to an answer.
    Returns:
        Some of empty, repeats, never_stopped, template_leak, copies_prompt.
    """
    copied = prompt.strip()
    flags = {
        "empty": not text.strip(),
        "repeats": _repeats(token_ids),
        "never_stopped": not is_stopped,
        "template_leak": any(token in leak_ids for token in token_ids),
        "copies_prompt": len(copied) >= COPY_MIN_CHARS
        and copied in text
        and copied not in (golden or ""),
    }
    return tuple(name for name, is_set in flags.items() if is_set)


def special_texts(tokenizer: Any) -> dict[int, str]:
    """Control tokens of a tokenizer: id -> text."""
    ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {
        index: str(tokenizer.decode([index], clean_up_tokenization_spaces=False))
        for index in ids | set(tokenizer.all_special_ids)
    }


def leak_ids(special: Mapping[int, str], goldens: Iterable[str | None]) -> frozenset[int]:
    """Control tokens that belong to no answer: those of golden answers, such as the markers of a
    call, do."""
    texts = "\n".join(golden or "" for golden in goldens)
    return frozenset(index for index, text in special.items() if text not in texts)


def _repeats(token_ids: list[int]) -> bool:
    if len(token_ids) < REPEATS_MIN_TOKENS:
        return False
    windows = [tuple(token_ids[i : i + 4]) for i in range(len(token_ids) - 3)]
    return len(set(windows)) <= REPEATS_SHARE * len(windows)
