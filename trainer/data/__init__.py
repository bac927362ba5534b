"""Files of rows -> token ids and labels -> batches. Names are loaded when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer import lazy_names

if TYPE_CHECKING:
    from trainer.data.batches import EpochOrder, PadCollator
    from trainer.data.card_text import card_lines
    from trainer.data.dataset import RunData, prepare_data
    from trainer.data.encode import RowEncoder

__all__ = ["EpochOrder", "PadCollator", "RowEncoder", "RunData", "card_lines", "prepare_data"]

__getattr__ = lazy_names(
    __name__,
    {
        "trainer.data.batches": ["EpochOrder", "PadCollator"],
        "trainer.data.card_text": ["card_lines"],
        "trainer.data.dataset": ["RunData", "prepare_data"],
        "trainer.data.encode": ["RowEncoder"],
    },
)
