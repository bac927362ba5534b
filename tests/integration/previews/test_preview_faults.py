"""Whatever a preview server does: training ends with the same weights, nothing is mislabelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.integration import faulty_proxy as faults
from tests.integration.serving import Server

pytestmark = pytest.mark.slow

PARTS, PREVIEWS = r"PUT /weights/\w+/parts", r"POST /previews"


def shifted(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**one, "step": one["step"] - 1} for one in results]


# fault, requests it hits, how often, whether previews are lost for good
CASES: dict[str, tuple[str, faults.Fault, int, bool]] = {
    "a part is cut off in the middle": (PARTS, faults.reset_mid_body, 2, False),
    "a bit flips on the way": (PARTS, faults.flipped_bit, 1, False),
    "the connection drops on the offer": (r"POST /weights$", faults.reset, 2, False),
    "the connection drops after the commit": (r"/commit$", faults.reset, 1, False),
    "it accepts and never answers": (PREVIEWS, faults.hang, 10**6, True),
    "it answers garbage": (PREVIEWS, faults.garbage, 10**6, True),
    "it answers garbage to an offer": (r"POST /weights$", faults.garbage, 10**6, True),
    "it answers another schema": (PREVIEWS, faults.wrong_schema, 10**6, True),
    "it redirects": (PREVIEWS, faults.redirect, 10**6, True),
    "it answers 1 GiB": (PREVIEWS, faults.one_gibibyte, 10**6, True),
    "it names other weights": (PREVIEWS, faults.edited(weights_id="0" * 64), 10**6, True),
    "it names another step": (PREVIEWS, faults.edited(step=lambda s: s + 1), 10**6, True),
    "its answers are of another step": (PREVIEWS, faults.edited(results=shifted), 10**6, True),
    "an answer is missing": (PREVIEWS, faults.edited(results=lambda r: r[1:]), 10**6, True),
    "answers are swapped": (PREVIEWS, faults.edited(results=lambda r: r[::-1]), 10**6, True),
    "its weights compute otherwise": (
        PREVIEWS,
        faults.edited(canary_logprob=lambda value: value - 0.5),
        10**6,
        True,
    ),
    "it forgets the canary": (PREVIEWS, faults.edited(canary_logprob=None), 10**6, True),
}


LONG = {"a part is cut off in the middle", "answers are swapped", "a bit flips on the way"}
"""Siblings of others: the exhaustive tests have them."""


@pytest.mark.parametrize(
    "case", [pytest.param(one, marks=pytest.mark.long if one in LONG else ()) for one in CASES]
)
def test_training_is_the_same_and_nothing_is_mislabelled_when(
    attempt: Callable[..., Any], server: Server, case: str
) -> None:
    pattern, fault, times, is_lost = CASES[case]
    with faults.faulty_proxy(server.port, pattern, fault, times) as proxy:
        result, rows = attempt(proxy.server_address[1])
    assert proxy.hits, "the fault was never met"
    failed = [row for row in rows if row["error_message"] is not None]
    assert bool(failed) == is_lost, rows
    assert all(row["text"] == "" and row["matches"] is None for row in failed)
    if is_lost and times > 1:
        assert len(failed) == len(rows), "an answer of a faulty server was shown"
    assert result.summary["previews"]["failed"] == len(failed)
