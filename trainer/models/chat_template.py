"""Chat templates: one for tokenizers that have none, the date that it prints, and its hash."""

from __future__ import annotations

import datetime as dt
import json
import re
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.files import canonical_hash

ONE_RENDERING = threading.Lock()
"""Held while a template is rendered: transformers keeps one compiled template for all threads, and
what notes its generation markers cannot be used by two. Streamed rows are rendered by a thread."""

# ---- the date that a chat template prints: the run's own, not that of the day on which it renders
#
# Some templates write today's date into every conversation (Llama 3.2, gpt-oss), by a function
# `strftime_now` that transformers gives them. A run that is resumed, shown or asked on another day
# would train on and answer other prompts than it began with. So a tokenizer can be told a date, and
# its template is rendered behind a definition of `strftime_now` that says this date. The template
# itself, which is saved with the model, stays as it is.


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


# ---- chat templates for tokenizers that have none: `chatml`, `plain`, or a file of the user's
#
# Both named ones carry generation markers and write the tokenizer's BOS if it would add one itself.
# The tokenizer takes the template with it wherever it is saved.


CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
        {{- message['content'] + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

PLAIN = """\
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- 'Assistant:' -}}
        {%- generation -%}
            {{- ' ' + (message['content'] | trim) + eos_token -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
        {{- (message['role'] | capitalize) + ': ' + (message['content'] | trim) + '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant:' -}}
{%- endif -%}
"""

BOS = "{{- bos_token -}}\n"


def set_chat_template(tokenizer: Any, choice: str | None) -> None:
    """Give a tokenizer the template of `model.chat_template`, or a default if it has none.

    The tokenizer's `template_origin` then says in words where its template is from.

    Args:
        tokenizer: changed in place.
        choice: `chatml`, `plain`, the path of a Jinja file, or None: the model's own, and where
            there is none `chatml` if its tokens are known, else `plain`.
    Raises:
        ConfigError: no such file, or the tokenizer lacks a token that the template needs.
    """
    if choice is None:
        if tokenizer.chat_template:
            return
        name = "chatml" if _has_chatml_tokens(tokenizer) else "plain"
        origin = f"`{name}`, because the model has none"
    else:
        name = choice
        origin = f"`{name}`, by model.chat_template"
    if name == "chatml":
        _need_chatml_tokens(tokenizer)
        template = CHATML
    elif name == "plain":
        _need_eos(tokenizer)
        template = PLAIN
    else:
        tokenizer.chat_template = _read_template(name)
        tokenizer.template_origin = origin
        return
    tokenizer.chat_template = (BOS if _adds_bos(tokenizer) else "") + template
    tokenizer.template_origin = origin


def takes_parts(tokenizer: Any) -> bool:
    """Whether the template wants content as a list of parts, as those of vision models do."""
    turns = [{"role": "user", "content": "quay"}, {"role": "assistant", "content": "zebra"}]

    def shows(spelled: list[dict[str, Any]]) -> bool:
        try:
            with ONE_RENDERING:
                text = tokenizer.apply_chat_template(
                    spelled, tokenize=False, **date_options(tokenizer)
                )
        except Exception:  # whatever a template raises says that it does not take this
            return False
        return all(turn["content"] in text for turn in turns)

    return not shows(turns) and shows(in_parts(turns))


def in_parts(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The turns with each content as a list of one text part."""
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def as_taken(tokenizer: Any, turns: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The turns with content as the tokenizer's template takes it: text, or a list of parts."""
    return in_parts(turns) if takes_parts(tokenizer) else turns


def _has_chatml_tokens(tokenizer: Any) -> bool:
    return set(CHATML_TOKENS) <= set(tokenizer.get_vocab())


def _need_chatml_tokens(tokenizer: Any) -> None:
    if not _has_chatml_tokens(tokenizer):
        raise ConfigError(
            f"model.chat_template=chatml needs the tokens {' and '.join(CHATML_TOKENS)}, which "
            "this model's tokenizer does not have; use plain, or a file."
        )


def _need_eos(tokenizer: Any) -> None:
    if tokenizer.eos_token is None:
        raise ConfigError(
            "the chat template `plain` ends a turn with the end-of-text token, and this model's "
            "tokenizer has none; set eos_token in its tokenizer_config.json, or give a file."
        )


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _read_template(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"model.chat_template={name}: there is no such file. Give chatml, plain, or the path "
            "of a Jinja chat template."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.chat_template={name}: cannot be read: {error}.") from error
    if not text.strip():
        raise ConfigError(f"model.chat_template={name}: the file is empty.")
    return text


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of everything that turns text into ids, the chat template apart."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls with padding or truncation leave their settings there; they are not the vocabulary.
    state.pop("padding", None)
    state.pop("truncation", None)
    return canonical_hash(state)


def chat_template_hash(tokenizer: Any) -> str:
    """Hash of the chat template ("" where there is none)."""
    return canonical_hash(tokenizer.chat_template or "")
