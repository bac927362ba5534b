"""A tokenizer's chat template: turns -> text -> ids, and what it does round the answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import count
from typing import Any

from trainer.data.rows import is_usual
from trainer.data.tools import (
    CALLED,
    SAYS,
    THOUGHT,
    answer,
    call_turn,
    find_dialect,
    question,
    result_turn,
    tools_of,
)
from trainer.errors import TemplateError
from trainer.models.chat_template import ONE_RENDERING, date_options
from trainer.profiles import Message

# ---- marks in the texts of a row, so that they can be found again once a template rendered them
#
# A mark is one character that no row holds, put behind a text. What the template makes of marked
# turns, less the marks, must be what it makes of the turns themselves; where that holds, the marks
# say where each text ends, whatever the template wrote round it and in which order.


FIRST, LAST = 0x108000, 0x10FFFD
"""The last characters of Unicode, for private use: no font and hardly any data knows them."""

MARK = re.compile(f"[{chr(FIRST)}-{chr(LAST)}]")


@dataclass(frozen=True)
class TurnMarks:
    """The marks of one turn; None where the turn has no such text."""

    content: str | None
    thought: str | None
    calls: tuple[str, ...]
    """Behind the name of each function called."""

    @property
    def last(self) -> list[str]:
        """The marks behind what a turn says or calls; its thought comes before both."""
        return [*([self.content] if self.content else []), *self.calls]


def has_marks(text: str) -> bool:
    """Whether a text holds characters that are used as marks."""
    return MARK.search(text) is not None


def without_marks(text: str) -> str:
    """The text less its marks."""
    return MARK.sub("", text)


def mark_places(with_marks: str) -> dict[str, list[int]]:
    """Where each mark stands, as positions of the text without marks."""
    places: dict[str, list[int]] = {}
    for removed, found in enumerate(MARK.finditer(with_marks)):
        places.setdefault(found.group(), []).append(found.start() - removed)
    return places


def marked(row: list[Message], *, only_answers: bool) -> tuple[list[Message], list[TurnMarks]]:
    """A copy of the row with a mark behind each text, and the marks turn by turn.

    Args:
        row: the turns.
        only_answers: leave the other turns as they are, for templates that look at their ends.
    """
    numbers = count(FIRST)
    turns, marks = [], []
    for turn in row:
        is_answer = turn["role"] == "assistant"
        found = TurnMarks(None, None, ())
        if is_answer or not only_answers:
            calls = tuple(chr(next(numbers)) for _ in turn.get("tool_calls", []))
            found = TurnMarks(
                content=chr(next(numbers)) if turn["content"].strip() else None,
                thought=chr(next(numbers)) if turn.get("reasoning_content", "").strip() else None,
                calls=calls,
            )
        turns.append(_with_marks(turn, found))
        marks.append(found)
    return turns, marks


def _with_marks(turn: Message, marks: TurnMarks) -> Message:
    copy = turn.copy()
    if marks.content:
        copy["content"] = _mark_behind(turn["content"], marks.content)
    if marks.thought:
        copy["reasoning_content"] = _mark_behind(turn["reasoning_content"], marks.thought)
    if marks.calls:
        copy["tool_calls"] = [
            {**call, "function": {**call["function"], "name": call["function"]["name"] + mark}}
            for call, mark in zip(turn["tool_calls"], marks.calls, strict=True)
        ]
    return copy


def _mark_behind(text: str, mark: str) -> str:
    """The mark behind the last character that is no space: templates strip what follows it."""
    core = text.rstrip()
    return core + mark + text[len(core) :]


def shared_start(a: str, b: str) -> int:
    """How many leading characters two texts share."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices are compared far faster than characters
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


# ---- a tokenizer's chat template: turns -> text -> ids, and what it does round the answers
#
# The ids are always those of the model's own template, which is also the one saved. What it does is
# found by rendering small conversations: how it wants turns to be spelled (`tools.py`), what the
# prompt of an answer ends with, and which tokens end an answer.


PROBE = [
    Message(role="user", content="a"),
    Message(role="assistant", content="b"),
]

# Templates that know thinking leave an empty thought in the prompt; the others ignore the name.
TEMPLATE_OPTIONS: dict[str, Any] = {"enable_thinking": False}


RENDERING = (
    *("apply_chat_template", "get_chat_template", "special_tokens_map"),
    *("__call__", "_encode_plus"),
)
"""Methods of tokenizers that turns go through; where a class has its own, they are called."""


@dataclass(frozen=True)
class Asking:
    """The end of the prompt of an answer, under one value of `enable_thinking`."""

    tail: str
    """What follows the user's words in the prompt."""
    openings: tuple[str, ...]
    """Ends of `tail` that a row without a thought does not have, such as an opened thought."""
    is_always: bool
    """Whether even a row of one question and one answer lacks the first of them."""


class ChatTemplate:
    """A tokenizer's chat template, and what was found out about it."""

    def __init__(self, tokenizer: Any) -> None:
        """Try the template.

        Raises:
            TemplateError: no template, or it takes no conversation, or nothing ends an answer.
        """
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise TemplateError(
                "the tokenizer has no chat template, so turns cannot be put into tokens; choose an "
                "instruction-tuned model, or add chat_template.jinja to the model folder."
            )
        self.has_markers = bool(re.search(r"\{%[-+]?\s*generation\b", tokenizer.chat_template))
        self.is_usual = is_usual(tokenizer, *RENDERING)
        self.special_ids = frozenset(
            {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
            | set(tokenizer.all_special_ids)
        )
        self._special = _pattern(tokenizer.convert_ids_to_tokens(sorted(self.special_ids)))
        self.dialect = find_dialect(tokenizer, self._render)
        self.source = self._source()
        self.asking = {thinking: self._asking(thinking) for thinking in (False, True)}
        self.asks = self.text([question()], ask=True) != self.text([question()])
        """Whether asking for an answer adds anything to the turns."""
        self.thought_end = self._find_thought_end()
        self.end_ids = self._find_ends()
        self.stop_ids = self.end_ids - self._ids_inside()
        """The tokens at which generation stops: what ends an answer and stands in none."""

    def text(self, turns: list[Message], *, ask: bool = False, thinking: bool = False) -> str:
        """The turns under the model's own template.

        Args:
            turns: with the arguments of calls in the form of `dialect`.
            ask: end with the header that asks for an answer.
            thinking: value of the template's option `enable_thinking`.
        Raises:
            TemplateError: the template refuses them; its own words are in the message.
        """
        return self._render(self.dialect.spelled(turns), ask=ask, thinking=thinking)

    def _render(self, turns: list[Message], *, ask: bool = False, thinking: bool = False) -> str:
        """The text of turns that are handed to the template as they are."""
        options = {**TEMPLATE_OPTIONS, "enable_thinking": thinking}
        tools = tools_of(turns)
        if tools is not None:
            options["tools"] = tools
        try:
            with ONE_RENDERING:
                text: str = self.tokenizer.apply_chat_template(
                    turns,
                    tokenize=False,
                    add_generation_prompt=ask,
                    **{**options, **date_options(self.tokenizer)},
                )
        except Exception as error:  # jinja2 errors, and whatever a template raises itself
            raise _refusal(error) from error
        return text

    def encode(self, texts: list[str]) -> Any:
        """Tokens of rendered texts: one `tokenizers.Encoding` each, with `ids` and positions."""
        if not self.is_usual:
            return self.tokenizer(texts, add_special_tokens=False).encodings
        # As transformers does, less the lists that it makes of each encoding.
        backend = self.tokenizer.backend_tokenizer
        # What is set already stays untouched: another thread may be tokenizing.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != self.tokenizer.split_special_tokens:
            backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return backend.encode_batch(texts, add_special_tokens=False)

    def texts_and_markers(
        self, rows: list[list[Message]], *, thinking: bool
    ) -> list[tuple[str, list[tuple[int, int]] | None]]:
        """As `text` of each row, and the stretches of it between generation markers; None without.

        Args:
            rows: with the same tools, if any.
        Raises:
            TemplateError: the template refuses one of them.
        """
        spelled = [self.dialect.spelled(turns) for turns in rows]
        if self.is_usual:
            return self._by_jinja(spelled, thinking) if rows else []
        texts = [self._render(turns, thinking=thinking) for turns in spelled]
        if not self.has_markers:
            return [(text, None) for text in texts]
        found = self._by_jinja(spelled, thinking)
        return [(text, markers) for text, (_, markers) in zip(texts, found, strict=True)]

    def _by_jinja(
        self, rows: list[list[Message]], thinking: bool
    ) -> list[tuple[str, list[tuple[int, int]] | None]]:
        """What `apply_chat_template` does, less what it does anew for every row."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with ONE_RENDERING:
                texts, found = render_jinja_template(
                    rows,
                    tools=tools_of(rows[0]),
                    return_assistant_tokens_mask=self.has_markers,
                    **{
                        "chat_template": self.tokenizer.chat_template,
                        **self.tokenizer.special_tokens_map,
                        **TEMPLATE_OPTIONS,
                        "enable_thinking": thinking,
                        **date_options(self.tokenizer),
                    },
                )
        except Exception as error:  # as in _render
            raise _refusal(error) from error
        return list(zip(texts, found if self.has_markers else [None] * len(texts), strict=True))

    @property
    def opening(self) -> str:
        """The thought that every prompt opens and that a row without one does not have, or ""."""
        asking = self.asking[False]
        return asking.openings[0] if asking.is_always else ""

    def thought_words(self, *, is_trained: bool) -> str:
        """What becomes of thoughts, for the data card."""
        fate = "trained" if is_trained else "context only, no loss (data.train_on_thinking=false)"
        if self.dialect.thought != "content":
            return fate
        return f"{fate}; written as <think>...</think>, for which the chat template has no form"

    def _source(self) -> str:
        origin = getattr(self.tokenizer, "template_origin", None)
        name = (
            "the model's own chat template" if origin is None else f"the chat template ({origin})"
        )
        how = "the generation markers" if self.has_markers else "the output"
        return f"assistant turns, located by {how} of {name}"

    def _marked(self, turns: list[Message], **options: Any) -> tuple[str, list[Any]]:
        """The text of marked turns, and the marks."""
        with_marks, marks = marked(turns, only_answers=False)
        return self.text(with_marks, **options), marks

    def _asking(self, thinking: bool) -> Asking:
        """Compare the end of a prompt with how answers begin in rows without thoughts."""
        prompt, [marks] = self._marked([question()], ask=True, thinking=thinking)
        tail = _behind(prompt, marks.content)
        openings: list[str] = []
        one, two = [question(), answer()], [question(), answer(), question(), answer()]
        for turns in (one, two):
            try:
                text, [first, *_] = self._marked(turns, thinking=thinking)
            except TemplateError:
                if turns is one:
                    raise
                continue  # a template for one question and one answer
            openings.append(tail[shared_start(tail, _behind(text, first.content)) :])
        found = tuple(dict.fromkeys(opening for opening in openings if opening))
        return Asking(tail, found, is_always=bool(openings[0]))

    def _find_thought_end(self) -> str:
        """What stands between a thought and the words or the call behind it."""
        if self.dialect.thought is None:
            return ""
        thought = {"reasoning_content": THOUGHT}
        ends = []
        for last in (answer(**thought), call_turn(self.dialect.arguments, **thought)):
            try:
                text, [_, marks] = self._marked([question(), last], thinking=True)
            except TemplateError:
                continue  # a template without calls
            if marks.thought in text:
                ends.append(_behind(text, marks.thought))
        if not ends:
            return ""
        shared = ends[0][: min(shared_start(ends[0], end) for end in ends)]
        said = shared.find(SAYS)
        shared = shared if said < 0 else shared[:said]
        # The next part of an answer may have a header like the first one's.
        tail = self.asking[True].tail
        headers = list(self._special.finditer(tail))
        header = tail[headers[-1].start() :] if headers else ""
        at = shared.find(header) if header else -1
        return shared if at < 0 else shared[: at + len(header)]

    def _find_ends(self) -> frozenset[int]:
        """The end-of-text token, and what follows the answers of small conversations."""
        eos = self.tokenizer.eos_token
        found = {eos} - {None}
        alone, [_, marks] = self._marked([question(), answer()])
        closing = _behind(alone, marks.content)
        for follower in (None, question(), result_turn()):
            turns = [question(), answer(), *([follower] if follower else [])]
            try:  # some families end a turn with the header of the next one, which may be a tool's
                text, [_, marks, *_] = self._marked(turns)
            except TemplateError:
                continue  # a family without tools, or one that wants a call before its result
            rest = _behind(text, marks.content)
            if eos is None or eos not in closing[: shared_start(closing, rest)]:
                found.update(self._specials(rest)[:1])
        found |= self._call_ends(found)
        if not found:
            raise TemplateError(
                "neither the tokenizer nor its chat template has a token that ends a turn, so a "
                "model trained with it could never stop; set eos_token in tokenizer_config.json."
            )
        return frozenset(self.tokenizer.convert_tokens_to_ids(sorted(found)))

    def _call_ends(self, known: set[str]) -> set[str]:
        """The token that ends a call, where it is not one of the known ones."""
        called = [question(), call_turn(self.dialect.arguments)]
        try:
            alone, [_, marks] = self._marked(called)
            text, [_, _, result, _] = self._marked([*called, result_turn(), answer()])
        except TemplateError:
            return set()
        if CALLED not in alone or CALLED not in text:
            return set()
        closing, rest = (_behind(whole, marks.calls[0]) for whole in (alone, text))
        rest = rest.partition(result.content)[0]
        shared = self._specials(closing[: shared_start(closing, rest)])
        if known & set(shared):
            return set()
        return set(shared[-1:] or self._specials(rest)[:1])

    def _ids_inside(self) -> set[int]:
        """Ends that also stand inside an answer, between its thought and its words."""
        if not self.thought_end:
            return set()
        return set(self.tokenizer.convert_tokens_to_ids(self._specials(self.thought_end)))

    def is_special(self, text: str) -> bool:
        """Whether a text is that of one control token."""
        return self._special.fullmatch(text) is not None

    def _specials(self, text: str) -> list[str]:
        return self._special.findall(text)


def _refusal(error: Exception) -> TemplateError:
    words = " ".join(str(error).split())
    return TemplateError(f"the model's chat template refuses these turns: {words}")


def _pattern(tokens: list[str]) -> re.Pattern[str]:
    """Finds control tokens in a text, the longest first."""
    longest = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest)) or r"(?!)")


def _behind(text: str, mark: str) -> str:
    """What follows the first place of a mark; nothing where it is not there."""
    return text.partition(mark)[2]
