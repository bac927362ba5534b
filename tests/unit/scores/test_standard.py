"""Standard scores: each on answers whose score is plain to see."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.scores.spec import is_function, parse_scores
from trainer.scores.standard import (
    PLAIN,
    f1,
    last_number,
    regex_score,
    rouge_l,
    schema_score,
    tool_calls,
    words_of,
)

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'


@pytest.mark.parametrize(
    ("name", "answer", "golden", "score"),
    [
        ("exact", " 4\n2 ", "4 2", 1),
        ("exact", "42", "4 2", 0),
        ("exact", "4", None, None),
        ("contains", "it is  4 2.", "4 2", 1),
        ("contains", "it is 42.", "4 2", 0),
        ("contains", "anything", " ", None),
        ("f1", "The cat sat", "the cat", 0.8),
        ("f1", "a a a", "a", 0.5),
        ("f1", "Größe Ё", "GRÖSSE ё", 1),
        ("f1", "", "a", 0),
        ("f1", "a", "?!", None),
        ("rouge_l", "b a", "a b", 0.5),
        ("rouge_l", "", "a b", 0),
        ("rouge_l", "猫が座る", "猫が座る", 1),
        ("number", "so 3 + 4 = 7.0", "#### 7", 1),
        ("number", "it costs $1,234.50.", "1234.5", 1),
        ("number", "5-3", "3", 1),
        ("number", "-3", "3", 0),
        ("number", "no idea", "3", 0),
        ("number", "3", "none", None),
        ("json", '{"a": 1}', None, 1),
        ("json", "NaN", None, 0),
        ("json", 'Sure: {"a": 1}', None, 0),
        ("tool_calls", CALL, CALL, 1),
        ("tool_calls", CALL.replace("[2]", "[3]"), CALL, 0),
        ("tool_calls", CALL + CALL, CALL, 0),
        ("tool_calls", '{"name": "add", "parameters": {"b": [2], "a": 1}}', CALL, 1),
        ("tool_calls", "<function=add><parameter=a>1</parameter></function>", CALL, 0),
        ("tool_calls", "no call", "no call", None),
    ],
)
def test_a_score_of_an_answer(
    name: str, answer: str, golden: str | None, score: float | None
) -> None:
    assert PLAIN[name](answer, golden) == (None if score is None else pytest.approx(score))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("x = -4", "-4"),
        ("\N{MINUS SIGN}5", "-5"),
        ("step2", "2"),
        ("1e3", "1000"),
        (".5", "0.5"),
        ("5.", "5"),
        ("1,234,567 people", "1234567"),
        ("<<48/2=24>>24", "24"),
        ("9" * 2000, None),
        ("1e99999999999999999999", None),
        ("٣", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_calls_in_xml_are_calls_too() -> None:
    golden = "<function=add>\n<parameter=a>\n1\n</parameter>\n</function>"
    assert tool_calls('{"name": "add", "arguments": "{\\"a\\": 1}"}', golden) == 1


def test_a_pattern_is_looked_for() -> None:
    assert [regex_score(r"^\d+$")(text, None) for text in ("42", "it is 42")] == [1, 0]
    with pytest.raises(ConfigError, match="no regular expression"):
        regex_score("(")


def test_json_is_held_against_a_schema(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", "required": ["a"]}))
    try:
        import jsonschema  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"pip install 'ultimate-trainer\[scores\]'"):
            schema_score(str(path))
        return
    fits = schema_score(str(path))
    assert [fits(text, None) for text in ('{"a": 1}', "{}", "no")] == [1, 0, 0]
    path.write_text('{"type": 3}')
    with pytest.raises(ConfigError, match="is no JSON Schema"):
        schema_score(str(path))


def test_a_schema_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        schema_score("/nowhere/schema.json")


WORDS = st.lists(st.sampled_from("abc"), max_size=12)


@given(WORDS, WORDS.filter(bool))
def test_rouge_l_is_the_longest_common_subsequence(said: list[str], wanted: list[str]) -> None:
    table = [[0] * (len(wanted) + 1) for _ in range(len(said) + 1)]
    for i, one in enumerate(said):
        for j, other in enumerate(wanted):
            best = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else best
    expected = 2 * table[-1][-1] / (len(said) + len(wanted))
    assert rouge_l(" ".join(said), " ".join(wanted)) == pytest.approx(expected)


def test_rouge_l_is_that_of_the_package() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for answer, golden in [("The cat sat on a mat.", "A cat was on the mat"), ("x", "y z")]:
        package = scorer.score(golden, answer)["rougeL"].fmeasure
        assert rouge_l(answer, golden) == pytest.approx(package)


@given(st.text())
def test_every_standard_score_takes_every_text(text: str) -> None:
    for score in PLAIN.values():
        for golden in (text, "a 1", None):
            found = score(text, golden)
            assert found is None or 0 <= found <= 1
    assert words_of(text) == words_of(text)


# ---- names


def test_scores_are_named_after_what_they_are() -> None:
    entries = ["exact", r"regex:a=b:\d", "polite=regex:^Dear", "json_schema:s.json", "a.b:C.d"]
    found = parse_scores(entries)
    assert [one.name for one in found] == ["exact", "regex", "polite", "json_schema", "d"]
    assert found[1].argument == r"a=b:\d"
    assert [is_function(entry) for entry in entries] == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["exakt"], "Did you mean 'exact'"),
        (["regex"], "which is no score"),
        (["my file.py:f"], "which is no score"),
        (["exact", "exact"], "NAME=SCORE"),
    ],
)
def test_what_names_no_score_is_an_error(entries: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_scores(entries)


@pytest.mark.parametrize(
    ("answer", "golden", "expected"),
    [
        ("\U0001f600", "\U0001f600", 1.0),
        ("\U0001f600 yes", "\U0001f622 yes", 0.5),
        ("\u5317\u4eac\u5e02", "\u5317\u4eac", 0.8),
        ("\u0623\u0647\u0644\u0627 \u0628\u0643", "\u0623\u0647\u0644\u0627", 2 / 3),
        ("yes!", "yes", 1.0),
        ("a_b", "a b", 1.0),
    ],
)
def test_emoji_and_characters_of_unspaced_scripts_are_words(
    answer: str, golden: str, expected: float
) -> None:
    assert f1(answer, golden) == pytest.approx(expected)
