"""Small real runs for N26: one config, one section changed, and everything that can be seen."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.trust.reference import llama
from trainer.config import TrainerConfig, create_default_config
from trainer.core import TrainerEngine
from trainer.data.dataset import RunData
from trainer.errors import TrainerError

RATE, NUM_STEPS, NUM_ROWS, BATCH_SIZE = 1e-2, 4, 40, 4
BASE: dict[str, dict[str, Any]] = {
    "hyperparams": {
        "batch_size": BATCH_SIZE,
        "max_steps": NUM_STEPS,
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "fp_precision": "fp32",
        "max_length": 64,
    },
    "data": {"validation_split": 0.25, "cache": False},
    "monitoring": {
        "inference_interval": 0,
        "micro_eval_interval": 0,
        "preview_max_tokens": 6,
        "preview_temperature": 0,
        "report_to": (),
    },
    "environment": {"num_threads": 1, "device": "cpu"},
}
LORA = {"training_mode": "lora"}


class Recorder:
    """An observer that keeps every event, and what status.json said at each step."""

    def __init__(self, status: Path) -> None:
        self.status, self.events, self.shown = status, list[Any](), list[Any]()

    def on_event(self, event: Any) -> None:
        self.events.append(event)
        if type(event).__name__ == "StepDone":
            self.shown.append(json.loads(self.status.read_text())["step"])

    def close(self) -> None: ...


@dataclass
class Seen:
    """All that a run left behind."""

    result: Any
    recorder: Recorder

    def events(self, kind: str) -> list[Any]:
        return [event for event in self.recorder.events if type(event).__name__ == kind]

    @property
    def folder(self) -> Path:
        return Path(self.result.output_dir)

    @property
    def steps(self) -> list[Any]:
        return self.events("StepDone")

    @property
    def rates(self) -> list[float]:
        return [step.learning_rate for step in self.steps]

    @property
    def previews(self) -> list[Any]:
        return [result for event in self.events("PreviewsDone") for result in event.results]

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "status.json").read_text())
        return found

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        [path] = (self.folder / "final_model").glob("*model.safetensors")
        return load_file(path)

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([self.tensors[name].double().flatten() for name in sorted(self.tensors)])

    def optimizer_groups(self) -> list[dict[str, Any]]:
        path = self.folder / "checkpoints" / self.checkpoints[-1] / "optimizer.pt"
        groups: list[dict[str, Any]] = torch.load(path, weights_only=True)["param_groups"]
        return groups


@dataclass
class Lab:
    """Makes configs, runs and refusals in a folder of its own."""

    folder: Path
    tokenizer: Any
    count: int = 0
    cases: dict[str, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.folder / "model"
        llama(vocab_size=len(self.tokenizer), max_position_embeddings=512).save_pretrained(
            self.model
        )
        self.tokenizer.save_pretrained(self.model)
        self.rows = [
            {"question": f"what is {n} plus {n}?", "answer": f"it is {2 * n}. " * (n % 4 + 1)}
            for n in range(NUM_ROWS)
        ]
        self.file = self.write(self.rows)

    def path(self, name: str) -> Path:
        self.count += 1
        return self.folder / f"{self.count}-{name}"

    def write(self, rows: list[Any]) -> Path:
        path = self.path("rows.jsonl")
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    def config(self, **sections: dict[str, Any]) -> TrainerConfig:
        """The base config with some values of some sections changed."""
        merged = {name: {**values} for name, values in BASE.items()}
        for name, values in sections.items():
            merged[name] = {**merged.get(name, {}), **values}
        merged.setdefault("model", {}).setdefault("model_path", str(self.model))
        merged["data"].setdefault("dataset_path", str(self.file))
        merged.setdefault("output", {}).setdefault("output_dir", str(self.path("run")))
        return create_default_config(
            model_path=merged["model"].pop("model_path"),
            dataset_path=merged["data"].pop("dataset_path"),
            output_dir=merged["output"].pop("output_dir"),
            **merged,
        )

    def run(self, **sections: dict[str, Any]) -> Seen:
        """A run that reaches its end."""
        config = self.config(**sections)
        recorder = Recorder(Path(config.output.output_dir) / "status.json")
        result = TrainerEngine(observers=[recorder]).run_job(config)
        assert result.success, result.error_message
        return Seen(result, recorder)

    @property
    def base(self) -> Seen:
        """The run with nothing changed; once."""
        if "base" not in self.cases:
            self.cases["base"] = self.run()
        return self.cases["base"]

    def data(self, **sections: dict[str, Any]) -> RunData:
        """The rows of a run, without the run."""
        return TrainerEngine().inspect_data(self.config(**sections))

    def trainer(self, **sections: dict[str, Any]) -> Any:
        """The Trainer of a run, not run yet."""
        return TrainerEngine().create_trainer(self.config(**sections))

    def refusal(self, **sections: dict[str, Any]) -> str:
        """The message of a config that is refused, before any weight moves."""
        try:
            config = self.config(**sections)
        except (TrainerError, ValueError) as error:
            return str(error)
        result = TrainerEngine().run_job(config)
        assert not result.success, "was not refused"
        assert result.exit_code == 2, result.error_message
        assert result.global_step == 0
        return str(result.error_message)


@contextmanager
def http_server(answer: Callable[[Any], Any]) -> Iterator[tuple[int, list[Any]]]:
    """A real server on loopback: its port, and every request it got, with path, body, headers."""
    requests: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("content-length", 0))
            self.body = json.loads(self.rfile.read(length) or b"null")
            requests.append(self)
            data = json.dumps(answer(self)).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_DELETE = do_POST  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield int(server.server_address[1]), requests
    finally:
        server.shutdown()
        server.server_close()
