"""Checkpoints of runs in several processes: saved by all, read by any number, whole or not there.

Every run of shards is asserted to be one: accelerate falls back to DDP on a CPU without a word.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.runs_of_shards import (
    SAVED,
    STEPS,
    STRATEGY,
    Runs,
    check_close,
    config_of,
    figures,
    trained,
)
from trainer.core.checkpoint import find_checkpoint, find_latest_checkpoint, verify_checkpoint
from trainer.core.finished import open_run
from trainer.errors import EXIT_FAILED, EXIT_USER_INPUT
from trainer.files import checkpoint_steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("ranks"), tokenizer)
    yield made
    made.close()


def check_equal(one: Path, other: Path) -> None:
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    assert a.keys() == b.keys()
    assert len(a) > 20
    assert [name for name in a if not torch.equal(a[name].float(), b[name].float())] == []


def resumed(runs: Runs, source: Path, world: int, strategy: str, kind: str, **more: Any) -> Path:
    """What the ranks say of a run that went on from a copy, in `run` of that folder."""
    damaged = bool(more.pop("damaged", False))
    out = runs.half(source, damaged=damaged)
    config = runs.config(out, world, strategy, kind)
    config["output"]["resume"] = "latest"
    said = runs.ended(config, world, **more)
    (said / "run").symlink_to(out)
    return said


SHORT = [(2, 1, "full"), (1, 2, "full"), (2, 1, "lora"), (1, 1, "full moe")]
LONG = [
    *((a, b, kind) for a, b in ((2, 4), (4, 1), (4, 2)) for kind in ("full", "lora")),
    *((a, b, "full untied") for a, b in ((2, 2), (2, 4), (4, 1), (1, 2))),
    *((a, b, "full moe") for a, b in ((1, 2), (2, 1), (2, 4))),
    (1, 2, "lora"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [*SHORT, *(pytest.param(*one, marks=pytest.mark.long) for one in LONG)],
)
def test_any_number_of_processes_goes_on_from_the_same_state(
    runs: Runs, before: int, after: int, kind: str
) -> None:
    source = runs.straight(before, STRATEGY[before], kind)
    said = resumed(runs, source, after, STRATEGY[after], kind)
    check_equal(source / f"saved-{SAVED}.pt", said / "loaded.pt")
    wanted, found = figures(source / "run"), figures(said / "run")
    assert found == pytest.approx(wanted, abs=1e-6)
    changes = json.loads((said / "run" / "run.json").read_text())["changed_since_checkpoint"]
    assert any(f"processes: {before} -> {after}" in one for one in changes) == (before != after)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("strategies", [("ddp", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "ddp")])
def test_the_strategy_may_change_at_a_resume(
    runs: Runs, strategies: tuple[str, str], kind: str
) -> None:
    source = runs.straight(2, strategies[0], kind)
    said = resumed(runs, source, 2, strategies[1], kind)
    check_equal(source / f"saved-{SAVED}.pt", said / "loaded.pt")
    assert figures(said / "run") == pytest.approx(figures(source / "run"), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["full", *(pytest.param(k, marks=pytest.mark.long) for k in ("full untied", "lora"))]
)
def test_as_many_processes_go_on_bit_for_bit_from_the_newest_whole_checkpoint(
    runs: Runs, kind: str
) -> None:
    source = runs.straight(2, "fsdp2", kind)
    said = resumed(runs, source, 2, "fsdp2", kind, damaged=kind != "lora")
    assert json.loads((said / "run" / "run.json").read_text())["resumed_from_step"] == SAVED
    check_equal(source / f"saved-{STEPS}.pt", said / f"saved-{STEPS}.pt")
    assert figures(said / "run") == figures(source / "run")
    check_same_shards(source / "run", said / "run")


def check_same_shards(one: Path, other: Path) -> None:
    """Every tensor of every file of each process; the order within a header is not fixed."""
    last = f"checkpoints/step-{STEPS:08d}"
    folders = [(one, one / last), (other, other / last)]
    names = [sorted(p.relative_to(f) for p in at.rglob("*.safetensors")) for f, at in folders]
    assert names[0] == names[1] != []
    for name in names[0]:
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == [], name


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("lost", ["_load_from_checkpoint", "_load_optimizer_and_scheduler"])
def test_mutant_lost_state_is_killed(runs: Runs, lost: str) -> None:
    source = runs.straight(2, "fsdp2", "full")
    said = resumed(runs, source, 2, "fsdp2", "full", blind=lost)
    with pytest.raises(AssertionError):
        check_equal(source / f"saved-{SAVED}.pt", said / "loaded.pt")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("ddp", marks=pytest.mark.long)])
def test_a_resume_in_the_middle_of_a_later_epoch_has_the_rows_of_that_epoch(
    runs: Runs, strategy: str
) -> None:
    steps_of_epoch, last = 6, 11
    config = config_of(runs, runs.root / f"later-{strategy}", 2, "tied", {})
    config["hyperparams"]["max_steps"] = last
    config["monitoring"]["micro_eval_interval"] = 0
    config["output"]["checkpoint_interval"] = steps_of_epoch + 2
    config["distributed"] = {"strategy": strategy}
    out = Path(config["top"]["output_dir"])
    runs.ended(config, 2)
    straight = figures(out)
    shutil.rmtree(out / "checkpoints" / f"step-{last:08d}")
    shutil.rmtree(out / "final_model")
    config["output"]["resume"] = "latest"
    runs.ended(config, 2)
    assert json.loads((out / "run.json").read_text())["summary"]["ended_by"] == "steps"
    assert figures(out) == straight


# ---- what other programs and commands get


def plain_model(runs: Runs, state: Path, kind: str = "full") -> Any:
    """The model of a gathered state, as a run of one process has it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(runs.model(kind))
    tensors = torch.load(state, weights_only=True)
    wanted = {name: one for name, one in tensors.items() if ":" not in name}
    model.load_state_dict(wanted, strict=True)
    return model


def assert_same_files(one: Path, other: Path) -> None:
    """But for the card, which tells how the run went."""
    names = [{p.relative_to(f).as_posix() for p in f.rglob("*")} for f in (one, other)]
    assert names[0] - {"README.md"} == names[1] - {"README.md"}
    for name in sorted(names[0] - {"README.md"}):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["full", *(pytest.param(k, marks=pytest.mark.long) for k in ("full untied", "full moe"))],
)
def test_the_final_model_and_exports_are_those_of_one_process(
    runs: Runs, tmp_path: Path, kind: str
) -> None:
    from transformers import AutoModelForCausalLM

    from trainer.commands import export
    from trainer.data.template import ChatTemplate
    from trainer.models.adapter_files import write_model

    source = runs.straight(2, "fsdp2", kind)
    run = (source / "run").resolve()
    assert export.run([str(run), "--step", str(SAVED), "--output", str(tmp_path / "export")]) == 0
    for step, folder in ((STEPS, run / "final_model"), (SAVED, tmp_path / "export")):
        model = plain_model(runs, source / f"saved-{step}.pt", kind)
        tokenizer = open_run(run).load()[1]
        ids = ChatTemplate(tokenizer).stop_ids
        wanted = tmp_path / f"wanted-{step}"
        wanted.mkdir()
        write_model(model, tokenizer, wanted, dtype=torch.float32, stop_ids=ids, use_cache=True)
        assert_same_files(folder, wanted)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        is_tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
        assert is_tied == (kind == "full")
        prompt = torch.arange(3, 20)[None]
        assert torch.equal(loaded(prompt).logits, model(prompt).logits)


@pytest.mark.slow
def test_chat_and_serve_open_a_checkpoint_of_shards(runs: Runs) -> None:
    source = runs.straight(2, "fsdp2", "full")
    found = open_run(source / "run", step="best")
    best = verify_checkpoint(found.model_dir).step
    model, _ = found.load()
    wanted = plain_model(runs, source / f"saved-{best}.pt").state_dict()
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    assert [name for name in state if not torch.equal(state[name], wanted[name])] == []
    assert not any(one.is_meta for one in model.buffers())
    assert "trainer export" in (found.model_dir / "README.md").read_text()


@pytest.mark.slow
def test_adapters_of_shards_are_files_as_of_one_process(runs: Runs, tmp_path: Path) -> None:
    from trainer.models.adapter_files import load_finished_model, save_adapter

    source, one = runs.straight(2, "fsdp2", "lora"), runs.straight(1, "auto", "lora")
    for folder in ("final_model", f"checkpoints/step-{SAVED:08d}"):
        names = [
            {re_ranked(p.name) for p in (said / "run" / folder).iterdir()} for said in (source, one)
        ]
        assert names[0] == names[1]
    final = source / "run" / "final_model"
    model = load_finished_model(final)
    saved = torch.load(source / f"saved-{STEPS}.pt", weights_only=True)
    trained = {name: one for name, one in saved.items() if ":" not in name}
    state = model.state_dict()
    assert trained
    assert all(torch.equal(state[name], trained[name]) for name in trained)
    save_adapter(model, tmp_path)
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (final / name).read_bytes()


def re_ranked(name: str) -> str:
    return "rng_state.pth" if name.startswith("rng_state") else name


# ---- a save that is cut short


def killed_and_resumed(runs: Runs, rank: int, at: int, kind: str = "full") -> None:
    source = runs.straight(2, "fsdp2", kind)
    out = runs.half(source)
    config = runs.config(out, 2, "fsdp2", kind)
    config["output"]["resume"] = "latest"
    codes, _ = runs.launch(config, 2, die=[rank, STEPS, at])
    assert codes[rank] == -9, codes
    assert codes[1 - rank] > 0, codes  # it ended by itself
    path, _, _ = find_latest_checkpoint(out / "checkpoints")
    verify_checkpoint(path)
    runs.ended(config, 2) if path.name.endswith(f"{SAVED}") else runs.launch(config, 2)
    assert_same_files(out / "final_model", (source / "run").resolve() / "final_model")
    check_same_shards((source / "run").resolve(), out)
    assert all(p.name.startswith("step-") for p in (out / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "at"),
    [
        (1, 20),
        *(pytest.param(0, at, marks=pytest.mark.long) for at in range(1, 140, 6)),
        *(pytest.param(1, at, marks=pytest.mark.long) for at in range(1, 91, 4)),
    ],
)
def test_kill_9_of_a_rank_in_a_save_leaves_a_whole_checkpoint_and_an_exact_resume(
    runs: Runs, rank: int, at: int
) -> None:
    killed_and_resumed(runs, rank, at)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "at", "strategy"),
    [
        (1, 3, "fsdp2"),
        *(pytest.param(0, at, "fsdp2", marks=pytest.mark.long) for at in (1, 2, 40)),
        pytest.param(0, 1, "ddp", marks=pytest.mark.long),
    ],
)
def test_a_full_disk_of_one_rank_is_one_error_on_all(
    runs: Runs, rank: int, at: int, strategy: str
) -> None:
    out = runs.half(runs.straight(2, strategy, "full"))
    config = runs.config(out, 2, strategy, "full")
    config["output"]["resume"] = "latest"
    codes, said = runs.launch(config, 2, full=[rank, STEPS, at])
    assert codes == [EXIT_FAILED] * 2
    errors = [json.loads((said / f"rank-{n}.json").read_text())["error"] for n in (0, 1)]
    assert errors[0] == errors[1]
    assert "No space left" in errors[0]
    assert "older checkpoints are as they were" in errors[0]
    assert rank == 0 or f"rank {rank}: " in errors[0]
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{SAVED:08d}"]
    verify_checkpoint(out / "checkpoints" / f"step-{SAVED:08d}")


# ---- a run folder that is not shared


@pytest.mark.slow
def test_a_run_folder_that_a_rank_does_not_see_is_refused_before_training(runs: Runs) -> None:
    codes, said = runs.launch(runs.config("out", 2, "fsdp2", "full"), 2, apart=True)
    assert codes == [EXIT_USER_INPUT] * 2
    for rank in (0, 1):
        error = json.loads((said / f"rank-{rank}.json").read_text())["error"]
        assert "rank 1 (on" in error
        assert "file system that all machines share" in error
        assert not (said / f"machine-{rank}" / "out").exists()


# ---- the lowest validation loss, early stopping, what is kept

STOPPING = (
    "tied",
    {
        "hyperparams": {
            "learning_rate": 0.1,  # it overshoots soon
            "lr_scheduler": "constant",
            "max_steps": 40,
            "early_stopping_patience": 3,
        },
        "monitoring": {"micro_eval_interval": 2},
        "output": {"keep_checkpoints": 1, "checkpoint_interval": 3},
    },
)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_early_stopping_and_what_is_kept_are_those_of_one_process(
    runs: Runs, strategy: str, tmp_path: Path
) -> None:
    from trainer.commands import export

    model, sections = STOPPING
    shared = (model, {**sections, "distributed": {"strategy": strategy}})
    one = trained(runs, "stopping", 1, STOPPING)
    two = trained(runs, f"stopping {strategy}", 2, shared)
    records = [json.loads((run / "run.json").read_text()) for run in (one, two)]
    assert [record["summary"]["ended_by"] for record in records] == ["early_stopping"] * 2
    wanted, found = figures(one), figures(two)
    assert found == pytest.approx(wanted, rel=1e-4)
    best = min((loss, key) for key, loss in wanted.items() if key.startswith("validation"))[1]
    kept = [checkpoint_steps(run / "checkpoints") for run in (one, two)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 2
    bests = [find_checkpoint(run, "best") for run in (one, two)]
    assert {chosen.step for chosen in bests} == {int(best.split()[1])}
    for number, run in enumerate((one, two)):
        assert (
            export.run([str(run), "--step", "best", "--output", str(tmp_path / str(number))]) == 0
        )
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "01")
    assert a.keys() == b.keys()
    final = load_file(two / "final_model" / "model.safetensors")
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)
    assert all(torch.equal(final[name], b[name]) for name in b)
    assert [record["summary"]["final_model_step"] for record in records] == [
        int(best.split()[1])
    ] * 2
    check_close(two, one, 1e-2)


@pytest.mark.slow
@pytest.mark.long
def test_early_stopping_that_was_half_counted_goes_on_after_a_resume(runs: Runs) -> None:
    two = trained(runs, "stopping fsdp2", 2, STOPPING)
    steps = max(checkpoint_steps(two / "checkpoints"))
    config = config_of(runs, runs.root / "stopping-half", 2, *STOPPING)
    config["hyperparams"]["max_steps"] = 40
    config["output"]["keep_checkpoints"] = 30
    runs.ended(config, 2)
    out = runs.root / "stopping-half"
    late = [step for step in checkpoint_steps(out / "checkpoints") if step > steps - 4]
    for step in late:
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(out / "final_model")
    config["output"]["resume"] = "latest"
    runs.ended(config, 2)
    assert json.loads((out / "run.json").read_text())["summary"]["ended_by"] == "early_stopping"
    assert figures(out) == figures(two)
