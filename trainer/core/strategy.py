"""How the processes of a run share the model: whole copies (DDP) or shards (FSDP2)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch

from trainer.config.schema import TrainerConfig
from trainer.config.training_sections import OF_SHARDS, DistributedSection
from trainer.core.dry_run import memory_setup
from trainer.core.memory import MemorySetup, device_memory, estimate_memory, fits, size_words
from trainer.core.run import Prepared, Strategy
from trainer.errors import ConfigError
from trainer.models.load import read_model_config
from trainer.models.train_on import base_section
from trainer.monitoring.processes import num_processes

Agree = Callable[[bool], bool]
"""Whether something is so on every process of the run."""


def with_strategy(prepared: Prepared, notice: Callable[..., None], *, agree: Agree) -> Prepared:
    """The run with its strategy filled in, which is told where there are several processes.

    Args:
        agree: all processes call it in the same places.
    Raises:
        ConfigError: as of `choose_strategy`, or `distributed.cpu_offload` without a GPU.
    """
    if prepared.config.distributed.cpu_offload and prepared.device.type == "cpu":
        raise ConfigError(
            "distributed.cpu_offload=true keeps shards out of a GPU, and this run computes "
            "on the CPU; set it to false."
        )
    strategy = choose_strategy(prepared, agree)
    if strategy.num_processes > 1 or prepared.config.distributed.strategy == "fsdp2":
        notice(f"strategy: {strategy}")
    name: str = prepared.config.distributed.strategy
    if strategy.name != "one":
        name = strategy.name
    elif name == "fsdp2":  # of a run that is continued by one process
        name = "auto"
    changes: dict[str, Any] = {"strategy": name}
    if name == "ddp":  # which has no shards: as written down, the config loads again
        fields = DistributedSection.model_fields
        changes |= {option: fields[option].default for option in OF_SHARDS}
    section = prepared.config.distributed.model_copy(update=changes)
    config = prepared.config.model_copy(update={"distributed": section})
    return dataclasses.replace(prepared, config=config, strategy=strategy)


def choose_strategy(prepared: Prepared, agree: Agree) -> Strategy:
    """What the config says, or what the memory card and the launcher lead to.

    Raises:
        ConfigError: sharding that was asked for and is not possible.
    """
    config, world = prepared.config, num_processes()
    asked = config.distributed.strategy
    if world == 1:
        if asked == "fsdp2" and prepared.resume is None:
            raise ConfigError(
                "distributed.strategy=fsdp2 shares the weights out among processes, and this run "
                "has one; start several (torchrun --nproc_per_node N ...), or set strategy=auto."
            )
        return Strategy("one", "one process", 1)
    if asked == "ddp":
        return Strategy("ddp", f"{world} processes with a whole copy each, as asked for", world)
    if asked == "fsdp2" or is_launched_sharded():
        words = f"{world} processes with a shard each, by {_asked_by(config)}"
        return Strategy("fsdp2", words, world)
    return _by_memory(prepared, world, agree)


def _asked_by(config: TrainerConfig) -> str:
    is_ours = config.distributed.strategy == "fsdp2"
    return "distributed.strategy" if is_ours else "the configuration of accelerate"


def _by_memory(prepared: Prepared, world: int, agree: Agree) -> Strategy:
    where = base_section(prepared.config.model)
    model_config = read_model_config(where, offline=prepared.config.environment.offline)
    setup, device = memory_setup(prepared), prepared.device
    need, room = estimate_memory(model_config, setup).total, device_memory(device)
    # Processes of different machines, or in an uneven moment of one, may see different rooms.
    is_here = fits(need, room, device_type=device.type)
    is_everywhere = agree(is_here)
    words = f"a whole copy needs about {size_words(need)} of the {size_words(room)} per process"
    if is_everywhere:
        return Strategy("ddp", f"{words}, so each of {world} processes has one", world)
    if is_here:
        words += ", and another process has less"
    try:
        check_shardable(prepared.config, f"{words}, so the weights must be shared out (FSDP2)")
    except ConfigError as error:
        raise ConfigError(f"{error} distributed.strategy=ddp tries whole copies anyway.") from None
    words += f", so the weights are shared out among {world} processes"
    return Strategy("fsdp2", f"{words}: {_shard_words(model_config, setup, room, device)}", world)


def _shard_words(model_config: Any, setup: MemorySetup, room: int, device: torch.device) -> str:
    need = estimate_memory(model_config, dataclasses.replace(setup, is_sharded=True)).total
    words = f"about {size_words(need)} each"
    if not fits(need, room, device_type=device.type):
        words += ", which is too much as well; use more processes or a smaller batch_size"
    return words


def check_shardable(config: TrainerConfig, why: str) -> None:
    """Refuse what has not been proved on shards.

    Args:
        why: who wants them, in words.
    Raises:
        ConfigError: one line with the option and the way out.
    """
    problem = config.sharding_problem
    if problem is not None:
        raise ConfigError(f"{why}, but {problem[1]}.")


# ---- how this process was started


def is_launched_sharded() -> bool:
    """Whether `accelerate launch` was configured for FSDP."""
    return _is_on("ACCELERATE_USE_FSDP")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


FSDP_VARIABLES = {
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_ACTIVATION_CHECKPOINTING": "False",
}
"""What `accelerate launch` says of FSDP, and the values that this program works with."""

OPTIONS = {
    "FSDP_RESHARD_AFTER_FORWARD": "distributed.reshard_after_forward",
    "FSDP_OFFLOAD_PARAMS": "distributed.cpu_offload",
    "FSDP_ACTIVATION_CHECKPOINTING": "hyperparams.gradient_checkpointing",
    "ACCELERATE_MIXED_PRECISION": "hyperparams.fp_precision",
    "ACCELERATE_DYNAMO_BACKEND": "hyperparams.compile",
}
"""What says here what a variable of accelerate says."""

UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (tensor or context parallel)",
}

WITH_WORLD_SIZE = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def check_launcher(config: TrainerConfig) -> None:
    """Refuse what a launcher was configured for and this run would not do.

    Raises:
        ConfigError: one line with the variable or option, and the way out.
    """
    for variable, name in UNSUPPORTED.items():
        if _is_on(variable):
            raise ConfigError(
                f"this run was launched under {name}, which is not supported; use FSDP2 "
                "(torchrun, or `accelerate launch --use_fsdp --fsdp_version 2`)."
            )
    _check_number()
    told = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if told.lower() != "no":
        _contradict("ACCELERATE_DYNAMO_BACKEND", told, "no")
    precision = config.hyperparams.fp_precision or "fp32"
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told.lower() not in ("no", precision):
        _contradict("ACCELERATE_MIXED_PRECISION", told, f"fp_precision={precision}")
    if num_processes() > 1 and (is_launched_sharded() or config.distributed.strategy == "fsdp2"):
        check_shardable(config, f"{_asked_by(config)} asks for FSDP2")
    if not is_launched_sharded():
        return
    # True is the launcher's default. transformers would leave the weights of all processes but the
    # first unread, and there is nothing here that fills them (docs/decisions/0009).
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
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
    }
    for name, value in ours.items():
        told = os.environ.get(name, "")
        if told and told.lower() != value.lower():
            _contradict(name, told, value)


def _contradict(variable: str, told: str, value: str) -> None:
    way = f", or set {OPTIONS[variable]}" if variable in OPTIONS else ""
    raise ConfigError(
        f"the configuration of accelerate sets {variable}={told}, and this run works with "
        f"{value}; change it there{way}."
    )


def _check_number() -> None:
    """Refuse processes that do not know of each other: each would train the whole run alone."""
    if "WORLD_SIZE" in os.environ:
        missing = [name for name in WITH_WORLD_SIZE if name not in os.environ]
        if num_processes() > 1 and missing:
            raise ConfigError(
                f"WORLD_SIZE={num_processes()} is set and {', '.join(missing)} is not, so this "
                "process cannot meet the others; start it with torchrun, or unset WORLD_SIZE."
            )
        return
    mpi = next((name for name in MPI_SIZES if int(os.environ.get(name, "1")) > 1), None)
    if mpi is not None:
        raise ConfigError(
            f"this process was started by MPI ({mpi}={os.environ[mpi]}), which is not supported: "
            "start the processes with torchrun."
        )
    # `accelerate launch --cpu --num_processes N` sets an address to meet at, and starts one.
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
        raise ConfigError(
            "`accelerate launch --cpu` was asked for several processes and starts one; use "
            "torchrun --nproc_per_node N, or ACCELERATE_USE_CPU=true accelerate launch "
            "--multi_gpu --num_processes N, or --num_processes 1."
        )
