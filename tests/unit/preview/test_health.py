"""Health flags name what is visibly wrong with an answer."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.preview.base import health_flags

FINE: dict[str, Any] = {
    "text": "The answer is four.",
    "token_ids": list(range(30)),
    "prompt": "What is two plus two, please?",
    "golden": "four",
    "is_stopped": True,
    "leak_ids": {99},
}


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        ({}, ()),
        ({"text": " \n"}, ("empty",)),
        ({"token_ids": [1, 2, 3, 4] * 8}, ("repeats",)),
        ({"token_ids": [1, 2] * 5}, ()),
        ({"is_stopped": False}, ("never_stopped",)),
        ({"token_ids": [1, 99, 2]}, ("template_leak",)),
        ({"text": "What is two plus two, please? Four"}, ("copies_prompt",)),
        (
            {"text": "What is two plus two, please?", "golden": "What is two plus two, please?"},
            (),
        ),
    ],
)
def test_each_fault_has_its_flag_and_no_other(
    change: dict[str, Any], flags: tuple[str, ...]
) -> None:
    assert health_flags(**{**FINE, **change}) == flags
