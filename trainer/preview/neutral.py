"""Leave no trace: put back everything of the training process that generating could change."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def rng_preserved() -> Iterator[None]:
    """Restore the random state of Python, NumPy, torch and every initialised GPU."""
    python, numpy_state = random.getstate(), np.random.get_state()
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put every module into eval mode and back into its own, which may differ within a model.

    Gradient checkpointing acts in train mode only, so it needs no switch of its own; `use_cache`
    is put back because generation sets it.
    """
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if config is not None:
            config.use_cache = use_cache


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Both of the above, without gradients: for anything done with a model between two steps."""
    with rng_preserved(), evaluating(model), torch.no_grad():
        yield
