"""Models and tokenizers by name, adapters, the built-in `tiny`; names are loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer import lazy_names

if TYPE_CHECKING:
    from trainer.models.adapters import add_lora, load_finished_model
    from trainer.models.load import load_model, load_tokenizer
    from trainer.models.tiny import write_demo_data

__all__ = ["add_lora", "load_finished_model", "load_model", "load_tokenizer", "write_demo_data"]

__getattr__ = lazy_names(
    __name__,
    {
        "trainer.models.adapters": ["add_lora", "load_finished_model"],
        "trainer.models.load": ["load_model", "load_tokenizer"],
        "trainer.models.tiny": ["write_demo_data"],
    },
)
