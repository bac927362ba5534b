"""What happens in the engine at every token: look for a cancellation, tell what was written.

No sampling here: scores go through as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import LogitsProcessor

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
INCOMPLETE = "\ufffd"
"""What decoders write for bytes that are not UTF-8, such as half of a character."""


class JobCancelledError(BaseException):
    """Nobody waits for this generation any more; not an Exception, so that no edge eats it."""


class TextPieces:
    """Turns token ids that grow into pieces of text that add up to the whole text.

    Only the tokens of the last piece are decoded again with the new ones, as context: decoding
    everything at every token would cost the square of the length.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Take the tokenizer that decodes."""
        self.tokenizer = tokenizer
        self.start = self.end = 0

    def next(self, ids: Sequence[int]) -> str:
        """Text that is new and final; "" while a character is not complete.

        Args:
            ids: all generated tokens so far.
        """
        if len(ids) == self.end or self._is_byte(ids[-1]):
            return ""
        known = self._decode(ids[self.start : self.end])
        text = self._decode(ids[self.start :])
        if text.endswith(INCOMPLETE) or len(text) <= len(known) or not text.startswith(known):
            return ""
        self.start, self.end = self.end, len(ids)
        return text[len(known) :]

    def _is_byte(self, token: int) -> bool:
        # A byte-fallback token may change what the bytes before it mean.
        name = self.tokenizer.convert_ids_to_tokens(token)
        return isinstance(name, str) and BYTE_TOKEN.fullmatch(name) is not None

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class TokenWatch(LogitsProcessor):  # type: ignore[misc]
    """Runs before every token of the message that is being answered."""

    def __init__(
        self, control: Connection, tokenizer: Any, send_text: Callable[[str], None]
    ) -> None:
        """Take the pipe on which `{"cancel": id}` arrives, and where pieces of text go."""
        self.control, self.tokenizer, self.send_text = control, tokenizer, send_text
        self.job: int | None = None
        self.prompt_length = 0
        self.pieces: TextPieces | None = None

    def begin(self, job: int, *, is_streamed: bool) -> None:
        """A new message is being answered."""
        self.job = job
        self.pieces = TextPieces(self.tokenizer) if is_streamed else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores as they are."""
        while self.control.poll(0):
            if json.loads(self.control.recv_bytes())["cancel"] == self.job:
                raise JobCancelledError
        if self.pieces is not None and input_ids.shape[1] > self.prompt_length:
            text = self.pieces.next(input_ids[0, self.prompt_length :].tolist())
            if text:
                self.send_text(text)
        return scores
