"""The publisher process: hashes snapshots, sends them, asks for previews, reports. No torch here.

    python -m trainer.publish.publisher      started by `trainer.publish.lane`

Commands come as JSON lines on stdin, events leave as JSON lines on stdout; it ends when stdin
closes, so it cannot outlive the trainer. Nothing it does can hold up training: it runs at low
priority, and the trainer never waits for it but in the bounded drain at the end.

    -> setup (first line)           -> give {step, slot, path, is_kept, is_evaluated}
    -> hurry (try again now)
    <- idle                         <- away {step, error, retry_s, is_open}
    <- done {step, slot, ...}       <- failed {step, slot, error, is_linked}
    <- superseded {step, slot}
"""

from __future__ import annotations

import json
import os
import queue
import random
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict

from trainer.child import own_lines
from trainer.errors import ConfigError, PreviewError
from trainer.exchange import AwayError, RefusedError, TooSlowError
from trainer.preview.drift import BaseAnswer, Drift, DriftRequest, load_base, save_base
from trainer.preview.samples import sample_seed
from trainer.publish.client import Transport, WorkerClient
from trainer.publish.weight_file import WeightFile
from trainer.publish.wire import AdapterConfig, PreviewsRequest, PreviewsResult, ServerHashes

FAILURES_TO_OPEN = 3

FIRST_PAUSE_S = 0.5

OPEN_PAUSE_S = 30.0

MAX_OPEN_PAUSE_S = 600.0

MAX_SLOW_TRIES = 2
"""Generations of one step that may run out of time before the step counts as failed."""

MAX_REFUSALS = 3
"""Refusals after which a step is published again before it counts as failed."""

NICENESS = 10

UNPROCESSABLE = 422
"""Status of a request with a field that the server does not know."""

AGAIN = (
    *("base_missing", "not_active", "no_upload", "no_file", "parts_missing"),
    *("bad_part_hash", "bad_tensors", "bad_file"),
)
"""Codes of refusals after which publishing again helps: the server restarted, another trainer was
quicker, or bytes were damaged on the way."""


class PublisherMessage(BaseModel):
    """What the trainer says."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Setup(PublisherMessage):
    """The first line: where the server is, and what is the same for every step."""

    url: str
    key: str | None = None
    run: str
    transport: Transport
    timeout_s: float
    weights_dir: str | None = None
    folder: str
    """The run's private folder of snapshots: removed with the run, also when it is killed."""
    hashes: ServerHashes
    model: str | None = None
    """What a server without a model is told to load; None: it is our own and needs no telling."""
    quantize: str | None = None
    """`nf4`: how that model is to be quantized."""
    adapter: AdapterConfig | None = None
    template_date: str | None = None
    """ISO date that the run's chat template prints."""
    base_path: str | None = None
    """Full weights under the adapter, as a safetensors file."""
    previews: dict[str, Any]
    """A PreviewsRequest without run, step and weights_id."""
    num_samples: int = 1
    """Answers to each of these prompts; each further one is a batch with a seed of its own, which
    every server can be asked for."""
    evaluation: list[dict[str, Any]] = []
    """The same for prompts that are asked besides, at some steps; one batch each."""
    drift_prompts: list[list[int]] = []
    """Token ids of the prompts by which drift is measured; none: it is not."""
    drift_path: str | None = None
    """Where the base answers are kept."""


class Give(PublisherMessage):
    """One snapshot to be shown."""

    step: int
    slot: int
    path: str
    is_kept: bool
    """First and last step: not given up for a newer one."""
    is_evaluated: bool = False
    """The batches of the evaluation are asked too."""


@dataclass
class Breaker:
    """How long to leave a server alone that does not answer."""

    failures: int = 0

    @property
    def is_open(self) -> bool:
        """Whether it is only probed now and then."""
        return self.failures >= FAILURES_TO_OPEN

    def failed(self) -> float:
        """Note a failure; seconds to wait before the next try, with jitter."""
        self.failures += 1
        if not self.is_open:
            pause = FIRST_PAUSE_S * 2 ** (self.failures - 1)
        else:
            doublings = min(self.failures - FAILURES_TO_OPEN, 10)
            pause = min(OPEN_PAUSE_S * 2**doublings, MAX_OPEN_PAUSE_S)
        return float(pause * random.uniform(0.8, 1.2))


@dataclass
class Tries:
    """What has gone wrong with one snapshot so far."""

    slow: int = 0
    refused: int = 0
    is_linked: bool = False
    bytes_sent: int = 0
    times: dict[str, float] = field(default_factory=dict)


class Publisher:
    """Shows one snapshot after the other."""

    def __init__(self, setup: Setup, commands: queue.Queue[Any], out: IO[bytes]) -> None:
        """Take the set-up, where commands arrive and where events go."""
        self.setup, self.commands, self.out = setup, commands, out
        self.weights_dir = Path(setup.weights_dir) if setup.weights_dir else None
        self.client = WorkerClient(
            setup.url,
            setup.key,
            run=setup.run,
            transport=setup.transport,
            timeout_s=setup.timeout_s,
            weights_dir=self.weights_dir,
            template_date=setup.template_date,
        )
        self.breaker = Breaker()
        self.base_id: str | None = None
        self.base_answers: list[BaseAnswer] | None = None
        self.drift_refusal: str | None = None
        self.is_server_known = setup.model is None

    def run(self) -> None:
        """Serve commands for ever; the reader of stdin ends the process."""
        waiting: Give | None = None
        while True:
            if waiting is None:
                self._emit("idle")
                command = self.commands.get()
                waiting = command if isinstance(command, Give) else None
                continue
            waiting = self._show(waiting)

    def _emit(self, event: str, **values: Any) -> None:
        self.out.write(json.dumps({"event": event, **values}).encode() + b"\n")
        self.out.flush()

    # ---- one snapshot

    def _show(self, give: Give) -> Give | None:
        """Send one snapshot and report its previews; returns a newer one that took its place."""
        tries = Tries()
        while True:
            try:
                self._report(give, tries, *self._try(give, tries))
                self.breaker.failures = 0
                return None
            except AwayError as error:
                self.is_server_known = self.setup.model is None  # another one may come back
                if isinstance(error, TooSlowError) and tries.slow >= MAX_SLOW_TRIES:
                    self._failed(give, tries, error)
                    return None
                newer = self._wait(give, error)
                if newer is not None:
                    self._emit("superseded", step=give.step, slot=give.slot)
                    return newer
            except RefusedError as error:
                tries.refused += 1
                if error.code not in AGAIN or tries.refused >= MAX_REFUSALS:
                    self._failed(give, tries, error)
                    return None
                self.base_id = None  # it may have lost the base as well
            except BrokenPipeError:
                raise  # the trainer is gone, and with it whoever could be told
            except (PreviewError, ConfigError, OSError) as error:
                self._failed(give, tries, error)
                return None

    def _try(self, give: Give, tries: Tries) -> tuple[str, PreviewsResult]:
        self._know_server()
        started = time.monotonic()
        file = self._file(give)
        manifest = file.manifest()
        hashed = time.monotonic()
        pushed = self.client.publish(file, give.step, manifest)
        tries.bytes_sent += pushed.bytes_sent
        tries.is_linked |= bool(pushed.bytes_sent) and self.weights_dir is not None
        self._forget_links(pushed.weights_id if tries.is_linked else None)
        sent = time.monotonic()
        identity = {
            "run": self.setup.run,
            "step": give.step,
            "weights_id": pushed.weights_id,
        }
        found: PreviewsResult | None = None
        try:
            for part, body in enumerate(self._bodies(give)):
                drift = self._drift(give.step) if part == 0 else None
                request = PreviewsRequest.model_validate({**body, **identity, "drift": drift})
                num_prompts = len(request.prompts) + (len(drift.prompts) if drift else 0)
                answered = self._ask(request, part, self.setup.timeout_s * num_prompts)
                found = answered if found is None else _joined(found, answered)
        except TooSlowError:
            tries.slow += 1
            raise
        assert found is not None, "previews are always asked for"
        tries.times = {
            "hash_s": hashed - started,
            "push_s": sent - hashed,
            "generate_s": time.monotonic() - sent,
        }
        return pushed.weights_id, found

    def _bodies(self, give: Give) -> list[dict[str, Any]]:
        """The batches of a step: previews, their further samples, and the evaluation if it is due.

        Golden answers are scored with the first batch.
        """
        previews = self.setup.previews
        seed = previews.get("seed", PreviewsRequest.model_fields["seed"].default)
        seeds = [sample_seed(seed, sample) for sample in range(1, self.setup.num_samples)]
        samples = [
            {**previews, "seed": one, "golden_logprobs": False, "canary": None} for one in seeds
        ]
        return [previews, *samples, *(self.setup.evaluation if give.is_evaluated else ())]

    def _ask(self, request: PreviewsRequest, part: int, timeout_s: float) -> PreviewsResult:
        """Previews, without drift where the server does not know it: an older one refuses it."""
        try:
            return self.client.previews(request, part=part, timeout_s=timeout_s)
        except RefusedError as error:
            if request.drift is None or error.status != UNPROCESSABLE:
                raise
            self.drift_refusal = f"the preview server refuses to measure it ({error})"
            plain = request.model_copy(update={"drift": None})
            return self.client.previews(plain, part=part, timeout_s=timeout_s)

    def _drift(self, step: int) -> DriftRequest | None:
        """What is asked of drift: at step 0 for the base answers, later by them."""
        prompts, path = self.setup.drift_prompts, self.setup.drift_path
        if not prompts or path is None or self.drift_refusal is not None:
            return None
        if step > 0 and self.base_answers is None:
            self.base_answers = load_base(Path(path), prompts)
            if self.base_answers is None:
                return None
        return DriftRequest(prompts=prompts, base=self.base_answers if step > 0 else None)

    def _drift_found(self, step: int, found: Drift | None) -> dict[str, Any] | None:
        """What a server says of drift, as far as it can be true; base answers are kept here."""
        prompts, path = self.setup.drift_prompts, self.setup.drift_path
        if not prompts or path is None:
            return None
        if found is None:
            reason = self.drift_refusal or "the weights before training were not asked"
            found = Drift(error=reason)
        elif not found.is_of(len(prompts)):
            found = Drift(error="the preview server answered with something else")
        elif step == 0 and found.base is not None and len(found.base) == len(prompts):
            self.base_answers = found.base
            try:
                save_base(Path(path), prompts, found.base)
            except OSError as error:  # they are known as long as this process lives
                found = Drift(error=f"{path}: cannot be written ({error.strerror})")
        return found.model_dump(mode="json", exclude={"base"})

    def _know_server(self) -> None:
        """Compare a server that was away with this run, and name the model to one without.

        Raises:
            ConfigError: it holds something else; the step fails with these words.
        """
        if not self.is_server_known:
            profile = str(self.setup.previews["profile"])
            setup = self.setup
            self.client.check(setup.hashes, profile, setup.model or "", setup.quantize)
            self.is_server_known = True

    def _file(self, give: Give) -> WeightFile:
        path, setup = Path(give.path), self.setup
        if setup.adapter is None:
            return WeightFile(path, setup.hashes)
        if self.base_id is None:
            assert setup.base_path is not None, "an adapter comes with its base"
            base = WeightFile(Path(setup.base_path), setup.hashes)
            self.base_id = self.client.publish(base, give.step, base.manifest()).weights_id
        return WeightFile(path, setup.hashes, self.base_id, setup.adapter)

    def _forget_links(self, current: str | None) -> None:
        """Take older names out of the shared folder once the server has newer weights."""
        if self.weights_dir is None or current is None:
            return
        for path in self.weights_dir.glob("*.safetensors"):
            if path.stem not in (current, self.base_id):
                path.unlink(missing_ok=True)

    # ---- how it ended

    def _report(self, give: Give, tries: Tries, weights_id: str, found: PreviewsResult) -> None:
        self._emit(
            "done",
            step=give.step,
            slot=give.slot,
            weights_id=weights_id,
            is_linked=tries.is_linked,
            bytes=tries.bytes_sent,
            times=tries.times,
            results=[one.model_dump(mode="json") for one in found.results],
            golden_logprobs=found.golden_logprobs,
            canary_logprob=found.canary_logprob,
            drift=self._drift_found(give.step, found.drift),
        )

    def _failed(self, give: Give, tries: Tries, error: Exception) -> None:
        self._emit(
            "failed",
            step=give.step,
            slot=give.slot,
            error=str(error) or type(error).__name__,
            is_linked=tries.is_linked,
            bytes=tries.bytes_sent,
        )

    def _wait(self, give: Give, error: AwayError) -> Give | None:
        """Leave the server alone for a while; a newer snapshot ends the wait."""
        pause = self.breaker.failed()
        self._emit(
            "away",
            step=give.step,
            error=str(error),
            retry_s=round(pause, 1),
            is_open=self.breaker.is_open,
        )
        try:
            command = self.commands.get(timeout=pause)
        except queue.Empty:
            return None
        return command if isinstance(command, Give) else None


def _joined(one: PreviewsResult, other: PreviewsResult) -> PreviewsResult:
    """The answers of two batches under the same weights; the canary is the first one's."""
    scores = [answers.golden_logprobs or [None] * len(answers.results) for answers in (one, other)]
    return one.model_copy(
        update={
            "results": [*one.results, *other.results],
            "golden_logprobs": [*scores[0], *scores[1]],
        }
    )


def read_commands(stream: IO[bytes], commands: queue.Queue[Any], folder: str) -> None:
    """Put commands into the queue; the end of the stream is the end of this process."""
    for line in stream:
        values = json.loads(line)
        kind = values.pop("op")
        commands.put(Give.model_validate(values) if kind == "give" else kind)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # the trainer is gone or done: nobody is left to be told anything


def main() -> None:
    """Run until stdin closes."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    stream, out = own_lines()
    setup = Setup.model_validate_json(stream.readline())
    commands: queue.Queue[Any] = queue.Queue()
    reader = threading.Thread(
        target=read_commands, args=(stream, commands, setup.folder), daemon=True
    )
    reader.start()
    try:
        Publisher(setup, commands, out).run()
    except BrokenPipeError:
        reader.join()  # the trainer is gone: the reader sees it too, tidies up and ends us


if __name__ == "__main__":
    main()
