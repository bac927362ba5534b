"""Nothing of ours waits for the device between the start of a forward and the end of a backward.

Each of these asks for a number that only the device knows: `.item()` and what calls it (`int()`,
`bool()`, `if tensor`), `nonzero`, indexing with a mask, `.tolist()`, `.cpu()`, `.numpy()`. On a CPU
they cost nothing, but they can be seen: by a dispatch mode, and by whose code asked.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

import trainer
from tests.trust import flash
from tests.trust.reference import decoder, llama, ragged_rows, weighted_rows
from tests.trust.trainers import make_trainer
from trainer.core import hf_trainer, loss
from trainer.core.proofs import TrainingCollator
from trainer.core.tiles import PostHead, Tiling
from trainer.data.batches import PadCollator, count_tokens

OURS = str(Path(trainer.__file__).parent)
THEIRS = str(Path(transformers.__file__).parent)
EMULATION = flash.__file__

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
METHODS = ("tolist", "numpy", "cpu")

LIBRARY = {
    "masking_utils.py:find_packed_sequence_indices",
    "masking_utils.py:_ignore_causal_mask_sdpa",
    "masking_utils.py:flash_attention_mask",
}
"""Where transformers asks, once a mask: see docs/engine.md."""

FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": llama,
    "qwen3": lambda **options: decoder(
        Qwen3ForCausalLM, Qwen3Config, **{"head_dim": 16, **options}
    ),
    "gemma3": lambda **options: decoder(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        **{
            "head_dim": 16,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            **options,
        },
    ),
}


class Waits(TorchDispatchMode):
    """Counts who waited: `ours: what`, or the file and function of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def note(self, what: str) -> None:
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(
            (OURS, THEIRS, EMULATION)
        ):
            frame = frame.f_back  # type: ignore[assignment]
        name = frame.f_code.co_filename if frame is not None else "?"
        if name == EMULATION:
            return  # a kernel reads its borders on the device
        if name.startswith(THEIRS):
            self.found[f"{Path(name).name}:{frame.f_code.co_name}"] += 1
        else:
            self.found[f"ours: {what} in {Path(name).name}:{frame and frame.f_code.co_name}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        is_mask = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if name in WAITS or is_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    mode = Waits()
    with monkeypatch.context() as patch:
        for name in METHODS:
            plain = getattr(torch.Tensor, name)

            def noted(self: Any, *args: Any, _name: str = name, _plain: Any = plain) -> Any:
                mode.note(_name)
                return _plain(self, *args)

            patch.setattr(torch.Tensor, name, noted)
        with mode:
            yield mode


def ours_of(found: Counter[str]) -> list[str]:
    return [name for name in found if name.startswith("ours")]


def micro_batch(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    *,
    attention: str = "sdpa",
    capacity: int | None = None,
    with_mask: bool = True,
    weighted: bool = False,
    tile: int = 0,
    mix: tuple[float, ...] = (),
    **hyper: Any,
) -> Counter[str]:
    """Who waited during one call of the real trainer's `training_step`."""
    rows = (weighted_rows if weighted else ragged_rows)(8)
    model = FAMILIES[family](attn_implementation=attention)
    options: dict[str, Any] = {"batch_size": 4, "accumulation": 2, "capacity": capacity, "mix": mix}
    trainer = make_trainer(model, rows, **options, **hyper)
    if not with_mask:
        trainer.data_collator = TrainingCollator(PadCollator(0), with_mask=False)
    trainer.tiling = Tiling(PostHead(), tile) if tile else None
    batches = list(trainer.get_train_dataloader())
    total = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    trainer.create_optimizer_and_scheduler(1)
    with waits(monkeypatch) as mode:
        for batch in batches:
            trainer.training_step(trainer.model, batch, total)
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    return mode.found


CASES: dict[str, dict[str, Any]] = {
    "padded": {},
    "no mask": {"with_mask": False},
    "eager": {"attention": "eager", "with_mask": False},
    "packed": {"capacity": 48},
    "tiles": {"tile": 5, "weighted": True},
    "weights": {"weighted": True, "with_mask": False},
    "joined packs": {"attention": "flash_attention_2", "capacity": 48},
    "joined rows": {"attention": "flash_attention_2"},
    "sources": {"mix": (0.5, 0.5), "with_mask": False},
    "tiles of sources": {"mix": (0.5, 0.5), "tile": 5, "weighted": True},
    "recomputed": {"gradient_checkpointing": True, "with_mask": False},
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("case", sorted(CASES))
def test_our_code_does_not_wait_for_the_device(
    monkeypatch: pytest.MonkeyPatch, family: str, case: str
) -> None:
    with flash.installed():
        found = micro_batch(monkeypatch, family, **CASES[case])
    assert ours_of(found) == []
    assert found
    assert set(found) <= LIBRARY


# ---- mutants


def test_mutant_an_index_by_mask_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_mask(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(states.shape[:2], dtype=torch.bool)
        mask.view(-1).index_fill_(0, positions, True)
        return states[mask]

    monkeypatch.setattr(loss, "_kept", by_mask)
    assert any("_kept" in name or "index" in name for name in ours_in_llama(monkeypatch))


def ours_in_llama(monkeypatch: pytest.MonkeyPatch, *, with_mask: bool = False) -> list[str]:
    return ours_of(micro_batch(monkeypatch, "llama", with_mask=with_mask))


def test_mutant_positions_from_the_labels_on_the_device_are_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = hf_trainer.supervised_loss

    def without(model: Any, unwrapped: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        batch = {key: value for key, value in batch.items() if key != loss.SUPERVISED}
        return plain(model, unwrapped, batch, *rest, **named)

    monkeypatch.setattr(hf_trainer, "supervised_loss", without)
    assert any("aten::nonzero in loss.py" in name for name in ours_in_llama(monkeypatch))


ASKS: dict[str, Callable[[torch.Tensor], Any]] = {
    "int": int,
    "bool": bool,
    "item": lambda tensor: tensor.item(),
    "tolist": lambda tensor: tensor.tolist(),
    "cpu": lambda tensor: tensor.cpu(),
}


@pytest.mark.parametrize("name", ASKS)
def test_mutant_a_number_asked_of_the_device_is_killed(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plain = hf_trainer.SupervisedTrainer._note

    def note(self: Any, loss: torch.Tensor, inputs: Any) -> None:
        ASKS[name](count_tokens(inputs))
        plain(self, loss, inputs)

    monkeypatch.setattr(hf_trainer.SupervisedTrainer, "_note", note)
    assert len(ours_in_llama(monkeypatch, with_mask=True)) == 1
