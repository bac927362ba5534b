"""`hyperparams.compile: blocks`: decoder layers compiled in place, checked, counted and put back.

Each layer is compiled by itself, so that one graph serves all layers of a kind. What is done with
the model beside training (`undisturbed`) runs the layers as they were written.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import signal
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.core.checks import training_loss, untraced
from trainer.core.hf_trainer import SupervisedTrainer
from trainer.core.loss import RELATIVE_TOLERANCE
from trainer.core.process import StopRequest
from trainer.core.proofs import attention_name
from trainer.errors import ConfigError, StoppedError
from trainer.preview.neutral import uncompiled

CHOICE = "hyperparams.compile=blocks"

BACKEND = "inductor"
"""What torch compiles with."""

ADVICE = "set hyperparams.compile=off."

ATTENTION = ("sdpa", "eager")
"""Others are given the borders of each batch's documents as plain numbers, or are compiled."""

MIN_CAPABILITY = (7, 0)
"""Of a GPU, for Triton."""

SHAPES_OF_A_LENGTH = 4
"""A length comes in full batches and in the last one of an epoch, each with padding or without."""

TOLD_AFTER = 10
"""Optimizer steps after which the run says what was compiled so far."""

NORM_TOLERANCE = 5
"""Times the tolerance of the loss: how far gradient norms may be apart."""


# ---- before anything is written


def check_compiler(device: torch.device) -> None:
    """Refuse `compile=blocks` where this machine cannot compile for the device.

    Raises:
        ConfigError: with the reason.
    """
    from torch._dynamo import config, eval_frame  # takes seconds, and only these runs need it

    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"{CHOICE} works on CPU and CUDA, and this run is on {device.type}; {ADVICE}"
        )
    if not eval_frame.is_dynamo_supported():
        raise ConfigError(f"{CHOICE}: torch {torch.__version__} cannot compile here; {ADVICE}")
    if config.disable:
        raise ConfigError(
            f"{CHOICE}, but TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE turns compilation off in "
            f"this process; unset it, or {ADVICE}"
        )
    missing = _missing_on_cpu() if device.type == "cpu" else _missing_on_cuda(device)
    if missing:
        raise ConfigError(f"{CHOICE} needs {missing}; install it, or {ADVICE}")


def _missing_on_cpu() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        found = shutil.which(get_cpp_compiler())
    except InvalidCxxCompiler:
        found = None
    if found is None:
        return "a C++ compiler (g++ or clang++, or the variable CXX), and there is none"
    return _missing_header()


def _missing_on_cuda(device: torch.device) -> str | None:
    from torch.utils._triton import has_triton

    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return "a GPU of compute capability 7.0 or more, and this one has {}.{}".format(*capability)
    if not has_triton():
        return "the package triton, and it does not work here"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "a C compiler (gcc or clang, or the variable CC), and there is none"
    return _missing_header()


def _missing_header() -> str | None:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.exists() else f"Python's headers, and there is no {header}"


def check_blocks(model_config: Any, name: str) -> None:
    """Refuse models whose layers cannot be compiled by themselves; no weights are loaded.

    Args:
        name: the option that names the model, with its value.
    Raises:
        ConfigError: code of the model's own folder, or no list of decoder layers.
    """
    if type(model_config).__module__.startswith("transformers_modules"):
        raise ConfigError(
            f"{CHOICE}: {name} runs code from its own folder, whose layers are not known to "
            f"compile; {ADVICE}"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(model_config), attn_implementation="eager"
        )
    if not decoder_layers(model):
        raise ConfigError(
            f"{CHOICE}: {type(model).__name__} ({name}) has no list of decoder layers; {ADVICE}"
        )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that repeat, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


# ---- while the model trains


class CompiledBlocks(TrainerCallback):  # type: ignore[misc]
    """The layers of one model, compiled until `close`; counts what torch compiles meanwhile.

    Graphs are made at the first batch of each length, in the forward and backward pass.
    """

    def __init__(self, model: Any, buckets: Sequence[int], notice: Callable[..., None]):
        """Compile the layers in place: names of weights stay as they are.

        Args:
            model: with adapters, if it has any.
            buckets: all lengths that a batch can have.
            notice: told (text, level).
        Raises:
            ConfigError: its attention cannot be compiled.
        """
        import torch._dynamo as dynamo
        from torch._dynamo import callback
        from torch._dynamo.utils import counters

        if attention_name(model) not in ATTENTION:
            raise ConfigError(
                f"{CHOICE}: attention {attention_name(model)} gets the lengths of each batch as "
                "plain numbers, and each would be compiled anew; set "
                f"model.attn_implementation=sdpa, or {ADVICE}"
            )
        self.trainer: SupervisedTrainer | None = None
        self.num_recompiles, self.seconds = 0, 0.0
        self.buckets, self._notice = tuple(buckets), notice
        self._counters, self._first_step = counters, 0
        self._is_limit_told = False
        self._layers = decoder_layers(model)
        kinds = {(type(one), _kind(model, at)) for at, one in enumerate(self._layers)}
        # One more than the kinds: the first layer's input may need no gradient.
        self.limit = len(self.buckets) * SHAPES_OF_A_LENGTH * (len(kinds) + 1)
        self._closing = contextlib.ExitStack()
        dynamo.reset()  # graphs of an earlier run would count against the limit
        self._closing.callback(dynamo.reset)
        self._closing.enter_context(
            dynamo.config.patch(
                recompile_limit=self.limit,
                accumulated_recompile_limit=max(
                    self.limit, dynamo.config.accumulated_recompile_limit
                ),
                suppress_errors=False,  # what cannot be compiled must not run as if it were
                optimize_ddp=False,  # layers are small enough for gradients to travel in time
            )
        )
        self._before = self._counts()
        watch, handler = _CompilationWatch(self), callback.callback_handler
        handler.register_start_callback(watch.begin)
        self._closing.callback(handler.remove_start_callback, watch.begin)
        handler.register_end_callback(watch.end)
        self._closing.callback(handler.remove_end_callback, watch.end)
        for layer in self._layers:
            layer.compile(backend=BACKEND, dynamic=False)
            self._closing.callback(setattr, layer, "_compiled_call_impl", None)

    def close(self) -> None:
        """Leave the model, and torch's settings, as they were."""
        self._closing.close()

    # ---- counts

    def _counts(self) -> dict[str, int]:
        unimplemented = self._counters["unimplemented"]
        return {
            "graphs": self._counters["stats"]["unique_graphs"],
            "graph_breaks": sum(self._counters["graph_break"].values()),
            "uncompiled": sum(unimplemented.values()),
            "limit": sum(n for why, n in unimplemented.items() if "recompile limit" in why),
        }

    def summary(self) -> dict[str, Any]:
        """What was compiled so far.

        Returns:
            graphs, recompiles (graphs of code that had one already), graph_breaks, uncompiled
            (pieces of code that torch gave up on), seconds, lengths (those that batches are padded
            to, in tokens), limit (of graphs), is_limit_reached.
        """
        now = self._counts()
        counts = {name: now[name] - self._before[name] for name in now}
        is_over = bool(counts.pop("limit"))
        return {
            **counts,
            "recompiles": self.num_recompiles,
            "seconds": round(self.seconds, 3),
            "lengths": list(self.buckets),
            "limit": self.limit,
            "is_limit_reached": is_over,
        }

    def words(self) -> str:
        """The same in a line."""
        seen = self.summary()
        return (
            f"compiled {seen['graphs']} graphs in {seen['seconds']:.1f} s ({len(self._layers)} "
            f"layers, up to {len(seen['lengths'])} lengths), {seen['recompiles']} recompiles, "
            f"{seen['graph_breaks']} graph breaks"
        )

    # ---- what HF's Trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare a compiled pass over the longest batch with a plain one."""
        assert self.trainer is not None, "set by assemble_trainer"
        self._first_step = int(state.global_step)
        compare_with_plain(self.trainer, self._notice)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what was compiled after some steps, and at once where a shape is not any more."""
        if state.global_step == self._first_step + TOLD_AFTER:
            self._notice(self.words(), "info")
        if not self._is_limit_told and self.summary()["is_limit_reached"]:
            self._is_limit_told = True
            self._notice(
                f"more than {self.limit} graphs would be needed, so batches of new shapes run "
                f"uncompiled from here on; {CHOICE} is of little use for this model",
                "warning",
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what was compiled in all."""
        self._notice(self.words(), "info")


def _kind(model: Any, at: int) -> str | None:
    """What a config says of the attention of layer `at`."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    return kinds[at] if kinds and at < len(kinds) else None


class _CompilationWatch:
    """Counts and times compilations, and keeps a terminal's signals from the compiler.

    Ctrl-C goes to every process of the terminal: it would end the C++ compiler, and so the run,
    which stops at the end of its step. The signal waits for the end of the compilation.
    """

    def __init__(self, blocks: CompiledBlocks) -> None:
        self.blocks, self.started = blocks, 0.0
        self.mask: set[Any] = set()

    def begin(self, what: Any) -> None:
        self.started = time.perf_counter()
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
        frame = str(what.compile_id).rpartition("/")[2]
        if what.callback_trigger.name == "DYNAMO" and frame != "0":
            self.blocks.num_recompiles += 1

    def end(self, _: Any) -> None:
        self.blocks.seconds += time.perf_counter() - self.started
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)


def compare_with_plain(trainer: SupervisedTrainer, notice: Callable[..., None]) -> None:
    """Refuse to train where compiled layers give another loss or gradient than plain ones.

    Nothing is left behind. Where a pass is random (dropout) there is nothing to compare.

    Raises:
        ConfigError: they differ by more than rounding.
    """
    plain, is_random = _figures(trainer, is_plain=True)
    if is_random:
        notice("compiled layers were not compared with plain ones: the model has dropout", "info")
        return
    compiled, _ = _figures(trainer, is_plain=False)
    dtype = trainer.accelerator.state.mixed_precision
    tolerance = RELATIVE_TOLERANCE[
        {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    ]
    for what, mine, own, times in zip(
        ("loss", "gradient norm"), compiled, plain, (1, NORM_TOLERANCE), strict=True
    ):
        # Written so that a NaN refuses, unless both are (an overflow of fp16).
        if not abs(mine - own) <= times * tolerance * max(abs(own), 1e-6) and mine == mine:
            raise ConfigError(
                f"{CHOICE}: the {what} of the longest batch is {mine:.6g} compiled and {own:.6g} "
                f"uncompiled, which is more than rounding; {ADVICE}"
            )


def _figures(trainer: SupervisedTrainer, *, is_plain: bool) -> tuple[tuple[float, float], bool]:
    """Loss and gradient norm of the longest batch, and whether the pass was random."""
    rows = trainer.order.longest_rows(trainer.args.per_device_train_batch_size)
    model, device = trainer.model_wrapped, trainer.args.device
    model.train()
    with untraced(model), uncompiled(model) if is_plain else contextlib.nullcontext():
        batch = trainer._prepare_inputs(
            trainer.data_collator([trainer.train_dataset[row] for row in rows])
        )
        before = _rng_state(device)
        loss = training_loss(trainer, model, batch)
        is_random = not torch.equal(before, _rng_state(device))
        trainer.accelerator.backward(loss)
        gradients = [one.grad for one in model.parameters() if one.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        model.zero_grad()
    return (float(loss.detach()), norm), is_random


def _rng_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextlib.contextmanager
def compiler_errors(stop: StopRequest) -> Iterator[None]:
    """Turn what torch raises while it compiles into what the run can say.

    Raises:
        StoppedError: a signal came meanwhile.
        ConfigError: the compiler failed.
    """
    try:
        yield
    except RuntimeError as error:
        cause = _compiler_error(error)
        if cause is None:
            raise
        if stop.is_signalled:
            raise StoppedError(f"by {stop.by}", exit_code=stop.exit_code) from error
        words = " ".join(str(cause).split())[:300]
        raise ConfigError(
            f"{CHOICE}: torch could not compile a layer of this model ({words}); {ADVICE}"
        ) from error


def _compiler_error(error: BaseException) -> BaseException | None:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError

    return error if isinstance(error, TorchDynamoException | CppCompileError) else None
