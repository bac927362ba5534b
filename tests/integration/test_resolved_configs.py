"""The config that a run writes down is accepted again, and leads to the same run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config import ConfigLoader, TrainerConfig, create_default_config
from trainer.config.flags import config_fields
from trainer.core import TrainerEngine, dry_run, preview_choice, strategy
from trainer.core.dry_run import DryRun
from trainer.errors import ConfigError

SMALL, LARGE = 2**20, 2**40

RANK = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
"""A dry run of the main one of two processes meets nobody."""

LOSING: dict[str, tuple[int, int, dict[str, Any]]] = {
    # case: processes, free memory, options of which something becomes of no use
    "whole copies": (2, LARGE, {"distributed": {"reshard_after_forward": False}}),
    "shards by memory": (2, SMALL, {"distributed": {"reshard_after_forward": False}}),
    "no previews": (
        2,
        SMALL,
        {
            "distributed": {"strategy": "fsdp2"},
            "monitoring": {
                "scores": ["exact"],
                "canary_set": "general",
                "num_score_prompts": 2,
                "tracker_texts": True,
                "num_preview_samples": 2,
            },
        },
    ),
    "no previews, final evaluation": (
        2,
        SMALL,
        {"monitoring": {"scores": ["exact"], "final_eval_prompts": 2}},
    ),
    "rows in order": (1, LARGE, {"data": {"shuffle": False}}),
    "bf16 masters": (1, LARGE, {"hyperparams": {"masters": "bf16_stochastic"}}),
}

VALUES: dict[str, list[Any]] = {
    "hyperparams.max_steps": [None, 3],
    "hyperparams.max_length": [None, 64],
    "hyperparams.warmup_steps": [0, 1, 0.5],
    "hyperparams.early_stopping_patience": [0, 2],
    "hyperparams.learning_rate": [None, 1e-3],
    "monitoring.inference_interval": [0, 3],
    "monitoring.num_eval_samples": [0, 2],
    "monitoring.num_score_prompts": [0, 2],
    "monitoring.final_eval_prompts": [0, 2],
    "monitoring.num_preview_samples": [1, 2],
    "monitoring.micro_eval_interval": [0, 3],
    "monitoring.scores": [(), ("exact", "f1")],
    "monitoring.canary_set": ["off", "general"],
    "monitoring.report_to": [(), ("tensorboard",)],
    "monitoring.preview_prompts": [(), ("hello",)],
    "lora.modules_to_save": [(), ("lm_head",)],
    "lora.neftune_alpha": [0, 5.0],
    "model.add_tokens": [(), ("<a>",)],
    "profile.system_prompt": [None, "Today is {date}."],
    "data.validation_split": [0.0, 0.2],
}
NOT_VARIED = {
    *("model.attn_implementation", "model.trust_remote_code", "data.format", "data.truncation"),
    *("environment.offline", "environment.deterministic", "monitoring.display"),
    *("hyperparams.compile", "hyperparams.loss_kernel", "data.text_markers"),
    *("distributed.cpu_offload", "data.on_bad_row"),
}
"""What is not decided by values alone (a device, a compiler, code), or not at all."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """A function that makes this the main one of so many processes, with so much free memory."""

    def be(world: int, room: int) -> None:
        for name, value in RANK.items() if world > 1 else ():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WORLD_SIZE", str(world))
        for module in (strategy, dry_run, preview_choice):
            monkeypatch.setattr(module, "device_memory", lambda device: room)

    return be


def config_of(rows: Path, out: Path, sections: dict[str, Any]) -> TrainerConfig:
    here = {**sections.get("environment", {}), "device": "cpu", "num_threads": 1}
    return create_default_config(
        model_path="tiny",
        dataset_path=str(rows),
        output_dir=str(out),
        **{**sections, "environment": here},
    )


def check_accepted_again(written: DryRun, again: Path) -> None:
    """What a dry run has written down loads, and a dry run of that writes the same."""
    file = Path(written.config.output.output_dir) / "config.resolved.json"
    loaded = ConfigLoader.load(file).config
    assert loaded == written.config
    moved = loaded.model_copy(
        update={"output": loaded.output.model_copy(update={"output_dir": str(again)})}
    )
    TrainerEngine().dry_run(moved)
    found = [json.loads((at / file.name).read_text()) for at in (file.parent, again)]
    for one in found:
        del one["output"]["output_dir"]
    assert found[0] == found[1]


OFTEN = ("whole copies", "no previews")


@pytest.mark.parametrize(
    "case", [*OFTEN, *(pytest.param(k, marks=pytest.mark.long) for k in LOSING if k not in OFTEN)]
)
def test_what_a_run_makes_of_its_config_is_accepted_again(
    case: str, machine: Callable[[int, int], None], qa_file: Path, tmp_path: Path
) -> None:
    world, room, sections = LOSING[case]
    machine(world, room)
    config = config_of(qa_file, tmp_path / "out", sections)
    check_accepted_again(TrainerEngine().dry_run(config), tmp_path / "again")


def drawn(generator: random.Random) -> dict[str, Any]:
    """Sections with every fifth option set, of those that have few values."""
    sections: dict[str, Any] = {}
    for key, one in config_fields().items():
        values = VALUES.get(key) or list(one.choices) or ([True, False] * (one.kind == "bool"))
        if values and key not in NOT_VARIED and generator.random() < 0.2:
            section, name = key.split(".")
            sections.setdefault(section, {})[name] = generator.choice(values)
    if sections.get("monitoring", {}).get("preview_backend") in ("remote_3090", "openai"):
        sections["monitoring"] |= {
            "remote_3090_host": "127.0.0.1",
            "openai_base_url": "http://127.0.0.1:1/v1",
        }
    return sections


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", range(12))
def test_of_many_configs_what_a_run_makes_of_them_is_accepted_again(
    seed: int, machine: Callable[[int, int], None], qa_file: Path, tmp_path: Path
) -> None:
    generator = random.Random(seed)
    accepted = 0
    for number in range(200):
        sections = drawn(generator)
        machine(generator.choice([1, 2]), generator.choice([SMALL, LARGE]))
        try:
            config = config_of(qa_file, tmp_path / f"out-{number}", sections)
            written = TrainerEngine().dry_run(config)
        except ConfigError:  # these values do not go together
            continue
        check_accepted_again(written, tmp_path / f"again-{number}")
        accepted += 1
        if accepted == 4:
            return
    pytest.fail("hardly any of these configs is accepted at all")
