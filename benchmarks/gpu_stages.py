"""One stage of `benchmarks/gpu.py`, in a process of its own.

    python benchmarks/gpu_stages.py STAGE --work FOLDER --out FILE.json [--rehearse]

The file gets `{"figures": ...}` or `{"skipped": why}`; anything else is a failure and its last
lines are in the log. Models are Qwen3-shaped with random weights, so nothing is downloaded, and
their losses mean nothing. `--rehearse` runs the same code on tiny shapes, on any machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.arms import Clock, trainer_arm, trl_arm, wait_for_device
from benchmarks.gpu_setup import FULL, REHEARSAL, Bench, SkippedError, needs

ROOT = Path(__file__).parents[1]

TOLD_PACKAGES = (
    *("transformers", "accelerate", "peft", "trl", "datasets", "bitsandbytes", "flash_attn"),
    *("liger-kernel", "triton", "numpy"),
)


def machine(bench: Bench) -> dict[str, Any]:
    """What the figures were measured on; fails where this Python lacks what a run imports."""
    importlib.import_module("trainer.core.engine")
    packages: dict[str, str | None] = {}
    for name in TOLD_PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    found: dict[str, Any] = {
        "card": "CPU (rehearsal)",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": packages,
        "cpu_cores": os.cpu_count(),
    }
    if not bench.is_rehearsal:
        properties = torch.cuda.get_device_properties(0)
        found["card"] = properties.name
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["driver"] = _driver()
    return found


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout else None


def gpu_tests(bench: Bench) -> dict[str, Any]:
    """The tests that need a CUDA device, those of packing (does a document see another?) first."""
    needs("pytest", "pytest_timeout")
    marked = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]
    marked.sort(key=lambda path: "packing" not in path.name)
    report = bench.work / "tests.xml"
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"),
        *(f"--junitxml={report}", *map(str, marked)),
    ]
    subprocess.run(command, cwd=ROOT, check=False)
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    outcomes: dict[str, list[str]] = {"failure": [], "error": [], "skipped": []}
    for case in cases:
        for kind, names in outcomes.items():
            if (child := case.find(kind)) is not None:
                why = f": {child.get('message', '')}" if kind == "skipped" else ""
                names.append(f"{case.get('classname')}.{case.get('name')}{why}")
    failed = outcomes["failure"] + outcomes["error"]
    passed = len(cases) - len(failed) - len(outcomes["skipped"])
    return {"passed": passed, "failed": failed, "skipped": outcomes["skipped"]}


def figures_of(clock: Clock) -> dict[str, Any]:
    """Tokens per second and peak memory."""
    peak = clock.peak_gib
    return {
        "tokens_per_s": round(clock.rate),
        "peak_gib": None if peak is None else round(peak, 2),
        "tokens": clock.tokens,
        "seconds": round(clock.seconds, 2),
    }


def ours(bench: Bench, shape: str, training_mode: str) -> dict[str, Any]:
    """`trainer`, rows packed, in bf16 (full training: masters in fp32)."""
    if training_mode == "qlora":
        needs("bitsandbytes")
    task = bench.task(shape)
    clock = trainer_arm(task, precision="bf16", batching="packed", training_mode=training_mode)
    return figures_of(clock)


def trl_best(bench: Bench, shape: str, *, is_lora: bool) -> dict[str, Any]:
    """SFTTrainer, packed as much as `trainer`, without recomputing activations."""
    needs("trl", "datasets", "pyarrow", "pandas")
    task = bench.task(shape)
    has_flash = importlib.util.find_spec("flash_attn") is not None
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    options = {
        "per_device_train_batch_size": task.batch_size,
        "bf16": True,
        "max_length": task.max_length,
        "packing": True,
        "gradient_checkpointing": False,
        "use_liger_kernel": has_liger and not bench.is_rehearsal,
    }
    attention = "flash_attention_2" if has_flash else "sdpa"
    figures = figures_of(trl_arm(task, options, attention=attention, is_lora=is_lora))
    return {**figures, "attention": attention, "liger": options["use_liger_kernel"]}


def trl_defaults(bench: Bench, shape: str) -> dict[str, Any]:
    """SFTTrainer with its defaults for all that changes what a step computes."""
    needs("trl", "datasets", "pyarrow", "pandas")
    return figures_of(trl_arm(bench.task(shape), {}))


@dataclass
class Marks:
    """When each step ended, on the device's own clock where it has one."""

    steps: list[int] = field(default_factory=list)
    marks: list[Any] = field(default_factory=list)

    def on_event(self, event: Any) -> None:
        """Note the end of a step; it comes before the preview of that step."""
        if type(event).__name__ == "StepDone":
            self.steps.append(event.step)
            self.marks.append(mark())

    def close(self) -> None:
        """Nothing to give back."""

    def stall(self, every_steps: int, warm_steps: int) -> dict[str, Any]:
        """Milliseconds from step to step, where a preview came between, and where none did."""
        wait_for_device()
        gaps: dict[bool, list[float]] = {True: [], False: []}
        for before, after, step in zip(self.marks, self.marks[1:], self.steps, strict=False):
            if step > warm_steps:
                gaps[step % every_steps == 0].append(between_ms(before, after))
        asked, other = (statistics.median(gaps[kind]) for kind in (True, False))
        return {
            "step_ms": round(other, 2),
            "step_with_preview_ms": round(asked, 2),
            "stall_ms": round(asked - other, 2),
            "stall_pct_of_step_time": round(100 * (asked - other) / (every_steps * other), 2),
        }


def mark() -> Any:
    """A point in time: a CUDA event, or the host's clock."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def between_ms(before: Any, after: Any) -> float:
    """Milliseconds between two marks."""
    if isinstance(before, float):
        return 1000 * float(after - before)
    return float(before.elapsed_time(after))


def stall(bench: Bench, sidecar: str) -> dict[str, Any]:
    """What previews from a sidecar cost training: on this GPU, or on the CPU."""
    needs("fastapi", "uvicorn", "httptools", "prometheus_client")
    sizes, marks, summary = bench.sizes, Marks(), dict[str, Any]()
    trainer_arm(
        bench.task("0.6B"),
        precision="bf16",
        batching="packed",
        monitoring={
            "preview_backend": "sidecar",
            "sidecar_device": "cpu" if bench.is_rehearsal else sidecar,
            "inference_interval": sizes.every_steps,
            "num_eval_samples": 2,
            "preview_max_tokens": sizes.new_tokens // 2,
            "preview_drain_timeout": 20,
        },
        observers=[marks],
        found=summary,
    )
    counts = summary["previews"]
    told = ("asked", "verified", "superseded", "failed", "last_error", "visible_s_median")
    return {
        **marks.stall(sizes.every_steps, sizes.warm_steps),
        "host_stall_ms": counts["stall_ms_median"],
        **{name: counts[name] for name in told},
    }


def snapshot(bench: Bench) -> dict[str, Any]:
    """A copy of all weights into pinned shared memory, beside the next step."""
    from transformers import AutoModelForCausalLM

    from trainer.publish.identity import canonical_tensors
    from trainer.publish.snapshot import SHARED_MEMORY, Snapshotter, arena_folder

    device, sizes = bench.device, bench.sizes
    model = AutoModelForCausalLM.from_pretrained(bench.model("0.6B"), dtype=torch.float32)
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    snapshots = Snapshotter(canonical_tensors(model), torch.bfloat16, device)
    snapshots.guard(optimizer)
    ids = torch.randint(0, 300, (sizes.packs["0.6B"], sizes.max_length // 4), device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    held, plain, beside = [], [], []
    folder = arena_folder(snapshots.layout.size, bench.work)
    try:
        arena = snapshots.arena(folder / "arena")
        for _ in range(sizes.warm_steps):
            step()
        for _ in range(sizes.steps // 2):
            before = mark()
            step()
            middle = mark()
            wait_for_device()
            started = time.perf_counter()
            last = mark()
            wait = snapshots.copy(arena)
            held.append(1000 * (time.perf_counter() - started))
            step()
            after = mark()
            wait()
            wait_for_device()
            plain.append(between_ms(before, middle))
            beside.append(between_ms(last, after))
        arena.close()
    finally:
        shutil.rmtree(folder)
    return {
        "in_shared_memory": folder.parent == SHARED_MEMORY,
        "mib": round(snapshots.layout.size / 2**20, 1),
        "host_held_ms": round(statistics.median(held), 2),
        "step_ms": round(statistics.median(plain), 2),
        "step_with_copy_ms": round(statistics.median(beside), 2),
    }


def generation(bench: Bench) -> dict[str, Any]:
    """Tokens per second of one `generate` call over more and more prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer.preview.generate import GenerationSettings, generate

    folder, sizes = bench.model("0.6B"), bench.sizes
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to(bench.device).eval()
    settings = GenerationSettings(sizes.new_tokens, temperature=0.7, seed=0)
    lines = bench.rows().read_text(encoding="utf-8").splitlines()
    found = {}
    for count in sizes.num_prompts:
        prompts = [tokenizer(json.loads(line)["question"])["input_ids"] for line in lines[:count]]
        with torch.inference_mode():
            generate(model, tokenizer, prompts, settings)
            wait_for_device()
            started = time.perf_counter()
            made = generate(model, tokenizer, prompts, settings)
            seconds = time.perf_counter() - started
        found[f"batch of {count}"] = round(sum(len(one.raw_ids) for one in made) / seconds, 1)
    return {"new_tokens_per_s": found}


STAGES: dict[str, tuple[Callable[[Bench], dict[str, Any]], float]] = {
    "gpu tests": (gpu_tests, 150),
    "0.6B full, trainer packed": (partial(ours, shape="0.6B", training_mode="full"), 90),
    "0.6B full, TRL at its best": (partial(trl_best, shape="0.6B", is_lora=False), 90),
    "0.6B full, TRL at its defaults": (partial(trl_defaults, shape="0.6B"), 90),
    "0.6B LoRA, trainer packed": (partial(ours, shape="0.6B", training_mode="lora"), 60),
    "0.6B LoRA, TRL at its best": (partial(trl_best, shape="0.6B", is_lora=True), 60),
    "snapshot": (snapshot, 60),
    "stall, sidecar on the same GPU": (partial(stall, sidecar="cuda"), 100),
    "stall, sidecar on the CPU": (partial(stall, sidecar="cpu"), 100),
    "0.6B QLoRA, trainer packed": (partial(ours, shape="0.6B", training_mode="qlora"), 60),
    "1.7B full, trainer packed": (partial(ours, shape="1.7B", training_mode="full"), 90),
    "1.7B LoRA, trainer packed": (partial(ours, shape="1.7B", training_mode="lora"), 60),
    "1.7B QLoRA, trainer packed": (partial(ours, shape="1.7B", training_mode="qlora"), 60),
    "generation": (generation, 60),
}
"""In order of worth, with the seconds that each may take."""

ALIKE = (
    *("0.6B full, TRL at its best", "0.6B LoRA, trainer packed", "stall, sidecar on the CPU"),
    *(name for name in STAGES if name.startswith("1.7B")),
)
"""Stages that are others with other values: a rehearsal leaves them out."""


def main() -> int:
    """Run one stage and write what it found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("stage", choices=["machine", *STAGES])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    words = parser.parse_args()
    bench = Bench(
        words.work, REHEARSAL if words.rehearse else FULL, words.rehearse, data=words.data
    )
    run = machine if words.stage == "machine" else STAGES[words.stage][0]
    try:
        found: dict[str, Any] = {"figures": run(bench)}
    except SkippedError as why:
        found = {"skipped": str(why)}
    words.out.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
