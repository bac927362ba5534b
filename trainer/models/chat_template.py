"""Chat templates for tokenizers that have none: `chatml`, `plain`, or a file of the user's.

Both named ones carry generation markers and write the tokenizer's BOS if it would add one itself.
The tokenizer takes the template with it wherever it is saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.models.template_date import date_options

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
            text = tokenizer.apply_chat_template(spelled, tokenize=False, **date_options(tokenizer))
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
