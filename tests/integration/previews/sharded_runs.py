"""Real runs on two shards (gloo) with their previews, in processes forked from this one.

`sharded_runs.py FOLDER SETUP` writes FOLDER/rank-N.json; what it must hold is in
test_sharded_previews.py. SETUP is JSON: model, rows, port of a preview server.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from benchmarks.ranks import run_ranks
from tests.trust.two_processes import patched
from trainer.config import create_default_config
from trainer.core import TrainerEngine, hf_trainer
from trainer.core.run import is_main_process
from trainer.preview.scheduler import PreviewScheduler
from trainer.publish import lane, shards

WORLD = 2
STEPS = 4


def config_of(folder: Path, setup: dict[str, Any], name: str, **sections: Any) -> Any:
    hyper = {
        "max_steps": STEPS,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "fp_precision": "fp32",
        **sections.pop("hyperparams", {}),
    }
    monitoring = {
        "inference_interval": 2,
        "num_eval_samples": 2,
        "preview_max_tokens": 4,
        "preview_temperature": 0.0,
        "preview_drain_timeout": 120,
        "micro_eval_interval": 0,
        "report_to": (),
        "display": "quiet",
        **sections.pop("monitoring", {}),
    }
    return create_default_config(
        model_path=setup["model"],
        dataset_path=setup["rows"],
        output_dir=str(folder / name),
        hyperparams=hyper,
        monitoring=monitoring,
        data={"validation_split": 0.2},
        environment={"device": "cpu", "num_threads": 1},
        output={"checkpoint_interval": 0},
        **{"distributed": {"strategy": "fsdp2"}, **sections},
    )


def remote(setup: dict[str, Any], **more: Any) -> dict[str, Any]:
    where = {"remote_3090_host": "127.0.0.1", "remote_3090_port": setup["port"]}
    return {"preview_backend": "remote_3090", **where, **more}


def patient() -> Any:
    """The main process waits for each preview, so that all are shown; the others wait for it."""
    ask = PreviewScheduler.ask

    def ask_and_wait(self: PreviewScheduler, step: int, **options: Any) -> None:
        ask(self, step, **options)
        while self.lane.pending():
            self.lane.wait(0.1)

    return patched(PreviewScheduler, "ask", ask_and_wait)


def run(config: Any) -> dict[str, Any]:
    """One run by all processes."""
    result = TrainerEngine().run_job(config)
    counts, message = result.summary["previews"], result.error_message
    return {"exit_code": result.exit_code, "error": message, "previews": counts}


def noting_shards(found: list[bool]) -> Any:
    """Each trainer says whether it is sharded, once it trains."""
    train = hf_trainer.SupervisedTrainer.train

    def noting(self: Any, *args: Any, **named: Any) -> Any:
        found.append(bool(self.accelerator.is_fsdp2))
        return train(self, *args, **named)

    return patched(hf_trainer.SupervisedTrainer, "train", noting)


def kill_helpers_before(when: int) -> Any:
    """The sidecar and the publisher of this process end just before the preview of a step."""
    ask = PreviewScheduler.ask

    def ask_after(self: PreviewScheduler, step: int, **options: Any) -> None:
        if step == when:
            for one in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    words = one.cmdline()
                    if "--wait-for-weights" in words or "trainer.publish.publisher" in words:
                        one.kill()
        ask(self, step, **options)

    return patched(PreviewScheduler, "ask", ask_after)


def wrong_copy() -> Any:
    """The main process copies one of the tensors as it was at step 0."""
    gathered = shards.ShardSnapshotter._gathered
    kept: dict[str, torch.Tensor] = {}

    def stale(self: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, whole in gathered(self):
            if name.endswith("layers.1.mlp.down_proj.weight"):
                kept.setdefault(name, whole.clone())
                whole = kept[name]
            yield name, whole

    return patched(shards.ShardSnapshotter, "_gathered", stale)


def failing_copies() -> Any:
    """The copy of step 0 fails on the main process, that of step 2 on the other one."""
    part, count = shards.ShardSnapshotter.take_part, [0]

    class Full(dict):  # type: ignore[type-arg]
        def __getitem__(self, name: str) -> Any:
            raise OSError("no space left")

    def copying(self: Any, number: int) -> Any:
        count[0] += 1
        if count[0] != dist.get_rank() + 1:
            return part(self, number)
        with patched(self.arenas[number], "views", Full()):
            return part(self, number)

    return patched(shards.ShardSnapshotter, "take_part", copying)


def late_ask() -> Any:
    """The last step finds no slot: it is copied in the drain, for which the others must stay."""
    slot_for, seen = lane.PublishedPreviews._slot_for, [0]

    def none_at_first(self: Any, step: int, **options: Any) -> int | None:
        if step == STEPS and not seen[0]:
            seen[0] = 1
            self._state.last_wanted = step
            return None
        return slot_for(self, step, **options)

    return patched(lane.PublishedPreviews, "_slot_for", none_at_first)


def cases(folder: Path, setup: dict[str, Any]) -> dict[str, Any]:
    def config(name: str, **sections: Any) -> Any:
        return config_of(folder, setup, name, **sections)

    found: dict[str, Any] = {}
    off = {"inference_interval": 0}
    found["off"] = run(config("off", monitoring=off))
    with late_ask():
        options = {"hyperparams": {"fp_precision": "bf16"}}
        found["bf16"] = run(
            config("bf16", monitoring=remote(setup, inference_interval=STEPS), **options)
        )
    with patient():
        found["http"] = run(config("http", monitoring=remote(setup, final_eval_prompts=3)))
        with failing_copies():
            found["failing"] = run(config("failing", monitoring=remote(setup)))
        with wrong_copy():
            found["wrong"] = run(config("wrong", monitoring=remote(setup)))
        lora = {"training_mode": "lora", "fp_precision": "bf16"}
        found["lora"] = run(config("lora", monitoring=remote(setup), hyperparams=lora))
        with kill_helpers_before(2):
            found["killed"] = run(config("killed"))
    explicit = {"preview_backend": "local"}
    found["local"] = run(config("local", monitoring=explicit))
    return found


def work(rank: int, folder: Path, setup: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    is_sharded: list[bool] = []
    with noting_shards(is_sharded):
        found = cases(folder, setup)
    assert is_main_process() == (rank == 0)
    found["is_sharded"] = is_sharded
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    return 0


if __name__ == "__main__":
    target, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    codes = run_ranks(
        WORLD,
        lambda rank: work(rank, target, given),
        lambda rank: target / f"rank-{rank}.txt",
        timeout_s=280,
    )
    for number in range(WORLD):
        print((target / f"rank-{number}.txt").read_text(), file=sys.stderr)
    sys.exit(any(codes))
