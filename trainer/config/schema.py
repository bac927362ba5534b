"""TrainerConfig and its sections: every option of the program, its type, default and meaning.

The text under a field is its documentation: `--help`, `trainer config schema` and
`docs/configuration.md` are made from it. Validators check and never rewrite; values that depend
on others stay None here and are filled by `resolve()` in `trainer/config/loader.py`.
No torch, no file access.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    JsonValue,
    model_validator,
)

from trainer.config.data_section import DataSection
from trainer.config.monitoring_section import MonitoringConfig
from trainer.config.section import (
    MIN_PROMPTS,
    VAL_LOSS,
    CombinationError,
    Interval,
    Metric,
    PositiveInt,
    Section,
)
from trainer.config.training_sections import (
    DistributedSection,
    Hyperparams,
    LoraSection,
    ModelSection,
)


class ProfileSection(Section):
    """How rows are rewritten, prompted, stopped and compared."""

    name: str = "plain"
    """`plain`, `regime3`, `emoji_think`, an installed entry point, or `package.module:Class`."""
    options: dict[str, JsonValue] = {}
    """Options of the profile itself; unknown ones are errors."""
    system_prompt: str | None = None
    """System turn of rows that bring none. Empty: the profile's own, which docs/profiles.md shows.
    Flag: --system-prompt."""


class OutputSection(Section):
    """Where the run is written."""

    output_dir: str = "outputs"
    """Folder of the run. Flag: --output."""
    checkpoint_interval: Interval = 500
    """Steps between checkpoints; the last step and a stop always make one."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept. The best one by `best_by` is kept besides (each lower validation
    loss makes one, and where a score decides each evaluation), and the one that was marked as
    best."""
    best_by: Metric | None = None
    """What makes a step the best one: `val_loss`, or `score.NAME` as in
    `hyperparams.early_stopping_metric`. Empty: the same as that."""
    final_model: Literal["last", "best"] | None = None
    """Which weights `final_model` gets: those of the last step, or of the best one by `best_by`
    (of the step that was marked as best, if one was). Empty: `best` with early stopping, else
    `last`."""
    resume: str | None = None
    """`latest`, or the folder of a checkpoint of this run. Flag: --resume [STEP_DIR]."""
    allow_changes: bool = False
    """With `resume`: `hyperparams.learning_rate`, `lr_scheduler` and `warmup_steps` may differ from
    the checkpoint's. From the next step on the rate is that of the new values at that step, as if
    the run had had them from its start; run.json has each change with its step. Flag:
    --allow-changes."""
    report: bool = True
    """Write `report.html` into the run folder at the end: curves, previews, config, in one file."""

    @model_validator(mode="after")
    def _check_changes(self) -> OutputSection:
        if self.allow_changes and self.resume is None:
            raise CombinationError(
                "output.allow_changes is for a run that is resumed; give --resume too, or leave it "
                "out",
                "output.allow_changes",
                "output.resume",
            )
        return self


class EnvironmentSection(Section):
    """The machine and the seed."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """`auto` (cuda, then mps, then cpu), `cpu`, `mps`, `cuda` or `cuda:N`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything random: split, order, dropout, adapters, preview noise."""
    deterministic: bool = False
    """Use only algorithms that give the same bits every time on a GPU too, which are slower; an
    operation that has none is an error. On a CPU runs are bit-equal without it."""
    num_threads: PositiveInt | None = None
    """CPU threads. Empty: torch's own choice. Results are bit-equal only at equal counts."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that collate batches; 0 = in the training process."""
    offline: bool = False
    """Never ask the model hub, nor any other machine for rows; use what is cached."""


class LockedSection(Section):
    """What the model must be, compared with the one really loaded. Empty fields are not."""

    base_model: str | None = None
    """The model's name: alias, hub id or folder, as given or as its config names itself."""
    architecture: str | None = None
    """Class name in the model's config, such as `Qwen3ForCausalLM`."""
    context_length: PositiveInt | None = None
    """The model's longest sequence in tokens (`max_position_embeddings`)."""
    vocab_size: PositiveInt | None = None
    """Rows of the model's embedding."""


class TrainerConfig(Section):
    """The whole config of a run. Made by `ConfigLoader` or `create_default_config`."""

    hyperparams: Hyperparams = Hyperparams()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    profile: ProfileSection = ProfileSection()
    monitoring: MonitoringConfig = MonitoringConfig()
    output: OutputSection = OutputSection()
    environment: EnvironmentSection = EnvironmentSection()
    locked: LockedSection = LockedSection()
    lora: LoraSection = LoraSection()
    distributed: DistributedSection = DistributedSection()

    @property
    def sharding_problem(self) -> tuple[str, str] | None:
        """The option that keeps weights from being shared out (fsdp2), and the way out in words."""
        hyper = self.hyperparams
        if hyper.optimizer != "adamw":
            words = "works on whole matrices; set it to adamw"
            return "hyperparams.optimizer", f"hyperparams.optimizer={hyper.optimizer} {words}"
        if hyper.masters != "fp32":
            words = "is for whole weights; set it to fp32"
            return "hyperparams.masters", f"hyperparams.masters={hyper.masters} {words}"
        if hyper.compile != "off":
            words = "is not proved on shards; set it to off"
            return "hyperparams.compile", f"hyperparams.compile={hyper.compile} {words}"
        if hyper.training_mode == "qlora":
            words = (
                "a base of 4-bit weights cannot be shared out; use lora, or "
                "distributed.strategy=ddp where the quantized base fits each device"
            )
            return "hyperparams.training_mode", f"hyperparams.training_mode=qlora: {words}"
        if hyper.auto_batch_size:
            words = "tries batches on a whole model; set it to false"
            return "hyperparams.auto_batch_size", f"hyperparams.auto_batch_size {words}"
        if hyper.trains_adapters and self.model.add_tokens:
            words = (
                "trains single rows of the embedding in training_mode="
                f"{hyper.training_mode}, and the rows of a shard cannot be put together for that; "
                "use distributed.strategy=ddp or training_mode=full, or leave add_tokens empty"
            )
            return "model.add_tokens", f"model.add_tokens {words}"
        return None

    @model_validator(mode="after")
    def _check_stream(self) -> TrainerConfig:
        if self.data.streaming and self.hyperparams.max_steps is None:
            raise CombinationError(
                "data.streaming=true does not know how many rows an epoch has, so the length of "
                "the run must be said: set hyperparams.max_steps",
                "data.streaming",
                "hyperparams.max_steps",
            )
        if self.data.streaming and self.environment.num_workers:
            raise CombinationError(
                f"environment.num_workers={self.environment.num_workers} has other processes take "
                "the rows, and those of data.streaming=true are read by the training process; set "
                "num_workers=0 (data.encode_processes encodes them in several)",
                "data.streaming",
                "environment.num_workers",
            )
        return self

    @model_validator(mode="after")
    def _check_shards(self) -> TrainerConfig:
        problem = self.sharding_problem
        if self.distributed.strategy == "fsdp2" and problem is not None:
            raise CombinationError(
                f"distributed.strategy=fsdp2 asks for shards, but {problem[1]}",
                "distributed.strategy",
                problem[0],
            )
        return self

    @model_validator(mode="after")
    def _check_noise(self) -> TrainerConfig:
        if self.lora.neftune_alpha and self.hyperparams.training_mode == "full":
            raise CombinationError(
                "lora.neftune_alpha is an option of adapters, and hyperparams.training_mode=full "
                "trains none; set training_mode=lora or neftune_alpha=0",
                "lora.neftune_alpha",
                "hyperparams.training_mode",
            )
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> TrainerConfig:
        attention = self.model.attn_implementation
        if self.hyperparams.compile != "off" and attention not in ("auto", "sdpa", "eager"):
            raise CombinationError(
                f"hyperparams.compile=blocks needs model.attn_implementation=sdpa or eager: "
                f"{attention} gets the lengths of each batch as plain numbers, and each would be "
                "compiled anew; change one of them",
                "hyperparams.compile",
                "model.attn_implementation",
            )
        return self

    @property
    def best_metric(self) -> str:
        """What makes a step the best one (`output.best_by`)."""
        return self.output.best_by or self.hyperparams.early_stopping_metric

    @property
    def final_choice(self) -> str:
        """`last` or `best` (`output.final_model`)."""
        is_early = self.hyperparams.early_stopping_patience > 0
        return self.output.final_model or ("best" if is_early else "last")

    @property
    def deciding_scores(self) -> tuple[str, ...]:
        """The scores that stop the run or choose its best step, such as `score.exact`."""
        hyper = self.hyperparams
        stop_by = hyper.early_stopping_metric if hyper.early_stopping_patience else VAL_LOSS
        return tuple(one for one in dict.fromkeys((stop_by, self.best_metric)) if one != VAL_LOSS)

    @model_validator(mode="after")
    def _check_deciding(self) -> TrainerConfig:
        hyper, best_by = self.hyperparams, self.output.best_by
        metric = hyper.early_stopping_metric
        if metric not in (VAL_LOSS, best_by) and best_by and not hyper.early_stopping_patience:
            raise CombinationError(
                f"hyperparams.early_stopping_metric={metric} decides nothing: early_stopping_"
                f"patience is 0, and output.best_by={best_by}; set a patience, or leave one empty",
                "hyperparams.early_stopping_metric",
                "hyperparams.early_stopping_patience",
                "output.best_by",
            )
        deciding = self.deciding_scores
        if deciding and self.monitoring.num_score_prompts < MIN_PROMPTS:
            is_best = best_by == deciding[0]
            where = "output.best_by" if is_best else "hyperparams.early_stopping_metric"
            raise CombinationError(
                f"{where}={deciding[0]} decides by the answers to monitoring.num_score_prompts="
                f"{self.monitoring.num_score_prompts}; with fewer than {MIN_PROMPTS} no "
                "rise can be told from chance: set it, better to 100 or more",
                where,
                "monitoring.num_score_prompts",
            )
        if self.monitoring.score_lag != 1 and not deciding:
            raise CombinationError(
                f"monitoring.score_lag={self.monitoring.score_lag} is how far training may be "
                "ahead of a score that decides, and none does; name one in "
                "hyperparams.early_stopping_metric or output.best_by, or leave it at 1",
                "monitoring.score_lag",
                "hyperparams.early_stopping_metric",
            )
        is_measured = deciding or self.monitoring.micro_eval_interval
        if (self.output.final_model == "best" or best_by == VAL_LOSS) and not is_measured:
            raise CombinationError(
                "the best step is the one with the lowest validation loss, and "
                "monitoring.micro_eval_interval=0 measures none; set an interval, or "
                "output.final_model=last and no output.best_by",
                "output.final_model" if self.output.final_model == "best" else "output.best_by",
                "monitoring.micro_eval_interval",
            )
        return self

    @model_validator(mode="after")
    def _check_early_stopping(self) -> TrainerConfig:
        if self.hyperparams.early_stopping_patience and not self.monitoring.micro_eval_interval:
            raise CombinationError(
                "hyperparams.early_stopping_patience needs validation losses, and "
                "monitoring.micro_eval_interval=0 turns them off; set an interval or turn "
                "early stopping off with 0",
                "hyperparams.early_stopping_patience",
                "monitoring.micro_eval_interval",
            )
        return self
