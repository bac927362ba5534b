"""Sections `hyperparams`, `model`, `lora` and `distributed`: what is trained, and how.

No torch, no file access; see `trainer/config/schema.py` for the rules.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from trainer.config.section import (
    VAL_LOSS,
    CombinationError,
    Interval,
    Masters,
    Metric,
    PositiveInt,
    Precision,
    Section,
    Share,
    TrainingMode,
)


class Hyperparams(Section):
    """How the weights are trained."""

    training_mode: TrainingMode = "full"
    """`full` trains every weight; `lora` trains small adapters (section `lora`); `qlora` trains
    adapters on a base that is quantized to 4 bit (nf4) while it is loaded: about 0.52 bytes a
    weight of its linear layers. Needs the extra `qlora`."""
    batch_size: PositiveInt = 8
    """Sequences in one forward pass on one device."""
    gradient_accumulation: PositiveInt = 1
    """Forward passes in one optimizer step; effective batch = batch_size x this x devices."""
    auto_batch_size: bool = False
    """Halve `batch_size` and double `gradient_accumulation` until the longest rows fit into memory,
    which is tried before the first step; effective batch and steps stay the same."""
    learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Peak rate. Empty: 2e-5 for full, 2e-4 for lora and qlora, 5e-3 for the untrained model
    `tiny`."""
    num_epochs: Annotated[float, Field(gt=0.0)] = 1.0
    """Passes over the training rows; `max_steps` wins when it is set."""
    max_steps: PositiveInt | None = None
    """Optimizer steps in all. Empty: as many as `num_epochs` takes."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Longest row, prompt and answer, in tokens. Empty: the model's context, at most 2048."""
    fp_precision: Precision | None = None
    """One precision for loading, computing and saving; full training keeps fp32 master weights.
    Empty: `bf16` on a GPU that computes in it, `fp32` elsewhere: a CPU with bf16 arithmetic may be
    slower in it (`trainer doctor` and `--dry-run` measure that)."""
    masters: Masters = "fp32"
    """Dtype of the weights that full training moves. `bf16_stochastic`: the only copy is bf16, and
    the optimizer rounds up or down at random, so that small updates are not lost; norms and biases
    stay fp32. Saves 4 bytes a weight with `adamw`, 10 with `adamw_8bit` (needs the extra
    `torchao`; `fp_precision` is then `bf16`)."""
    optimizer: Literal["adamw", "muon", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """`muon`: Muon for the matrices of the blocks, AdamW for the rest. `adamw_8bit`: AdamW with
    8-bit moments, those of embeddings in fp32 (needs the extra `qlora`; with
    `masters=bf16_stochastic` the extra `torchao`). `paged_adamw_8bit`: the same, and moments move
    to the CPU when a CUDA GPU is full."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate moves after the warm-up. Linear and cosine fall so that the step after
    the last one would have 0."""
    warmup_steps: Annotated[float, Field(ge=0.0)] = 0.03
    """Steps before the first one at the peak rate: a whole number, or below 1 a share of all steps.
    With N of them the first step has 1/(N+1) of the peak."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay of the optimizer (norms and biases are left out)."""
    adam_beta1: Share = 0.9
    """AdamW's decay of the mean of gradients."""
    adam_beta2: Share = 0.999
    """AdamW's decay of the mean of squared gradients."""
    adam_epsilon: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's term against division by zero."""
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are scaled down to this norm; 0 = off."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third slower."""
    loss_kernel: Literal["auto", "tiles", "liger"] = "auto"
    """Output head and loss of large batches: `tiles` computes logits part by part, and again in
    the backward pass; `liger` (a CUDA GPU, extra `liger`) in one kernel. `auto` takes `liger` where
    it is installed and gives the same loss and gradients on this model's head."""
    compile: Literal["off", "blocks"] = "off"
    """`blocks` compiles the decoder layers with torch.compile, which takes seconds to minutes at
    the first batch of each length. Batches are padded to few different lengths;
    previews and evaluation are not compiled. On CPU (with a C++ compiler) and CUDA."""
    early_stopping_patience: Interval = 0
    """Stop after this many micro-evaluations without a lower validation loss, or without a clear
    rise of the score that decides; 0 = off. The best weights have a checkpoint, which is kept, and
    the final model has them too (`output.final_model`)."""
    early_stopping_metric: Metric = "val_loss"
    """What early stopping looks at: `val_loss`, or a score of the `monitoring.num_score_prompts`:
    `score.NAME`, a name of `monitoring.scores` or `golden_probability`. A score has risen only
    where the paired interval at 95 % says so."""
    early_stopping_min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """By how much (nats per token) validation loss must fall to count as lower."""

    @property
    def trains_adapters(self) -> bool:
        """Whether the model's own weights are frozen."""
        return self.training_mode != "full"

    @model_validator(mode="after")
    def _check_compile(self) -> Hyperparams:
        if self.compile != "off" and self.training_mode == "qlora":
            raise CombinationError(
                "hyperparams.compile=blocks cannot compile layers in 4 bit, which "
                "training_mode=qlora makes; set compile=off or training_mode=lora",
                "hyperparams.compile",
                "hyperparams.training_mode",
            )
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> Hyperparams:
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise CombinationError(
                f"warmup_steps={self.warmup_steps} is neither a whole number of steps nor a share "
                "below 1; give one of them",
                "hyperparams.warmup_steps",
            )
        if self.max_steps is not None and self.warmup_steps >= max(self.max_steps, 1):
            raise CombinationError(
                f"warmup_steps={self.warmup_steps:g} is not below max_steps={self.max_steps}; "
                "lower warmup_steps or raise max_steps",
                "hyperparams.warmup_steps",
                "hyperparams.max_steps",
            )
        return self

    @model_validator(mode="after")
    def _check_early_stopping_metric(self) -> Hyperparams:
        if self.early_stopping_metric != VAL_LOSS and self.early_stopping_min_delta:
            raise CombinationError(
                f"early_stopping_min_delta is in nats of validation loss, and early_stopping_metric"
                f"={self.early_stopping_metric}, which has risen where the paired interval says "
                "so; set early_stopping_min_delta=0 or early_stopping_metric=val_loss",
                "hyperparams.early_stopping_min_delta",
                "hyperparams.early_stopping_metric",
            )
        return self

    @model_validator(mode="after")
    def _check_masters(self) -> Hyperparams:
        if self.masters == "fp32":
            return self
        if self.training_mode != "full":
            raise CombinationError(
                f"masters={self.masters} is for training_mode=full; training_mode="
                f"{self.training_mode} trains few weights, which are fp32; set masters=fp32",
                "hyperparams.masters",
                "hyperparams.training_mode",
            )
        if self.fp_precision not in (None, "bf16"):
            raise CombinationError(
                f"masters={self.masters} computes in bf16, and fp_precision={self.fp_precision}; "
                "set fp_precision=bf16 or masters=fp32",
                "hyperparams.masters",
                "hyperparams.fp_precision",
            )
        if self.optimizer not in ("adamw", "adamw_8bit"):
            raise CombinationError(
                f"optimizer={self.optimizer} rounds to the nearest value, which loses most updates "
                f"of weights that are kept as masters={self.masters}; set optimizer=adamw or "
                "adamw_8bit, or masters=fp32",
                "hyperparams.masters",
                "hyperparams.optimizer",
            )
        return self


ATTENTION = (
    "auto",
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)

HUB_KERNEL = re.compile(r"[^/:@\s]+/[^/:@\s]+(@[^/:@\s]+)?(:[^/:@\s]+)?")
"""`owner/name`, with any revision and function."""


class ModelSection(Section):
    """Which model is trained, and how it is loaded."""

    model_path: str = ""
    """An alias (`trainer models` lists them), a hub id, a folder, or a .gguf file (its weights are
    unpacked; needs the extra `gguf`). Flag: --model."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    attn_implementation: str = "auto"
    """Attention code: `sdpa`, `eager`, `flash_attention_2` to `_4`, `flex_attention`, or a kernel
    of the hub, `owner/name` or `owner/name:function` (extra `kernels`; such a kernel is code, and
    needs model.trust_remote_code outside `kernels-community`). `auto`: flash attention where it is
    installed, the device is a CUDA GPU and the model is proved right with it; else the model's own
    choice, usually sdpa. The run says which it took and why."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """`chatml`, `plain` or a Jinja file, in place of the model's own; saved with the result.
    Empty: the model's own, and for base models without one `chatml` if they know its tokens, else
    `plain`."""
    add_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that become one token each, such as the markers of a profile; the embedding grows and
    is saved with them. Adapters train the rows of these tokens, in embedding and head, and hold
    them."""
    trust_remote_code: bool = False
    """Run Python code that lies in the model folder. Only for models whose code you have read."""

    @field_validator("attn_implementation")
    @classmethod
    def _check_attention(cls, name: str) -> str:
        if name in ATTENTION or HUB_KERNEL.fullmatch(name):
            return name
        near = difflib.get_close_matches(name, ATTENTION, n=1)
        raise PydanticCustomError(
            "attention",
            "not one of {known}, nor a kernel of the hub (owner/name){hint}",
            {"known": ", ".join(ATTENTION), "hint": f"; did you mean {near[0]!r}?" if near else ""},
        )


class LoraSection(Section):
    """Adapters; used when hyperparams.training_mode is `lora` or `qlora`."""

    r: PositiveInt = 16
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0.0)] = 32
    """Scale: an adapter's output is multiplied by alpha / r."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(r) instead, so that large ranks learn as fast as small ones."""
    use_dora: bool = False
    """DoRA: the length of each row of the adapted weights is trained apart from its direction.
    Slower; closer to full training at small ranks."""
    dropout: Share = 0.0
    """Dropout before the adapters."""
    neftune_alpha: Annotated[float, Field(ge=0.0)] = 0.0
    """NEFTune: noise on the embedded tokens while training, each number of a token moved by up to
    this / sqrt(tokens of the row x hidden size); the paper has 5 to 15. 0 = off."""
    init: Literal["default", "gaussian"] = "default"
    """How the first matrix of an adapter begins, the second being 0: uniform (Kaiming), or normal
    with standard deviation 1 / r."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Module names that get an adapter; `all-linear` is every linear layer but the head."""
    modules_to_save: tuple[str, ...] = ()
    """Module names trained in full beside the adapters, such as `lm_head`."""
    layers_to_transform: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Numbers of the decoder layers whose modules get an adapter, from 0. Empty: all."""
    ensure_weight_tying: bool = False
    """A head that is tied to the embedding stays so where one of them is in `modules_to_save`; else
    they are two from then on. An error where there is no such tie."""


OF_SHARDS = ("reshard_after_forward", "cpu_offload")
"""Options of section `distributed` that whole copies have not."""


class DistributedSection(Section):
    """How several processes, each with a device, train one model (torchrun, accelerate launch)."""

    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """`ddp`: a whole copy of the model in each process. `fsdp2`: weights, gradients and optimizer
    state are shared out. `auto`: ddp where the memory card says that a whole copy fits a device,
    else fsdp2."""
    reshard_after_forward: bool = True
    """fsdp2: give a layer's gathered weights back after its forward pass, and gather them again
    for the backward pass. False takes more memory and less traffic."""
    cpu_offload: bool = False
    """fsdp2 on GPUs: shards stay in host memory and are copied to the device for each use; slow."""

    heartbeat_timeout_s: Annotated[float, Field(ge=1.0)] = 30
    """Seconds after which a process that is stopped, or whose machine is silent, counts as hanging
    and ends the run. One that is busy, for however long, does not; one that died is found at
    once."""
    timeout_s: Annotated[int, Field(ge=60)] = 1800
    """Seconds that a process waits for the others in an exchange (such as that of gradients), or to
    begin, before it ends the run. Previews, evaluations and checkpoints of the main process are not
    waited for in one."""

    @model_validator(mode="after")
    def _check_copies(self) -> DistributedSection:
        changed = [name for name in OF_SHARDS if self._is_set(name)]
        if self.strategy == "ddp" and changed:
            raise CombinationError(
                f"distributed.{changed[0]} is an option of shards, and distributed.strategy=ddp "
                f"makes none; set strategy=fsdp2 or auto, or leave {changed[0]} as it is",
                "distributed.strategy",
                f"distributed.{changed[0]}",
            )
        return self

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)
