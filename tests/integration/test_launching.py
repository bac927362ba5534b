"""Runs of several processes as users start them: torchrun, two machines, accelerate launch.

Each asserts the number of processes and, where weights are shared out, the mesh that they lie on:
accelerate takes whole copies on a CPU, without a word, where it is not told otherwise.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.forked_runs import ROOT, other_paths

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TIMEOUT_S = 200
FSDP_YAML = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_reshard_after_forward: true
  fsdp_offload_params: false
  fsdp_activation_checkpointing: false
  fsdp_cpu_ram_efficient_loading: false
"""


def words(rows: Path, output: Path, *more: str) -> list[str]:
    """A short run without previews, on the CPU."""
    return [
        *("--dataset", str(rows), "--model", "tiny", "--output", str(output)),
        *("--environment.device", "cpu", "--max-steps", "2", "--batch-size", "2", "--fp32"),
        *("--monitoring.inference_interval", "0", "--monitoring.micro_eval_interval", "0"),
        *("--output.checkpoint_interval", "0", "--monitoring.display", "plain"),
        *more,
    ]


def started(command: list[str], folder: Path, **env: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    paths = os.pathsep.join([str(ROOT), *other_paths()])
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    """What it printed, once it has come to a good end."""
    try:
        text, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # a launcher ends its processes then
        text, _ = process.communicate(timeout=60)
        pytest.fail(f"hung: {text}")
    assert process.returncode == 0, text
    return text


def record(run: Path) -> Any:
    return json.loads((run / "run.json").read_text())["processes"]


def check_sharded(run: Path) -> None:
    found = record(run)
    assert (found["strategy"], found["world_size"]) == ("fsdp2", 2)
    assert found["mesh"] == "fsdp 2 (cpu)"
    assert (run / "final_model" / "model.safetensors").is_file()


def test_torchrun_starts_the_script_on_shards(qa_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = [str(ROOT / "core/train.py"), *words(qa_file, run, "--distributed.strategy", "fsdp2")]
    launch = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", *script]
    text = ended(started(launch, tmp_path / "here"))
    check_sharded(run)
    assert "strategy: fsdp2 (2 processes with a shard each, by distributed.strategy)" in text


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [one["train_loss"] for line in lines if "train_loss" in (one := json.loads(line))]


@pytest.mark.long
def test_two_processes_train_adapters_on_a_quantized_base_as_one_does(
    qa_file: Path, tmp_path: Path
) -> None:
    """Each quantizes the built-in model, which is in no folder, for itself."""
    pytest.importorskip("bitsandbytes")
    qlora = ("--hyperparams.training_mode", "qlora")
    two = [*words(qa_file, tmp_path / "two", *qlora)]
    launch = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "-m", "trainer", "train", *two]
    ended(started(launch, tmp_path / "here"))
    assert record(tmp_path / "two")["world_size"] == 2
    one = [*words(qa_file, tmp_path / "one", *qlora)]
    one[one.index("--batch-size") + 1] = "4"
    ended(started([sys.executable, "-m", "trainer", "train", *one], tmp_path / "here"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.long
def test_four_shards_show_what_one_process_shows(tmp_path: Path) -> None:
    """Sidecar previews with scores and the canary, evaluation, and a last step that is ragged."""
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"question": f"what is {n} plus {n}?", "answer": f"{n}+{n}={2 * n}"} for n in range(38)
    ]
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    usual = ["--dataset", str(rows), "--model", "tiny", "--fp32", "--environment.device", "cpu"]
    usual += ["--monitoring.inference_interval", "2", "--monitoring.micro_eval_interval", "2"]
    usual += ["--monitoring.scores", "number", "--monitoring.scores", "f1"]
    usual += ["--monitoring.canary_set", "general", "--monitoring.preview_max_tokens", "8"]
    usual += ["--monitoring.num_score_prompts", "2", "--monitoring.display", "plain"]
    usual += ["--data.validation_split", "0.3", "--monitoring.preview_backend", "sidecar"]
    usual += ["--monitoring.preview_drain_timeout", "120", "--monitoring.preview_temperature", "0"]
    start = ["-m", "trainer", "train", *usual, "--output"]
    four = [str(tmp_path / "four"), "--batch-size", "2", "--distributed.strategy", "fsdp2"]
    one = [str(tmp_path / "one"), "--batch-size", "8"]
    launch = [*TORCHRUN, "--standalone", "--nproc_per_node", "4", *start, *four]
    text = ended(started(launch, tmp_path / "here"))
    plain = ended(started([sys.executable, *start, *one], tmp_path / "here"))
    assert record(tmp_path / "four")["mesh"] == "fsdp 4 (cpu)"
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), abs=2e-6)
    card = json.loads((tmp_path / "four" / "run.json").read_text())["data_card"]
    assert card["num_train_rows"] % 8, "the last step is ragged"
    last = json.loads((tmp_path / "four" / "status.json").read_text())["step"]
    for said in (f"scores at step {last}, 2 evaluation prompts", f"drift at step {last}:"):
        assert said in text
        assert said in plain
    assert "rank" not in text.replace("strategy:", "")
    shown = [last_previews(tmp_path / name) for name in ("four", "one")]
    assert len(shown[0]) == 4
    assert [one["weights"] for one in shown[0]] == ["verified"] * 4
    assert [one["text"] for one in shown[0]] == [one["text"] for one in shown[1]]
    assert [one["scores"] for one in shown[0]] == [one["scores"] for one in shown[1]]


def last_previews(run: Path) -> list[dict[str, Any]]:
    """Of the last step that has answers, in order of the prompts."""
    found = [json.loads(line) for line in (run / "previews.jsonl").read_text().splitlines()]
    answered = [one for one in found if one["error_message"] is None]
    last = max(one["step"] for one in answered)
    return sorted((one for one in answered if one["step"] == last), key=lambda o: o["prompt_id"])


def test_two_machines_meet_and_only_the_main_process_writes(qa_file: Path, tmp_path: Path) -> None:
    """Two agents on loopback, each with a folder, a cache and a run folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    meet = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
    meet += ["--rdzv_endpoint", endpoint, "--rdzv_id", "one", "--local_addr", "127.0.0.1"]
    machines = [tmp_path / "first", tmp_path / "second"]
    more = ["--distributed.strategy", "ddp"]
    processes = [
        started(
            [*TORCHRUN, *meet, "-m", "trainer", "train", *words(qa_file, one / "run", *more)],
            one,
            ULTIMATE_TRAINER_CACHE=str(one / "cache"),
        )
        for one in machines
    ]
    for process in processes:
        ended(process)
    [main] = [one for one in machines if (one / "run").exists()]
    found = record(main / "run")
    assert (found["strategy"], found["world_size"], found["mesh"]) == ("ddp", 2, None)
    assert all(len(list((one / "cache").glob("*.cache"))) == 1 for one in machines)


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "check"),
    [
        ([], lambda run: record(run)["strategy"] == "ddp"),
        (["--config_file", "fsdp.yaml"], lambda run: check_sharded(run) is None),
        (
            ["--use_fsdp", "--fsdp_version", "2", "--fsdp_reshard_after_forward", "true"],
            lambda run: check_sharded(run) is None,
        ),
    ],
    ids=["ddp", "fsdp by a file", "fsdp by flags"],
)
def test_accelerate_launch_starts_two_processes(
    qa_file: Path, tmp_path: Path, options: list[str], check: Callable[[Path], bool]
) -> None:
    here, run = tmp_path / "here", tmp_path / "run"
    here.mkdir()
    (here / "fsdp.yaml").write_text(FSDP_YAML)
    # `--multi_gpu` and this variable: `--cpu` would start one process, without a word.
    number = [] if "--config_file" in options else ["--multi_gpu", "--num_processes", "2"]
    if "--use_fsdp" in options:
        number = number[1:]
    script = [str(ROOT / "core/train.py"), *words(qa_file, run)]
    launch = [*ACCELERATE, *number, "--main_process_port", "0", *options, *script]
    text = ended(started(launch, here, ACCELERATE_USE_CPU="true", HF_HOME=str(here)))
    assert record(run)["world_size"] == 2, text
    assert check(run)


@pytest.mark.long
def test_accelerate_launch_for_cpus_that_starts_one_process_is_told(
    qa_file: Path, tmp_path: Path
) -> None:
    here, run = tmp_path / "here", tmp_path / "run"
    script = [str(ROOT / "core/train.py"), *words(qa_file, run)]
    launch = [*ACCELERATE, "--cpu", "--num_processes", "2", *script]
    process = started(launch, here, HF_HOME=str(here))
    text, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    assert "was asked for several processes and starts one" in text
    assert not run.exists()
