"""Who makes the previews of a run with sharded weights, which none of its processes has whole."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from pydantic import ValidationError

from trainer.config.monitoring_section import MonitoringConfig
from trainer.config.schema import TrainerConfig
from trainer.config.section import WRITTEN, CombinationError
from trainer.core.dry_run import memory_setup
from trainer.core.memory import device_memory, estimate_memory, fits, size_words
from trainer.core.publishing import NUM_SLOTS, profile_by_name
from trainer.core.run import Prepared, is_main_process
from trainer.errors import ConfigError
from trainer.models.load import read_model_config
from trainer.models.precision import resolve_device
from trainer.models.train_on import base_section
from trainer.monitoring.processes import num_processes

NOT_LOCAL = "local previews are not made from sharded weights"


def with_preview_backend(prepared: Prepared, notice: Callable[..., None]) -> Prepared:
    """The run with previews that its strategy allows, which is told where they were not asked for.

    The main process looks at the memory of its machine; the others are ready to take part, and
    told before training whether there is anything to take part in.

    Raises:
        ConfigError: `local` previews were asked for, and the weights are sharded.
    """
    monitoring = prepared.config.monitoring
    is_local = monitoring.preview_backend == "local"
    if not (prepared.is_sharded and is_local and monitoring.inference_interval):
        return prepared
    if "preview_backend" in monitoring.model_fields_set:
        raise ConfigError(
            f"monitoring.preview_backend=local, but {NOT_LOCAL} ({prepared.strategy}); set it to "
            "sidecar (a process of its own on this machine) or remote_3090 (a `trainer serve` on "
            "another one), or set monitoring.inference_interval=0."
        )
    if is_main_process():
        chosen, words = _in_place_of_local(prepared)
    else:
        chosen, words = {"preview_backend": "sidecar"}, "as the main process chooses"
    changes = _without_previews(prepared.config) if chosen is None else chosen
    if chosen is None and len(changes) > 1:
        others = ", ".join(f"monitoring.{name}" for name in list(changes)[1:])
        words += f" (what needs them is off too: {others})"
    notice(f"previews: {words}; {NOT_LOCAL}", "warning" if chosen is None else "info")
    config = prepared.config.model_copy(
        update={"monitoring": monitoring.model_copy(update=changes)}
    )
    return dataclasses.replace(prepared, config=config)


def _in_place_of_local(prepared: Prepared) -> tuple[dict[str, Any] | None, str]:
    """Changes of section `monitoring`, or None where there can be no previews; why, in words."""
    config = prepared.config
    away = "give monitoring.preview_backend=remote_3090 a server elsewhere to have some"
    where = base_section(config.model)
    model_config = read_model_config(where, offline=config.environment.offline)
    if getattr(model_config, "auto_map", None):
        return None, "off, because a sidecar does not run code from a model's own folder"
    stop_ids = prepared.data.encoder.template.stop_ids
    has_code = prepared.profile.logits_processors(prepared.tokenizer, stop_ids=stop_ids)
    if has_code and not profile_by_name(config.profile.name):
        return None, f"off, because a sidecar does not have the code of {config.profile.name}"
    need = _need(prepared, model_config)
    asked = resolve_device(config.monitoring.sidecar_device)
    for device in dict.fromkeys((asked, torch.device("cpu"))):
        if need.fits(device):
            chosen = {"preview_backend": "sidecar", "sidecar_device": str(device)}
            return chosen, f"sidecar on {device} ({need.words(device)})"
    return None, f"off, because a sidecar does not fit: {need.words(asked)}; {away}"


def _without_previews(config: TrainerConfig) -> dict[str, Any]:
    """Changes that turn previews off, and whatever the rules of the config want them for.

    Raises:
        ConfigError: something else than previews is wanted of them.
    """
    changes: dict[str, Any] = {"inference_interval": 0}
    fields, values = MonitoringConfig.model_fields, config.model_dump()
    for _ in fields:
        try:
            TrainerConfig.model_validate(
                {**values, "monitoring": {**values["monitoring"], **changes}}, context=WRITTEN
            )
        except ValidationError as error:
            broken: CombinationError = error.errors()[0]["ctx"]["error"]
            section, _, name = broken.keys[0].partition(".")  # the one that asks for something
            if section != "monitoring":
                raise ConfigError(f"a sidecar cannot be had, and {broken}.") from error
            changes[name] = fields[name].default
        else:
            break
    return changes


@dataclasses.dataclass(frozen=True)
class SidecarNeed:
    """Bytes that a sidecar needs beside training."""

    server: int
    """Weights, and keys and values of the prompts, where the sidecar computes."""
    copies: int
    """Of the weights, in shared memory."""
    loading: int
    """What the processes of this machine hold on the host while they load the model."""
    training: int
    """What they hold there later."""

    def fits(self, device: torch.device) -> bool:
        """Whether there is room for it, there and on the host."""
        host = torch.device("cpu")
        is_there = device == host or fits(
            self.server, device_memory(device), device_type=device.type
        )
        return is_there and fits(self._host(device), device_memory(host), device_type="cpu")

    def words(self, device: torch.device) -> str:
        """What is needed, and what there is."""
        host, there = device_memory(torch.device("cpu")), ""
        if device.type != "cpu":
            there = f"{size_words(self.server)} of {size_words(device_memory(device))} and "
        return f"about {there}{size_words(self._host(device))} of {size_words(host)} of host memory"

    def _host(self, device: torch.device) -> int:
        later = self.training + (self.server if device.type == "cpu" else 0)
        return self.copies + max(self.loading, later)


def _need(prepared: Prepared, model_config: Any) -> SidecarNeed:
    setup = dataclasses.replace(memory_setup(prepared), arenas=NUM_SLOTS["dir"])
    found = estimate_memory(model_config, setup)
    world = num_processes()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    itemsize = prepared.precision.compute_dtype.itemsize
    is_adapter = prepared.config.hyperparams.training_mode != "full"
    base = (found.num_parameters - found.num_trainable) * itemsize if is_adapter else 0
    return SidecarNeed(
        server=found.num_parameters * itemsize + found.previews,
        copies=found.host + base,
        loading=here * found.weights,
        training=here * found.total // world if prepared.device.type == "cpu" else 0,
    )
