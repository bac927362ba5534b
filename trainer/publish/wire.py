"""What travels between a trainer and a preview server: closed, bounded bodies. No torch here.

The trainer's publisher and the server both import this module, so a body that one side can write is
a body that the other side can read.
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

from trainer.files import canonical_hash
from trainer.preview.base import FinishReason, PreviewRequest, PreviewResult
from trainer.preview.drift import Drift, DriftRequest

PART_BYTES = 16 << 20
"""Bytes of a part; only the last part of an upload is shorter."""

MAX_BODY = 64 << 20
"""Bytes of one request body; more is answered with 413."""

MAX_PROMPT_CHARS = 200_000

MAX_PROMPT_TOKENS = 131_072

MAX_NEW_TOKENS = 8192

MAX_BATCH = 256

MAX_TENSORS = 20_000

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@:/-]{0,199}$")]

Run = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]

Step = Annotated[int, Field(ge=0, le=2**53)]

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=131_072)]

Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]

Row = Annotated[int, Field(ge=0, lt=MAX_BATCH)]

Day = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"),
    AfterValidator(lambda text: dt.date.fromisoformat(text).isoformat()),
]

Option = str | int | float | bool | None


class Body(BaseModel):
    """A request body: a field that the server does not know is refused, never ignored."""

    # Strict: "5" is no number and true is no 1. What the description forbids is refused.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TensorEntry(Body):
    """One tensor of a weight set."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=300)]
    dtype: Literal["F32", "F16", "BF16", "F64", "I64", "I32", "I8", "U8", "BOOL"]
    """As safetensors writes it."""
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**40)]], Field(max_length=8)]
    sha256: Digest
    """Of the tensor's bytes: contiguous, little endian."""


Rank = Annotated[int, Field(ge=1, le=4096)]

Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=65_536)]

FIRST_FIELDS = {"r", "alpha", "target_modules", "modules_to_save"}
"""Of an AdapterConfig: what every server reads."""

ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]{1,200}$")]


class AdapterConfig(Body):
    """How a LoRA adapter is built: names of modules, never patterns or classes."""

    r: Rank
    alpha: Alpha
    target_modules: Annotated[list[ModuleName], Field(min_length=1, max_length=2000)]
    modules_to_save: Annotated[list[ModuleName], Field(max_length=200)] = []
    use_rslora: bool = False
    """The scale is alpha / sqrt(r) instead of alpha / r."""
    use_dora: bool = False
    """Each target has a trained magnitude beside its two matrices."""
    ranks: Annotated[dict[ModuleName, Rank], Field(max_length=2000)] = {}
    """Of targets that have another one than `r`."""
    alphas: Annotated[dict[ModuleName, Alpha], Field(max_length=2000)] = {}
    """Of targets that have another one than `alpha`."""
    trainable_tokens: Annotated[dict[ModuleName, Ids], Field(max_length=4)] = {}
    """Rows of embedding and head that are trained, by the module's full name; a head that is tied
    to the embedding has those of the embedding."""
    ensure_weight_tying: bool = False
    """Embedding and head stay tied where one of them is trained."""

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only what differs, so that a server that does not know a field yet takes plain LoRA."""
        written: dict[str, Any] = write(self)
        fields = type(self).model_fields
        return {
            key: value
            for key, value in written.items()
            if key in FIRST_FIELDS or value != fields[key].get_default(call_default_factory=True)
        }


class WeightsManifest(Body):
    """Everything that identifies a weight set; the step is a tag and not part of it."""

    kind: Literal["full", "adapter"] = "full"
    base: Digest | None = None
    """The full weights that an adapter builds on; None for `full`."""
    adapter: AdapterConfig | None = None
    """Only with kind `adapter`."""
    config_hash: Digest
    tokenizer_hash: Digest
    chat_template_hash: Digest
    tensors: Annotated[list[TensorEntry], Field(min_length=1, max_length=MAX_TENSORS)]

    @model_validator(mode="after")
    def _names_are_sorted(self) -> WeightsManifest:
        names = [entry.name for entry in self.tensors]
        if names != sorted(set(names)):
            raise ValueError("tensors must be sorted by name, each name once")
        if (self.kind == "adapter") != (self.base is not None and self.adapter is not None):
            raise ValueError("kind=adapter goes with base and adapter, kind=full with neither")
        return self

    @property
    def weights_id(self) -> str:
        """sha256 of the canonical JSON: sorted keys, no spaces, ASCII."""
        return canonical_hash(self.model_dump(mode="json"))


class WeightsOffer(Body):
    """`POST /weights`: these are the weights of this step."""

    manifest: WeightsManifest
    run: Run
    step: Step
    transport: Literal["http", "dir"] = "http"
    template_date: Day | None = None
    """What a chat template that prints the date prints over these weights; None: today's."""


class WeightsState(Body):
    """The answer to an offer, and to `GET /weights/{upload_id}`."""

    upload_id: str
    weights_id: str
    have: list[str] = []
    """Tensors that the server holds already."""
    base_ok: bool = True
    committed: bool = False
    """True: these weights are active; nothing is to be sent."""
    part_bytes: int = PART_BYTES
    parts: list[int] = []
    """Numbers of the parts that have arrived, from 0."""


class RegisterModel(Body):
    """`POST /models/register`: load this model into a server that has none."""

    model: Annotated[
        str,
        StringConstraints(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$"
        ),
    ]
    """An alias or a hub id (`owner/name`), never a path."""
    quantize: Literal["nf4"] | None = None
    """Quantize its linear layers to 4 bit, as the run that asks has done with its own copy."""


class ModelState(Body):
    """What `/models/active`, `set_active` and `register` answer: the model and its weights."""

    model_id: str | None
    """None: this server has no model yet."""
    weights_id: str | None
    """None: no weights yet."""
    run: str | None = None
    step: int | None = None


class SetActive(Body):
    """`POST /models/set_active`: make a kept weight set the active one again."""

    weights_id: Digest


class GenerateRequest(Body):
    """`POST /generate`: one prompt, as text or as the exact ids of training."""

    prompt: Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)] | None = None
    prompt_token_ids: TokenIds | None = None
    system_prompt: Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)] | None = None
    """Only with `prompt`."""
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    """256 where neither this nor `max_tokens` is given."""
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    """Another name of `max_new_tokens`; not both."""
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    """Without one every answer is drawn afresh; the same seed gives the same answer."""
    stop: Annotated[list[Stop], Field(max_length=16)] = []
    model_id: Name | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerateRequest:
        if (self.prompt is None) == (not self.prompt_token_ids):
            raise ValueError("give either prompt or prompt_token_ids (at least one id)")
        if self.prompt is None and self.system_prompt is not None:
            raise ValueError("system_prompt goes with prompt; prompt_token_ids hold theirs")
        if self.max_new_tokens is not None and self.max_tokens is not None:
            raise ValueError("give max_new_tokens or max_tokens, not both")
        return self

    @property
    def limit(self) -> int:
        """Tokens to generate at most."""
        return self.max_new_tokens or self.max_tokens or 256


class GenerateResult(Body):
    """What `/generate` answers."""

    text: str
    raw_text: str
    tokens_generated: int
    prompt_tokens: int
    generation_time_sec: float
    tokens_per_sec: float
    finish_reason: FinishReason
    weights_id: str
    run: str | None = None
    step: int | None = None


class PreviewPrompt(Body):
    """One prompt of a batch."""

    prompt: Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]
    prompt_token_ids: Annotated[TokenIds, Field(min_length=1)]
    golden_answer: Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)] | None = None
    golden_token_ids: TokenIds | None = None
    """Ids of the golden answer as trained on; needed for its log-probabilities."""
    prompt_id: Annotated[str, StringConstraints(max_length=200)] = ""
    held_out: bool = True

    @staticmethod
    def values_of(request: PreviewRequest) -> dict[str, Any]:
        """A request with its ids as JSON values; the server, which gets them, checks the limits."""
        return {
            "prompt": request.prompt,
            "prompt_token_ids": list(request.prompt_token_ids or ()),
            "golden_answer": request.golden_answer,
            "golden_token_ids": list(request.golden_token_ids or ()) or None,
            "prompt_id": request.prompt_id,
            "held_out": request.held_out,
        }

    def request(self) -> PreviewRequest:
        """What a backend is asked; golden ids are left out, as the server scores them itself."""
        return PreviewRequest(
            **self.model_dump(exclude={"golden_token_ids", "prompt_token_ids"}),
            prompt_token_ids=tuple(self.prompt_token_ids),
        )


class PreviewsRequest(Body):
    """`POST /previews`: a batch of fixed composition, under exactly these weights."""

    run: Run
    step: Step
    weights_id: Digest
    prompts: Annotated[list[PreviewPrompt], Field(min_length=1, max_length=MAX_BATCH)]
    profile: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,100}$")] = "plain"
    """A name that the server knows; never a path or code."""
    profile_options: Annotated[dict[str, Option], Field(max_length=50)] = {}
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 256
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 42
    stop: Annotated[list[Stop], Field(max_length=16)] = []
    """Stop strings beside the profile's own."""
    stop_ids: Annotated[TokenIds, Field(max_length=100)] = []
    """Ids that end an answer, beside the model's own."""
    golden_logprobs: bool = False
    canary: Row | Annotated[list[Row], Field(min_length=1, max_length=MAX_BATCH)] | None = None
    """Index of the prompt, or of the prompts, whose golden answers are scored to prove the
    weights."""
    drift: DriftRequest | None = Field(default=None, exclude_if=lambda value: value is None)
    """How far these weights are from others; left out where nobody asks, so that a server that
    does not know it yet can be asked."""

    @model_validator(mode="after")
    def _canaries_are_prompts(self) -> PreviewsRequest:
        if any(row >= len(self.prompts) for row in self.canaries):
            raise ValueError(f"canary names a prompt that is none of the {len(self.prompts)}")
        return self

    @property
    def canaries(self) -> list[int]:
        """The indices of `canary`."""
        if self.canary is None:
            return []
        return [self.canary] if isinstance(self.canary, int) else self.canary


class PreviewsResult(Body):
    """The batch's answers, in the order of its prompts."""

    run: str
    step: int
    weights_id: str
    results: list[PreviewResult]
    golden_logprobs: list[list[float] | None] | None = None
    """Nats per golden token and prompt; None for a prompt without golden ids."""
    canary_logprob: float | None = None
    """Sum of the golden log-probabilities of the canary's rows, nats."""
    drift: Drift | None = Field(default=None, exclude_if=lambda value: value is None)
    """What `drift` asked for; only where it was."""
    seq: int = 0
    """Number of this batch on the server, for `GET /previews?after=`."""


class ServerHashes(BaseModel):
    """What weights must have in common with the server's model."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    config_hash: str
    tokenizer_hash: str
    chat_template_hash: str
