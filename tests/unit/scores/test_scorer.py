"""Functions of the user: called in the shape they have, and what goes wrong costs one column."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from trainer.errors import ConfigError
from trainer.preview.base import PreviewRequest, PreviewResult, PreviewSample
from trainer.scores.functions import ScoreFunction
from trainer.scores.scorer import MAX_FAILURES, Scorer
from trainer.scores.spec import parse_scores

HERE = Path(__file__).parent
ROW = {"question": "2 + 2?", "answer": "4", "points": 2}
ANSWER = {
    "completion": "it is 4",
    "golden_answer": "4",
    "prompt": "2 + 2?",
    "messages": [{"role": "user", "content": "2 + 2?"}],
    "row": ROW,
}
REQUESTS = {
    f"p{n}": PreviewRequest(prompt="2 + 2?", golden_answer="4", prompt_id=f"p{n}", row=ROW)
    for n in range(3)
}
RESULTS = [
    PreviewResult(step=3, prompt="2 + 2?", text=text, golden_answer="4", prompt_id=f"p{n}")
    for n, text in enumerate(["4", "5", "it is 4"])
]
FAILED = PreviewResult.failed(REQUESTS["p0"], 3, "nobody there", "local")

MakeScorer = Callable[..., Scorer]


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions can be imported, here and in a process."""
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def make_scorer(tmp_path: Path) -> Iterator[MakeScorer]:
    made: list[Scorer] = []

    def make(*entries: str, timeout_s: float = 20.0, **columns: str) -> Scorer:
        log = tmp_path / "scores.log"
        scorer = Scorer(parse_scores(entries), columns=columns, timeout_s=timeout_s, log=log)
        made.append(scorer)
        return scorer

    yield make
    for scorer in made:
        scorer.close()


# ---- shapes


def score(name: str, *, answers: int = 1, **columns: str) -> list[float | None]:
    return ScoreFunction(f"rewards:{name}", columns).score([ANSWER] * answers, 7)


@pytest.mark.parametrize(
    ("name", "columns", "value"),
    [
        ("is_short", {}, 0),
        ("everything", {}, 9),
        ("trl_reward", {"solution": "answer"}, 1),
        ("trl_reward", {"solution": "golden_answer"}, 1),
        ("trl_async", {}, 0.5),
        ("correct_answer", {}, 1),
        ("no_score", {}, None),
    ],
)
def test_a_function_gets_what_it_names(
    name: str, columns: dict[str, str], value: float | None
) -> None:
    assert score(name, answers=2, **columns) == [value, value]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_number", "'good', which is no number"),
        ("not_finite", "nan"),
        ("trl_reward", "it asks for solution, and the columns of the rows are question, answer"),
    ],
)
def test_what_is_no_score_is_an_error(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        score(name)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("rewards:unknown", "asks for temperature"),
        ("rewards:nothing", "cannot be imported"),
        ("no_such_module:f", "No module named"),
        ("rewards:HERE", "cannot be imported"),
        ("os:sep", "must be a function"),
    ],
)
def test_a_function_that_cannot_be_had_is_told_before_the_run(
    make_scorer: MakeScorer, path: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_scorer(path).check()


def test_rewards_of_trl_run_as_they_are(make_scorer: MakeScorer) -> None:
    scorer = make_scorer(
        "trl.rewards:think_format_reward", "trl.rewards:accuracy_reward", solution="answer"
    )
    results, errors = scorer.score(RESULTS, REQUESTS)
    assert [one.scores["think_format_reward"] for one in results] == [0, 0, 0]
    try:
        import math_verify  # noqa: F401
    except ImportError:
        assert "math_verify" in errors["accuracy_reward"]
        return
    boxed = [
        one.model_copy(update={"text": f"so $\\boxed{{{text}}}$"})
        for one, text in zip(RESULTS, ("4", "5", "4.0"), strict=True)
    ]
    results, errors = scorer.score(boxed, REQUESTS)
    assert errors == {}
    assert [one.scores["accuracy_reward"] for one in results] == [1, 0, 1]


# ---- what goes wrong


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "KeyError: 'no such thing' (rewards.py:"),
        ("hangs", "no answer within 1 s"),
        ("exits", "its process ended with exit code 7"),
        ("exits_politely", "SystemExit: 3"),
        ("forks_and_exits", "its process ended with exit code 3"),
        ("forks", None),
        ("forks_and_stays", None),
        ("prints", None),
    ],
)
def test_a_bad_score_costs_its_own_column(
    make_scorer: MakeScorer, name: str, words: str | None
) -> None:
    scorer = make_scorer("exact", f"rewards:{name}", "rewards:is_short", timeout_s=1.0)
    for _ in range(2):  # again, with what is left of the first time
        results, errors = scorer.score([*RESULTS, FAILED], REQUESTS)
        assert [one.scores.get("exact") for one in results] == [1, 0, 0, None]
        assert [one.scores.get("is_short") for one in results] == [1, 1, 0, None]
        assert list(errors) == ([] if words is None else [name])
        assert words is None or errors[name].startswith(words)
        assert all((name in one.scores) == (words is None) for one in results[:3])
    assert results[3] == FAILED


def test_each_sample_has_scores_of_its_own(make_scorer: MakeScorer) -> None:
    said = [PreviewSample(text="4"), PreviewSample(text="", error_message="no luck")]
    results = [RESULTS[1].model_copy(update={"samples": tuple(said)}), FAILED, RESULTS[0]]
    [first, failed, last], errors = make_scorer("exact", "f1").score(results, REQUESTS)
    assert errors == {}
    assert first.scores == {"exact": 0.0, "f1": 0.0}
    assert [one.scores for one in first.samples] == [{"exact": 1.0, "f1": 1.0}, {}]
    assert (failed.scores, last.scores) == ({}, {"exact": 1.0, "f1": 1.0})


def test_two_processes_of_one_score_give_one_answer(make_scorer: MakeScorer) -> None:
    scorer = make_scorer("rewards:forks")
    for step in range(3):
        results = [one.model_copy(update={"step": step}) for one in RESULTS]
        scored, errors = scorer.score(results, REQUESTS)
        assert errors == {}
        assert [one.scores for one in scored] == [{"forks": step}] * 3


def test_nothing_of_it_is_left(
    make_scorer: MakeScorer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STARTED_BY", str(tmp_path))
    scorer = make_scorer("rewards:forks_and_stays", "rewards:hangs", timeout_s=1.0)
    scorer.score(RESULTS, REQUESTS)
    scorer.close()
    deadline = time.monotonic() + 10
    while left := [one for one in psutil.process_iter() if _is_started_by(one, str(tmp_path))]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _is_started_by(process: psutil.Process, name: str) -> bool:
    try:
        is_alive = process.status() != psutil.STATUS_ZOMBIE
        return is_alive and process.environ().get("STARTED_BY") == name
    except psutil.Error:
        return False


def test_what_is_printed_is_bounded(make_scorer: MakeScorer, tmp_path: Path) -> None:
    make_scorer("rewards:prints").score(RESULTS, REQUESTS)
    assert (tmp_path / "scores.log").stat().st_size <= 2**20


def test_one_that_never_answers_is_given_up(make_scorer: MakeScorer) -> None:
    scorer = make_scorer("rewards:exits")
    errors = [scorer.score(RESULTS, REQUESTS)[1]["exits"] for _ in range(MAX_FAILURES + 1)]
    assert errors[-1].startswith("given up after")
    assert not errors[-2].startswith("given up after")


def test_a_pattern_that_never_ends_costs_its_own_column(make_scorer: MakeScorer) -> None:
    text = "a" * 60 + "b"
    results = [RESULTS[0].model_copy(update={"text": text})]
    scorer = make_scorer("f1", r"regex:^(a+)+$", timeout_s=1.0)
    [scored], errors = scorer.score(results, REQUESTS)
    assert scored.scores == {"f1": 0}
    assert list(errors) == ["regex"]


def test_closing_ends_what_is_being_computed(make_scorer: MakeScorer) -> None:
    scorer = make_scorer("rewards:hangs", timeout_s=600.0)
    threading.Timer(1.0, scorer.close).start()
    _, errors = scorer.score(RESULTS, REQUESTS)
    assert "the run ended" in errors["hangs"]
