"""How the processes of a run share the model: whole copies (DDP) or shards (FSDP2)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass

from trainer.config.schema import TrainerConfig
from trainer.core.dry_run import memory_setup
from trainer.core.memory import device_memory, estimate_memory, fits, size_words
from trainer.core.run import Prepared
from trainer.core.together import num_processes
from trainer.errors import ConfigError
from trainer.models.load import read_model_config
from trainer.models.train_on import base_section


@dataclass(frozen=True)
class Strategy:
    """How the processes of a run share the model."""

    name: str
    """`one` process, `ddp` or `fsdp2`."""
    reason: str
    """In words, for the user."""


FSDP_VARIABLES = {
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
"""What `accelerate launch` says of FSDP, and the values that this program works with."""


def choose_strategy(prepared: Prepared) -> Strategy:
    """What the config says, or what the memory card and the launcher lead to.

    Raises:
        ConfigError: sharding that was asked for and is not possible.
    """
    config, world = prepared.config, num_processes()
    asked = config.distributed.strategy
    _check_launcher(config)
    if world == 1:
        if asked == "fsdp2":
            raise ConfigError(
                "distributed.strategy=fsdp2 shares the weights out among processes, and this run "
                "has one; start several (torchrun --nproc_per_node N ...), or set strategy=auto."
            )
        return Strategy("one", "one process")
    if asked == "ddp":
        return Strategy("ddp", f"{world} processes with a whole copy each, as asked for")
    if asked == "fsdp2" or _launched_sharded():
        by = "distributed.strategy" if asked == "fsdp2" else "the configuration of accelerate"
        check_shardable(config, f"{by} asks for FSDP2")
        return Strategy("fsdp2", f"{world} processes with a shard each, by {by}")
    return _by_memory(prepared, world)


def _by_memory(prepared: Prepared, world: int) -> Strategy:
    where = base_section(prepared.config.model)
    model_config = read_model_config(where, offline=prepared.config.environment.offline)
    need = estimate_memory(model_config, memory_setup(prepared)).total
    device = prepared.device
    # The processes of one machine share its memory where they compute on the CPU.
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    room = device_memory(device) // sharers
    words = f"a whole copy needs about {size_words(need)} of the {size_words(room)} per process"
    if fits(need, room, device_type=device.type):
        return Strategy("ddp", f"{words}, so each of {world} processes has one")
    check_shardable(prepared.config, f"{words}, so the weights must be shared out (FSDP2)")
    return Strategy("fsdp2", f"{words}, so the weights are shared out among {world} processes")


def _launched_sharded() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")


def _check_launcher(config: TrainerConfig) -> None:
    """Refuse what `accelerate launch` was configured for and this run would not do."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true", "yes"):
        raise ConfigError(
            "this run was launched under DeepSpeed, which is not supported; use FSDP2 (torchrun, "
            "or `accelerate launch --use_fsdp --fsdp_version 2`)."
        )
    if not _launched_sharded():
        return
    if config.distributed.strategy == "ddp":
        raise ConfigError(
            "distributed.strategy=ddp, but the configuration of accelerate asks for FSDP; change "
            "one of them."
        )
    section = config.distributed
    ours = {
        **FSDP_VARIABLES,
        "FSDP_RESHARD_AFTER_FORWARD": str(section.reshard_after_forward),
        "FSDP_OFFLOAD_PARAMS": str(section.cpu_offload),
        "FSDP_ACTIVATION_CHECKPOINTING": "False",
    }
    for name, value in ours.items():
        told = os.environ.get(name)
        if told and told.lower() != value.lower():
            raise ConfigError(
                f"the configuration of accelerate sets {name}={told}, and this run works with "
                f"{value}; change it there{_ours_of(name)}."
            )


def _ours_of(variable: str) -> str:
    options = {
        "FSDP_RESHARD_AFTER_FORWARD": "distributed.reshard_after_forward",
        "FSDP_OFFLOAD_PARAMS": "distributed.cpu_offload",
        "FSDP_ACTIVATION_CHECKPOINTING": "hyperparams.gradient_checkpointing",
    }
    return f", or set {options[variable]}" if variable in options else ""


def check_shardable(config: TrainerConfig, why: str) -> None:
    """Refuse what has not been proved on shards.

    Args:
        why: who wants them, in words.
    Raises:
        ConfigError: one line with the option and the way out.
    """
    hyper = config.hyperparams
    problem = None
    if hyper.optimizer != "adamw":
        problem = (
            f"hyperparams.optimizer={hyper.optimizer} works on whole matrices; set it to adamw"
        )
    elif hyper.masters != "fp32":
        problem = f"hyperparams.masters={hyper.masters} is for whole weights; set it to fp32"
    elif hyper.compile != "off":
        problem = f"hyperparams.compile={hyper.compile} is not proved on shards; set it to off"
    elif hyper.training_mode == "qlora":
        problem = (
            "hyperparams.training_mode=qlora: a base of 4-bit weights cannot be shared out; use "
            "lora, or distributed.strategy=ddp where the quantized base fits each device"
        )
    elif hyper.auto_batch_size:
        problem = "hyperparams.auto_batch_size tries batches on a whole model; set it to false"
    if problem is not None:
        raise ConfigError(f"{why}, but {problem}.")


def with_strategy(prepared: Prepared, notice: Callable[..., None]) -> Prepared:
    """The run with its strategy filled in, which is told where there are several processes.

    Raises:
        ConfigError: as of `choose_strategy`.
    """
    strategy = choose_strategy(prepared)
    if strategy.name == "one":
        return prepared
    notice(f"strategy: {strategy.name} ({strategy.reason})")
    section = prepared.config.distributed.model_copy(update={"strategy": strategy.name})
    config = prepared.config.model_copy(update={"distributed": section})
    return dataclasses.replace(
        prepared, config=config, strategy=f"{strategy.name}: {strategy.reason}"
    )
