"""NEFTune's noise goes by each document's own length, and is there while training only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.core.neftune import document_lengths, noisy_embeddings
from trainer.data.batches import JoinCollator, PackCollator, PadCollator, join_documents
from trainer.errors import ConfigError


def row(length: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(5, 5 + length)
    return {"input_ids": ids, "labels": ids}


def test_a_padded_row_has_its_own_length() -> None:
    lengths = document_lengths(PadCollator(0)([row(3), row(5)]))
    assert lengths.tolist() == [[3] * 5, [5] * 5]


@pytest.mark.parametrize("collate", [PackCollator(0), JoinCollator(with_borders=True)])
def test_a_packed_document_has_its_own_length(collate: Any) -> None:
    packs = [join_documents([row(3), row(5)]), join_documents([row(4)])]
    found = document_lengths(collate(packs)).flatten().tolist()
    assert found[:8] == [3] * 3 + [5] * 5
    assert found[8:12] == [4] * 4


def embedded(model: Any, batch: dict[str, torch.Tensor], alpha: float) -> torch.Tensor:
    """What the first layer gets, (B, T, D)."""
    seen: list[torch.Tensor] = []
    layer = model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with noisy_embeddings(model, batch, alpha), torch.no_grad():
        model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False)
    hook.remove()
    return seen[0]


def test_the_noise_is_uniform_up_to_alpha_by_the_root_of_length_times_width(
    make_model: Callable[..., Any],
) -> None:
    model = make_model()
    batch = PadCollator(0)([row(4), row(16)])
    noise = embedded(model, batch, 6.0) - embedded(model, batch, 0.0)
    width = noise.shape[-1]
    for index, length in enumerate((4, 16)):
        bound = 6.0 / (length * width) ** 0.5
        found = noise[index, :length]
        assert 0.9 * bound < float(found.abs().max()) <= 1.001 * bound
        assert float(found.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not model.get_input_embeddings()._forward_hooks


def test_a_model_that_does_not_call_its_embedding_is_refused(
    make_model: Callable[..., Any],
) -> None:
    model, batch = make_model(), PadCollator(0)([row(4)])
    with pytest.raises(ConfigError, match="neftune_alpha"), noisy_embeddings(model, batch, 1.0):
        pass
