"""Status files, terminal views, the Trainer callback, and the names that users import.

Names are loaded when they are first used: the reader of a status file needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.monitoring.callbacks import LiveMonitorCallback
    from trainer.monitoring.preview_backend import create_preview_backend
    from trainer.monitoring.status_reader import TrainingStatusReader
    from trainer.monitoring.status_writer import TrainingStatusWriter
    from trainer.preview.base import PreviewBackend, PreviewResult
    from trainer.preview.http import Remote3090Backend
    from trainer.preview.local import LocalPreviewBackend

_HOMES = {
    "TrainingStatusWriter": "status_writer",
    "TrainingStatusReader": "status_writer",
    "LiveMonitorCallback": "callbacks",
    "create_preview_backend": "preview_backend",
    "PreviewBackend": "preview_backend",
    "PreviewResult": "preview_backend",
    "LocalPreviewBackend": "preview_backend",
    "Remote3090Backend": "preview_backend",
}

__all__ = [
    "LiveMonitorCallback",
    "LocalPreviewBackend",
    "PreviewBackend",
    "PreviewResult",
    "Remote3090Backend",
    "TrainingStatusReader",
    "TrainingStatusWriter",
    "create_preview_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
