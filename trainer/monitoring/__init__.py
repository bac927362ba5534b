"""What a run writes about itself and reading it back; the Trainer callback; preview backends.

Names are loaded when they are first used: the reader of a status file needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer import lazy_names

if TYPE_CHECKING:
    from trainer.monitoring.callbacks import LiveMonitorCallback, Previews
    from trainer.monitoring.delivery import deliver_previews
    from trainer.monitoring.events import Observers
    from trainer.monitoring.preview_backend import create_preview_backend
    from trainer.monitoring.status_reader import TrainingStatusReader
    from trainer.monitoring.status_writer import TrainingStatusWriter
    from trainer.preview.base import PreviewBackend, PreviewResult
    from trainer.preview.http import Remote3090Backend
    from trainer.preview.local import LocalPreviewBackend

__all__ = [
    "LiveMonitorCallback",
    "LocalPreviewBackend",
    "Observers",
    "PreviewBackend",
    "PreviewResult",
    "Previews",
    "Remote3090Backend",
    "TrainingStatusReader",
    "TrainingStatusWriter",
    "create_preview_backend",
    "deliver_previews",
]

__getattr__ = lazy_names(
    __name__,
    {
        "trainer.monitoring.callbacks": ["LiveMonitorCallback", "Previews"],
        "trainer.monitoring.delivery": ["deliver_previews"],
        "trainer.monitoring.events": ["Observers"],
        "trainer.monitoring.preview_backend": ["create_preview_backend"],
        "trainer.monitoring.status_reader": ["TrainingStatusReader"],
        "trainer.monitoring.status_writer": ["TrainingStatusWriter"],
        "trainer.preview.base": ["PreviewBackend", "PreviewResult"],
        "trainer.preview.local": ["LocalPreviewBackend"],
        "trainer.preview.http": ["Remote3090Backend"],
    },
)
