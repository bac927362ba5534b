"""`model.add_tokens`: new tokens of the tokenizer, and the rows of the embedding that they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError

if TYPE_CHECKING:  # annotations only: importing torch here would slow every command
    import torch


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Make each of `tokens` one id; they are plain text, and not hidden like special tokens.

    Raises:
        ConfigError: the tokenizer has one of them already, or one is named twice.
    """
    known = set(tokenizer.get_vocab())
    wrong = [
        token for at, token in enumerate(tokens) if token in known or token in list(tokens)[:at]
    ]
    if wrong:
        raise ConfigError(
            f"model.add_tokens names {', '.join(map(repr, wrong))}, which the tokenizer has "
            "already; leave it out."
        )
    tokenizer.add_tokens(list(tokens))


def grow_embeddings(model: Any, tokenizer: Any, tokens: Sequence[str]) -> None:
    """Give the ids of added tokens rows in the embedding and the head: the mean of the others.

    Rows that the model has to spare are used; else it is made larger.
    """
    import torch

    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    old = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= old:
        # Without HF's own initialisation, which draws from the global random state.
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    first = min(ids)
    seen: set[int] = set()
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for parameter in () if module is None else module.parameters(recurse=False):
                if id(parameter) not in seen:  # a tied head is the embedding itself
                    seen.add(id(parameter))
                    _to_mean(parameter, ids, first)


def _to_mean(parameter: torch.Tensor, ids: list[int], first: int) -> None:
    parameter[ids] = parameter[:first].float().mean(dim=0).to(parameter.dtype)
