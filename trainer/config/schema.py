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
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from trainer.config.receiver import NOTIFY_SILENCE_S, notify_problem, shown_notify
from trainer.config.section import (
    MIN_PROMPTS,
    VAL_LOSS,
    WRITTEN,
    CombinationError,
    Interval,
    Metric,
    PositiveInt,
    Section,
    Share,
)
from trainer.config.training_sections import (
    DistributedSection,
    Hyperparams,
    LoraSection,
    ModelSection,
)
from trainer.net import is_cut, names_without_secrets, without_secrets

MIX_ROUNDING = 0.01
"""How far a sum of probabilities may be from 1: thirds are written as 0.333."""


class DataSection(Section):
    """Which rows are trained on, and how they are read, split and batched."""

    dataset_path: str = ""
    """File of rows (JSONL, JSON, CSV, TSV, Parquet, Arrow; text kinds also packed as .gz, .bz2, .xz
    or .zst), a folder of them, a pattern such as `rows/*.jsonl`, an address (`https://`, `s3://`, `gs://`,
    `hf://`), or a hub id `owner/name` or `owner/name:split`; several with commas between. What is
    secret of an address is written down nowhere. Flag: --dataset."""
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "question_answer",
        "prompt_completion",
        "alpaca",
        "text",
        "tokens",
    ] = "auto"
    """The rows' layout (`tokens`: ids that are trained as they are); `auto` looks at the first row
    of each file and says what it found."""
    text_markers: Literal["turns", "tokens"] = "turns"
    """Rows of format `text` that hold the model's own control tokens: `turns` reads them back into
    the conversation they were made from and trains its answers; `tokens` trains every token."""
    columns: dict[str, str] = {}
    """Other names for the format's keys, such as `question=frage`: its key = the file's."""
    weights: tuple[Annotated[float, Field(gt=0.0)], ...] = ()
    """How often the training rows of each name in `dataset_path` are used: 2 = twice, 0.5 = half of
    them, chosen by content hash. Empty: once each."""
    mix_probabilities: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = ()
    """Share of each file in the rows of an epoch, one number a file, 1 in all; their rows are mixed
    in an order drawn from the seed. With `enable_packing` shares are of packs, each of one file.
    Empty: every file has all of its rows, as often as `weights` says."""
    mix_epoch: Literal["first", "longest"] = "first"
    """When an epoch of `mix_probabilities` ends: once the `first` file runs out, the next epoch
    going on in the others where this one stopped; or once the `longest`, for its share, has been
    seen, the others coming again in a new order."""
    validation_path: str | None = None
    """Held-out rows, named as in `dataset_path`. Empty: `validation_split` of the rows."""
    validation_split: Share = 0.05
    """Share of the rows held out, chosen by a hash of their prompt; 0 = none."""
    max_rows: PositiveInt | None = None
    """Use only the first rows of each name in `dataset_path`."""
    on_bad_row: Literal["strict", "skip"] = "strict"
    """`strict` stops and names the lines; `skip` leaves bad rows out, counts and lists them."""
    max_bad_rows: Interval | None = None
    """With `skip`: stop when more rows than this are bad. Empty: any number."""
    cache: bool = True
    """Keep encoded rows on disk; the next start with the same files and options reads them."""
    cache_dir: str | None = None
    """Folder of encoded rows. Empty: `ultimate-trainer` in $XDG_CACHE_HOME or ~/.cache."""
    cache_max_gib: Annotated[float, Field(gt=0)] | None = 50.0
    """GiB that the entries of that folder may take; those that were longest unused are removed when
    one is written. Empty: any size."""
    encode_processes: PositiveInt | None = None
    """Processes that encode rows. Empty: one for few rows, else as many as there are cores for each
    process of the run. The rows and their order are the same with any number."""
    truncation: Literal["error", "drop", "keep_start", "keep_end", "split"] = "keep_start"
    """Rows longer than hyperparams.max_length: an error, left out, or cut to their first or last
    tokens; `split`: plain text is cut into windows of which none loses a token, and a conversation
    that is longer is an error. The data card counts them."""
    train_on_thinking: bool = True
    """Train the thoughts of answers (`reasoning_content`, or `<think>...</think>` in the content);
    `false` trains only what follows them. An error where no row has a thought."""
    streaming: bool = False
    """Train while the files are still being read and encoded, for more rows than the cache can
    hold: rows that are read ahead lie in a file of at most `cache_max_gib`. Needs
    `hyperparams.max_steps`; see docs/data.md for what is not exact then."""
    shuffle_buffer: PositiveInt | None = None
    """With `streaming`: rows within which the order is drawn, and that are read before the first
    step. Empty: 10,000."""
    shuffle: bool = True
    """A new order of rows every epoch, drawn from the seed."""
    group_by_length: bool = True
    """Batch rows of like length together, so that little is computed on padding."""
    enable_packing: bool = False
    """Fill each training sequence with several whole rows, kept apart, up to `max_length` tokens.
    `batch_size` then counts packs, not rows, so that a step holds more rows and an epoch has fewer
    steps. Refused for models whose rows would see each other, as found at start in batches of the
    run's own size. Flash attention gets the packs of a batch as one long row."""

    @field_serializer("dataset_path")
    def _write_no_secret(self, value: str) -> str:
        return names_without_secrets(value)

    @field_serializer("validation_path")
    def _write_no_secret_of_validation(self, value: str | None) -> str | None:
        return None if value is None else names_without_secrets(value)

    @model_validator(mode="after")
    def _check_mix(self) -> DataSection:
        shares = self.mix_probabilities
        if shares and self.weights:
            raise CombinationError(
                "mix_probabilities and weights both say how often the rows of each file are "
                "trained; set one of them only",
                "data.mix_probabilities",
                "data.weights",
            )
        if shares and abs(sum(shares) - 1) > MIX_ROUNDING:
            raise CombinationError(
                f"mix_probabilities are shares of one epoch and must have 1 as their sum; these "
                f"({', '.join(f'{one:g}' for one in shares)}) have {sum(shares):g}",
                "data.mix_probabilities",
            )
        if self.mix_epoch != "first" and not shares:
            raise CombinationError(
                f"mix_epoch={self.mix_epoch} says when an epoch of mix_probabilities ends, which "
                "is empty; set mix_probabilities, or leave mix_epoch as it is",
                "data.mix_epoch",
                "data.mix_probabilities",
            )
        return self

    @model_validator(mode="after")
    def _check_order(self) -> DataSection:
        if self.group_by_length and not self.shuffle and "group_by_length" in self.model_fields_set:
            raise CombinationError(
                "group_by_length=true changes the order of rows, shuffle=false keeps it; "
                "set one of them only",
                "data.group_by_length",
                "data.shuffle",
            )
        if self.max_bad_rows is not None and self.on_bad_row == "strict":
            raise CombinationError(
                "max_bad_rows limits what on_bad_row=skip leaves out, and on_bad_row is strict; "
                "set on_bad_row=skip or leave max_bad_rows empty",
                "data.max_bad_rows",
                "data.on_bad_row",
            )
        if self.enable_packing and not self.shuffle:
            raise CombinationError(
                "enable_packing=true changes the order of rows, shuffle=false keeps it; "
                "set one of them only",
                "data.enable_packing",
                "data.shuffle",
            )
        if self.shuffle_buffer is not None and not self.streaming:
            raise CombinationError(
                "shuffle_buffer is for rows that are streamed; set streaming=true, or leave it "
                "empty: all rows are shuffled together",
                "data.shuffle_buffer",
                "data.streaming",
            )
        if self.streaming and self.enable_packing:
            raise CombinationError(
                "enable_packing=true forms packs from the lengths of all rows, and streaming=true "
                "does not know them before the end; set one of them only (rows of like length are "
                "batched together in a stream too)",
                "data.streaming",
                "data.enable_packing",
            )
        mix = "weights" if self.weights else "mix_probabilities" if self.mix_probabilities else ""
        if self.streaming and mix:
            raise CombinationError(
                f"{mix} decides by the number of rows of each file, and streaming=true does not "
                "know it; leave it empty, or write the mix into one file",
                "data.streaming",
                f"data.{mix}",
            )
        return self


class ProfileSection(Section):
    """How rows are rewritten, prompted, stopped and compared."""

    name: str = "plain"
    """`plain`, `regime3`, `emoji_think`, an installed entry point, or `package.module:Class`."""
    options: dict[str, JsonValue] = {}
    """Options of the profile itself; unknown ones are errors."""
    system_prompt: str | None = None
    """System turn of rows that bring none. Empty: the profile's own, which docs/profiles.md shows.
    Flag: --system-prompt."""


MIN_TEMPERATURE = 1e-5
"""Below it scores would overflow, and the most likely token is what is meant."""


class MonitoringConfig(Section):
    """What is written and shown while training, and how often (in optimizer steps; 0 = off)."""

    status_update_interval: PositiveInt = 2
    """Steps between writes of status.json."""
    prompt_snapshot_interval: Interval = 20
    """Steps between copies of a training row's prompt and golden answer into status.json."""
    micro_eval_interval: Interval = 200
    """Steps between measurements of the loss on held-out rows."""
    micro_eval_rows: PositiveInt = 64
    """Held-out rows of a micro-evaluation: the same ones each time."""
    inference_interval: Interval = 50
    """Steps between previews; step 0 and the last step always have one unless this is 0."""
    num_eval_samples: Annotated[int, Field(ge=0)] = 4
    """Held-out prompts of a preview: the same ones each time."""
    preview_prompts: tuple[str, ...] = ()
    """Prompts of your own, shown after the held-out ones, without a golden answer."""
    num_preview_samples: Annotated[int, Field(ge=1, le=100)] = 1
    """Answers to each prompt of a preview, with other noise each. The first is the one shown; all
    together say how often the model is right (pass@k). Needs `preview_temperature` above 0."""
    max_output_tokens: PositiveInt = 2048
    """Longest text in status.json, in tokens."""
    max_eval_tokens: PositiveInt = 2048
    """Longest generation in the final evaluation, in tokens."""
    final_eval_prompts: Interval = 0
    """Held-out prompts answered after the last step and compared with golden; 0 = none."""
    preview_backend: Literal["local", "sidecar", "remote_3090", "openai"] = "local"
    """Who generates previews: `local` (this process, training waits; not from sharded weights),
    `sidecar` (a process of its own on this machine), `remote_3090` (a `trainer serve` on another
    machine; this run sends it its weights) or `openai` (any OpenAI-compatible server, with the
    weights it has: unverified)."""
    preview_golden_logprobs: Literal["auto", "on", "off"] = "auto"
    """Also say how likely each token of the golden answer is: one forward pass a prompt. `auto`:
    for up to 16 prompts, or where `golden_probability` decides; never from `openai`."""
    scores: tuple[str, ...] = ()
    """Scores of the answers: `exact`, `contains`, `f1`, `rouge_l`, `number` (the last number of
    both), `json` (parses), `json_schema:FILE`, `regex:PATTERN`, `tool_calls` (names and arguments),
    or a function of yours, `package.module:function`. `NAME=SCORE` gives one another name."""
    score_columns: dict[str, str] = {}
    """Parameter of a score function -> the row's column (or `golden_answer`, or `prompt`) that it
    gets, such as `solution=golden_answer`."""
    score_timeout: Annotated[float, Field(gt=0.0)] = 60
    """Seconds that a score may take for the answers of one step; then it has no value there."""
    num_score_prompts: Annotated[int, Field(ge=0)] = 0
    """Held-out prompts that are answered for scores only (greedily, at step 0, every
    `micro_eval_interval` steps and after the last one), besides those of `num_eval_samples`."""
    score_lag: Annotated[int, Field(ge=0, le=8)] = 1
    """Where a score decides (`early_stopping_metric`, `best_by`): evaluations that training may be
    ahead of the one that is taken, before it waits. A stop comes so many evaluations after the one
    that decides it, however fast answers are. Each above 1 takes room for one more copy of the
    weights where previews are made elsewhere."""
    canary_set: str = "off"
    """Prompts that tell what the model forgets: `general` (a built-in set) or a JSONL file of
    prompts. What the weights before training answer to them is kept at step 0, and each preview
    step says how far the model has drifted from it. `off`: nothing is asked, as it takes time at
    each preview step. Not from `openai`."""
    preview_drain_timeout: Annotated[float, Field(ge=0.0)] = 60
    """Seconds that the end of a run waits for previews still being made elsewhere, and for
    scores."""
    preview_max_tokens: PositiveInt = 256
    """Longest preview, in tokens."""
    preview_temperature: Annotated[float, Field(ge=0.0)] = 0.7
    """Sampling temperature of previews; 0 = greedy. The noise depends on seed, prompt, position and
    sample only."""
    remote_3090_host: str | None = None
    """Host of the preview server."""
    remote_3090_port: Annotated[int, Field(ge=1, le=65535)] = 8765
    """Port of the preview server."""
    remote_3090_timeout: Annotated[float, Field(gt=0.0)] = 30
    """Seconds until a remote preview is given up."""
    remote_3090_model_id: str | None = None
    """Model that the server must hold. Empty: whichever fits the weights of this run."""
    remote_3090_key_file: str | None = None
    """File with the server's key. Empty: the environment variable ULTIMATE_TRAINER_KEY."""
    sidecar_device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "cpu"
    """Where the sidecar computes; `cuda:1` is a second GPU."""
    sidecar_num_threads: PositiveInt | None = None
    """CPU threads of the sidecar. Empty: one when training is on the CPU, else half the cores."""
    openai_base_url: str | None = None
    """Address of an OpenAI-compatible server, such as `http://127.0.0.1:8000/v1`. Its key is the
    environment variable OPENAI_API_KEY, if it needs one; a password in the address is used and
    written down nowhere."""
    openai_model: str | None = None
    """Model that server is asked for. Empty: the only one that it lists."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Trackers: tensorboard, and wandb, mlflow, trackio and others where installed; `none` alone
    turns them off."""
    tracker_texts: bool = False
    """Trackers get the texts of previews too: prompt, golden answer, what was generated. `false`:
    they get numbers only. From tensorboard, wandb and trackio; others get no texts."""
    notify: tuple[str, ...] = ()
    """Who is told when the run ends, fails, is killed, or says nothing any more: a webhook (an
    `http://` or `https://` address) or a command (its words; no shell; `{text}` in a word stands
    for the message). What is secret of it is written down nowhere, and the config in the folder of
    a run cannot set it."""
    notify_silence: Annotated[float, Field(ge=0.0)] = NOTIFY_SILENCE_S
    """Seconds without a sign of life (and 10 step times) until `notify` is told that the run is
    silent; 0 = never."""
    display: Literal["auto", "rich", "plain", "json", "quiet"] = "auto"
    """The terminal: `auto` is rich on a terminal, plain lines elsewhere. Flags: --quiet, --json."""

    @field_validator("preview_golden_logprobs", mode="before")
    @classmethod
    def _on_or_off(cls, value: object) -> object:
        """It was true or false once, and YAML reads `on` and `off` as these."""
        if isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower(), value)
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check_remote(self, info: ValidationInfo) -> MonitoringConfig:
        if self.preview_backend == "remote_3090" and not self.remote_3090_host:
            raise CombinationError(
                "preview_backend=remote_3090 needs remote_3090_host, the name or address of the "
                "machine that runs the preview server",
                "monitoring.preview_backend",
                "monitoring.remote_3090_host",
            )
        if self.preview_backend == "openai":
            self._check_openai(is_written=info.context is WRITTEN)
        self._check_canary_set()
        self._check_samples()
        self._check_texts()
        return self

    def _check_samples(self) -> None:
        if self.num_preview_samples == 1:
            return
        if self.preview_temperature < MIN_TEMPERATURE:
            raise CombinationError(
                f"num_preview_samples={self.num_preview_samples} with preview_temperature="
                f"{self.preview_temperature:g} would give the same greedy answer each time; set "
                "preview_temperature above 0 (such as 0.7), or num_preview_samples=1",
                "monitoring.num_preview_samples",
                "monitoring.preview_temperature",
            )
        if not self.inference_interval or not (self.num_eval_samples or self.preview_prompts):
            raise CombinationError(
                f"num_preview_samples={self.num_preview_samples} is of preview prompts, and this "
                "run has none; set inference_interval and num_eval_samples above 0, or "
                "num_preview_samples=1",
                "monitoring.num_preview_samples",
                "monitoring.inference_interval",
                "monitoring.num_eval_samples",
            )

    def _check_texts(self) -> None:
        if self.tracker_texts and not {"tensorboard", "wandb", "trackio"} & set(self.report_to):
            raise CombinationError(
                f"tracker_texts=true, and report_to ({', '.join(self.report_to) or 'none'}) names "
                "no tracker that takes texts; add tensorboard, wandb or trackio, or set "
                "tracker_texts=false",
                "monitoring.tracker_texts",
                "monitoring.report_to",
            )
        if self.tracker_texts and not self.inference_interval:
            raise CombinationError(
                "tracker_texts=true sends the texts of previews, and inference_interval=0 makes "
                "none; change one of them",
                "monitoring.tracker_texts",
                "monitoring.inference_interval",
            )

    def _check_canary_set(self) -> None:
        if self.canary_set == "off":
            return
        if not self.inference_interval or not (self.num_eval_samples or self.preview_prompts):
            raise CombinationError(
                f"canary_set={self.canary_set} is asked at preview steps, and this run has none; "
                "set inference_interval and num_eval_samples above 0, or canary_set=off",
                "monitoring.canary_set",
                "monitoring.inference_interval",
                "monitoring.num_eval_samples",
            )
        if self.preview_backend == "openai":
            raise CombinationError(
                f"canary_set={self.canary_set} measures this run's weights, and "
                "preview_backend=openai has its own; change one of them",
                "monitoring.canary_set",
                "monitoring.preview_backend",
            )

    @model_validator(mode="after")
    def _check_scores(self) -> MonitoringConfig:
        if self.score_columns and not any(":" in entry for entry in self.scores):
            raise CombinationError(
                "score_columns names what functions of monitoring.scores get, and there is none; "
                "name a function (package.module:function) or leave score_columns empty",
                "monitoring.score_columns",
                "monitoring.scores",
            )
        if self.num_score_prompts:
            self._check_score_prompts()
        if self.scores and not (self.inference_interval or self.final_eval_prompts):
            raise CombinationError(
                "scores are of previews and of the final evaluation, and inference_interval=0 and "
                "final_eval_prompts=0 turn both off; set one of them, or leave scores empty",
                "monitoring.scores",
                "monitoring.inference_interval",
            )
        return self

    def _check_score_prompts(self) -> None:
        needed = {
            "scores": not self.scores and self.preview_golden_logprobs != "on",
            "micro_eval_interval": not self.micro_eval_interval,
            "inference_interval": not self.inference_interval,
        }
        for name, is_missing in needed.items():
            if is_missing:
                raise CombinationError(
                    "num_score_prompts are answered at the steps of micro_eval_interval, by "
                    "whoever makes the previews, and get the scores of monitoring.scores; "
                    f"{name} is empty: set it, or num_score_prompts=0",
                    "monitoring.num_score_prompts",
                    f"monitoring.{name}",
                )
        if self.preview_backend == "openai":
            raise CombinationError(
                "num_score_prompts measures this run's weights, and preview_backend=openai has its "
                "own, which stay the same; change one of them",
                "monitoring.num_score_prompts",
                "monitoring.preview_backend",
            )

    @model_validator(mode="after")
    def _check_notify(self, info: ValidationInfo) -> MonitoringConfig:
        problem = notify_problem(self.notify)
        if problem is not None and info.context is not WRITTEN:
            raise CombinationError(f"notify {problem}", "monitoring.notify")
        if not self.notify and self.notify_silence != NOTIFY_SILENCE_S:
            raise CombinationError(
                f"notify_silence={self.notify_silence:g} says when notify is told that the run is "
                "silent, and notify is empty; name a webhook or a command, or leave notify_silence "
                "as it is",
                "monitoring.notify_silence",
                "monitoring.notify",
            )
        return self

    @field_serializer("notify")
    def _write_no_word(self, value: tuple[str, ...]) -> list[str]:
        return shown_notify(value)

    @field_serializer("openai_base_url")
    def _write_no_secret(self, value: str | None) -> str | None:
        return None if value is None else without_secrets(value)

    def _check_openai(self, *, is_written: bool) -> None:
        if is_cut(self.openai_base_url or "") and not is_written:
            raise CombinationError(
                "openai_base_url was written down without its password or key, which stands "
                "nowhere; give it again by --monitoring.openai_base_url or by "
                "TRAINER_MONITORING__OPENAI_BASE_URL",
                "monitoring.openai_base_url",
            )
        if not (self.openai_base_url or "").startswith(("http://", "https://")):
            raise CombinationError(
                "preview_backend=openai needs openai_base_url, such as http://127.0.0.1:8000/v1",
                "monitoring.preview_backend",
                "monitoring.openai_base_url",
            )
        if self.preview_golden_logprobs == "on":
            raise CombinationError(
                "preview_golden_logprobs=on needs this run's weights, and preview_backend=openai "
                "has its own; change one of them",
                "monitoring.preview_golden_logprobs",
                "monitoring.preview_backend",
            )


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
