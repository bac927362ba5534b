"""Previews of a run with sharded weights: refused, made by a sidecar, or off, and told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.config import create_default_config
from trainer.core import preview_choice
from trainer.core.preview_choice import SidecarNeed, with_preview_backend
from trainer.errors import ConfigError
from trainer.models.precision import resolve_precision
from trainer.profiles import get_profile

GIB = 2**30
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Run:
    """What the choice asks of a prepared run."""

    config: Any
    is_sharded: bool = True
    strategy: str = "fsdp2: two processes"
    device: torch.device = CPU
    profile: Any = dataclasses.field(default_factory=lambda: get_profile("plain"))
    tokenizer: Any = None
    precision: Any = dataclasses.field(
        default_factory=lambda: resolve_precision("fp32", "full", CPU)
    )
    data: Any = dataclasses.field(
        default_factory=lambda: SimpleNamespace(
            train=SimpleNamespace(lengths=[64]),
            encoder=SimpleNamespace(template=SimpleNamespace(stop_ids=frozenset({2}))),
        )
    )


@pytest.fixture
def chosen(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, list[tuple[str, str]]]]:
    """A function that chooses for a run on a machine with so much free memory."""

    def choose(room: int = 64 * GIB, *, rank: int = 0, sharded: bool = True, **more: Any) -> Any:
        config = create_default_config(
            model_path=str(model_folder), dataset_path="rows.jsonl", output_dir="out", **more
        )
        told: list[tuple[str, str]] = []
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(preview_choice, "device_memory", lambda device: room)
        run: Any = Run(config, is_sharded=sharded)
        made = with_preview_backend(run, lambda text, level="info": told.append((level, text)))
        return made.config.monitoring, told

    return choose


def test_a_default_backend_becomes_a_sidecar_where_the_host_holds_it(chosen: Any) -> None:
    monitoring, told = chosen()
    assert (monitoring.preview_backend, monitoring.inference_interval) == ("sidecar", 50)
    [(level, text)] = told
    assert level == "info"
    assert text.startswith("previews: sidecar on cpu (about ")
    assert "not made from sharded weights" in text


def test_a_default_backend_is_off_where_nothing_holds_it(chosen: Any) -> None:
    monitoring, told = chosen(2**16)
    assert monitoring.inference_interval == 0
    [(level, text)] = told
    assert level == "warning"
    assert "previews: off, because a sidecar does not fit" in text
    assert "remote_3090" in text


def test_what_needs_previews_is_off_with_them_and_named(chosen: Any) -> None:
    asked = {"scores": ["f1"], "num_score_prompts": 2, "canary_set": "general"}
    told_at_end = {"notify": ["sh", "-c", "true"]}  # of no use to a preview, and kept
    monitoring, told = chosen(2**16, monitoring={**asked, **told_at_end})
    assert (monitoring.scores, monitoring.num_score_prompts, monitoring.canary_set) == (
        (),
        0,
        "off",
    )
    assert monitoring.notify == ("sh", "-c", "true")
    names = told[0][1].partition("off too: ")[2].partition(")")[0].split(", ")
    assert set(names) == {f"monitoring.{name}" for name in asked}


def test_the_other_processes_are_ready_whatever_they_see_of_memory(chosen: Any) -> None:
    monitoring, _ = chosen(2**16, rank=1)
    assert monitoring.preview_backend == "sidecar"


def test_a_local_backend_that_was_asked_for_is_refused_with_the_way_out(chosen: Any) -> None:
    with pytest.raises(ConfigError, match=r"preview_backend=local.*sidecar .*remote_3090 "):
        chosen(monitoring={"preview_backend": "local"})


@pytest.mark.parametrize(
    "more",
    [
        {"sharded": False},
        {"sharded": False, "monitoring": {"preview_backend": "local"}},
        {"monitoring": {"inference_interval": 0, "preview_backend": "local"}},
        {"monitoring": {"preview_backend": "sidecar"}},
    ],
)
def test_other_runs_keep_what_they_have(chosen: Any, more: dict[str, Any]) -> None:
    before = more.get("monitoring", {})
    monitoring, told = chosen(2**16, **more)
    assert told == []
    assert monitoring.preview_backend == before.get("preview_backend", "local")


def test_a_gpu_that_is_full_leaves_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    room = {"cuda": GIB, "cpu": 16 * GIB}
    monkeypatch.setattr(preview_choice, "device_memory", lambda device: room[device.type])
    need = SidecarNeed(server=4 * GIB, copies=3 * GIB, loading=5 * GIB, training=6 * GIB)
    assert not need.fits(torch.device("cuda:1"))
    assert need.fits(CPU)  # 3 + max(5, 6 + 4) of 16
    assert not dataclasses.replace(need, training=9 * GIB).fits(CPU)
    assert "13.0 GiB of 16.0 GiB" in need.words(CPU)
