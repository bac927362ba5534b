"""`--dry-run`: what a run would train on and need, before any weights are loaded."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from trainer.config.schema import TrainerConfig
from trainer.core.loss import TILE_LOGITS
from trainer.core.run import Prepared
from trainer.core.run_folder import RunFolder, resolved_config
from trainer.data.dataset import RunData
from trainer.models.adapters import add_lora
from trainer.models.load import read_model_config
from trainer.models.precision import ResolvedPrecision
from trainer.models.train_on import base_section

# ---- how much memory a run will take, from shapes alone
#
# Rough on purpose: allocator overhead, kernels' work space and fragmentation are not in it.


ADAMW_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Optimizer state per trained weight: two fp32 moments, or two 8-bit ones."""

MUON_BYTES = 4
"""Muon keeps one fp32 momentum for matrices; AdamW's part (embeddings, norms) has its own two."""

LOGIT_BYTES = 12
"""Peak bytes of one logit in a step, with softmax and gradient (benchmarks/bench_loss.py)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by use."""

    num_parameters: int
    num_trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Of one micro-batch of the longest rows."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def lines(self) -> list[tuple[str, str]]:
        """(label, value) lines for the terminal."""
        share = 100 * self.num_trainable / max(self.num_parameters, 1)
        parts = ", ".join(
            f"{name} {_size(getattr(self, name))}"
            for name in ("weights", "gradients", "optimizer", "activations")
        )
        return [
            (
                "parameters",
                f"{self.num_parameters:,}, of them trained {self.num_trainable:,} ({share:.1f} %)",
            ),
            ("memory", f"about {_size(self.total)}: {parts}"),
        ]


def estimate_memory(
    config: TrainerConfig,
    model_config: Any,
    precision: ResolvedPrecision,
    *,
    longest_row: int,
) -> MemoryEstimate:
    """Count a model's weights without making them, and add up what training needs.

    Args:
        config: the run's config.
        model_config: the transformers config of the model.
        precision: load, master and compute dtypes.
        longest_row: in tokens; the widest batch the run can meet.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(model_config, dtype=precision.load_dtype)
        if config.hyperparams.trains_adapters:
            model = add_lora(model, config.lora, seed=0)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    num_trained = sum(p.numel() for p in trained)
    return MemoryEstimate(
        num_parameters=sum(p.numel() for p in parameters),
        num_trainable=num_trained,
        weights=sum(p.numel() * p.element_size() for p in parameters),
        gradients=sum(p.numel() * p.element_size() for p in trained),
        optimizer=_optimizer_bytes(config.hyperparams.optimizer, trained),
        activations=_activation_bytes(config, model_config, precision, longest_row),
    )


def _optimizer_bytes(optimizer: str, trained: list[nn.Parameter]) -> int:
    if optimizer == "muon":
        return sum(p.numel() * (MUON_BYTES if p.ndim == 2 else 8) for p in trained)
    return sum(p.numel() for p in trained) * ADAMW_BYTES[optimizer]


def _activation_bytes(
    config: TrainerConfig, model_config: Any, precision: ResolvedPrecision, longest_row: int
) -> int:
    """What the backward pass keeps, with attention that never stores its matrix (sdpa).

    Per token and layer: two norms' inputs and outputs (4 h), queries, keys, values before and
    after the rotation, the attention's output, and gate, up and their product in the MLP.
    """
    text = (
        model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    )
    hidden = getattr(text, "hidden_size", 0)
    ffn = getattr(text, "intermediate_size", None) or 4 * hidden
    layers = getattr(text, "num_hidden_layers", 1)
    heads = getattr(text, "num_attention_heads", 1)
    head = getattr(text, "head_dim", None) or hidden // max(heads, 1)
    keys = (getattr(text, "num_key_value_heads", None) or heads) * head
    per_token = 4 * hidden + 3 * heads * head + 4 * keys + 3 * ffn
    size = torch.finfo(precision.compute_dtype).bits // 8
    tokens = config.hyperparams.batch_size * longest_row
    if config.hyperparams.gradient_checkpointing:
        kept = layers * hidden + per_token  # layer inputs, and one layer at a time in full
    else:
        kept = layers * per_token
    # At most: all positions trained. More than a tile of them are never there at once.
    logits = min(tokens * getattr(text, "vocab_size", 0), TILE_LOGITS)
    return int(tokens * kept * size + logits * LOGIT_BYTES)


def _size(num_bytes: int) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{math.ceil(num_bytes / 2**20)} MiB"


# ---- `--dry-run`: what a run would train on and need, before any weights are loaded


@dataclass(frozen=True)
class DryRun:
    """What `--dry-run` found."""

    config: TrainerConfig
    data: RunData
    precision: ResolvedPrecision
    attention: str
    """What is planned; the loaded model is what it is proved on."""
    memory: MemoryEstimate
    num_steps: int

    def as_json(self) -> dict[str, Any]:
        """The figures as plain JSON values, sizes in bytes."""
        return {
            "precision": self.precision.reason,
            "attention": self.attention,
            "num_steps": self.num_steps,
            "memory": {**dataclasses.asdict(self.memory), "total": self.memory.total},
            "data_card": self.data.card.as_json(),
        }


def finish_dry_run(prepared: Prepared, folder: RunFolder | None) -> DryRun:
    """The sums of a run whose rows are prepared; writes config.resolved.json.

    The file of a run that is to be resumed stays as it is.
    """
    config, data = prepared.config, prepared.data
    estimate = estimate_memory(
        config,
        read_model_config(base_section(config.model), offline=config.environment.offline),
        prepared.precision,
        longest_row=max(data.train.lengths),
    )
    if folder is not None and prepared.resume is None:
        folder.write_json(folder.config_resolved, resolved_config(config))
    return DryRun(
        config=config,
        data=data,
        precision=prepared.precision,
        attention=prepared.attention.reason,
        memory=estimate,
        num_steps=prepared.num_steps,
    )
