"""Section `monitoring`: what is written, shown and asked while a run trains.

No torch, no file access; see `trainer/config/schema.py` for the rules.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from trainer.config.receiver import NOTIFY_SILENCE_S, notify_problem, shown_notify
from trainer.config.section import (
    WRITTEN,
    CombinationError,
    Interval,
    PositiveInt,
    Section,
)
from trainer.net import is_cut, without_secrets

MIN_TEMPERATURE = 1e-5
"""Below it scores would overflow, and the most likely token is what is meant."""


class MonitoringConfig(Section):
    """What is written and shown while training, and how often (in optimizer steps; 0 = off)."""

    status_update_interval: PositiveInt = 2
    """Steps between writes of status.json."""
    prompt_snapshot_interval: Interval = 20
    """Steps between copies of a training row's prompt and golden answer into status.json."""
    micro_eval_interval: Interval = 200
    """Steps between measurements of the loss on held-out rows. Unless it is set, shorter runs have
    about ten, as far as these take no more than a fifth of the time of training; not with
    `num_score_prompts`."""
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
