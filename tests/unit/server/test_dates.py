"""A server renders words under the date of the run whose weights answer."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import save_file

from trainer.models.chat_template import fix_date
from trainer.preview.local import LocalPreviewBackend
from trainer.publish.identity import canonical_tensors, model_manifest
from trainer.publish.wire import WeightsManifest, WeightsOffer
from trainer.server.held_model import HeldModel
from trainer.server.inference import _load
from trainer.server.weight_store import WeightStore

DATED = (
    "Today: {{ strftime_now('%d %b %Y') }}\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture
def held(model_folder: Path) -> HeldModel:
    (model_folder / "chat_template.jinja").write_text(DATED)
    return HeldModel(str(model_folder), "cpu", wait_for_weights=False)


def asked(held: HeldModel) -> str:
    """The first line of what the model is asked."""
    backend = LocalPreviewBackend.__new__(LocalPreviewBackend)
    backend.tokenizer, backend.system_prompt = held.tokenizer, None
    text: str = held.tokenizer.decode(backend.render("q"))
    return text.partition("\n")[0]


def today() -> str:
    return f"Today: {dt.date.today():%d %b %Y}"


def published(held: HeldModel, folder: Path, day: str | None) -> dict[str, Any]:
    """What the engine is told to load: the held weights, as another run sent them."""
    path = folder / "sent.safetensors"
    save_file({name: t.contiguous() for name, t in canonical_tensors(held.base).items()}, path)
    return {"path": str(path), "weights_id": "0" * 64, "template_date": day}


def test_words_are_rendered_under_the_date_of_the_run_that_sent_the_weights(
    held: HeldModel, tmp_path: Path
) -> None:
    own = {"path": None, "weights_id": held.original_id, "template_date": None}
    assert asked(held) == today()
    assert _load(held, published(held, tmp_path, "2024-02-29"))["ok"]
    assert asked(held) == "Today: 29 Feb 2024"
    assert _load(held, own)["ok"]
    assert asked(held) == today()


def test_a_server_of_a_finished_run_goes_back_to_the_date_of_that_run(
    held: HeldModel, tmp_path: Path
) -> None:
    held.date = dt.date(2025, 1, 2)
    fix_date(held.tokenizer, held.date)
    assert _load(held, published(held, tmp_path, "2024-02-29"))["ok"]
    assert asked(held) == "Today: 29 Feb 2024"
    assert _load(held, {"path": None, "weights_id": held.original_id})["ok"]
    assert asked(held) == "Today: 02 Jan 2025"


def offer_of(held: HeldModel, day: str | None) -> WeightsOffer:
    manifest: WeightsManifest = model_manifest(held.base, held.tokenizer)
    return WeightsOffer(manifest=manifest, run="r", step=0, template_date=day)


def test_equal_weights_of_a_run_of_another_day_are_loaded_anew(
    held: HeldModel, tmp_path: Path
) -> None:
    store = WeightStore(tmp_path / "store", None)
    weights_id = offer_of(held, None).manifest.weights_id
    store.loads[weights_id] = {"path": "x", "template_date": "2024-02-29"}
    assert store.is_same_day(offer_of(held, "2024-02-29"), weights_id)
    assert not store.is_same_day(offer_of(held, "2024-03-01"), weights_id)
    store.original_id = weights_id
    assert store.is_same_day(offer_of(held, "2024-03-01"), weights_id)


@pytest.mark.parametrize("day", ["2024-02-30", "29 Feb 2024", "2024-2-1", ""])
def test_a_date_that_is_none_is_refused_at_the_door(held: HeldModel, day: str) -> None:
    with pytest.raises(ValidationError):
        offer_of(held, day)
