"""Trackers of transformers (W&B, trackio, MLflow, ...): started before the weights are loaded, told
what TensorBoard is told, and ended with the run.

Texts of rows and answers are not theirs: `tracker_texts.py` has those.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.config.monitoring_section import MonitoringConfig
from trainer.errors import ConfigError
from trainer.monitoring.events import (
    DriftMeasured,
    EvaluationDone,
    Event,
    PreviewsDone,
    RunEnded,
    ScoresDone,
)
from trainer.monitoring.loss_names import named_losses
from trainer.monitoring.tracker_texts import keep_console_out

logger = logging.getLogger(__name__)

NOT_HFS = {"tensorboard", "none"}
"""TensorBoard's callback is ours, with previews in the same file."""

TEXT_KEYS = ("profile.system_prompt", "monitoring.preview_prompts")
"""Of the config: what a user wrote for the model; sent with monitoring.tracker_texts only."""


class Trackers(TrainerCallback):  # type: ignore[misc]
    """Transformers' callbacks of `monitoring.report_to`, in the main process.

    An observer as well: validation loss, share of previews that match, drift and means of scores
    are logged under the step they belong to.
    """

    def __init__(self, callbacks: Mapping[str, Any], arguments: Arguments, total_steps: int):
        """Start them.

        Args:
            callbacks: name -> callback of transformers, not started.
            arguments: what they are told of the run.
            total_steps: optimizer steps of the run.
        Raises:
            ConfigError: one cannot start; those that had been started are ended.
        """
        self._callbacks = dict(callbacks)
        self._state = TrainerState(max_steps=total_steps, is_world_process_zero=True)
        self._more: dict[str, Any] = {"model": SimpleNamespace(config=arguments.model_config)}
        self._arguments: Any = arguments
        self._failed: set[str] = set()
        self._exit_code = 0
        self._lock = threading.RLock()
        self._context: contextvars.Context | None = None
        begun: dict[str, Any] = {}
        for name, callback in self._callbacks.items():
            begun[name] = callback
            try:
                for method in ("on_init_end", "on_train_begin"):
                    self._call(callback, method, self._state)
            except BaseException as error:
                self._callbacks = begun
                self._exit_code = 1
                self.close()
                if not isinstance(error, Exception | SystemExit):
                    raise
                raise _unusable(name, "start", error) from error
        # trackio knows its run in this thread only, and previews may arrive in another one.
        self._context = contextvars.copy_context()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take note of the real model, for what is logged later."""
        self._arguments, self._more = args, kwargs

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """HF's figures of a step."""
        self._log(dict(logs or {}), state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """For those that show progress."""
        self._each("on_step_end", state)

    def on_event(self, event: Event) -> None:
        """Log the figures of an event."""
        if isinstance(event, RunEnded):
            self._exit_code = int(event.state == "failed")
        figures = figures_of(event)
        if figures:
            step = getattr(event, "step", 0)
            self._log(figures, replace(self._state, global_step=step))

    def close(self) -> None:
        """End the trackers' runs: another run of this process has its own."""
        self._each("on_train_end", self._state)
        if "wandb" in self._callbacks:
            import wandb  # installed, as it was asked for

            if wandb.run is not None:
                wandb.finish(exit_code=self._exit_code)
        self._callbacks = {}

    def _log(self, logs: dict[str, Any], state: Any) -> None:
        self._state = replace(self._state, epoch=state.epoch)
        for callback in self._callbacks.values():
            live = getattr(callback, "live", None)  # DVCLive counts calls else
            if live is not None:
                live.step = state.global_step
        self._each("on_log", state, logs=logs)

    def _each(self, method: str, state: Any, **more: Any) -> None:
        """Call all; what one raises is logged once and changes nothing."""
        for name, callback in self._callbacks.items():
            try:
                with self._lock:
                    self._in_context(functools.partial(self._call, callback, method, state, **more))
            except Exception as error:
                if name not in self._failed:
                    self._failed.add(name)
                    logger.warning(
                        "%s failed (%s: %s); training goes on, its output may have gaps",
                        *(name, type(error).__name__, error),
                    )

    def _in_context(self, call: Callable[[], None]) -> None:
        if self._context is None:
            call()
        else:
            self._context.run(call)

    def _call(self, callback: Any, method: str, state: Any, **more: Any) -> None:
        more = {"processing_class": None, **self._more, **more}
        getattr(callback, method)(self._arguments, state, TrainerControl(), **more)


def figures_of(event: Event) -> dict[str, float]:
    """Numbers of an event by the names that transformers shows under `eval/`."""
    if isinstance(event, EvaluationDone):
        more = named_losses("StepDone", event.source_losses)
        return {"eval_loss": event.val_loss, **{f"eval_{name}": one for name, one in more.items()}}
    if isinstance(event, DriftMeasured):
        return {"eval_drift/kl": event.kl, "eval_drift/changed_answers": event.num_changed}
    if isinstance(event, PreviewsDone) and not event.is_superseded:
        compared = [one.matches for one in event.results if one.matches is not None]
        return {"eval_preview_accuracy": sum(compared) / len(compared)} if compared else {}
    if isinstance(event, ScoresDone):
        return {f"eval_{event.source}/{one.name}": one.mean for one in event.figures}
    return {}


class Arguments:
    """What trackers read of TrainingArguments when they start: our config, and HF's defaults.

    Real ones would set up the device before it is known.
    """

    def __init__(self, config: Mapping[str, Any], model_config: Any, *, output_dir: Path) -> None:
        """Take the values to be shown.

        Args:
            config: dotted key -> plain value.
            model_config: transformers' config of the model.
            output_dir: its name becomes the run's, unless WANDB_NAME has one.
        """
        self._config = dict(config)
        self.model_config, self.output_dir = model_config, str(output_dir.resolve())
        self.run_name = os.environ.get("WANDB_NAME") or output_dir.resolve().name
        self.seed = config.get("environment.seed")

    def to_dict(self) -> dict[str, Any]:
        """The config of the run."""
        return dict(self._config)

    to_sanitized_dict = to_dict

    def __getattr__(self, name: str) -> Any:
        """HF's default."""
        for field in fields(TrainingArguments):
            if field.name == name:
                make = field.default_factory
                return field.default if make is MISSING else make()
        raise AttributeError(name)


def shown_config(values: Mapping[str, Any], *, with_texts: bool) -> dict[str, Any]:
    """A flat config without what the user wrote for the model, unless texts may be sent."""
    return {key: value for key, value in values.items() if with_texts or key not in TEXT_KEYS}


class _WithSteps:
    """trackio's module, whose `log` takes the step: transformers' callback has it count calls."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def log(self, metrics: dict[str, Any]) -> None:
        self._module.log(metrics, step=metrics.get("train/global_step"))


def make_callbacks(names: tuple[str, ...]) -> dict[str, Any]:
    """Transformers' callbacks of trackers, not started; without those that are ours.

    Raises:
        ConfigError: one cannot be made.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    found: dict[str, Any] = {}
    for name in names:
        if name in NOT_HFS:
            continue
        try:
            found[name] = INTEGRATION_TO_CALLBACK[name]()
        except Exception as error:
            raise _unusable(name, "be used", error) from error
    if "trackio" in found:
        found["trackio"]._trackio = _WithSteps(found["trackio"]._trackio)
    return found


def _unusable(name: str, what: str, error: BaseException) -> ConfigError:
    words = " ".join(str(error).split())[:300]
    return ConfigError(
        f"monitoring.report_to names {name}, which cannot {what} ({type(error).__name__}: "
        f"{words}). Put that right, or take {name} out of monitoring.report_to."
    )


def start_trackers(
    monitoring: MonitoringConfig,
    arguments: Arguments,
    *,
    total_steps: int,
    notice: Callable[..., None],
) -> Trackers | None:
    """Start those of `monitoring.report_to` that are transformers'; None where there are none.

    Raises:
        ConfigError: one cannot start.
    """
    callbacks = make_callbacks(monitoring.report_to)
    if "wandb" in callbacks and not monitoring.tracker_texts:
        told = keep_console_out()
        if told is not None:
            notice(told, "warning")
    return Trackers(callbacks, arguments, total_steps) if callbacks else None
