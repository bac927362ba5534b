"""Log-probabilities of a golden answer under a model's weights: one forward pass, no sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trainer.preview.neutral import undisturbed


def golden_logprobs(model: Any, prompt: Sequence[int], golden: Sequence[int]) -> torch.Tensor:
    """How likely each golden token is, given the prompt and the golden tokens before it.

    Leaves the model as it was. The caller chooses autocast.

    Returns:
        (len(golden),) float32 on the model's device, nats. Nothing waits for the device here.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *golden]], device=device)
    with undisturbed(model):
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = torch.log_softmax(logits.float(), -1).gather(1, ids[0, len(prompt) :, None])
    return chosen[:, 0]
