"""The date that a chat template prints: the run's own, not that of the day on which it renders.

Some templates write today's date into every conversation (Llama 3.2, gpt-oss), by a function
`strftime_now` that transformers gives them. A run that is resumed, shown or asked on another day
would train on and answer other prompts than it began with. So a tokenizer can be told a date, and
its template is rendered behind a definition of `strftime_now` that says this date. The template
itself, which is saved with the model, stays as it is.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from functools import lru_cache
from typing import Any

FUNCTION = "strftime_now"
CALL = re.compile(rf"\b{FUNCTION}\s*\(\s*(?:\"(?P<a>[^\"\\]*)\"|'(?P<b>[^'\\]*)')?\s*\)?")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
DIRECTIVES = (
    *"aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZf",
    *(f"-{code}" for code in "dmHIMSjyeUW"),
)
"""Codes of strftime behind `%`, those of the C library too."""


def fix_date(tokenizer: Any, date: dt.date | None) -> None:
    """Let the tokenizer's template print this date from now on; None: that of the day."""
    tokenizer.template_date = date


def date_options(tokenizer: Any) -> dict[str, Any]:
    """What `apply_chat_template` must be given so that the tokenizer's date is printed.

    Args:
        tokenizer: one that was told its date, or not.
    """
    text = tokenizer.chat_template
    date = getattr(tokenizer, "template_date", None)
    if date is not None and isinstance(text, str) and FUNCTION in text:
        return {"chat_template": _definition(date) + text}
    return {}


def printed_dates(tokenizer: Any) -> dict[str, str]:
    """What the tokenizer's template can print of its date: format -> text; {} for most templates.

    Two dates that give the same texts render alike.
    """
    template = tokenizer.chat_template
    text = COMMENT.sub("", template) if isinstance(template, str) else ""
    date = getattr(tokenizer, "template_date", None) or dt.date.today()
    found = {}
    for call in CALL.finditer(text):
        given = call["a"] if call["a"] is not None else call["b"]
        is_plain = given is not None and call[0].endswith(")")
        # What is put together within the template can be any format.
        words = given if is_plain and given is not None else "%c"
        found[words] = _midnight(date).strftime(words)
    return found


def is_dated(tokenizer: Any) -> bool:
    """Whether the tokenizer's template prints the date."""
    return bool(printed_dates(tokenizer))


def _midnight(date: dt.date) -> dt.datetime:
    return dt.datetime.combine(date, dt.time())


@lru_cache(maxsize=8)
def _definition(date: dt.date) -> str:
    """A macro `strftime_now`, in front of which and behind which nothing is printed.

    transformers hands templates plain values only, so the function is written in the template's
    own language: every code of strftime is replaced by what it says of the date.
    """
    moment = _midnight(date)
    # "%%" must not make a code of what follows it.
    steps = [("%%", "%\u0001")]
    steps += [(f"%{code}", moment.strftime(f"%{code}")) for code in DIRECTIVES]
    steps += [("%\u0001", "%")]
    filters = "".join(
        f" | replace({json.dumps(old)}, {json.dumps(new)})" for old, new in steps if new != old
    )
    # The line end is trimmed, and the template begins at the beginning of a line as it did.
    return f"{{%- macro {FUNCTION}(format) -%}}{{{{- format{filters} -}}}}{{%- endmacro %}}\n"
