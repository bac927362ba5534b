"""What training rows ask and answer, as text, read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trainer.data.batches import EncodedDataset
from trainer.data.encode import RowEncoder
from trainer.data.file_arrays import FileArray
from trainer.data.rows import golden_ids

Arrays = Mapping[str, np.ndarray[Any, Any] | FileArray]


class TrainTexts:
    """(prompt, golden answer) of each training row.

    Prompts are kept as bytes end to end; answers are decoded from the rows' ids.
    """

    def __init__(
        self,
        arrays: Arrays,
        rows: EncodedDataset,
        encoder: RowEncoder,
        order: Sequence[int] | None = None,
    ) -> None:
        """Take what is known of the rows.

        Args:
            arrays: `prompts` (UTF-8, end to end), `starts` (rows + 1), `prompt_lengths` (tokens
                before the answer) and `is_plain_text` of each row.
            rows: the rows themselves.
            encoder: that made them.
            order: the rows that are spoken of; None: all, in order.
        """
        self.arrays, self.rows, self.encoder = arrays, rows, encoder
        self.order = range(len(rows)) if order is None else order

    def of(self, order: Sequence[int]) -> TrainTexts:
        """The texts of some of the rows."""
        return TrainTexts(self.arrays, self.rows, self.encoder, order)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[str, str]:
        row = self.order[index]
        begin, end = self.arrays["starts"][row : row + 2]
        prompt = self.arrays["prompts"][begin:end].tobytes().decode()
        [length] = self.arrays["prompt_lengths"][row : row + 1].tolist()
        [is_plain_text] = self.arrays["is_plain_text"][row : row + 1].tolist()
        say = self.encoder.sayer(is_plain_text=is_plain_text)
        return prompt, say(golden_ids(self.rows[row]["labels"].tolist(), length))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainTexts | tuple) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
