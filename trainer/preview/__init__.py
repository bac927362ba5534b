"""What the current weights say to a prompt. Names are loaded when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer import lazy_names

if TYPE_CHECKING:
    from trainer.preview.base import PreviewBackend, PreviewRequest, PreviewResult
    from trainer.preview.local import LocalPreviewBackend
    from trainer.preview.scheduler import PreviewScheduler

__all__ = [
    "LocalPreviewBackend",
    "PreviewBackend",
    "PreviewRequest",
    "PreviewResult",
    "PreviewScheduler",
]

__getattr__ = lazy_names(
    __name__,
    {
        "trainer.preview.base": ["PreviewBackend", "PreviewRequest", "PreviewResult"],
        "trainer.preview.local": ["LocalPreviewBackend"],
        "trainer.preview.scheduler": ["PreviewScheduler"],
    },
)
