"""messages -> input_ids + labels: the assistant's tokens are trained; of plain text, every one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from trainer.data.plain_text import TextEncoder
from trainer.data.rendered import Rendered, render_row
from trainer.data.rows import (
    IGNORE_INDEX,
    BadRowError,
    Example,
    cut,
    golden_text,
    is_text,
    is_tokens,
    kept_weights,
)
from trainer.data.shapes import Ahead, Shapes
from trainer.data.spans import SpanFinder, Spans
from trainer.data.template import PROBE, ChatTemplate
from trainer.data.token_rows import TokenEncoder
from trainer.data.tools import refuse_lost_tools, tools_of
from trainer.data.turns import assistant_turns, num_openings
from trainer.errors import TemplateError
from trainer.profiles import Message

REFUSED = "refused by the chat template"

CHUNK = 256  # rows per tokenizer call: the fast tokenizer works on a chunk in parallel


@dataclass(frozen=True)
class Begun:
    """Rows that are rendered, and tokenized now or later."""

    chunk: list[list[Message]]
    turns: list[list[Message]]
    """Of these, the conversations."""
    rendered: list[Rendered | BadRowError]
    """Of each conversation."""
    encodings: Callable[[], list[Any]]
    """Waits for the tokens of what is rendered."""


class RowEncoder:
    """Turns conversations into examples with one tokenizer, one template, one length."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        truncation: str = "keep_start",
        train_on_thinking: bool = True,
    ) -> None:
        """Examine the chat template.

        Args:
            tokenizer: a transformers fast tokenizer.
            max_length: longest example in tokens.
            truncation: what becomes of longer ones, as `data.truncation`.
            train_on_thinking: whether thoughts are trained, as `data.train_on_thinking`.
        Raises:
            TemplateError: the template cannot be proved.
        """
        self.template = ChatTemplate(tokenizer)
        self.finder = SpanFinder(self.template, train_on_thinking=train_on_thinking)
        self.shapes = Shapes(self.template)
        self.tokenizer = tokenizer
        self.max_length, self.truncation = max_length, truncation
        specials = sorted(
            {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
            | set(tokenizer.all_special_tokens),
            # The longest first, and no two alike: the pattern is part of the cache's key.
            key=lambda text: (-len(text), text),
        )
        self.texts = TextEncoder(tokenizer, max_length, truncation, self.template.end_ids)
        self.tokens = TokenEncoder(tokenizer, max_length, truncation)
        self._prove_template()
        self.control_tokens = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    def _prove_template(self) -> None:
        """Find the answer of a small conversation, so that a hopeless template stops the run."""
        try:
            rendered = render_row(self.template, PROBE)
            [encoding] = self.template.encode([rendered.text])
            spans = self.finder.find(rendered, encoding)
            self._check_prompt(spans, encoding.ids, self._encoded_prompts([spans]))
        except BadRowError as error:
            raise TemplateError(
                "it cannot be proved which tokens the assistant writes under the model's chat "
                f"template: {error}. Put {{% generation %}} ... {{% endgeneration %}} around "
                "the assistant's content and its end-of-turn token in the folder's "
                "chat_template.jinja, and see that "
                "add_generation_prompt writes the header of the answer."
            ) from error

    def encode_all(self, conversations: list[list[Message]]) -> list[Example | BadRowError]:
        """Encode conversations, in order; what cannot be encoded comes back as its error.

        A "conversation" of one TEXT_ROLE turn is plain text: no template, every token trained.
        """
        return self.finish(self.begin(conversations))

    def begin(
        self, conversations: list[list[Message]], pool: Executor | None = None
    ) -> list[Begun]:
        """Render conversations; `finish` encodes them, and they may be begun before others end.

        Args:
            pool: tokenizes meanwhile; None: that is left to `finish`.
        """
        chunks = [conversations[at : at + CHUNK] for at in range(0, len(conversations), CHUNK)]
        return [self._begin(chunk, pool) for chunk in chunks]

    def finish(self, begun: list[Begun]) -> list[Example | BadRowError]:
        """As `encode_all`."""
        return [result for chunk in begun for result in self._finish_chunk(chunk)]

    def encode(self, messages: list[Message]) -> Example:
        """Encode one conversation.

        Raises:
            BadRowError: it cannot be encoded, or nothing in it would be trained.
        """
        [result] = self.encode_all([messages])
        if isinstance(result, BadRowError):
            raise result
        return result

    def _begin(self, chunk: list[list[Message]], pool: Executor | None) -> Begun:
        turns = [row for row in chunk if not is_text(row) and not is_tokens(row)]
        ahead = self.shapes.render_ahead(turns)
        rendered = [self._render(row, found) for row, found in zip(turns, ahead, strict=True)]
        texts = [found.text for found in rendered if isinstance(found, Rendered)]
        tokenize = partial(self.template.encode, texts)
        if not texts or pool is None or not self.template.is_usual:
            return Begun(chunk, turns, rendered, tokenize if texts else list)
        return Begun(chunk, turns, rendered, pool.submit(tokenize).result)

    def _finish_chunk(self, begun: Begun) -> list[Example | BadRowError]:
        texts = [row[0] for row in begun.chunk if is_text(row)]
        from_texts = iter(self.texts.encode_chunk(texts, self._refuse_control) if texts else ())
        from_turns = iter(self._finish_turns(begun))
        return [
            self.tokens.encode(row[0], self.texts.say, self.texts.end_ids)
            if is_tokens(row)
            else next(from_texts if is_text(row) else from_turns)
            for row in begun.chunk
        ]

    def _finish_turns(self, begun: Begun) -> list[Example | BadRowError]:
        encodings = iter(begun.encodings())
        found = [
            result if isinstance(result, BadRowError) else self._find(result, next(encodings))
            for result in begun.rendered
        ]
        prompts = self._encoded_prompts([part[0] for part in found if isinstance(part, tuple)])
        results: list[Example | BadRowError] = []
        for row, part in zip(begun.turns, found, strict=True):
            if isinstance(part, BadRowError):
                is_refused = part.reason == REFUSED and num_openings(row)
                results.append(self._encode_without_opening(row) if is_refused else part)
            else:
                results.append(self._finish(row, *part, prompts))
        return results

    def _encode_without_opening(self, row: list[Message]) -> Example | BadRowError:
        """A row whose template takes no assistant turn before the first user turn.

        Such a greeting is not trained anyway; without it the answers still are, and its text is
        reported like everything that a template leaves out.
        """
        first = [turn["role"] for turn in row].index("user")
        before = [turn for turn in row[:first] if turn["role"] != "assistant"]
        [result] = self.encode_all([[*before, *row[first:]]])
        if isinstance(result, BadRowError):
            return result
        left_out = [turn["content"] for turn in row[:first] if turn["role"] == "assistant"]
        return replace(result, stripped=(*left_out, *result.stripped))

    def _render(self, row: list[Message], ahead: Ahead | None) -> Rendered | BadRowError:
        try:
            self._refuse_special_text(row)
            rendered = self.shapes.render(row, ahead) or render_row(self.template, row)
            if tools_of(row):
                refuse_lost_tools(row, rendered.text)
            return rendered
        except BadRowError as error:
            return error
        except TemplateError as error:
            return BadRowError(str(error), REFUSED)

    def _find(self, rendered: Rendered, encoding: Any) -> tuple[Spans, list[int]] | BadRowError:
        try:
            return self.finder.find(rendered, encoding), encoding.ids
        except BadRowError as error:
            return error

    def _encoded_prompts(self, spans: list[Spans]) -> dict[str, list[int]]:
        """The ends of prompts as tokens; most rows of a file share one."""
        texts = list(dict.fromkeys(found.last_prompt[0] for found in spans if found.last_prompt))
        encodings = self.template.encode(texts) if texts else []
        return {text: found.ids for text, found in zip(texts, encodings, strict=True)}

    def _finish(
        self, row: list[Message], spans: Spans, ids: list[int], prompts: dict[str, list[int]]
    ) -> Example | BadRowError:
        try:
            _refuse_lost_system(row, spans.stripped)
            self._check_prompt(spans, ids, prompts)
            return self._example(row, ids, spans)
        except BadRowError as error:
            return error

    def _check_prompt(self, spans: Spans, ids: list[int], prompts: dict[str, list[int]]) -> None:
        """Refuse rows whose last prompt, taken by itself, becomes other tokens than in the row."""
        if spans.last_prompt is None:
            return
        text, begin, end = spans.last_prompt
        if prompts[text] != ids[begin:end]:
            alone, inside = (
                self.tokenizer.convert_ids_to_tokens(part)[-4:]
                for part in (prompts[text], ids[begin : end + 1])
            )
            raise BadRowError(
                "the prompt of the last assistant turn is not a prefix of the whole row under the "
                "model's chat template, so training and generation would not see the same tokens: "
                f"{text[-40:]!r} ends with the tokens {alone} by itself, and continues as "
                f"{inside} in the row",
                "template not provable",
            )

    def _example(self, row: list[Message], ids: list[int], spans: Spans) -> Example:
        labels = [IGNORE_INDEX] * len(ids)
        weights: list[float] | None = None
        turns = assistant_turns(row)
        trained = []
        for (begin, end), turn in zip(spans.ranges, turns, strict=False):
            weight = row[turn].get("weight", 1.0)
            if not weight:
                continue
            labels[begin:end] = ids[begin:end]
            trained.append((turn, begin, end))
            if weight != 1:
                weights = weights or [1.0] * len(ids)
                weights[begin:end] = [weight] * (end - begin)
        kept_ids, kept_labels = cut(ids, labels, self.max_length, self.truncation)
        is_cut_at_end = len(ids) > self.max_length and self.truncation == "keep_start"
        limit = self.max_length if is_cut_at_end else len(ids)
        removed = len(ids) - len(kept_ids) if self.truncation == "keep_end" else 0
        first_turn, prompt_length = _first_whole_answer(trained, kept_labels, removed)
        return Example(
            input_ids=kept_ids,
            labels=kept_labels,
            prompt=row[first_turn - 1]["content"],
            say=self._say,
            conversation=tuple(row[:first_turn]),
            is_truncated=len(ids) > self.max_length,
            ends_with_stop=all(
                ids[end - 1] in self.template.end_ids for _, _, end in trained if end <= limit
            ),
            stripped=spans.stripped,
            prompt_length=prompt_length,
            num_removed=len(ids) - len(kept_ids),
            num_thoughts=spans.num_thoughts,
            is_opened=spans.is_opened,
            is_by_shape=spans.is_by_shape,
            weights=kept_weights(weights and weights[removed:], kept_labels),
        )

    def sayer(self, *, is_plain_text: bool) -> Callable[[list[int]], str]:
        """What gives the text of an answer's ids, as `Example.say`.

        Args:
            is_plain_text: the row has no turns: it is a text, or tokens.
        """
        return self.texts.say if is_plain_text else self._say

    def _say(self, ids: list[int]) -> str:
        return golden_text(self.tokenizer, ids, self.template.end_ids)

    def control_token(self, text: str) -> str | None:
        """The first control token that the tokenizer would find in a text; None: there is none."""
        found = self.control_tokens.search(text)
        return found.group() if found else None

    def _refuse_special_text(self, row: list[Message]) -> None:
        for position, turn in enumerate(row):
            texts = [turn["content"]]
            if "reasoning_content" in turn:
                texts.append(turn["reasoning_content"])
            if "tool_calls" in turn or "tools" in turn:
                tools = [turn.get("tool_calls", ""), turn.get("tools", "")]
                texts.append(json.dumps(tools, ensure_ascii=False))
            for text in texts:
                self._refuse_control(text, f"turn {position} ({turn['role']})")

    def _refuse_control(self, text: str, where: str = "the text") -> None:
        found = self.control_token(text)
        if found is not None:
            raise BadRowError(
                f"{where} contains the text {found!r}, which the tokenizer turns into a "
                "control token; remove it from the data",
                "control token in text",
            )


def _refuse_lost_system(row: list[Message], stripped: tuple[str, ...]) -> None:
    """Refuse a row with a later system turn that the template leaves out."""
    for position, turn in enumerate(row):
        if position and turn["role"] == "system" and turn["content"].strip() in stripped:
            raise BadRowError(
                f"messages[{position}] is a system turn, which the model's chat template does not "
                "write there; make it the first turn, or a user turn",
                "system turn lost",
            )


def _first_whole_answer(
    trained: list[tuple[int, int, int]], labels: list[int], removed: int
) -> tuple[int, int]:
    """The first trained turn whose prompt is kept, and the tokens before it.

    Where the start of the only answer left is gone too, the prompt is what precedes its rest.

    Args:
        trained: (position in the row, begin, end in ids) of each turn that is trained.
    """
    for turn, begin, _ in trained:
        if begin > removed:
            return turn, begin - removed
    first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    return trained[-1][0], first
