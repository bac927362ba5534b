"""Templates print the date of their run, on whatever day they are rendered."""

from __future__ import annotations

import ast
import datetime as dt
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as chat_templates

from trainer.config.data_section import DataSection
from trainer.core.finished import FinishedRun, open_run
from trainer.data.dataset import RunData, prepare_data
from trainer.data.encode import RowEncoder
from trainer.data.template import ChatTemplate
from trainer.models import chat_template
from trainer.models.chat_template import date_options, fix_date, is_dated, printed_dates
from trainer.preview.local import LocalPreviewBackend
from trainer.profiles import get_profile

PACKAGE = Path(chat_template.__file__).parent.parent
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
RUN_DAY = dt.date(2024, 2, 29)
CONVERSATIONS = (TURNS, [{"role": "system", "content": "s"}, *TURNS])
DATED = ("llama3_2", "gptoss", "gptoss_training", "muse_glimmer", "muse_glimmer_training")
ODD = (
    "\n  {% if messages %}{{ strftime_now('%%Y %Y|%d|%-d|%B %c %j %U') }}{% endif %}\n"
    "{% set kind = '%y' %}{{ strftime_now(kind) }}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
"""Line ends that templates trim, a percent sign, a format that is made within the template."""


def shipped(name: str) -> str:
    if name == "odd":
        return ODD
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> Callable[[dt.date], None]:
    """A function that makes it another day for transformers and for us."""

    def set_day(day: dt.date) -> None:
        class Clock(dt.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Clock:
                return cls(day.year, day.month, day.day)

        monkeypatch.setattr(chat_templates, "datetime", Clock)

    return set_day


def rendered(tokenizer: Any, turns: Any) -> str:
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, **date_options(tokenizer))
    return text


def check_dates(tokenizer: Any, name: str, today: Callable[[dt.date], None]) -> None:
    """Told the run's day, the template renders on any day as it did on the run's."""
    tokenizer.chat_template = shipped(name)
    for turns in CONVERSATIONS:
        fix_date(tokenizer, None)
        today(RUN_DAY)
        expected = rendered(tokenizer, turns)
        today(dt.date(2031, 12, 3))
        fix_date(tokenizer, RUN_DAY)
        assert rendered(tokenizer, turns) == expected


@pytest.mark.parametrize("name", [*DATED, "odd", "llama3_1", "qwen3", "gemma3"])
def test_a_template_prints_the_date_that_it_is_told(
    make_tokenizer: Callable[..., Any], today: Callable[[dt.date], None], name: str
) -> None:
    check_dates(make_tokenizer(), name, today)


@pytest.mark.parametrize("name", [*DATED[:3], "odd"])
def test_mutant_the_day_of_rendering_is_killed(
    make_tokenizer: Callable[..., Any],
    today: Callable[[dt.date], None],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(chat_template, "FUNCTION", "today_now")
    with pytest.raises(AssertionError):
        check_dates(make_tokenizer(), name, today)


def test_only_templates_that_print_the_date_are_dated(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    fix_date(tokenizer, RUN_DAY)
    found = {}
    for path in (files("trl") / "chat_templates").iterdir():
        if path.name.endswith(".jinja"):
            tokenizer.chat_template = path.read_text(encoding="utf-8")
            if is_dated(tokenizer):
                found[path.name.removesuffix(".jinja")] = printed_dates(tokenizer)
    assert set(found) == set(DATED)
    assert found["llama3_2"] == {"%d %b %Y": "29 Feb 2024"}
    tokenizer.chat_template = "{# strftime_now('%d') #}{{ messages[0].content }}"
    assert not is_dated(tokenizer)


def test_the_saved_template_is_the_models_own(
    make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(shipped("llama3_2"))
    fix_date(tokenizer, RUN_DAY)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == shipped("llama3_2")
    assert "2024" not in (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")


def test_previews_and_chats_print_the_date_of_the_run(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(shipped("llama3_2"))
    fix_date(tokenizer, RUN_DAY)
    backend = LocalPreviewBackend.__new__(LocalPreviewBackend)
    backend.tokenizer, backend.system_prompt = tokenizer, None
    assert "Today Date: 29 Feb 2024" in tokenizer.decode(backend.render("q"))
    template = ChatTemplate(tokenizer)
    assert "Today Date: 29 Feb 2024" in template.text(TURNS)


def test_every_rendering_of_the_program_passes_the_date() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_call and node.func.attr == "apply_chat_template":
                found.append((path.name, node.lineno, "date_options" in ast.dump(node)))
    assert found
    assert [place for *place, passes in found if not passes] == []


def prepare(tokenizer: Any, rows: Path, day: dt.date, cache: Path) -> RunData:
    fix_date(tokenizer, day)
    return prepare_data(
        DataSection(dataset_path=str(rows), validation_split=0, cache_dir=str(cache)),
        profile=get_profile("plain"),
        encoder=RowEncoder(tokenizer, 512),
        system_prompt=None,
        is_prompt_configured=False,
        seed=1,
        num_preview=1,
    )


@pytest.mark.parametrize(
    ("name", "is_same"), [("llama3_2", False), ("llama3_1", True), ("qwen3", True)]
)
def test_the_date_is_in_the_caches_key_only_where_it_is_printed(
    make_tokenizer: Callable[..., Any], qa_file: Path, tmp_path: Path, name: str, is_same: bool
) -> None:
    tokenizer = make_tokenizer(shipped(name))
    if name.startswith("llama"):
        tokens = ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"]
        tokenizer.add_tokens(["<|eot_id|>", *tokens], special_tokens=True)
        tokenizer.eos_token = "<|eot_id|>"
    one = prepare(tokenizer, qa_file, RUN_DAY, tmp_path / "cache")
    two = prepare(tokenizer, qa_file, dt.date(2024, 3, 1), tmp_path / "cache")
    again = prepare(tokenizer, qa_file, RUN_DAY, tmp_path / "cache")
    assert two.card.cache.startswith("read from") == is_same
    assert again.card.cache.startswith("read from")
    assert (one.train.fingerprint() == two.train.fingerprint()) == is_same
    assert one.train.fingerprint() == again.train.fingerprint()


def test_two_days_of_which_only_the_year_is_printed_share_an_entry(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer("{{ strftime_now('%Y') }}")
    texts = []
    for day in (dt.date(2024, 1, 1), dt.date(2024, 5, 5), dt.date(2025, 1, 1)):
        fix_date(tokenizer, day)
        texts.append(printed_dates(tokenizer))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("recorded", ["2024-02-29", None])
def test_a_finished_run_is_opened_under_its_own_date(
    tmp_path: Path, model_folder: Path, recorded: str | None
) -> None:
    (tmp_path / "run").mkdir()
    model_folder.rename(tmp_path / "run" / "final_model")
    record = {"config": {}, "system_prompt": None, "date": recorded}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    finished = open_run(tmp_path / "run")
    assert isinstance(finished, FinishedRun)
    assert finished.date == (dt.date.fromisoformat(recorded) if recorded else None)
    _, tokenizer = finished.load()
    assert tokenizer.template_date == finished.date
