"""What previews made elsewhere cost training, how soon they are there, and how fast the worker is.

    python benchmarks/bench_remote.py [--steps 100] [--repeats 5] [--out FILE.json]

Parts, in one run: stall of the training thread with training and worker on one core each; seconds
from step to visible preview, by stage; bytes per publication (full, equal, adapter); 16 prompts in
one batch against one by one, and against `transformers serve --continuous-batching` on the same
model and prompts (arms take turns, both warm); upload speed over loopback. Everything runs
single-threaded. What a snapshot costs on a GPU is a stage of `benchmarks/gpu_stages.py`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import concurrent.futures
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from trainer.commands.demo import demo_config
from trainer.core import TrainerEngine
from trainer.models.chat_template import chat_template_hash, tokenizer_hash
from trainer.models.tiny import build_tiny_model, load_tiny_tokenizer, write_demo_data
from trainer.monitoring.events import Event, StepDone
from trainer.publish.client import WorkerClient
from trainer.publish.identity import canonical_tensors, config_hash
from trainer.publish.snapshot import Snapshotter
from trainer.publish.weight_file import WeightFile
from trainer.publish.wire import ServerHashes

NUM_PROMPTS, NUM_TOKENS = 16, 64
EVERY_STEPS = 10


def main() -> int:
    """Measure, print, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of the stall part")
    parser.add_argument("--repeats", type=int, default=5, help="of each arm of the worker part")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"torch": torch.__version__, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        found["training, full"] = stall(root / "full", words.steps, "full")
        found["training, lora"] = stall(root / "lora", words.steps // 2, "lora")
        found["worker"] = worker_speed(root / "worker", words.repeats)
        found["upload"] = upload(root / "upload", words.repeats)
    print(json.dumps(found, indent=2))
    if words.out is not None:
        words.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


# ---- what training pays, and how soon a preview is there


class StepTimes:
    """Seconds of each step; pins helper processes to the second core once they are there."""

    def __init__(self, worker_json: Path) -> None:
        """Take where the run says who its worker is."""
        self.worker_json = worker_json
        self.seconds: list[float] = []

    def on_event(self, event: Event) -> None:
        """Note a step."""
        if isinstance(event, StepDone):
            self.seconds.append(event.step_time_s)
            pin_children()

    def close(self) -> None:
        """Nothing to give back."""


def pin_children() -> None:
    """Training keeps the first core; sidecar, engine and publisher get the second one."""
    if not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2:
        return
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            child.cpu_affinity([1])


def stall(folder: Path, steps: int, mode: str) -> dict[str, Any]:
    """Train the demo with a sidecar and previews every ten steps."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {0})
    data = write_demo_data(
        folder / "data", num_train_rows=steps * 64, num_validation_rows=40, seed=0
    )
    config = demo_config(folder, data, steps=steps, seed=0, backend="sidecar")
    changes = {
        "hyperparams": {"training_mode": mode},
        "environment": {"num_threads": 1},
        "monitoring": {
            "inference_interval": EVERY_STEPS,
            "micro_eval_interval": 0,
            "final_eval_prompts": 0,
        },
    }
    config = config.model_copy(
        update={
            name: getattr(config, name).model_copy(update=values)
            for name, values in changes.items()
        }
    )
    times = StepTimes(folder / "worker.json")
    result = TrainerEngine(observers=[times]).run_job(config)
    assert result.success, result.error_message
    counts = result.summary["previews"]
    step = statistics.median(times.seconds)
    return {
        "steps": steps,
        "step_s_median": round(step, 4),
        "stall_ms_median": counts["stall_ms_median"],
        "stall_ms_p99": counts["stall_ms_p99"],
        "stall_pct_of_step_time": round(
            100 * counts["stall_ms_median"] / 1000 / (EVERY_STEPS * step), 3
        ),
        "visible_s_median": counts["visible_s_median"],
        "stages_s_mean": counts["stages_s_mean"],
        "bytes_per_publication": counts["bytes_sent"] // max(len(set(_steps(folder))), 1),
        **{name: counts[name] for name in ("asked", "done", "verified", "superseded", "failed")},
    }


def _steps(folder: Path) -> list[int]:
    lines = (folder / "previews.jsonl").read_text().splitlines()
    return [row["step"] for row in map(json.loads, lines) if row["error_message"] is None]


# ---- the worker


@contextlib.contextmanager
def process(command: list[str], is_ready: Callable[[subprocess.Popen[str]], bool]) -> Iterator[Any]:
    """A server process, ended with the block."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as started:
        try:
            deadline = time.monotonic() + 180
            while not is_ready(started):
                assert time.monotonic() < deadline, command
            yield started
        finally:
            started.terminate()


@contextlib.contextmanager
def serving(model: Path | str) -> Iterator[str]:
    """`trainer serve` on a free port."""
    words = ["-m", "trainer", "serve", "--model", str(model), "--port", "0", "--device", "cpu"]
    lines: list[str] = []

    def is_ready(started: subprocess.Popen[str]) -> bool:
        assert started.stdout is not None
        lines.append(started.stdout.readline())
        return lines[-1].startswith("ready:")

    with process([sys.executable, *words], is_ready):
        yield lines[-1].split()[1]


def worker_speed(folder: Path, repeats: int) -> dict[str, Any]:
    """One batch of 16, 16 single requests, 16 at once to `transformers serve`: 64 tokens each."""
    tokenizer = load_tiny_tokenizer()
    model = build_tiny_model(seed=0, vocab_size=len(tokenizer), dtype=torch.float32)
    model.generation_config.eos_token_id = None  # all arms generate the full length
    model.config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = [f"max of {10 + 3 * n} and {90 - 2 * n}?" for n in range(NUM_PROMPTS)]
    port = 8791
    peer_command = [
        *(str(Path(sys.executable).with_name("transformers")), "serve", str(folder)),
        *("--device", "cpu", "--port", str(port), "--continuous-batching"),
    ]
    with serving(folder) as ours, process(peer_command, lambda _: _healthy(port)):
        client = httpx.Client(timeout=300)
        arms: dict[str, Callable[[], int]] = {
            "one batch": lambda: _batch(client, ours, tokenizer, texts),
            "one by one": lambda: sum(_batch(client, ours, tokenizer, [text]) for text in texts),
            "transformers serve, 16 at once": lambda: _peer(client, port, str(folder), texts),
        }
        tokens = {name: arm() for name, arm in arms.items()}  # warm
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(repeats):
            for name, arm in arms.items():
                started = time.perf_counter()
                arm()
                seconds[name].append(time.perf_counter() - started)
    batch = statistics.median(seconds["one batch"])
    ratios = {name: round(statistics.median(s) / batch, 2) for name, s in seconds.items()}
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "tokens": tokens,
        "times as long as one batch": ratios,
    }


def _healthy(port: int) -> bool:
    time.sleep(0.5)
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    return False


def _batch(client: httpx.Client, url: str, tokenizer: Any, texts: list[str]) -> int:
    """`POST /previews`; tokens made."""
    active = client.get(f"{url}/models/active").json()["weights_id"]
    prompts = [
        {"prompt": text, "prompt_token_ids": _ids(tokenizer, text), "prompt_id": str(index)}
        for index, text in enumerate(texts)
    ]
    body = {
        "run": "bench",
        "step": 0,
        "weights_id": active,
        "prompts": prompts,
        "max_new_tokens": NUM_TOKENS,
    }
    found = client.post(f"{url}/previews", json=body).raise_for_status().json()
    return sum(one["tokens_generated"] for one in found["results"])


def _ids(tokenizer: Any, text: str) -> list[int]:
    turns = [{"role": "user", "content": text}]
    ids: list[int] = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return ids


def _peer(client: httpx.Client, port: int, model: str, texts: list[str]) -> int:
    """16 chat requests at the same time; tokens made, as the peer counts them."""

    def ask(text: str) -> int:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": NUM_TOKENS,
            "temperature": 0.0,
        }
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        found = client.post(url, json=body).raise_for_status().json()
        return int((found.get("usage") or {}).get("completion_tokens", 0))

    with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
        return sum(pool.map(ask, texts))


# ---- the wire


def upload(folder: Path, repeats: int) -> dict[str, Any]:
    """Publish a 60M-parameter model (fp32) over http on loopback, new weights each time."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = load_tiny_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    snapshots = Snapshotter(canonical_tensors(model), torch.float32, torch.device("cpu"))
    arena = snapshots.arena(folder / "arena")
    hashes = ServerHashes(
        config_hash=config_hash(model.config),
        tokenizer_hash=tokenizer_hash(tokenizer),
        chat_template_hash=chat_template_hash(tokenizer),
    )
    copied, hashed, pushed = [], [], []
    with serving(folder / "model") as url:
        client = WorkerClient(url, None, run="bench", transport="http", timeout_s=60)
        for step in range(repeats):
            with torch.no_grad():
                model.model.norm.weight.add_(1e-3)
            started = time.perf_counter()
            snapshots.copy(arena)()
            copied.append(time.perf_counter() - started)
            file = WeightFile(arena.path, hashes)
            started = time.perf_counter()
            manifest = file.manifest()
            hashed.append(time.perf_counter() - started)
            started = time.perf_counter()
            sent = client.publish(file, step, manifest).bytes_sent
            pushed.append(time.perf_counter() - started)
            assert sent == snapshots.layout.size
        started = time.perf_counter()
        again = client.publish(file, repeats, manifest)
        equal = {"bytes": again.bytes_sent, "seconds": round(time.perf_counter() - started, 4)}
        client.close()
    mebibytes = snapshots.layout.size / 2**20
    return {
        "mebibytes": round(mebibytes, 1),
        "copy_mib_per_s": spread([mebibytes / s for s in copied]),
        "hash_mib_per_s": spread([mebibytes / s for s in hashed]),
        "publish_mib_per_s (send, verify, load)": spread([mebibytes / s for s in pushed]),
        "equal weights": equal,
    }


if __name__ == "__main__":
    raise SystemExit(main())
