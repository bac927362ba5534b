"""What the current weights say to a prompt. Names are loaded when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer import lazy_names

if TYPE_CHECKING:
    from trainer.preview.base import PreviewBackend, PreviewResult
    from trainer.preview.local import LocalPreviewBackend

__all__ = ["LocalPreviewBackend", "PreviewBackend", "PreviewResult"]

__getattr__ = lazy_names(
    __name__,
    {
        "trainer.preview.base": ["PreviewBackend", "PreviewResult"],
        "trainer.preview.local": ["LocalPreviewBackend"],
    },
)
