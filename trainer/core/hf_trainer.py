"""HF's Trainer, subclassed once, and its arguments made from our config.

The subclass has our loss, our order of rows, our checkpoints, and a guard: everything that could
move the weights wrongly is checked between the backward pass and `optimizer.step()`. What happens
around steps (previews, evaluation, status) is in `trainer.monitoring.callbacks`, not here.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerState, TrainingArguments, set_seed
from transformers.trainer_pt_utils import safe_globals

from trainer.config.schema import TrainerConfig
from trainer.core.checkpoint import RUN_STATE_FILE, Hashes
from trainer.core.loss import (
    NUM_TOKENS,
    SUPERVISED,
    full_loss,
    loss_share,
    supervised_loss,
)
from trainer.core.neftune import noisy_embeddings
from trainer.core.sharded_checkpoint import (
    SharedState,
    has_names_of,
    is_adapted,
    load_optimizer,
    load_weights,
)
from trainer.core.sharding import allow_sharding, offload_told, sharding_options
from trainer.core.source_losses import SourceSums
from trainer.core.tiles import Tiling
from trainer.data.batches import LOSS_WEIGHTS, EpochOrder, count_tokens
from trainer.data.rows import IGNORE_INDEX
from trainer.errors import MemoryFullError, NonFiniteError
from trainer.files import canonical_hash
from trainer.models.adapter_files import save_adapter
from trainer.models.devices import is_under_torchrun
from trainer.models.precision import ResolvedPrecision
from trainer.models.shard_files import has_shards
from trainer.monitoring.loss_names import named_losses
from trainer.monitoring.processes import num_processes
from trainer.monitoring.step_report import StepRecord

# The rates are made by schedule.py; these names and the warm-up are what trackers show of them.
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


ACCELERATE_DEVICE = "ACCELERATE_TORCH_DEVICE"


def build_training_arguments(
    config: TrainerConfig, *, precision: ResolvedPrecision, device: torch.device, run_dir: Path
) -> TrainingArguments:
    """Translate a resolved config; saving, evaluation and logging of HF's own are off.

    Args:
        config: with learning_rate filled in (`resolve`).
        precision: decides the bf16 and fp16 flags.
        device: of this process.
        run_dir: HF's output_dir; HF writes nothing into it.
    """
    hyper = config.hyperparams
    options: dict[str, Any] = {}
    if hyper.gradient_checkpointing:
        options["activation_checkpointing"] = True
        options["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    if device.type == "cpu":
        options["use_cpu"] = True
        if num_processes() > 1:
            options["ddp_backend"] = "gloo"
    with offload_told(config):
        arguments = _on(
            device,
            ddp_timeout=config.distributed.timeout_s,
            output_dir=str(run_dir),
            per_device_train_batch_size=hyper.batch_size,
            gradient_accumulation_steps=hyper.gradient_accumulation,
            num_train_epochs=hyper.num_epochs,
            max_steps=hyper.max_steps or -1,
            learning_rate=hyper.learning_rate,
            lr_scheduler_type=SCHEDULERS[hyper.lr_scheduler],
            warmup_steps=hyper.warmup_steps,
            weight_decay=hyper.weight_decay,
            adam_beta1=hyper.adam_beta1,
            adam_beta2=hyper.adam_beta2,
            adam_epsilon=hyper.adam_epsilon,
            max_grad_norm=hyper.max_grad_norm,
            bf16=precision.use_bf16,
            fp16=precision.use_fp16,
            seed=config.environment.seed,
            data_seed=config.environment.seed,
            dataloader_num_workers=config.environment.num_workers,
            dataloader_pin_memory=device.type == "cuda",
            remove_unused_columns=False,
            logging_strategy="steps",
            logging_steps=config.monitoring.status_update_interval,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # it hides NaN losses in the log
            report_to=[],  # trackers are started before the weights are loaded (`Trackers`)
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
            log_level="error",
            **options,
            **sharding_options(config),
        )
    if config.distributed.strategy == "fsdp2":
        allow_sharding(arguments)
    return arguments


def _on(device: torch.device, **options: Any) -> TrainingArguments:
    """TrainingArguments of a process that computes on `device`, whichever HF would take.

    HF takes cuda:0, and accelerate what a variable names, under torchrun for every process alike.
    """
    before = os.environ.pop(ACCELERATE_DEVICE, None)
    if device.type == "cuda" and not is_under_torchrun():
        os.environ[ACCELERATE_DEVICE] = str(device)
    try:
        arguments = TrainingArguments(**options)
        is_other = arguments.device != device
    finally:
        os.environ.pop(ACCELERATE_DEVICE, None)
        if before is not None:
            os.environ[ACCELERATE_DEVICE] = before
    if is_other and device.type == "cuda" and not is_under_torchrun():
        arguments.__dict__["_setup_devices"] = device  # a cached property, that of `device`
        torch.cuda.set_device(device)
    if arguments.n_gpu > 1:
        # HF would wrap the model in DataParallel, which copies it at every step and goes round
        # our hook; several GPUs are used through torchrun, one process each.
        arguments._n_gpu = 1
    return arguments


CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the host, had no memory left for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_OUT_OF_MEMORY in str(error)


def smaller_batch_size(batch_size: int, effective: int) -> int | None:
    """The largest divisor of an effective batch that is at most half of `batch_size`.

    Args:
        effective: rows of one optimizer step on one device.
    Returns:
        None at a batch_size of 1.
    """
    return next((n for n in range(batch_size // 2, 0, -1) if effective % n == 0), None)


MAX_OVERFLOWS_IN_A_ROW = 20

TRAINER_STATE_FILE = "trainer_state.json"

SCHEDULER_FILE = "scheduler.pt"

SaveCheckpoint = Callable[
    [int, Callable[[Path], None], Callable[[Path], Hashes] | None],
    None,
]
"""Called on every process with the step, what writes the main process's files into a folder, and,
of sharded weights, what writes those of this process; None where there are no shards."""


class SupervisedTrainer(Trainer):  # type: ignore[misc]
    """Trains on supervised positions and never steps on a non-finite loss or gradient."""

    loss_is_scaled_for_ga = True  # the loss is a sum over the whole accumulated batch's tokens

    def __init__(
        self,
        *args: Any,
        order: EpochOrder,
        save_checkpoint: SaveCheckpoint,
        run_state: Callable[[], dict[str, Any]],
        note_step: Callable[[StepRecord], None] = lambda record: None,
        use_own_forward: bool = False,
        tokenizer: Any = None,
        neftune_alpha: float = 0.0,
        resume_flags: str = "--resume",
        **kwargs: Any,
    ) -> None:
        """Take what HF's Trainer takes, and:

        Args:
            order: the order of training rows.
            save_checkpoint: called with the step and what writes the state's files.
            run_state: the monitoring state that a resume needs, as JSON values.
            note_step: told the figures of each step, before HF's callbacks hear of its end.
            tokenizer: saved beside the weights of each checkpoint.
            use_own_forward: compute the loss by the model's own forward instead of ours.
            neftune_alpha: of the noise on embeddings, which nothing but training gets.
            resume_flags: with which a message says how to go on with the run.
        """
        self.resume_flags = resume_flags
        optimizers = kwargs.pop("optimizers", (None, None))
        super().__init__(*args, **kwargs)
        # Not handed on: HF refuses them in a sharded run, where ours are sharded by `shard`.
        self.optimizer, self.lr_scheduler = optimizers
        # HF counts num_items_in_batch over labels[:, 1:] only when both of these are set.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.order = order
        self.use_own_forward = use_own_forward
        self.neftune_alpha = neftune_alpha
        self.tiling: Tiling | None = None
        """How logits may be made in tiles, once that is proved."""
        self.by_source: SourceSums | None = None
        """Takes the losses of each source, where rows are of several and the loss tells."""
        self.router = 0.0
        """What the router loss of experts counts beside the cross-entropy, as in their own loss."""
        self._tokenizer = tokenizer
        self.last_step: StepRecord | None = None
        self.num_overflows = 0
        self._overflows_in_a_row = 0
        self.save_with(save_checkpoint)
        self._run_state, self._note_step = run_state, note_step
        self._sums: torch.Tensor | None = None
        self._since_log: list[float] = []

    def save_with(self, save: SaveCheckpoint) -> None:
        """Save checkpoints by `save`."""
        self._save_with = save

    def use_batch_size(self, batch_size: int, order: EpochOrder) -> None:
        """Cut the steps into smaller micro-batches; before training.

        Args:
            batch_size: divides the rows of one optimizer step on one device.
            order: for that batch_size.
        """
        effective = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self.args.per_device_train_batch_size = self._train_batch_size = batch_size
        self.args.gradient_accumulation_steps = effective // batch_size
        self.order = order

    def training_step(self, *args: Any, **named: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch.

        Raises:
            MemoryFullError: it does not fit; says how to go on with smaller ones.
        """
        try:
            loss: torch.Tensor = super().training_step(*args, **named)
            return loss
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            words = " ".join(str(error).split())[:160]
        raise MemoryFullError(self._memory_advice(words))

    def _memory_advice(self, words: str) -> str:
        step, batch = self.state.global_step + 1, self.args.per_device_train_batch_size
        effective = batch * self.args.gradient_accumulation_steps
        smaller = smaller_batch_size(batch, effective)
        advice = "lower max_length or set gradient_checkpointing=true in a new run"
        if smaller is not None:
            advice = (
                f"go on from the last checkpoint with {self.resume_flags} --batch-size "
                f"{smaller} --gradient-accumulation {effective // smaller}, which trains the same "
                "steps"
            )
        return (
            f"step {step} ran out of the memory of {self.args.device} ({words}); the weights are "
            f"those of step {step - 1}. To go on, {advice}."
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy over supervised tokens, divided by those of the whole optimizer step.

        With loss weights: each token's times its weight, divided by the sum of the weights. A
        router loss is a mean over the step's forward passes, on all processes.
        """
        # Gradients are averaged over processes, the count is summed over them.
        is_share = num_items_in_batch is not None and self.args.average_tokens_across_devices
        factor = self.accelerator.num_processes if is_share else 1
        unwrapped = self.accelerator.unwrap_model(model)
        with noisy_embeddings(unwrapped, inputs, self.neftune_alpha if model.training else 0.0):
            if self.use_own_forward:
                loss = full_loss(model, inputs, num_items_in_batch)
            else:
                num_passes = getattr(self, "current_gradient_accumulation_steps", 1)
                loss = supervised_loss(
                    model,
                    unwrapped,
                    inputs,
                    num_items_in_batch,
                    tiling=self.tiling,
                    router=self.router / (factor * num_passes),
                    by_source=self.by_source,
                )
        loss = loss * factor
        self._note(loss, inputs)
        return (loss, None) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """What the losses of a step are divided by, over its micro-batches and all processes.

        Returns:
            The trained tokens, as HF counts them, or the sum of their loss weights. All rows of a
            run have weights or none has, so that every process is on the same way.
        """
        if not batch_samples or LOSS_WEIGHTS not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        total = torch.stack([loss_share(batch) for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            total = self.accelerator.gather(total).sum()
        return total

    def _note(self, loss: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Add this micro-batch to the step's sums, on the device, without waiting for it."""
        loss = loss.detach().float()
        if SUPERVISED in inputs:  # plain numbers, so that nothing is copied to the device
            tokens = torch.full_like(loss, inputs[NUM_TOKENS])
            trained = torch.full_like(loss, len(inputs[SUPERVISED]))
        else:
            tokens = count_tokens(inputs).float()
            trained = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().float()
        sums = torch.stack([loss, tokens, trained])
        self._sums = sums if self._sums is None else self._sums + sums

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last stop before `optimizer.step()`: take the step's numbers, refuse bad ones."""
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        assert self._sums is not None, "a step without a forward pass"
        sums, losses = self._sums, self._sums[:0]
        self._sums = None
        if self.by_source is not None:
            sums = torch.cat([sums, self.by_source.take(sums.device).flatten()])
        if self.accelerator.num_processes > 1:
            gathered = self.accelerator.gather(sums[None])
            losses = gathered[:, 0]
            sums = torch.cat([losses.mean().reshape(1), gathered[:, 1:].sum(0)])
        num_sums = len(sums)
        # One wait for the device per optimizer step, for all numbers at once.
        numbers = torch.cat(
            [sums, torch.as_tensor(norm, device=sums.device).detach().float().reshape(1), losses]
        ).tolist()
        loss, tokens, trained, *of_sources = numbers[:num_sums]
        value, *of_ranks = numbers[num_sums:]
        self._since_log = [a + b for a, b in zip_longest(self._since_log, of_sources, fillvalue=0)]
        self.last_step = StepRecord(
            loss,
            value,
            self._get_learning_rate(),
            int(tokens),
            int(trained),
            self.by_source.means(of_sources) if self.by_source is not None else {},
        )
        self._guard(loss, value, of_ranks)
        self._note_step(self.last_step)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **named: Any) -> None:
        """As HF's, with the loss of the step, where HF's is a mean since the last time.

        The losses of sources are over the steps since then: a step may have no row of a source.
        """
        if "loss" in logs and self.last_step is not None:
            logs = {**logs, "loss": self.last_step.train_loss}
            if self.by_source is not None:
                losses = self.by_source.means(self._since_log)
                logs |= named_losses("StepDone", losses)
                self._since_log = []
        super().log(logs, *args, **named)

    def _guard(self, loss: float, grad_norm: float, of_ranks: Sequence[float]) -> None:
        step = self.state.global_step + 1
        if not math.isfinite(loss):
            bad = [f"rank {rank}" for rank, one in enumerate(of_ranks) if not math.isfinite(one)]
            of_whom = f" of {', '.join(bad)}" if bad else ""
            raise NonFiniteError(
                f"step {step}: the loss{of_whom} is {loss}; the weights are those of step "
                f"{step - 1}. "
                "Lower hyperparams.learning_rate or look at the rows of this step."
            )
        if math.isfinite(grad_norm):
            self._overflows_in_a_row = 0
            return
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is None or not scaler.is_enabled():
            raise NonFiniteError(
                f"step {step}: the gradient norm is {grad_norm}; the weights are those of step "
                f"{step - 1}. Lower hyperparams.learning_rate, or use fp32."
            )
        # fp16: the scaler skips this step and lowers its scale; that is normal, now and then.
        self.num_overflows += 1
        self._overflows_in_a_row += 1
        if self._overflows_in_a_row >= MAX_OVERFLOWS_IN_A_ROW:
            raise NonFiniteError(
                f"step {step}: fp16 gradients overflowed {self._overflows_in_a_row} times in a "
                "row; the weights did not move. Use bf16 or fp32, or lower "
                "hyperparams.learning_rate."
            )

    def use_weights(self, folder: Path) -> None:
        """Take the weights of a checkpoint, and nothing else of it."""
        self._load_from_checkpoint(str(folder))

    def restore(self, folder: Path) -> None:
        """Take weights and position of a checkpoint, and train nothing."""
        self.use_weights(folder)
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_FILE))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume: Any) -> Any:
        """As HF's, but a model that was sharded before its proofs is not prepared again."""
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume)
        self.create_scheduler(num_training_steps=max_steps)
        if resume is not None:
            self._load_from_checkpoint(resume, self.model)
            self._load_optimizer_and_scheduler(resume)
            self._load_scaler(resume)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model, train_dataloader

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        return self.order

    def _run_epoch(self, model: Any, epoch: int, *rest: Any, **named: Any) -> Any:
        """As HF's, with the epoch's own rows also behind a loader that skips.

        A resume in mid-epoch wraps the batches of several processes once more, and accelerate's
        `set_epoch` does not reach the order through both: it would deal out epoch 0 again.
        """
        self.order.set_epoch(epoch)
        return super()._run_epoch(model, epoch, *rest, **named)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: nothing here reports it."""
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Our protocol instead of HF's, which writes in place and keeps by modification time."""
        rng_states = self._rng_states()
        shared = SharedState(self.model, self.optimizer) if self.is_fsdp_enabled else None
        self._save_with(
            self.state.global_step,
            lambda folder: self._write_state(folder, rng_states, shared),
            shared.write_share if shared is not None else None,
        )

    def _write_state(
        self, folder: Path, rng_states: list[dict[str, Any]], shared: SharedState | None
    ) -> None:
        """Write weights, optimizer, schedule, RNG and position, or what of them is not shared."""
        model = self.accelerator.unwrap_model(self.model)
        if shared is not None:
            shared.write_rest(folder)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_FILE)
        else:
            if hasattr(model, "peft_config"):
                save_adapter(model, folder)
            else:
                model.save_pretrained(folder)
            self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        for rank, state in enumerate(rng_states):
            torch.save(state, folder / self._rng_name(rank))
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)  # a checkpoint can be opened by itself
        self.state.save_to_json(str(folder / TRAINER_STATE_FILE))
        (folder / RUN_STATE_FILE).write_text(json.dumps(self._run_state(), allow_nan=False))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As HF's, and from shards into shards, and between shards and whole weights.

        HF's leaves out in silence what has another name in files than in memory, as experts have.
        """
        unwrapped = self.accelerator.unwrap_model(model if model is not None else self.model)
        folder = Path(resume_from_checkpoint)
        is_plain = not self._is_sharded_anywhere(resume_from_checkpoint)
        if is_plain and (is_adapted(unwrapped) or has_names_of(unwrapped, folder)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(unwrapped, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As HF's, and from shards into shards, and between shards and whole moments."""
        if checkpoint is None or not self._is_sharded_anywhere(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        model, folder = self.accelerator.unwrap_model(self.model), Path(checkpoint)
        load_optimizer(model, self.optimizer, folder)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_FILE, weights_only=True))

    def _is_sharded_anywhere(self, checkpoint: str) -> bool:
        return bool(self.is_fsdp_enabled or has_shards(Path(checkpoint)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As HF's, but a run on the CPU leaves a GPU of its machine alone.

        A process that the run had not before gets a random state of its own, the same each time.
        """
        if checkpoint is None:
            return
        rank = self.args.process_index
        names = [f"rng_state_{rank}.pth", *(["rng_state.pth"] if rank == 0 else [])]
        path = next((p for p in (Path(checkpoint) / n for n in names) if p.is_file()), None)
        if path is None:
            seed = canonical_hash([self.args.seed, self.state.global_step, rank])
            set_seed(int(seed[:8], 16))
            return
        with safe_globals():
            state = torch.load(path, weights_only=True)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.random.set_rng_state(state["cpu"])
        if self.args.device.type == "cuda" and "cuda" in state:
            _set_cuda_state(state["cuda"], self.args.device)

    def _rng_name(self, rank: int) -> str:
        return "rng_state.pth" if self.accelerator.num_processes == 1 else f"rng_state_{rank}.pth"

    def _rng_states(self) -> list[dict[str, Any]]:
        """The random state of every process, in order of rank."""
        mine = _rng_state()
        if self.accelerator.num_processes == 1:
            return [mine]
        states: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(states, mine)
        return states


def _rng_state() -> dict[str, Any]:
    """Random state in the layout that HF's `_load_rng_state` reads."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = (
            torch.cuda.get_rng_state_all() if _is_distributed() else torch.cuda.get_rng_state()
        )
    return state


def _set_cuda_state(found: torch.Tensor | list[torch.Tensor], device: torch.device) -> None:
    """Of one GPU, or of all that the process saw; machines need not have equally many."""
    if isinstance(found, torch.Tensor):
        torch.cuda.set_rng_state(found, device)
        return
    for index, one in enumerate(found[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one, index)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
