"""Trackers of `monitoring.report_to`: which are there, and that none of them can stop training.

TensorBoard gets the accuracy of previews, drift and the validation loss beside HF's own curves.
Texts of rows and answers go where `monitoring.tracker_texts` says so, and nowhere else.

Imports torch and tensorboard when a tracker is made, not when this module is imported.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.monitoring.events import (
    DriftMeasured,
    EvaluationDone,
    Event,
    PreviewsDone,
    ScoresDone,
    printable,
)
from trainer.monitoring.loss_names import named_losses
from trainer.preview.base import PreviewResult

logger = logging.getLogger(__name__)

NO_TRACKER = "none"

MAY_FAIL = {"on_init_end", "on_train_begin"}
"""A tracker that cannot start stops the run; one that fails later does not."""

TEXT_CHARS = 8192
"""Longest text sent to TensorBoard, in characters; previews.jsonl has all of it."""


TRACKERS = (
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow"),
    *("mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"),
)
"""Names that transformers knows, which takes seconds to load."""

PACKAGES = {"clearml", "codecarbon", "dagshub", "dvclive", "mlflow", "swanlab", "trackio", "wandb"}
"""Those that are called as their packages are."""


def check_tracker_names(names: tuple[str, ...]) -> None:
    """Refuse trackers that nobody knows, or that are not installed as far as names tell it.

    Raises:
        ConfigError: a name is unknown, or there is no package of that name.
    """
    # A script may have given transformers another one.
    loaded = sys.modules.get("transformers.integrations.integration_utils")
    known = [*dict.fromkeys((*TRACKERS, *getattr(loaded, "INTEGRATION_TO_CALLBACK", ())))]
    for name in names:
        if name in known:
            # Of the others the package has another name: `check_trackers` finds them.
            if name in PACKAGES and importlib.util.find_spec(name) is None:
                raise _not_installed(name)
            continue
        if names == (NO_TRACKER,):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"monitoring.report_to names {name!r}, which is not a known tracker.{hint} "
            f"Known: {', '.join(known)}; {NO_TRACKER!r} "
            "alone turns them off. On the command line, give the flag once per tracker."
        )


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that this machine does not have, before anything is loaded.

    Raises:
        ConfigError: a name is unknown, or its package is not installed.
    """
    check_tracker_names(names)
    # transformers loads torch.
    from transformers.integrations import integration_utils as hf

    installed = hf.get_available_reporting_integrations()
    for name in names:
        if name not in installed and name != NO_TRACKER:
            raise _not_installed(name)


def _not_installed(name: str) -> ConfigError:
    return ConfigError(
        f"monitoring.report_to names {name}, which is not installed; `pip install "
        f"{name.replace('_', '-')}`, or take it out of monitoring.report_to."
    )


def guard_trackers(trainer: Any) -> None:
    """Wrap HF's own trackers, and TensorBoard's, so that none can stop training later on."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    trackers = tuple(INTEGRATION_TO_CALLBACK.values())
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, trackers):
            for name in dir(type(callback)):
                if name.startswith("on_") and name not in MAY_FAIL:
                    setattr(callback, name, _guarded(getattr(callback, name), type(callback)))


def _guarded(method: Callable[..., Any], tracker: type) -> Callable[..., Any]:
    """The method, whose failures are logged once and change nothing."""
    has_failed = False

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal has_failed
        try:
            return method(*args, **kwargs)
        except Exception as error:
            if not has_failed:
                logger.warning(
                    "%s failed (%s: %s); training goes on, its output may have gaps",
                    tracker.__name__,
                    type(error).__name__,
                    error,
                )
            has_failed = True
            return None

    return call


def tensorboard_callback(
    log_dir: str | Path, *, start_step: int = 0, with_texts: bool = False
) -> tuple[Any, TensorBoardPreviews]:
    """HF's TensorBoard callback and the tracker of previews, writing into one event file.

    Args:
        log_dir: folder of the event files.
        start_step: above 0 after a resume; curves drop what an earlier process wrote after it.
        with_texts: prompts, golden answers and answers too.
    Raises:
        ConfigError: tensorboard is not installed or `log_dir` cannot be written.
    """
    writer = summary_writer(log_dir, start_step=start_step)
    # transformers loads torch.
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(writer), TensorBoardPreviews(writer, with_texts=with_texts)


def summary_writer(log_dir: str | Path, *, start_step: int = 0) -> Any:
    """A SummaryWriter of a folder; see `tensorboard_callback`."""
    try:
        # An optional dependency, and most of a second to import.
        from torch.utils.tensorboard import SummaryWriter

        # A run that ended before its first checkpoint has figures of steps that are made again.
        is_again = start_step > 0 or any(Path(log_dir).glob("events.out.tfevents.*"))
        purge_step = start_step + 1 if is_again else None
        return SummaryWriter(str(log_dir), purge_step=purge_step)
    except ImportError as error:
        raise ConfigError(
            f"monitoring.report_to names tensorboard, which cannot be imported ({error}); "
            "`pip install tensorboard`, or take it out of monitoring.report_to."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{log_dir}: TensorBoard's folder cannot be written ({error}); make it writable, or "
            "take tensorboard out of monitoring.report_to."
        ) from error


class TensorBoardPreviews:
    """An observer that sends previews and validation losses to TensorBoard."""

    def __init__(self, target: Any, *, with_texts: bool = False) -> None:
        """Take a SummaryWriter, which stays its owner's, or the folder of one of our own.

        Args:
            with_texts: prompts, golden answers and answers too.
        Raises:
            ConfigError: tensorboard is not installed or the folder cannot be written.
        """
        self.with_texts = with_texts
        self._is_own = isinstance(target, str | Path)
        self.writer = summary_writer(target) if self._is_own else target

    def on_event(self, event: Event) -> None:
        """Send what an event brings, if it is a preview or an evaluation."""
        if isinstance(event, EvaluationDone):
            self.writer.add_scalar("val_loss", event.val_loss, event.step)
            for name, loss in named_losses("EvaluationDone", event.source_losses).items():
                self.writer.add_scalar(name, loss, event.step)
        elif isinstance(event, DriftMeasured):
            self.writer.add_scalar("drift/kl", event.kl, event.step)
            self.writer.add_scalar("drift/changed_answers", event.num_changed, event.step)
        elif isinstance(event, PreviewsDone) and not event.is_superseded:
            for index, result in enumerate(event.results if self.with_texts else ()):
                tag = f"previews/{result.prompt_id or f'prompt-{index}'}"
                self.writer.add_text(tag, preview_markdown(result), event.step)
            compared = [one.matches for one in event.results if one.matches is not None]
            if compared:
                share = sum(compared) / len(compared)
                self.writer.add_scalar("preview_accuracy", share, event.step)
            self.writer.flush()

        elif isinstance(event, ScoresDone):
            for figure in event.figures:
                self.writer.add_scalar(f"{event.source}/{figure.name}", figure.mean, event.step)
            self.writer.flush()

    def close(self) -> None:
        """Flush; close the writer if it is our own."""
        if self._is_own:
            self.writer.close()
        else:
            self.writer.flush()


def preview_markdown(result: PreviewResult) -> str:
    """A preview as Markdown in which nothing of its texts is Markdown or HTML."""
    verdicts = {True: "matches", False: "does not match", None: "not compared"}
    head = f"step {result.step}: {verdicts[result.matches]}"
    scores = [f"{name} {one:.4g}" for name, one in result.scores.items() if one is not None]
    parts = [", ".join([head, *scores]), "prompt", _block(result.prompt)]
    if result.golden_answer is not None:
        parts += ["golden", _block(result.golden_answer)]
    if result.ok:
        parts += ["generated", _block(result.text)]
    else:
        parts += ["failed", _block(str(result.error_message))]
    for number, sample in enumerate(result.samples, start=1):
        said = verdicts[sample.matches] if sample.ok else "failed"
        parts += [
            f"sample {number}: {said}",
            _block(sample.text if sample.ok else str(sample.error_message)),
        ]
    return "\n\n".join(parts)


def _block(text: str) -> str:
    """An indented code block: unlike a fenced one, no text inside can end it."""
    lines = text[:TEXT_CHARS].split("\n")
    return "\n".join("    " + printable(line, TEXT_CHARS) for line in lines)
