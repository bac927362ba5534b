"""A launcher of runs in one or more gloo processes, forked so that nothing is imported twice.

Each line on stdin is one launch, the JSON of `launch`'s arguments; its exit codes come back as one
line. FOLDER/rank-N.json holds what rank N has to say, FOLDER/rank-N.txt what it printed.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.ranks import variables

PATIENCE_S = 10.0
"""Of ranks whose neighbour was killed, until the launcher kills them."""


def launch(
    config: dict[str, Any],
    folder: str,
    world: int = 1,
    die: list[int] | None = None,
    full: list[int] | None = None,
    apart: bool = False,
    blind: str = "",
) -> list[int]:
    """Run a config.

    Args:
        config: sections of options; those of `create_default_config` in section `top`.
        folder: of the ranks' files.
        die: [rank, step, n]: killed at its n-th file operation of that step's checkpoint.
        full: likewise, but the disk is full there.
        apart: rank 1 is in another folder, so that a relative --output is another one.
        blind: name of a function of SupervisedTrainer that does nothing.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pids: dict[int, int] = {}
    for rank in range(world):
        pid = os.fork()
        if not pid:
            be_rank(rank, world, port, locals())
        pids[pid] = rank
    codes: dict[int, int] = {}
    end = None
    while len(codes) < world:
        for pid, rank in pids.items():
            if rank not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        if die and end is None and any(code < 0 for code in codes.values()):
            end = time.monotonic() + PATIENCE_S
        if end is not None and time.monotonic() > end:
            for pid, rank in pids.items():
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
            end = time.monotonic() + PATIENCE_S
        time.sleep(0.02)
    return [codes[rank] for rank in range(world)]


def be_rank(rank: int, world: int, port: int, given: dict[str, Any]) -> None:
    folder, code = Path(given["folder"]), 70
    try:
        text = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(text, 1)
        os.dup2(text, 2)
        if world > 1:
            os.environ.update(variables(rank, world, port))
        if given["apart"]:
            shared_files.SIGHT_S = 0.5
            here = folder / f"machine-{rank}"
            here.mkdir()
            os.chdir(here)
        found = run(rank, folder, given)
        (folder / f"rank-{rank}.json").write_text(json.dumps(found))
        code = found["exit_code"]
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(rank: int, folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The run on one rank, and what it found."""
    found: dict[str, Any] = {}
    spoil(rank, given)
    note_states(folder, found)
    if given["blind"]:
        setattr(SupervisedTrainer, given["blind"], lambda *_, **__: None)
    sections = dict(given["config"])
    result = TrainerEngine().run_job(create_default_config(**sections.pop("top"), **sections))
    return {
        **found,
        "success": result.success,
        "error": result.error_message,
        "exit_code": result.exit_code,
        "step": result.global_step,
        "val_loss": result.val_loss,
    }


def spoil(rank: int, given: dict[str, Any]) -> None:
    """Be killed, or find the disk full, at one operation of one save."""
    sharded_checkpoint.FILE_BYTES = 8192  # several files of each kind
    for kind in ("die", "full"):
        if given[kind] and given[kind][0] == rank:
            files.before_operation = spoiler(kind, *given[kind][1:])


def spoiler(kind: str, step: int, number: int) -> Callable[[str, Path], None]:
    seen = 0

    def act(operation: str, path: Path) -> None:
        nonlocal seen
        if f"step-{step:08d}" not in str(path):
            return
        seen += 1
        if seen == number and kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if seen >= number and kind == "full" and operation in ("create", "write", "mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return act


def note_states(folder: Path, found: dict[str, Any]) -> None:
    """Keep the gathered state at each save and right after loading, and what the model is."""
    save, load = SupervisedTrainer._save_checkpoint, SupervisedTrainer._prepare_for_training

    def noting_save(self: Any, model: Any, trial: Any) -> None:
        keep(self, folder / f"saved-{self.state.global_step}.pt")
        save(self, model, trial)

    def noting_load(self: Any, max_steps: int, dataloader: Any, resume: Any) -> Any:
        result = load(self, max_steps, dataloader, resume)
        found["is_fsdp2"] = bool(getattr(self.accelerator, "is_fsdp2", False))
        found["processes"] = self.accelerator.num_processes
        if resume is not None:
            keep(self, folder / "loaded.pt")
        return result

    SupervisedTrainer._save_checkpoint = noting_save  # type: ignore[method-assign]
    SupervisedTrainer._prepare_for_training = noting_load  # type: ignore[method-assign]


def keep(trainer: Any, path: Path) -> None:
    """Write what is trained and the optimizer's state, whole, by name."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = {}
    for names, tensor in gathered(model, is_wanted=lambda one: one.requires_grad):
        state |= dict.fromkeys(names, tensor.clone())
    known = sharded_checkpoint.names_of_parameters(model)
    for group in trainer.optimizer.param_groups:
        for one in group["params"]:
            for key, value in trainer.optimizer.state.get(one, {}).items():
                if not isinstance(value, torch.Tensor):  # steps, of an 8-bit optimizer
                    continue
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                state[f"{known[id(one)]}:{key}"] = whole.clone()
    if trainer.args.process_index == 0:
        torch.save(state, path)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    from torch.distributed.tensor import DTensor

    from trainer import files
    from trainer.config import create_default_config
    from trainer.core import TrainerEngine, sharded_checkpoint, shared_files
    from trainer.core.hf_trainer import SupervisedTrainer
    from trainer.core.sharding import gathered

    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(launch(**json.loads(line))), flush=True)
