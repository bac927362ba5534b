"""The engine process: owns the model, one thread, JSON messages in and out.

It is started by `trainer.server.worker` and ends when its pipe closes. Weights are replaced
between two batches only, because there is one thread and one message at a time.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from multiprocessing.connection import Connection
from typing import Any

import torch
from safetensors import safe_open
from transformers import LogitsProcessor

from trainer.config.schema import ModelSection
from trainer.errors import TrainerError
from trainer.models.load import check_vocabulary, context_length, load_model, load_tokenizer
from trainer.models.precision import resolve_device
from trainer.preview.base import PreviewRequest, PreviewResult
from trainer.preview.identity import canonical_tensors, model_manifest
from trainer.preview.local import LocalPreviewBackend
from trainer.preview.neutral import undisturbed
from trainer.preview.wire import GenerateRequest, GenerateResult, PreviewsRequest, PreviewsResult
from trainer.profiles import Message, get_profile

Reply = dict[str, Any]


class JobCancelledError(BaseException):
    """Nobody waits for this generation any more; not an Exception, so that no edge eats it."""


class RefusedError(Exception):
    """The request cannot be answered by this model; the caller gets `status`."""

    def __init__(self, message: str, status: int = 422) -> None:
        """Take what the client is told and its HTTP status."""
        super().__init__(message)
        self.status = status


class CancelWatch(LogitsProcessor):  # type: ignore[misc]
    """Looks at the control pipe before every token and gives up when asked to."""

    def __init__(self, control: Connection) -> None:
        """Take the pipe on which `{"cancel": id}` arrives."""
        self.control = control
        self.job: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores as they are."""
        while self.control.poll(0):
            if json.loads(self.control.recv_bytes())["cancel"] == self.job:
                raise JobCancelledError
        return scores


class Engine:
    """A model, its tokenizer, and the identity of the weights that it holds now."""

    def __init__(self, model_path: str, device: str, control: Connection) -> None:
        """Load the model in fp32.

        Raises:
            TrainerError: no such model, or no such device.
        """
        section = ModelSection(model_path=model_path)
        self.device = resolve_device(device)
        self.tokenizer = load_tokenizer(section)
        self.model = load_model(section, dtype=torch.float32)
        check_vocabulary(self.model, self.tokenizer)
        self.model.to(self.device).eval()
        self.manifest = model_manifest(self.model, self.tokenizer)
        self.weights_id = self.manifest.weights_id
        self.watch = CancelWatch(control)

    def hello(self) -> Reply:
        """What the API process needs to know of the model."""
        return {
            "device": str(self.device),
            "weights_id": self.weights_id,
            "manifest": self.manifest.model_dump(mode="json"),
        }

    # ---- weights

    def load_weights(self, path: str, weights_id: str) -> Reply:
        """Copy a verified safetensors file over the model's weights, in place.

        An error in the middle is not caught here: the process ends, and the next one starts with
        a whole set.
        """
        mine = canonical_tensors(self.model)
        with safe_open(path, framework="pt") as file, torch.no_grad():
            if set(file.keys()) != set(mine):
                raise RefusedError("the file's tensors are not the model's")
            for name, target in mine.items():
                target.copy_(file.get_tensor(name))
        self.weights_id = weights_id
        return {"weights_id": weights_id}

    # ---- generation

    def generate(self, request: GenerateRequest) -> GenerateResult:
        """Answer one prompt."""
        backend = self._backend(
            "plain", {}, limit=request.limit, temperature=request.temperature, seed=request.seed
        )
        backend.system_prompt = request.system_prompt
        backend.settings = dataclasses.replace(backend.settings, stop_strings=tuple(request.stop))
        ids = request.prompt_token_ids or self._render(backend, request)
        self._check_ids(ids)
        asked = PreviewRequest(prompt=request.prompt or "", prompt_token_ids=tuple(ids))
        return self._answer(backend, asked, len(ids))

    def chat(self, messages: list[Message], request: dict[str, Any]) -> GenerateResult:
        """Answer a conversation; `request` is a GenerateRequest without a prompt."""
        backend = self._backend("plain", {}, limit=1, temperature=0.0, seed=0)
        try:
            ids = backend.render_turns(messages)
        except Exception as error:  # the template's own words
            raise RefusedError(f"the chat template refuses these turns: {error}") from error
        return self.generate(GenerateRequest.model_validate({**request, "prompt_token_ids": ids}))

    def complete(self, text: str, request: dict[str, Any]) -> GenerateResult:
        """Continue plain text, without a template."""
        ids = self.tokenizer(text)["input_ids"]
        return self.generate(GenerateRequest.model_validate({**request, "prompt_token_ids": ids}))

    def previews(self, request: PreviewsRequest) -> PreviewsResult:
        """Answer a batch, all with the weights that it names."""
        if request.weights_id != self.weights_id:
            raise RefusedError("these weights are not the active ones; publish them first", 409)
        backend = self._backend(
            request.profile,
            request.profile_options,
            limit=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
            stop_ids=frozenset(request.stop_ids),
        )
        for row in request.prompts:
            self._check_ids([*row.prompt_token_ids, *(row.golden_token_ids or ())])
        asked = [
            PreviewRequest(
                **row.model_dump(exclude={"golden_token_ids", "prompt_token_ids"}),
                prompt_token_ids=tuple(row.prompt_token_ids),
            )
            for row in request.prompts
        ]
        results = backend.preview_batch(asked, request.step)
        scores = [
            self._golden(row.prompt_token_ids, row.golden_token_ids)
            if request.golden_logprobs or index == request.canary
            else None
            for index, row in enumerate(request.prompts)
        ]
        canary = None if request.canary is None else scores[request.canary]
        return PreviewsResult(
            run=request.run,
            step=request.step,
            weights_id=self.weights_id,
            results=[self._signed(result) for result in results],
            golden_logprobs=scores if request.golden_logprobs else None,
            canary_logprob=None if canary is None else sum(canary),
        )

    def _backend(
        self,
        profile: str,
        options: dict[str, Any],
        *,
        limit: int,
        temperature: float,
        seed: int,
        stop_ids: frozenset[int] = frozenset(),
    ) -> LocalPreviewBackend:
        return LocalPreviewBackend(
            model=self.model,
            tokenizer=self.tokenizer,
            profile=get_profile(profile, options),
            max_new_tokens=limit,
            temperature=temperature,
            seed=seed,
            stop_ids=stop_ids,
            max_length=context_length(self.model.config),
            processors=(self.watch,),
        )

    def _render(self, backend: LocalPreviewBackend, request: GenerateRequest) -> list[int]:
        if not self.tokenizer.chat_template:
            raise RefusedError("the model has no chat template; send prompt_token_ids")
        return backend.render(request.prompt or "")

    def _check_ids(self, ids: list[int]) -> None:
        rows = self.model.get_input_embeddings().weight.shape[0]
        if not ids:
            raise RefusedError("the prompt has no token")
        if max(ids) >= rows:
            raise RefusedError(f"token id {max(ids)} is not below the model's {rows} rows")
        longest = context_length(self.model.config)
        if longest is not None and len(ids) >= longest:
            raise RefusedError(f"{len(ids)} tokens leave no room in a context of {longest}")

    def _answer(
        self, backend: LocalPreviewBackend, asked: PreviewRequest, prompt_tokens: int
    ) -> GenerateResult:
        found = backend.preview_batch([asked], 0)[0]
        if found.error_message is not None:
            raise RefusedError(f"generation failed: {found.error_message}", 500)
        return GenerateResult(
            text=found.text,
            raw_text=found.raw_text,
            tokens_generated=found.tokens_generated,
            prompt_tokens=prompt_tokens,
            generation_time_sec=found.generation_time_sec,
            tokens_per_sec=found.tokens_per_sec,
            finish_reason=found.finish_reason,
            weights_id=self.weights_id,
        )

    def _signed(self, result: PreviewResult) -> PreviewResult:
        return result.model_copy(
            update={"weights_id": self.weights_id, "backend_type": "remote_3090"}
        )

    def _golden(self, prompt: list[int], golden: list[int] | None) -> list[float] | None:
        """Log-probability of each golden token behind its prompt, one forward pass."""
        if not golden:
            return None
        ids = torch.tensor([[*prompt, *golden]], device=self.device)
        with undisturbed(self.model):
            logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])
        values: list[float] = chosen[:, 0].tolist()
        return values


def engine_main(jobs: Connection, control: Connection, model_path: str, device: str) -> None:
    """Body of the engine process: say hello or why not, then answer until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the API process's to handle
    try:
        engine = Engine(model_path, device, control)
    except (TrainerError, OSError, RuntimeError) as error:
        _send(jobs, {"ok": False, "error": str(error)})
        return
    _send(jobs, {"ok": True, "result": engine.hello()})
    while True:
        try:
            message = json.loads(jobs.recv_bytes())
            _send(jobs, _handle(engine, message))
        except (EOFError, OSError):
            return  # the API process is gone, and so is everyone who could ask


def _handle(engine: Engine, message: dict[str, Any]) -> Reply:
    engine.watch.job = message["id"]
    operation: str = message["op"]
    body: Any = message["body"]
    if operation == "load_weights":
        return _load(engine, body)
    try:
        if operation == "previews":
            found: Any = engine.previews(PreviewsRequest.model_validate(body))
        elif operation == "chat":
            found = engine.chat(body["messages"], body["request"])
        elif operation == "complete":
            found = engine.complete(body["text"], body["request"])
        else:
            found = engine.generate(GenerateRequest.model_validate(body))
    except JobCancelledError:
        return {"ok": False, "status": 499, "error": "cancelled"}
    except RefusedError as error:
        return {"ok": False, "status": error.status, "error": str(error)}
    except (TrainerError, ValueError) as error:
        return {"ok": False, "status": 422, "error": " ".join(str(error).split())[:300]}
    return {"ok": True, "result": found.model_dump(mode="json")}


def _load(engine: Engine, body: dict[str, Any]) -> Reply:
    try:
        return {"ok": True, "result": engine.load_weights(body["path"], body["weights_id"])}
    except RefusedError as error:
        # Raised before the first copy. Anything later ends this process, on purpose: half a
        # weight set must never answer.
        return {"ok": False, "status": error.status, "error": str(error)}


def _send(connection: Connection, message: Reply) -> None:
    connection.send_bytes(json.dumps(message).encode())
