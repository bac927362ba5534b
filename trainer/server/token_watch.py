"""What happens in the engine at every layer and token: look for a cancellation, tell what was
written, show that the process lives.

No sampling here: scores go through as they are.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
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
        self, cancelled: Any, tokenizer: Any, send_text: Callable[[int, str], None]
    ) -> None:
        """Take where to look and whom to tell.

        Args:
            cancelled: shared number: the message that is to be given up.
            send_text: takes a sample's number and a piece of its text.
        """
        self.cancelled, self.tokenizer, self.send_text = cancelled, tokenizer, send_text
        self.job: int | None = None
        self.prompt_length = 0
        self.sample = 0
        self.is_streamed = False
        self.pieces: TextPieces | None = None

    def begin(self, job: int, *, is_streamed: bool) -> None:
        """A new message is being answered."""
        self.job, self.is_streamed = job, is_streamed
        self.begin_sample(0)

    def begin_sample(self, sample: int) -> None:
        """The next of its samples is being made."""
        self.sample = sample
        self.pieces = TextPieces(self.tokenizer) if self.is_streamed else None

    def check(self, *_: Any) -> None:
        """End the message if it is to be given up.

        Raises:
            JobCancelledError: it is.
        """
        if self.cancelled.value == self.job:
            raise JobCancelledError

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores as they are."""
        self.check()
        if self.pieces is not None and input_ids.shape[1] > self.prompt_length:
            text = self.pieces.next(input_ids[0, self.prompt_length :].tolist())
            if text:
                self.send_text(self.sample, text)
        return scores


def watch_layers(model: Any, check: Callable[..., None]) -> None:
    """Call `check` before every layer, so that a long prompt can be given up as well."""

    def look(*_: Any) -> None:  # a function, not a method: layers may be copied with their hooks
        check()

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    inner = {id(below) for one in lists for below in one.modules() if below is not one}
    for one in lists:
        if id(one) not in inner:
            for layer in one:
                layer.register_forward_pre_hook(look)


def beat(beats: Any, pause_s: float = 0.5) -> None:
    """Count on for ever in a thread: a process that is stopped or stuck counts no more.

    Args:
        beats: shared number.
    """

    def count() -> None:
        while True:
            beats.value += 1
            time.sleep(pause_s)

    threading.Thread(target=count, name="beat", daemon=True).start()
