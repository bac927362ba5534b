"""The golden answer token by token: text, id, bytes, and whether a token only frames the answer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from trainer.profiles import DataProfile

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

SPACE = "\u2581"
"""How SentencePiece writes a space."""


def golden_parts(tokenizer: Any, profile: DataProfile, ids: Sequence[int]) -> dict[str, Any]:
    """What a result says of its golden tokens beside their log-probabilities.

    Args:
        profile: says what of an answer is its frame; special tokens, such as the end of the turn,
            always are.
        ids: of the golden answer, as trained on.
    Returns:
        Fields of PreviewResult, each with an entry for each token.
    """
    pieces = [token_bytes(tokenizer, token) for token in ids]
    special = set(tokenizer.all_special_ids)
    answer = b"".join(b"" if i in special else one for i, one in zip(ids, pieces, strict=True))
    text = answer.decode("utf-8", "replace")
    frame = _byte_spans(text, profile.frame(text))
    return {
        "golden_tokens": tuple(
            str(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in ids
        ),
        "golden_token_ids": tuple(ids),
        "golden_token_bytes": tuple(piece.hex() for piece in pieces),
        "golden_is_frame": tuple(_is_frame(ids, pieces, special, frame)),
    }


def _byte_spans(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]


def _is_frame(
    ids: Sequence[int], pieces: Sequence[bytes], special: set[int], frame: list[tuple[int, int]]
) -> list[bool]:
    """A token is frame where all of its bytes but spaces are in one of the spans.

    A token of spaces is where it touches one: what stands between a marker and the answer.
    """
    text = b"".join(b"" if i in special else one for i, one in zip(ids, pieces, strict=True))
    touched = [
        (len(text[:low].rstrip()), high + len(text[high:]) - len(text[high:].lstrip()))
        for low, high in frame
    ]
    found, at = [], 0
    for token, piece in zip(ids, pieces, strict=True):
        if token in special:
            found.append(True)
            continue
        start, end = at + len(piece) - len(piece.lstrip()), at + len(piece.rstrip())
        spans = frame
        if start >= end:
            start, end, spans = at, at + len(piece), touched
        found.append(any(low <= start < end <= high for low, high in spans))
        at += len(piece)
    return found


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The UTF-8 bytes that a token stands for; many tokens hold a part of a character only."""
    added = tokenizer.added_tokens_decoder.get(token)
    if added is not None:
        return str(added.content).encode()
    piece = str(tokenizer.convert_ids_to_tokens(token))
    byte = BYTE_TOKEN.fullmatch(piece)
    if byte:
        return bytes.fromhex(byte[1])
    if _is_byte_level(tokenizer):
        return bytes(_byte_of()[char] for char in piece)
    return piece.replace(SPACE, " ").encode()


def _is_byte_level(tokenizer: Any) -> bool:
    return "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones as they are, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (number for number in range(256) if number not in set(printable))
    return {chr(number): number for number in printable} | {
        chr(256 + n): number for n, number in zip(itertools.count(), others, strict=False)
    }
