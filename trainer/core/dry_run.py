"""`--dry-run`: what a run would train on and need, before any weights are loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trainer.config.schema import TrainerConfig
from trainer.core.memory import (
    MemoryEstimate,
    MemorySetup,
    device_memory,
    estimate_memory,
    fits,
    size_words,
)
from trainer.core.publishing import NUM_SLOTS
from trainer.core.run import Prepared, Strategy
from trainer.core.run_folder import RunFolder, resolved_config
from trainer.data.batches import PackedDataset
from trainer.data.dataset import RunData
from trainer.models.bf16_speed import block_sizes
from trainer.models.load import is_gguf, read_model_config
from trainer.models.precision import ResolvedPrecision
from trainer.models.train_on import base_section
from trainer.monitoring.processes import num_processes


@dataclass(frozen=True)
class DryRun:
    """What `--dry-run` found."""

    config: TrainerConfig
    data: RunData
    device: torch.device
    strategy: Strategy
    precision: ResolvedPrecision
    attention: str
    """What is planned; the loaded model is what it is proved on."""
    memory: MemoryEstimate
    fit: Fit
    modes: tuple[ModeNeed, ...]
    shards: dict[int, int]
    """Number of processes -> bytes that each needs where they share the weights out (FSDP2)."""
    num_steps: int
    warning: str | None
    """That it needs more than the device has, and what to change."""
    block_sizes: tuple[int, int]
    """Hidden and inner size of the model's MLP, for `measure_bf16`."""

    def as_json(self) -> dict[str, Any]:
        """The figures as plain JSON values, sizes in bytes."""
        return {
            "processes": self.strategy.as_json(),
            "precision": self.precision.reason,
            "attention": self.attention,
            "num_steps": self.num_steps,
            "memory": self.memory.as_json(),
            "fit": self.fit.as_json(),
            "warning": self.warning,
            "modes": [dataclasses.asdict(mode) for mode in self.modes],
            "shards": self.shards,
            "data_card": self.data.card.as_json(),
        }

    def mode_lines(self) -> list[str]:
        """For each mode what it needs, and where that is there."""
        return [mode.words(self.fit) for mode in self.modes]

    def shard_words(self) -> str:
        """What several processes need each, in one line; "" where shards are not possible."""
        found = ", ".join(f"{size_words(n)} each of {world}" for world, n in self.shards.items())
        return f"{found} processes (FSDP2)" if found else ""


def finish_dry_run(prepared: Prepared, folder: RunFolder | None) -> DryRun:
    """The sums of a run whose rows are prepared; writes config.resolved.json.

    The file of a run that is to be resumed stays as it is.
    """
    config, data = prepared.config, prepared.data
    where = base_section(config.model)
    model_config = read_model_config(where, offline=config.environment.offline)
    setup = memory_setup(prepared)
    memory = estimate_memory(model_config, setup)
    fit = find_fit(model_config, setup, prepared.device, device_memory(prepared.device))
    if folder is not None and prepared.resume is None:
        folder.write_json(folder.config_resolved, resolved_config(config))
    return DryRun(
        config=config,
        data=data,
        device=prepared.device,
        strategy=prepared.strategy,
        precision=prepared.precision,
        attention=prepared.attention.reason,
        memory=memory,
        fit=fit,
        warning=too_much(memory.total, fit),
        modes=tuple(mode_needs(model_config, setup)),
        shards=shard_needs(model_config, setup) if config.sharding_problem is None else {},
        num_steps=prepared.num_steps,
        block_sizes=block_sizes(model_config),
    )


def too_much(need: int, fit: Fit) -> str | None:
    """That a run needs more than its device has, and what to change; None where it fits."""
    if fits(need, fit.memory, device_type=torch.device(fit.device).type):
        return None
    return f"memory: as it is set, this run needs about {size_words(need)}. {fit.words()}"


ROUGH_SHARE = 0.3
"""A rough upper sum below this share of the memory needs no better one."""


def memory_warning(prepared: Prepared) -> str | None:
    """`too_much` of a run that is about to load its weights; quick where there is plenty.

    Of a .gguf file the dry run alone tells it: its config takes long to read.
    """
    where = base_section(prepared.config.model)
    if is_gguf(where.model_path):
        return None
    model_config = read_model_config(where, offline=prepared.config.environment.offline)
    setup, memory = memory_setup(prepared), device_memory(prepared.device)
    if _rough_need(model_config, setup) < ROUGH_SHARE * memory:
        return None
    need = estimate_memory(model_config, setup).total
    if fits(need, memory, device_type=prepared.device.type):
        return None
    return too_much(need, find_fit(model_config, setup, prepared.device, memory))


def _rough_need(model_config: Any, setup: MemorySetup) -> float:
    """Bytes of a dense model with fp32 masters, AdamW and all activations; inf where unknown."""
    text = model_config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
    sizes = [value for name in names if isinstance(value := getattr(text, name, None), int)]
    if len(sizes) < len(names) or hasattr(text, "num_experts"):
        return float("inf")
    hidden, layers, vocabulary, inner = map(float, sizes)
    weights = 2 * vocabulary * hidden + layers * (4 * hidden + 3 * inner) * hidden
    tokens = setup.batch_size * setup.length
    return 20 * weights + tokens * (4 * layers * (16 * hidden + 4 * inner) + 12 * vocabulary)


def memory_setup(prepared: Prepared) -> MemorySetup:
    """What of a run decides its memory."""
    config, data = prepared.config, prepared.data
    hyper, monitoring = config.hyperparams, config.monitoring
    longest = max(data.train.lengths)
    is_previewed = monitoring.inference_interval > 0
    backend = monitoring.preview_backend if is_previewed else None
    prompts = monitoring.num_eval_samples + len(monitoring.preview_prompts)
    row = max(data.train.rows.lengths) if isinstance(data.train, PackedDataset) else longest
    return MemorySetup(
        training_mode=hyper.training_mode,
        masters=hyper.masters,
        optimizer=hyper.optimizer,
        compute_dtype=prepared.precision.compute_dtype,
        gradient_checkpointing=hyper.gradient_checkpointing,
        batch_size=hyper.batch_size,
        gradient_accumulation=hyper.gradient_accumulation,
        length=longest,
        is_packed=isinstance(data.train, PackedDataset),
        attention=config.model.attn_implementation,
        device_type=prepared.device.type,
        lora=config.lora,
        num_processes=num_processes(),
        is_sharded=prepared.is_sharded,
        is_resharded=config.distributed.reshard_after_forward,
        preview_rows=prompts if backend == "local" and not prepared.is_sharded else 0,
        preview_tokens=row + monitoring.preview_max_tokens,
        arenas={"sidecar": NUM_SLOTS["dir"], "remote_3090": NUM_SLOTS["http"]}.get(
            backend or "", 0
        ),
    )


# ---- which batch fits, and what to change where none does


@dataclass(frozen=True)
class Option:
    """A change of the config, and what the run would need with it at batch_size=1."""

    values: dict[str, Any]
    total: int
    fits: bool

    def __str__(self) -> str:
        """In the form of the command line."""
        words = " ".join(f"{name}={_word(value)}" for name, value in self.values.items())
        return f"{words} ({size_words(self.total)})"


@dataclass(frozen=True)
class Fit:
    """The largest batch whose step fits the device; the effective batch is the config's."""

    device: str
    memory: int
    """Bytes of the device: all of a GPU's, what is free on the host."""
    batch_size: int | None
    """None: not even one row fits."""
    gradient_accumulation: int | None
    total: int
    """At this batch, or at batch_size=1 where none fits."""
    options: tuple[Option, ...] = ()
    """Changes with which one row would fit, or, where none does, all that were tried."""

    def as_json(self) -> dict[str, Any]:
        """Plain values, sizes in bytes."""
        return dataclasses.asdict(self)

    def words(self) -> str:
        """What to set, in one or two sentences."""
        there = f"{self.device} has {size_words(self.memory)}"
        if self.batch_size is not None:
            return (
                f"{there}: batch_size={self.batch_size} gradient_accumulation="
                f"{self.gradient_accumulation} fits (about {size_words(self.total)})"
            )
        enough = [str(option) for option in self.options if option.fits]
        advice = f"would fit: {'; or '.join(enough)}" if enough else "a smaller model is needed"
        return f"{there}, and batch_size=1 needs {size_words(self.total)}; {advice}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def smaller_batches(effective: int) -> list[int]:
    """Batch sizes that divide an effective batch, largest first."""
    return [n for n in range(effective, 0, -1) if effective % n == 0]


def find_fit(model_config: Any, setup: MemorySetup, device: torch.device, memory: int) -> Fit:
    """The largest batch that fits, each with as much accumulation as keeps the effective batch.

    Args:
        memory: bytes of the device.
    """
    effective = setup.batch_size * setup.gradient_accumulation
    needs: dict[int, int] = {}

    def does_fit(batch_size: int) -> bool:
        changed = _with_batch(setup, batch_size, effective)
        needs[batch_size] = estimate_memory(model_config, changed).total
        return fits(needs[batch_size], memory, device_type=device.type)

    sizes = smaller_batches(effective)
    found = _first_true(sizes, does_fit)
    if found is not None:
        return Fit(str(device), memory, found, effective // found, needs[found])
    options = tuple(_options(model_config, _with_batch(setup, 1, effective), device, memory))
    return Fit(str(device), memory, None, None, needs[1], options)


def _with_batch(setup: MemorySetup, batch_size: int, effective: int) -> MemorySetup:
    return dataclasses.replace(
        setup, batch_size=batch_size, gradient_accumulation=effective // batch_size
    )


def _first_true(sizes: list[int], does_fit: Callable[[int], bool]) -> int | None:
    """By halving: what fits at one size fits at all that are smaller."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if does_fit(sizes[middle]):
            high = middle
        else:
            low = middle + 1
    return sizes[low] if low < len(sizes) else None


def _options(
    model_config: Any, setup: MemorySetup, device: torch.device, memory: int
) -> Iterator[Option]:
    """Changes from the mildest on, up to the first that is enough; then shorter rows as they are.

    Args:
        setup: with batch_size=1.
    """
    for told in _changes(setup):
        total = estimate_memory(model_config, dataclasses.replace(setup, **told)).total
        option = Option(_dotted(told), total, fits(total, memory, device_type=device.type))
        yield option
        if option.fits:
            break
    shorter = dataclasses.replace(setup, gradient_checkpointing=True)
    told = {} if setup.gradient_checkpointing else {"gradient_checkpointing": True}
    for halvings in range(1, setup.length.bit_length() - 6):
        length = setup.length >> halvings
        total = estimate_memory(model_config, dataclasses.replace(shorter, length=length)).total
        if fits(total, memory, device_type=device.type):
            yield Option(_dotted({**told, "max_length": length}), total, True)
            return


CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"optimizer": "adamw_8bit"},
    {"optimizer": "adamw_8bit", "masters": "bf16_stochastic"},
    {"training_mode": "lora"},
    {"training_mode": "qlora"},
)
"""What is tried where one row does not fit, each with gradient checkpointing."""


def _changes(setup: MemorySetup) -> list[dict[str, Any]]:
    """Those of CHANGES that change something; optimizer and masters matter for full training."""
    order, found = ("full", "lora", "qlora"), list[dict[str, Any]]()
    for values in CHANGES:
        mode = values.get("training_mode", setup.training_mode)
        if setup.is_sharded and ("optimizer" in values or mode == "qlora"):
            continue
        is_larger = order.index(mode) < order.index(setup.training_mode)
        if is_larger or ("optimizer" in values and mode != "full"):
            continue
        changed = {**values, "gradient_checkpointing": True}
        told = {name: value for name, value in changed.items() if getattr(setup, name) != value}
        if told and told not in found:
            found.append(told)
    return found


def _dotted(values: dict[str, Any]) -> dict[str, Any]:
    return {f"hyperparams.{name}": value for name, value in values.items()}


# ---- what the modes need


CARDS_GIB = (24, 80)

MODES: dict[str, dict[str, Any]] = {
    "full": {"training_mode": "full", "masters": "fp32", "optimizer": "adamw"},
    "full, masters=bf16_stochastic": {
        "training_mode": "full",
        "masters": "bf16_stochastic",
        "optimizer": "adamw",
    },
    "full, masters=bf16_stochastic, optimizer=adamw_8bit": {
        "training_mode": "full",
        "masters": "bf16_stochastic",
        "optimizer": "adamw_8bit",
    },
    "lora": {"training_mode": "lora", "masters": "fp32", "optimizer": "adamw"},
    "qlora": {"training_mode": "qlora", "masters": "fp32", "optimizer": "adamw"},
}


@dataclass(frozen=True)
class ModeNeed:
    """What a run would need in another mode."""

    mode: str
    total: int
    cards: dict[str, bool]
    """Whether a GPU of so many GiB is enough."""

    def words(self, fit: Fit) -> str:
        """One line, with this machine's device too."""
        is_here = fits(self.total, fit.memory, device_type=torch.device(fit.device).type)
        places = {"here": is_here, **{f"{gib} GiB": yes for gib, yes in self.cards.items()}}
        found = ", ".join(place for place, yes in places.items() if yes)
        return f"{self.mode}: {size_words(self.total)}, fits {found or 'none of them'}"


def mode_needs(model_config: Any, setup: MemorySetup) -> Iterator[ModeNeed]:
    """The need of each mode in one process, with the batch and the rows of this run."""
    setup = dataclasses.replace(setup, is_sharded=False)
    for mode, values in MODES.items():
        total = estimate_memory(model_config, dataclasses.replace(setup, **values)).total
        cards = {str(gib): fits(total, gib * 2**30) for gib in CARDS_GIB}
        yield ModeNeed(mode, total, cards)


SHARDS = (2, 4, 8)


def shard_needs(model_config: Any, setup: MemorySetup) -> dict[int, int]:
    """What each of several processes needs that share the weights out.

    Returns:
        Number of processes -> bytes; the number of this run is among them.
    """
    worlds = sorted({*SHARDS, setup.num_processes} - {1})
    found = {}
    for world in worlds:
        shared = dataclasses.replace(setup, is_sharded=True, num_processes=world, preview_rows=0)
        found[world] = estimate_memory(model_config, shared).total
    return found
