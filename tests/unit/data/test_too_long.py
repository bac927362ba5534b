"""Rows beyond max_length are no bad rows, and rows of one reason stand together."""

from __future__ import annotations

import pytest

from trainer.data.rows import TOO_LONG, RowErrors
from trainer.errors import DataError


def test_rows_that_are_too_long_are_not_called_bad_and_the_advice_is_theirs() -> None:
    errors = RowErrors("strict")
    for n in range(30):
        errors.add(f"data.jsonl:{n + 1}", "nothing to train is left", TOO_LONG[1])
    with pytest.raises(DataError) as caught:
        errors.raise_if_strict()
    text = str(caught.value)
    assert text.startswith("30 rows too long for training:\n  30 rows: no trained token within")
    assert "bad" not in text
    assert "Raise hyperparams.max_length, or set data.truncation=drop" in text
    assert text.count("nothing to train is left") == 20
    assert "... and 10 more" in text


def test_equal_reasons_are_grouped_and_every_reason_is_shown() -> None:
    errors = RowErrors("strict")
    for n in range(50):
        errors.add(f"data.jsonl:{n + 1}", "no answer", "no answer")
    errors.add("data.jsonl:99", "is not JSON", "not JSON")
    errors.add("data.jsonl:100", "too long", TOO_LONG[0])
    with pytest.raises(DataError) as caught:
        errors.raise_if_strict()
    text = str(caught.value)
    assert text.startswith("51 bad rows and 1 row too long for training:")
    assert "\n  50 rows: no answer\n    data.jsonl:1: no answer" in text
    assert "\n  data.jsonl:99: is not JSON" in text
    assert "on_bad_row=skip" in text
    assert "max_length" in text


def test_rows_that_are_too_long_do_not_count_as_bad_under_skip() -> None:
    errors = RowErrors("skip", max_bad_rows=1)
    for reason in (*TOO_LONG, "no answer"):
        errors.add("x:1", "m", reason)
    errors.raise_if_strict()
    assert errors.num_bad == 1
