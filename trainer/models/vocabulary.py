"""Token ids against the rows of an embedding: what fits, and what padding may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.errors import ModelError

if TYPE_CHECKING:  # annotations only: importing torch here would slow every command
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def embedding_rows(model: PreTrainedModel) -> int:
    """Number of rows of a model's embedding: token ids are below it."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that can produce ids the embedding does not have.

    A padding token of its own may lie beyond: no model reads it (`harmless_pad_id`).

    Raises:
        ModelError: the largest token id is not below the number of embedding rows.
    """
    rows = embedding_rows(model)
    largest = max(id_ for id_ in _readable_ids(tokenizer))
    if largest >= rows:
        raise ModelError(
            f"the tokenizer has token ids up to {largest}, the model's embedding has {rows} rows "
            f"(ids 0 to {rows - 1}): they do not belong together. Give a folder in which both "
            "come from the same model."
        )


def _readable_ids(tokenizer: Any) -> set[int]:
    """All ids but that of a padding token that is nothing else."""
    others = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    spare = {tokenizer.pad_token} - others
    return {id_ for token, id_ in tokenizer.get_vocab().items() if token not in spare}


def harmless_pad_id(tokenizer: Any, rows: int) -> int:
    """An id that fills short rows: the tokenizer's own where the embedding has it.

    What is filled is masked and has no label, so that any id below `rows` will do.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and 0 <= candidate < rows:
            return int(candidate)
    return 0


def drop_pad_beyond(config: Any) -> None:
    """Forget a model config's padding id that its embedding does not have.

    torch refuses to build an embedding with such an id.
    """
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows = getattr(text_config, "vocab_size", None)
    for one in (config, text_config):
        pad = getattr(one, "pad_token_id", None)
        if rows is not None and pad is not None and not -rows <= pad < rows:
            one.pad_token_id = None
