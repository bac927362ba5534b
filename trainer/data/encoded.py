"""Encoded rows as a torch dataset, and a row as people read it."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from trainer.data.batches import BLANK, LOSS_WEIGHTS, blank_row
from trainer.data.encode import IGNORE_INDEX, Example


class EncodedDataset(Dataset[dict[str, Any]]):
    """Examples in flat arrays; item i is {"input_ids", "labels"}, int64 tensors (T_i,).

    Where a trained token of any row has another loss weight than 1, every item has
    "loss_weights" too, a float32 tensor (T_i,), 0 where nothing is trained.
    """

    def __init__(self, examples: list[Example]) -> None:
        """Copy ids, labels and weights of the examples, which may be dropped afterwards."""
        self.lengths = [len(example.input_ids) for example in examples]
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self._ids = _flat([example.input_ids for example in examples])
        self._labels = _flat([example.labels for example in examples])
        self._weights = _flat_weights(examples, self._labels)

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray[Any, Any]]) -> EncodedDataset:
        """The dataset that `as_arrays` was called on."""
        dataset = cls([])
        dataset._starts, dataset._ids = arrays["starts"], arrays["ids"]
        dataset._labels, dataset._weights = arrays["labels"], arrays.get("weights")
        dataset.lengths = np.diff(dataset._starts).tolist()
        return dataset

    def as_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """All rows: ids, labels and any loss weights end to end, and where each row starts."""
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "starts": self._starts,
            "ids": self._ids,
            "labels": self._labels,
        }
        return arrays if self._weights is None else {**arrays, "weights": self._weights}

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row as tensors."""
        if index == BLANK:
            return blank_row(has_weights=self._weights is not None)
        part = slice(self._starts[index], self._starts[index + 1])
        row = {
            "input_ids": torch.from_numpy(self._ids[part].astype(np.int64)),
            "labels": torch.from_numpy(self._labels[part].astype(np.int64)),
        }
        if self._weights is not None:
            row[LOSS_WEIGHTS] = torch.from_numpy(self._weights[part].copy())
        return row

    def fingerprint(self) -> str:
        """sha256 of all row borders, ids, labels and any loss weights, in order."""
        digest = hashlib.sha256()
        for array in self.as_arrays().values():
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _flat(rows: list[list[int]]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.concatenate(
        [np.asarray(row, dtype=np.int32) for row in rows] or [np.zeros(0, np.int32)]
    )


def _flat_weights(
    examples: list[Example], labels: np.ndarray[Any, Any]
) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """Loss weights end to end; None where each trained token counts 1, the plain token mean."""
    if all(example.weights is None for example in examples):
        return None
    weights = np.concatenate(
        [
            np.asarray(example.weights or [1.0] * len(example.labels), dtype=np.float32)
            for example in examples
        ]
    )
    is_trained = labels != IGNORE_INDEX
    assert weights.shape == labels.shape, "one weight for each label"
    assert bool(np.isfinite(weights).all() and (weights >= 0).all()), "weights are checked rows"
    weights = np.where(is_trained, weights, np.float32(0))
    return weights if (weights != is_trained).any() else None


def marked_text(
    tokenizer: Any, input_ids: list[int], labels: list[int]
) -> tuple[tuple[str, bool], ...]:
    """A row as decoded stretches of equal fate: (text, is trained)."""
    stretches: list[tuple[list[int], bool]] = []
    for token, label in zip(input_ids, labels, strict=True):
        is_trained = label != IGNORE_INDEX
        if not stretches or stretches[-1][1] != is_trained:
            stretches.append(([], is_trained))
        stretches[-1][0].append(token)
    return tuple(
        (tokenizer.decode(ids, clean_up_tokenization_spaces=False), is_trained)
        for ids, is_trained in stretches
    )
