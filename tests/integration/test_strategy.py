"""Which strategy a run takes, and why; what is refused; what it writes about it. Real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.forked_runs import Case, Ended, run_cases

pytestmark = pytest.mark.slow

SMALL, LARGE = 2**20, 2**40
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
RANK = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TWO = {"WORLD_SIZE": "2", **RANK}
"""As the main one of two processes finds them; what is refused is refused before the other is
asked."""

REFUSED: dict[str, tuple[dict[str, str], list[str], str]] = {
    # case: variables, flags, words of the message
    "deepspeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "DeepSpeed"),
    "megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, [], "Megatron"),
    "parallelism": ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, [], "parallelism config"),
    "ddp": (FSDP, ["--distributed.strategy", "ddp"], "distributed.strategy=ddp, but"),
    "version": ({**FSDP, "FSDP_VERSION": "1"}, [], "FSDP_VERSION=1, and this run works with 2"),
    "state": (
        {**FSDP, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
        [],
        "works with SHARDED_STATE_DICT",
    ),
    "wrap": ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, [], "TRANSFORMER_BASED_WRAP"),
    "reshard": (
        {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"},
        [],
        "or set distributed.reshard_after_forward",
    ),
    "offload": ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, [], "or set distributed.cpu_offload"),
    "checkpointing": (
        {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
        [],
        "or set hyperparams.gradient_checkpointing",
    ),
    "dynamo": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, [], "or set hyperparams.compile"),
    "precision": ({"ACCELERATE_MIXED_PRECISION": "bf16"}, [], "or set hyperparams.fp_precision"),
    "a number alone": (
        {"WORLD_SIZE": "2"},
        [],
        "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not",
    ),
    "mpi": ({"OMPI_COMM_WORLD_SIZE": "2"}, [], "started by MPI"),
    "cpu flag": (
        {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"},
        [],
        "was asked for several processes and starts one",
    ),
    "alone": ({}, ["--distributed.strategy", "fsdp2"], "this run has one"),
    "offload on a CPU": ({}, ["--distributed.cpu_offload", "true"], "this run computes on the CPU"),
    "muon": ({**FSDP, **TWO}, ["--hyperparams.optimizer", "muon"], "works on whole matrices"),
    "masters": (
        {**FSDP, **TWO, "ACCELERATE_MIXED_PRECISION": "bf16"},
        ["--hyperparams.masters", "bf16_stochastic", "--bf16"],
        "is for whole weights",
    ),
    "compile": ({**FSDP, **TWO}, ["--hyperparams.compile", "blocks"], "not proved on shards"),
    "qlora": (
        {**FSDP, **TWO},
        ["--hyperparams.training_mode", "qlora"],
        "a base of 4-bit weights cannot be shared out",
    ),
    "batch": (
        {**FSDP, **TWO},
        ["--hyperparams.auto_batch_size", "true"],
        "tries batches on a whole model",
    ),
}


def words(rows: Path, output: Path, *more: str) -> list[str]:
    """A short run without previews, on the CPU."""
    given = set(more)
    return [
        *("train", "--dataset", str(rows), "--model", "tiny", "--output", str(output)),
        *("--environment.device", "cpu", "--max-steps", "2", "--batch-size", "2"),
        *("--monitoring.inference_interval", "0", "--monitoring.micro_eval_interval", "0"),
        *("--output.checkpoint_interval", "0"),
        *([] if "--json" in given else ["--monitoring.display", "plain"]),
        *([] if "--bf16" in given else ["--fp32"]),
        *more,
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"question": f"what is {n} plus {n}?", "answer": f"{2 * n}"} for n in range(40)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


Runs = tuple[Path, dict[str, Ended]]


@pytest.fixture(scope="module")
def runs(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every refusal, and what needs two processes; all in one start, which takes long."""
    folder = tmp_path_factory.mktemp("runs")

    def case(name: str, *more: str, **options: Any) -> Case:
        return Case(words(rows, folder / name / "out", *more), **options)

    cases = {
        name: case(name, *more, env=variables) for name, (variables, more, _) in REFUSED.items()
    }
    cases |= {
        "roomy": case("roomy", "--dry-run", "--json", world=2, rooms=[LARGE, LARGE]),
        "uneven": case("uneven", world=2, rooms=[LARGE, SMALL]),
        "small, muon": case(
            "small, muon", "--hyperparams.optimizer", "muon", world=2, rooms=[SMALL, SMALL]
        ),
        "dry": case("dry", "--dry-run", "--json", world=2, rooms=[SMALL, SMALL]),
    }
    return folder, run_cases(folder, cases)


@pytest.fixture(scope="module")
def more_runs(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("more")
    lora = ("--hyperparams.training_mode", "lora")
    cache = ("--data.cache_dir", str(folder / "cache"))
    cases = {
        "small": Case(words(rows, folder / "small/out"), world=2, rooms=[SMALL, SMALL]),
        "four": Case(words(rows, folder / "four/out", *lora, *cache), world=4, rooms=[LARGE] * 4),
    }
    return folder, run_cases(folder, cases)


def record(runs: Runs, name: str) -> Any:
    """The part `processes` of run.json."""
    return json.loads((runs[0] / name / "out" / "run.json").read_text())["processes"]


def dry_run(runs: Runs, name: str) -> Any:
    """What a dry run of two processes found; one of them makes it."""
    ended = runs[1][name]
    assert ended.codes == [0, 0], ended.texts
    assert ended.texts[1] == ""
    return json.loads(ended.texts[0].splitlines()[-1])


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_possible_is_refused_in_one_line_and_nothing_is_written(
    runs: Runs, case: str
) -> None:
    folder, ended = runs
    assert ended[case].codes == [2]
    [told] = [line for line in ended[case].texts[0].splitlines() if line.startswith("error:")]
    assert REFUSED[case][2] in told
    assert not (folder / case / "out").exists()


def test_auto_takes_whole_copies_where_the_memory_card_has_room(runs: Runs) -> None:
    found = dry_run(runs, "roomy")["processes"]
    assert (found["strategy"], found["world_size"]) == ("ddp", 2)
    assert "of the 1024.0 GiB per process, so each of 2 processes has one" in found["reason"]


@pytest.mark.long
def test_auto_shares_the_weights_out_where_it_has_not(more_runs: Runs) -> None:
    assert more_runs[1]["small"].codes == [0, 0], more_runs[1]["small"].texts
    found = record(more_runs, "small")
    assert (found["strategy"], found["world_size"]) == ("fsdp2", 2)
    assert found["mesh"] == "fsdp 2 (cpu)"
    assert "of the 1 MiB per process, so the weights are shared out among 2" in found["reason"]
    assert "each, which is too much as well" in found["reason"]


def test_processes_that_see_different_rooms_take_one_strategy(runs: Runs) -> None:
    assert runs[1]["uneven"].codes == [0, 0], runs[1]["uneven"].texts
    found = record(runs, "uneven")
    assert (found["strategy"], found["mesh"]) == ("fsdp2", "fsdp 2 (cpu)")
    assert "and another process has less" in found["reason"]
    assert f"strategy: fsdp2 ({found['reason']})" in runs[1]["uneven"].texts[0]


def test_auto_refuses_what_fits_neither_whole_nor_in_shards(runs: Runs) -> None:
    ended = runs[1]["small, muon"]
    assert ended.codes == [2, 2]
    [told] = [line for line in ended.texts[0].splitlines() if line.startswith("error:")]
    assert "so the weights must be shared out (FSDP2), but hyperparams.optimizer=muon" in told
    assert told.endswith("distributed.strategy=ddp tries whole copies anyway.")


def test_a_dry_run_counts_what_each_of_its_processes_needs(runs: Runs) -> None:
    found, whole = dry_run(runs, "dry"), dry_run(runs, "roomy")
    assert found["processes"]["strategy"] == "fsdp2"
    assert set(found["shards"]) == {"2", "4", "8"}
    assert found["memory"]["total"] == found["shards"]["2"] < whole["memory"]["total"]
    assert found["shards"] == whole["shards"]


@pytest.mark.long
def test_four_processes_fill_an_empty_cache_and_save_the_base_once(more_runs: Runs) -> None:
    folder, ended = more_runs
    assert ended["four"].codes == [0] * 4, ended["four"].texts
    [entry] = (folder / "cache").iterdir()
    assert entry.suffix == ".cache"
    adapter = json.loads((folder / "four/out/final_model/adapter_config.json").read_text())
    assert Path(adapter["base_model_name_or_path"]).is_dir()
    assert record(more_runs, "four")["world_size"] == 4


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from trainer.errors import ConfigError
    from trainer.models.devices import own_device

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=r"4 processes were started .* has 2 GPUs.*start 2"):
        own_device(torch.device("cuda"), "auto")
