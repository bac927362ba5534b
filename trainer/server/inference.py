"""The engine process: owns the model, one thread, JSON messages in and out.

It is started by `inference_process.py` and ends when its stdin closes. Weights are replaced
between two batches only, because there is one thread and one message at a time.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import logging
import secrets
import signal
import sys
import time
from typing import IO, Any

import torch

from trainer.child import own_lines
from trainer.errors import TrainerError
from trainer.models.chat_template import fix_date
from trainer.models.load import context_length
from trainer.preview.base import PreviewRequest, PreviewResult
from trainer.preview.drift import Drift, DriftRequest, of_base
from trainer.preview.local import LocalPreviewBackend
from trainer.preview.measure_drift import base_answers, base_settings, drift_from
from trainer.preview.neutral import as_received, golden_logprobs
from trainer.preview.samples import MAX_SEED, sample_seed
from trainer.profiles import Message, get_profile
from trainer.publish.wire import (
    AdapterConfig,
    GenerateRequest,
    GenerateResult,
    PreviewsRequest,
    PreviewsResult,
)
from trainer.server.held_model import HeldModel, UnanswerableError
from trainer.server.inference_process import SharedNumbers
from trainer.server.token_watch import JobCancelledError, TokenWatch, beat

logger = logging.getLogger(__name__)

Reply = dict[str, Any]


class Engine:
    """Answers with the held model."""

    def __init__(self, held: HeldModel, watch: TokenWatch) -> None:
        """Take the model, and what looks on at every token."""
        self.held, self.watch = held, watch

    def hello(self) -> Reply:
        """What the API process needs to know of the model."""
        return {
            "device": str(self.held.device),
            "dtype": self.held.dtype_name,
            "num_threads": torch.get_num_threads(),
            "weights_id": self.held.weights_id,
            "manifest": self.held.manifest.model_dump(mode="json"),
        }

    def _weights_id(self) -> str:
        """Of the weights that answer now.

        Raises:
            UnanswerableError: none were sent yet.
        """
        if self.held.weights_id is None:
            raise UnanswerableError("waiting for the first weights of a trainer", 503)
        return self.held.weights_id

    # ---- generation

    def generate(self, request: GenerateRequest, samples: int = 1) -> Reply:
        """Answer one prompt, with as many samples as are wanted.

        Returns:
            The first answer as a GenerateResult, and under `samples` all of them.
        """
        self._weights_id()
        # Without a seed nobody asks for the same answer again.
        seed = secrets.randbelow(MAX_SEED) if request.seed is None else request.seed
        found = [self._one(request, seed, number) for number in range(samples)]
        first: Reply = found[0].model_dump(mode="json")
        return {**first, "samples": [one.model_dump(mode="json") for one in found]}

    def _one(self, request: GenerateRequest, seed: int, sample: int) -> GenerateResult:
        backend = self._backend(
            "plain",
            {},
            limit=request.limit,
            temperature=request.temperature,
            seed=sample_seed(seed, sample),
        )
        backend.with_special_tokens = False  # clients want words; raw_text has everything
        backend.system_prompt = request.system_prompt
        backend.settings = dataclasses.replace(backend.settings, stop_strings=tuple(request.stop))
        ids = request.prompt_token_ids or self._render(backend, request)
        self._check_ids(ids)
        asked = PreviewRequest(prompt=request.prompt or "", prompt_token_ids=tuple(ids))
        self.watch.begin_sample(sample)
        return self._answer(backend, asked, len(ids))

    def chat(self, messages: list[Message], request: Reply, samples: int) -> Reply:
        """Answer a conversation; `request` is a GenerateRequest without a prompt."""
        backend = self._backend("plain", {}, limit=1, temperature=0.0, seed=0)
        try:
            ids = backend.render_turns(messages)
        except Exception as error:  # the template's own words
            words = " ".join(str(error).split())[:200]
            raise UnanswerableError(f"the chat template refuses these turns: {words}") from error
        asked = GenerateRequest.model_validate({**request, "prompt_token_ids": ids})
        return self.generate(asked, samples)

    def complete(self, text: str, request: Reply, samples: int) -> Reply:
        """Continue plain text, without a template."""
        ids = self.held.tokenizer(text)["input_ids"]
        asked = GenerateRequest.model_validate({**request, "prompt_token_ids": ids})
        return self.generate(asked, samples)

    def previews(self, request: PreviewsRequest) -> PreviewsResult:
        """Answer a batch, all with the weights that it names."""
        if request.weights_id != self.held.weights_id:
            raise UnanswerableError(
                "these weights are not the active ones; publish them first", 409
            )
        backend = self._backend(
            request.profile,
            request.profile_options,
            limit=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
            stop_ids=frozenset(request.stop_ids),
        )
        stops = (*backend.settings.stop_strings, *request.stop)
        backend.settings = dataclasses.replace(backend.settings, stop_strings=stops)
        for row in request.prompts:
            self._check_ids([*row.prompt_token_ids, *(row.golden_token_ids or ())])
        asked = [row.request() for row in request.prompts]
        results = backend.preview_batch(asked, request.step)
        self.watch.check()
        model = self.held.model
        # In fp32, layer by layer, whatever answers are computed in: the proof is as sharp then.
        with as_received(model, lambda tensor: tensor.dtype):
            scores = [
                golden_logprobs(model, row.prompt_token_ids, row.golden_token_ids).tolist()
                if row.golden_token_ids and (request.golden_logprobs or index in request.canaries)
                else None
                for index, row in enumerate(request.prompts)
            ]
        canary = [scores[index] for index in request.canaries]
        drift = self._drift(request.drift, backend) if request.drift is not None else None
        return PreviewsResult(
            run=request.run,
            step=request.step,
            weights_id=self._weights_id(),
            results=[self._signed(result) for result in results],
            golden_logprobs=scores if request.golden_logprobs else None,
            canary_logprob=sum(map(sum, filter(None, canary))) if all(canary) and canary else None,
            drift=drift,
        )

    def _drift(self, asked: DriftRequest, backend: LocalPreviewBackend) -> Drift:
        """Answer as the base, or measure against it, computing as answers are computed.

        What fails here costs this figure only.
        """
        for index, prompt in enumerate(asked.prompts):
            self._check_ids([*prompt, *(asked.base[index].answer_ids if asked.base else ())])
        for answer in asked.base or ():
            self._check_rows(max(map(max, answer.top_ids)))
        started = time.perf_counter()
        try:
            found = self._measure(asked, backend)
        except Exception as error:
            logger.exception("drift could not be measured")
            found = Drift(error=f"{type(error).__name__}; details are in the server's log")
        self.watch.check()
        return found.model_copy(update={"seconds": time.perf_counter() - started})

    def _measure(self, asked: DriftRequest, backend: LocalPreviewBackend) -> Drift:
        model = self.held.model
        if asked.base is not None:
            kl, is_changed = drift_from(model, asked.prompts, asked.base)
            return Drift(kl=kl, is_changed=is_changed)
        settings = base_settings(backend.settings, asked.max_new_tokens)
        base = base_answers(model, self.held.tokenizer, asked.prompts, settings)
        return of_base(base).model_copy(update={"base": base})

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
            model=self.held.model,
            tokenizer=self.held.tokenizer,
            profile=get_profile(profile, options),
            max_new_tokens=limit,
            temperature=temperature,
            seed=seed,
            stop_ids=stop_ids,
            max_length=context_length(self.held.model.config),
            processors=(self.watch,),
        )

    def _render(self, backend: LocalPreviewBackend, request: GenerateRequest) -> list[int]:
        if not self.held.tokenizer.chat_template:
            raise UnanswerableError("the model has no chat template; send prompt_token_ids")
        return backend.render(request.prompt or "")

    def _check_ids(self, ids: list[int]) -> None:
        if not ids:
            raise UnanswerableError("the prompt has no token")
        self._check_rows(max(ids))
        longest = context_length(self.held.model.config)
        if longest is not None and len(ids) >= longest:
            raise UnanswerableError(f"{len(ids)} tokens fill the context of {longest} tokens")

    def _check_rows(self, largest: int) -> None:
        rows = self.held.model.get_input_embeddings().weight.shape[0]
        if largest >= rows:
            raise UnanswerableError(f"token id {largest} is not below the model's {rows} rows")

    def _answer(
        self, backend: LocalPreviewBackend, asked: PreviewRequest, prompt_tokens: int
    ) -> GenerateResult:
        self.watch.prompt_length = prompt_tokens
        found = backend.preview_batch([asked], 0)[0]
        if found.error_message is not None:
            # The backend has logged it whole; a client gets no paths and no inner workings.
            raise UnanswerableError("generation failed; details are in the server's log", 500)
        return GenerateResult(
            text=found.text,
            raw_text=found.raw_text,
            tokens_generated=found.tokens_generated,
            prompt_tokens=prompt_tokens,
            generation_time_sec=found.generation_time_sec,
            tokens_per_sec=found.tokens_per_sec,
            finish_reason=found.finish_reason,
            weights_id=self._weights_id(),
        )

    def _signed(self, result: PreviewResult) -> PreviewResult:
        signs = {"weights_id": self.held.weights_id, "weights": "published"}
        return result.model_copy(update={**signs, "backend_type": "remote_3090"})


def engine_main(numbers: SharedNumbers, lines: IO[bytes], out: IO[bytes]) -> None:
    """Body of the engine process: say hello or why not, then answer until its input closes.

    Args:
        numbers: where a message is given up, and where this process shows that it runs.
        lines: the set-up (options of HeldModel, JSON), then two lines a message: head and body.
    """
    setup = json.loads(lines.readline())
    model_path, date = setup["model_path"], setup["date"]
    try:
        held = HeldModel(
            model_path,
            setup["device"],
            wait_for_weights=setup["wait_for_weights"],
            dtype=setup["dtype"],
            base=setup["base"],
            date=None if date is None else dt.date.fromisoformat(date),
            quantize=setup["quantize"] is not None,
        )

        def send_text(sample: int, text: str) -> None:
            _send(out, {"sample": sample, "text": text})

        watch = TokenWatch(numbers.cancelled, held.tokenizer, send_text)
        held.watch_layers(watch.check)
        engine = Engine(held, watch)
    except TrainerError as error:
        _send(out, {"ok": False, "error": str(error)})
        return
    except Exception as error:  # a model folder can be wrong in any way
        words = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        _send(out, {"ok": False, "error": f"--model {model_path}: it does not load ({words})."})
        return
    beat(numbers.beats)
    _send(out, {"ok": True, "result": engine.hello()})
    while True:
        try:
            head, body = lines.readline(), lines.readline()
            if not body.endswith(b"\n"):
                return  # the API process is gone, and so is everyone who could ask
            _send(out, _handle(engine, json.loads(head), json.loads(body)))
        except OSError:
            return  # the API process is gone, and so is everyone who could ask


def _handle(engine: Engine, head: dict[str, Any], body: Any) -> Reply:
    engine.watch.begin(head["id"], is_streamed=head["stream"])
    operation: str = head["op"]
    if operation == "load_weights":
        return _load(engine.held, body)
    try:
        if operation == "previews":
            asked = PreviewsRequest.model_validate(body)
            found: Reply = engine.previews(asked).model_dump(mode="json")
        elif operation == "chat":
            found = engine.chat(body["messages"], body["request"], body["samples"])
        elif operation == "complete":
            found = engine.complete(body["text"], body["request"], body["samples"])
        else:
            found = engine.generate(
                GenerateRequest.model_validate(body["request"]), body["samples"]
            )
    except JobCancelledError:
        return {"ok": False, "status": 499, "error": "cancelled"}
    except UnanswerableError as error:
        return {"ok": False, "status": error.status, "error": str(error)}
    except (TrainerError, ValueError) as error:
        return {"ok": False, "status": 422, "error": " ".join(str(error).split())[:300]}
    except Exception:
        # The weights are as they were: no reason to die, and nothing of it is the client's to see.
        logger.exception("a %s request failed", operation)
        return {
            "ok": False,
            "status": 500,
            "error": "internal error; details are in the server's log",
        }
    return {"ok": True, "result": found}


def _load(held: HeldModel, body: dict[str, Any]) -> Reply:
    adapter = body.get("adapter")
    try:
        held.load_weights(
            body["path"],
            body["weights_id"],
            adapter=None if adapter is None else AdapterConfig.model_validate(adapter),
            base_id=body.get("base_id"),
            base_path=body.get("base_path"),
        )
    except UnanswerableError as error:
        # Raised before the first copy. Anything later ends this process, on purpose: half a
        # weight set must never answer.
        return {"ok": False, "status": error.status, "error": str(error)}
    day = body.get("template_date")
    own = held.date if body["path"] is None else None  # the weights it began with
    fix_date(held.tokenizer, own if day is None else dt.date.fromisoformat(day))
    return {"ok": True, "result": {"weights_id": held.weights_id, "dtype": held.dtype_name}}


def _send(out: IO[bytes], message: Reply) -> None:
    out.write(json.dumps(message).encode() + b"\n")
    out.flush()


def main() -> None:
    """Run until stdin closes; the argument is the descriptor of the shared numbers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the API process's to handle
    engine_main(SharedNumbers(int(sys.argv[1])), *own_lines())


if __name__ == "__main__":
    main()
