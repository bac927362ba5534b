"""What a run of shards trains, keeps and ends with is what a run of one process does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.runs_of_shards import (
    ROWS_OF_STEP,
    SAVED,
    Case,
    Runs,
    check_close,
    config_of,
    figures,
    trained,
)
from trainer.files import checkpoint_steps

pytestmark = [pytest.mark.slow, pytest.mark.long]
MIX = {"mix_probabilities": [0.7, 0.3]}
LORA = {"training_mode": "lora"}

MODES: dict[str, Case] = {
    "lora": ("tied", {"hyperparams": LORA}),
    "dora": ("tied", {"hyperparams": LORA, "lora": {"use_dora": True}}),
    "rslora": ("tied", {"hyperparams": LORA, "lora": {"use_rslora": True, "init": "gaussian"}}),
    "some layers": ("tied", {"hyperparams": LORA, "lora": {"layers_to_transform": [1]}}),
    "tied head saved": ("tied", {"hyperparams": LORA, "lora": {"modules_to_save": ["lm_head"]}}),
    "head saved": ("untied", {"hyperparams": LORA, "lora": {"modules_to_save": ["lm_head"]}}),
    "embedding saved": (
        "tied",
        {"hyperparams": LORA, "lora": {"modules_to_save": ["embed_tokens"]}},
    ),
    "both saved": (
        "tied",
        {
            "hyperparams": LORA,
            "lora": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        },
    ),
    "norms saved": ("tied", {"hyperparams": LORA, "lora": {"modules_to_save": ["norm"]}}),
    "tied head adapted": (
        "tied",
        {"hyperparams": LORA, "lora": {"target_modules": ["q_proj", "lm_head"]}},
    ),
    "embedding adapted": (
        "tied",
        {"hyperparams": LORA, "lora": {"target_modules": ["q_proj", "embed_tokens"]}},
    ),
    "embedding without tie adapted": (
        "untied",
        {"hyperparams": LORA, "lora": {"target_modules": ["q_proj", "embed_tokens"]}},
    ),
    "dora, checkpointed": (
        "tied",
        {"hyperparams": {**LORA, "gradient_checkpointing": True}, "lora": {"use_dora": True}},
    ),
    "lora, packed": ("tied", {"hyperparams": LORA, "data": {"enable_packing": True}}),
    "lora of experts": ("moe", {"hyperparams": LORA}),
    "tiled loss of experts": ("moe", {"hyperparams": {"loss_kernel": "tiles"}}),
    "added tokens": ("tied", {"model": {"add_tokens": ["<a>", "<b>"]}}),
    "packed": ("tied", {"data": {"enable_packing": True}}),
    "mixed files": ("tied", {"data": {**MIX, "mix_epoch": "longest"}}),
    "mixed files, packed": (
        "tied",
        {"data": {**MIX, "enable_packing": True}, "hyperparams": {"max_length": 64}},
    ),
}
NOISY = {
    "dropout": ("tied", {"hyperparams": LORA, "lora": {"dropout": 0.1}}),
    "neftune": ("tied", {"hyperparams": LORA, "lora": {"neftune_alpha": 5.0}}),
}
"""Each process draws its own numbers."""


COPIES: dict[str, tuple[float, str, dict[str, Any]]] = {
    # case: how far losses may be from those of one process, model, sections
    "added tokens of adapters": (
        2e-6,
        "tied",
        {"hyperparams": LORA, "model": {"add_tokens": ["<a>", "<b>"]}},
    ),
    "compiled": (2e-6, "tied", {"hyperparams": {"compile": "blocks"}}),
    "found batch size": (2e-6, "tied", {"hyperparams": {"auto_batch_size": True}}),
    "experts": (2e-6, "moe", {}),
    "muon": (1e-4, "tied", {"hyperparams": {"optimizer": "muon"}}),  # iterates in bf16
    "8 bit": (1e-4, "tied", {"hyperparams": {"optimizer": "adamw_8bit"}}),
    "adapters in bf16": (1e-2, "tied", {"hyperparams": {**LORA, "fp_precision": "bf16"}}),
    "random rounding": (
        1e-2,
        "tied",
        {"hyperparams": {"masters": "bf16_stochastic", "fp_precision": "bf16"}},
    ),
}
"""What shards do not have, or have otherwise."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("ranks"), tokenizer)
    yield made
    made.close()


def two_processes(runs: Runs, name: str, strategy: str, case: Case) -> Path:
    model, sections = case
    name = name if strategy == "fsdp2" else f"{name}, {strategy}"
    return trained(runs, name, 2, (model, {**sections, "distributed": {"strategy": strategy}}))


def check_resumes_exactly(runs: Runs, two: Path, case: Case) -> None:
    out = two.with_name(f"{two.name}-again")
    last = max(checkpoint_steps(two / "checkpoints"))
    shutil.copytree(
        two, out, ignore=shutil.ignore_patterns("final_model", ".lock", f"step-{last:08d}")
    )
    config = config_of(runs, out, 2, *case)
    config["output"]["resume"] = "latest"
    runs.ended(config, 2)
    assert json.loads((out / "run.json").read_text())["resumed_from_step"] == SAVED
    assert figures(out) == figures(two)
    check_close(out, two, 0.0)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
@pytest.mark.parametrize("name", MODES)
def test_adapters_and_batches_of_every_kind_train_in_two_processes_as_in_one(
    runs: Runs, name: str, strategy: str
) -> None:
    one = trained(runs, name, 1, MODES[name])
    two = two_processes(runs, name, strategy, MODES[name])
    assert figures(two) == pytest.approx(figures(one), abs=2e-6)
    check_close(two, one, 5e-5)  # AdamW moves a weight by its whole rate for any tiny gradient


@pytest.mark.parametrize("name", COPIES)
def test_what_shards_do_not_have_trains_on_whole_copies_as_in_one_process(
    runs: Runs, name: str
) -> None:
    limit, model, sections = COPIES[name]
    case = (model, {**sections, "distributed": {"strategy": "ddp"}})
    one, two = (trained(runs, f"copies, {name}", world, case) for world in (1, 2))
    assert figures(two) == pytest.approx(figures(one), abs=limit)
    check_resumes_exactly(runs, two, case)


@pytest.mark.parametrize("name", [*MODES, *NOISY])
def test_they_go_on_from_a_checkpoint_bit_for_bit(runs: Runs, name: str) -> None:
    case = {**MODES, **NOISY}[name]
    check_resumes_exactly(runs, trained(runs, name, 2, case), case)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_an_adapter_is_trained_on_in_two_processes_as_in_one(runs: Runs, strategy: str) -> None:
    adapter = trained(runs, "dora", 1, MODES["dora"])
    case = ("tied", {"hyperparams": LORA})
    found = []
    for world in (1, 2):
        out = runs.root / f"on-{world}-{strategy}"
        config = config_of(runs, out, world, *case)
        config["top"]["model_path"] = str(adapter)
        config["distributed"]["strategy"] = strategy if world == 2 else "auto"
        runs.ended(config, world)
        found.append(out)
    one, two = found
    assert figures(two) == pytest.approx(figures(one), abs=2e-6)
    check_close(two, one, 5e-5)


def test_the_rows_of_a_step_are_shared_out(runs: Runs) -> None:
    """Else the comparisons above would be of two runs of one process."""
    two = trained(runs, "packed", 2, MODES["packed"])
    hyper = json.loads((two / "config.resolved.json").read_text())["hyperparams"]
    assert hyper["batch_size"] == ROWS_OF_STEP // 2
