"""What becomes of a row that is longer than hyperparams.max_length (data.truncation)."""

from __future__ import annotations

from trainer.data.rows import BadRowError

IGNORE_INDEX = -100


class RowTooLongError(BadRowError):
    """A row is left out because data.truncation=drop says so; counted, never an error."""

    def __init__(self, num_tokens: int) -> None:
        """Keep the row's length in tokens for the count."""
        super().__init__(f"{num_tokens} tokens, dropped", "longer than max_length")
        self.num_tokens = num_tokens


def cut(
    ids: list[int], labels: list[int], max_length: int, how: str
) -> tuple[list[int], list[int]]:
    """Shorten one row to `max_length` tokens.

    Args:
        how: `keep_start`, `keep_end`, `drop` or `error`.
    Returns:
        ids and labels, both at most `max_length` long, with at least one trained token.
    Raises:
        RowTooLongError: the row is too long and is to be dropped.
        BadRowError: it is too long and that is an error, or nothing to train is left.
    """
    if len(ids) > max_length:
        if how == "drop":
            raise RowTooLongError(len(ids))
        if how == "error":
            raise BadRowError(
                f"the row has {len(ids)} tokens and hyperparams.max_length is {max_length}; raise "
                "it, or let data.truncation drop or cut such rows",
                "longer than max_length",
            )
    begin = max(len(ids) - max_length, 0) if how == "keep_end" else 0
    kept = labels[begin : begin + max_length]
    # NOTE: no token stands before the first one, so it cannot be predicted.
    kept[0] = IGNORE_INDEX
    if all(label == IGNORE_INDEX for label in kept):
        first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))
        raise BadRowError(
            f"nothing to train is left: the row has {len(ids)} tokens, its answer begins at "
            f"token {first + 1}, and hyperparams.max_length is {max_length}",
            "no trained token within max_length",
        )
    return ids[begin : begin + max_length], kept


def kept_weights(weights: list[float], labels: list[int]) -> list[float] | None:
    """The loss weights of kept labels: 0 where nothing is trained; None where all are 1.

    Args:
        weights: of the tokens from the first kept one on.
        labels: what `cut` kept.
    """
    pairs = zip(labels, weights[: len(labels)], strict=True)
    kept = [0.0 if label == IGNORE_INDEX else weight for label, weight in pairs]
    is_plain = all(
        weight == (label != IGNORE_INDEX) for label, weight in zip(labels, kept, strict=True)
    )
    return None if is_plain else kept
