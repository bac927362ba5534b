"""NEFTune: noise on the embedded tokens of a training step (arXiv 2310.05914).

transformers has a hook of its own for it. That one goes by the width of the batch, so that the
noise of a row would depend on how far it is padded, or on what it is packed with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.errors import ConfigError


def document_lengths(inputs: dict[str, Any]) -> torch.Tensor:
    """Tokens of the document that each position belongs to, (B, T) int64, without a device wait.

    Args:
        inputs: a batch with `attention_mask`, or with `position_ids` that begin at 0 in each
            document of a pack; padding of packs counts as documents of one token.
    """
    if "position_ids" not in inputs:
        mask: torch.Tensor = inputs["attention_mask"]
        return mask.sum(dim=1, keepdim=True).expand(mask.shape)
    number = (inputs["position_ids"] == 0).long().cumsum(dim=1)  # (B, T), of the document
    counts = torch.zeros(
        number.shape[0], number.shape[1] + 1, dtype=torch.int64, device=number.device
    )
    return counts.scatter_add_(1, number, torch.ones_like(number)).gather(1, number)


@contextmanager
def noisy_embeddings(model: Any, inputs: dict[str, Any], alpha: float) -> Iterator[None]:
    """Add uniform noise to what the model embeds: up to alpha / sqrt(L * D) in each of D numbers.

    L is the length of the token's document. The noise comes from torch's random state on the
    embedding's device, which checkpoints hold.

    Args:
        model: unwrapped.
        inputs: the batch that is embedded.
        alpha: 0: no noise.
    Raises:
        ConfigError: the model does not call its input embedding.
    """
    if not alpha:
        yield
        return
    lengths, was_called = document_lengths(inputs), False

    def add_noise(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal was_called
        was_called = True
        size = alpha / (lengths * output.shape[-1]).float().sqrt()  # (B, T)
        noise = torch.empty_like(output, requires_grad=False).uniform_(-1, 1)
        return output + noise * size[..., None].to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()
    if not was_called:
        raise ConfigError(
            f"lora.neftune_alpha={alpha:g}: {type(model).__name__} does not embed its tokens by "
            "its input embedding, so that no noise can be added; set it to 0."
        )
