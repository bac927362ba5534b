"""The loss of each source of a run's rows, from the losses of positions that are made anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class SourceSums:
    """The losses of each source's tokens, and their weights, summed on the device."""

    def __init__(self, names: Sequence[str]) -> None:
        """Take the names of the sources, in the order of their numbers."""
        self.names = tuple(names)
        self._sums: torch.Tensor | None = None

    @torch.no_grad()
    def add(
        self, losses: torch.Tensor, weights: torch.Tensor | None, sources: torch.Tensor
    ) -> None:
        """Add the losses of a batch's positions, all (N,), without waiting for the device."""
        by = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
        numbers = torch.arange(len(self.names), device=losses.device)
        is_own = sources[None] == numbers[:, None]  # (sources, N)
        # By a choice and no product: a loss that is not a number stays with its source.
        parts = [torch.where(is_own, one, 0.0).sum(1) for one in (losses * by, by)]
        sums = torch.stack(parts)
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(2, sources): losses and weights since the last time, from here on 0 again.

        Waits for the device where another one is asked for.
        """
        sums, self._sums = self._sums, None
        if sums is None:
            return torch.zeros(2, len(self.names), device=device, dtype=dtype)
        return sums.to(device).to(dtype)

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """Mean loss of each source that had a token, by name.

        Args:
            sums: of `take`, flat.
        """
        count = len(self.names)
        found = zip(self.names, sums[:count], sums[count:], strict=True)
        return {name: loss / weight for name, loss, weight in found if weight}
