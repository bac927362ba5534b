"""Reference models, rows and arithmetic, from torch and transformers alone.

Nothing here imports the package: two sides that share a helper would prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM

VOCABULARY = 128
IGNORED = -100
Rows = list[tuple[list[int], list[int]]]
WeightedRows = list[tuple[list[int], list[int], list[float]]]
AnyRows = Rows | WeightedRows


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A 2-layer Llama, 64 wide, with the same weights on every call."""
    return decoder(LlamaForCausalLM, LlamaConfig, tied=tied, dtype=dtype, **changes)


def decoder(
    kind: Any,
    config: Any,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    """A 2-layer model of any family, 64 wide, with the same weights on every call."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config(**{**options, **changes})).to(dtype)
    if dtype == torch.float64:
        _norms_in_fp64(model)
    return model


def lfm2(**options: Any) -> Any:
    """Attention and convolutions, which see over the borders of documents."""
    kinds = {"layer_types": ["conv", "full_attention"]}
    return decoder(Lfm2ForCausalLM, Lfm2Config, **{**kinds, **options})


def _norms_in_fp64(model: Any) -> None:
    """transformers' norms go through fp32, which would hide errors below 1e-7."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)


def ragged_rows(count: int, *, seed: int = 0, longest: int = 32) -> Rows:
    """Rows of 6 to `longest` tokens as (ids, labels); the share that is trained differs much."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, longest + 1, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        share = float(torch.rand(1, generator=generator))
        labels = torch.where(torch.rand(length, generator=generator) < share, ids, IGNORED)
        labels[-1] = ids[-1]
        rows.append((ids.tolist(), labels.tolist()))
    return rows


def token_losses(model: Any, rows: Rows) -> list[torch.Tensor]:
    """-log p of every trained token, row by row, without padding; from full logits."""
    losses = []
    for ids, labels in rows:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        for position in range(len(ids) - 1):
            target = labels[position + 1]
            if target != IGNORED:
                losses.append(-F.log_softmax(logits[position], dim=-1)[target])
    return losses


def token_mean(model: Any, rows: Rows) -> torch.Tensor:
    """The mean over trained tokens of all rows, nats per token."""
    losses = token_losses(model, rows)
    return torch.stack(losses).sum() / len(losses)


def weighted_rows(count: int, *, seed: int = 0, unit: float = 0.25) -> WeightedRows:
    """Ragged rows whose trained tokens count 1 to 7 units, each token drawn by itself."""
    generator = torch.Generator().manual_seed(seed + 1)
    rows: WeightedRows = []
    for ids, labels in ragged_rows(count, seed=seed):
        drawn = torch.randint(1, 8, (len(ids),), generator=generator) * unit
        counts = [
            0.0 if label == IGNORED else w for label, w in zip(labels, drawn.tolist(), strict=True)
        ]
        rows.append((ids, labels, counts))
    return rows


def weighted_mean(model: Any, rows: WeightedRows) -> torch.Tensor:
    """sum(w x -log p) / sum(w) over the trained tokens of all rows."""
    losses = torch.stack(token_losses(model, [(ids, labels) for ids, labels, _ in rows]))
    counts = [
        w
        for _, labels, weights_ in rows
        for label, w in zip(labels[1:], weights_[1:], strict=True)
        if label != IGNORED
    ]
    shares = torch.tensor(counts, dtype=losses.dtype)
    return (shares * losses).sum() / shares.sum()


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def weights(model: Any) -> torch.Tensor:
    """All parameters end to end, fp64."""
    return flat(list(model.parameters()))


def gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return flat([p.grad for p in model.parameters() if p.grad is not None])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|, the metric of all these checks."""
    return float((a - b).norm() / b.norm())


def sgd_change(
    model: Any, windows: Sequence[Any], loss_of: Callable[[Any, Any], torch.Tensor] = token_mean
) -> torch.Tensor:
    """By how much one SGD step a window, at rate 1, moves the weights of `model`."""
    before = weights(model)
    for rows in windows:
        model.zero_grad()
        loss_of(model, rows).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= parameter.grad
    return weights(model) - before
