"""Standard scores of an answer against its golden answer: each a number from 0 to 1, or None.

None says that the score does not apply, such as `number` where golden has no number. Words are
letters and digits of any script, without regard to case; each character of scripts that put no
spaces between words (Chinese, Japanese, Thai and the like), and each emoji, is a word.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError

Score = Callable[[str, str | None], float | None]
"""(answer, golden answer) -> its score."""

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
"""Thai, Lao, Burmese, Khmer, kana and ideographs."""

_WORDS = re.compile(
    rf"[{_UNSPACED}\U00020000-\U0003ffff]|[^\W{_UNSPACED}\U00020000-\U0003ffff]+|[^\w\s]"
)

_NUMBER = re.compile(
    r"(?<![\w.])-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII
)
"""A minus behind a word or a number is no sign: `5-3` ends with 3."""

_GLUED_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)

MAX_DIGITS = 1_000
"""A longer number is none that anybody meant."""


def exact(answer: str, golden: str | None) -> float | None:
    """Whether the answer is the golden one, white space aside."""
    return None if golden is None else float(answer.split() == golden.split())


def contains(answer: str, golden: str | None) -> float | None:
    """Whether the golden answer stands in the answer, white space aside."""
    if golden is None or not golden.strip():
        return None
    return float(" ".join(golden.split()) in " ".join(answer.split()))


def f1(answer: str, golden: str | None) -> float | None:
    """Overlap of the words, as often as they stand there: harmonic mean of precision and recall."""
    if golden is None or not (wanted := words_of(golden)):
        return None
    said = words_of(answer)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))


def rouge_l(answer: str, golden: str | None) -> float | None:
    """Words in a common order: harmonic mean of the longest common subsequence's two shares.

    As the package rouge-score has it (rougeL, without a stemmer), for words of any script.
    """
    if golden is None or not (wanted := words_of(golden)):
        return None
    said = words_of(answer)
    return 2 * _common_subsequence(said, wanted) / (len(said) + len(wanted))


def words_of(text: str) -> list[str]:
    """The words of a text, for `f1` and `rouge_l`."""
    found = _WORDS.findall(unicodedata.normalize("NFC", text).casefold().replace("_", " "))
    return [word for word in found if _is_word(word)]


def _is_word(text: str) -> bool:
    """Whether a match is one: of what is no letter or digit, symbols such as emoji only."""
    return len(text) > 1 or text.isalnum() or unicodedata.category(text) == "So"


def _common_subsequence(one: list[str], other: list[str]) -> int:
    """Length of the longest one; bits of a whole number are the cells of a row (Hyyro 2004)."""
    places: dict[str, int] = {}
    for index, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(one) - row.bit_count()


def number(answer: str, golden: str | None) -> float | None:
    """Whether the last number of the answer is the last number of the golden answer."""
    wanted = last_number(golden or "")
    if wanted is None:
        return None
    return float(last_number(answer) == wanted)


def last_number(text: str) -> Decimal | None:
    """The last number of a text, such as 1234.5 of `it costs $1,234.50.`"""
    text = text.replace("\N{MINUS SIGN}", "-")
    found = _NUMBER.findall(text) or _GLUED_NUMBER.findall(text)
    if not found or len(found[-1]) > MAX_DIGITS:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:  # an exponent without bounds
        return None


def parses(answer: str, golden: str | None) -> float:
    """Whether the answer is one JSON value."""
    return float(_json_of(answer) is not _NO_JSON)


_NO_JSON = object()


def _json_of(text: str) -> Any:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _NO_JSON


def schema_score(path: str) -> Score:
    """Whether the answer is JSON that fits the JSON Schema of a file.

    Raises:
        ConfigError: the file cannot be read, is no schema, or jsonschema is not installed.
    """
    where = f"monitoring.scores: json_schema:{path}"
    try:
        schema = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where}: cannot be read as JSON ({error}); give the file of a JSON Schema."
        ) from error
    try:
        import jsonschema  # an extra
    except ImportError as error:
        raise ConfigError(
            f"{where}: needs jsonschema, which is not installed; "
            "pip install 'ultimate-trainer[scores]'."
        ) from error
    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"{where}: is no JSON Schema ({error.message}); correct it.") from error
    validator = kind(schema)

    def fits(answer: str, golden: str | None) -> float:
        value = _json_of(answer)
        return float(value is not _NO_JSON and validator.is_valid(value))

    return fits


def regex_score(pattern: str) -> Score:
    """Whether a regular expression is found in the answer.

    Raises:
        ConfigError: it is none.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError) as error:
        raise ConfigError(
            f"monitoring.scores: regex:{pattern} is no regular expression ({error}); correct it."
        ) from error
    return lambda answer, golden: float(compiled.search(answer) is not None)


# ---- calls of tools, as chat templates write them into an answer


_XML_CALL = re.compile(r"<function=([^>\s]+)>(.*?)</function>", re.DOTALL)

_XML_ARGUMENT = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def tool_calls(answer: str, golden: str | None) -> float | None:
    """Whether the answer makes the calls of the golden one: names and arguments, in any order.

    Calls are JSON objects with a name and `arguments` (or `parameters`), or `<function=...>` with
    `<parameter=...>`. A golden answer without such a call has no score.
    """
    wanted = calls_of(golden or "")
    return float(calls_of(answer) == wanted) if wanted else None


def calls_of(text: str) -> Counter[str]:
    """The calls of a text as JSON, each as often as it is made."""
    found: list[tuple[str, Any]] = [
        (name, {key: _value_of(value) for key, value in _XML_ARGUMENT.findall(body)})
        for name, body in _XML_CALL.findall(text)
    ]
    decoder, place = json.JSONDecoder(), text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            found += _calls_in(value)
        place = text.find("{", end)
    return Counter(json.dumps(call, sort_keys=True, ensure_ascii=False) for call in found)


def _calls_in(value: dict[str, Any]) -> list[tuple[str, Any]]:
    inner = value.get("function")
    call = inner if isinstance(inner, dict) else value
    name = call.get("name")
    arguments = call.get("arguments", call.get("parameters"))
    if not isinstance(name, str) or arguments is None:
        return []
    return [(name, _value_of(arguments) if isinstance(arguments, str) else arguments)]


def _value_of(text: str) -> Any:
    """JSON where it is, else the text."""
    value = _json_of(text)
    return text if value is _NO_JSON else value


# ---- by name


PLAIN: dict[str, Score] = {
    "exact": exact,
    "contains": contains,
    "f1": f1,
    "rouge_l": rouge_l,
    "number": number,
    "json": parses,
    "tool_calls": tool_calls,
}

GRADED = frozenset({"f1", "rouge_l"})
"""Scores that are no verdict of right or wrong, also where all are 0 or 1."""

WITH_ARGUMENT: dict[str, Callable[[str], Score]] = {
    "json_schema": schema_score,
    "regex": regex_score,
}
