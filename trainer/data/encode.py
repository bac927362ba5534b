"""messages -> input_ids + labels: exactly the assistant's tokens are trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from trainer.data.formats import BadRowError
from trainer.data.template import ChatTemplate, shared_prefix
from trainer.errors import TemplateError
from trainer.profiles import Message

IGNORE_INDEX = -100
CHUNK = 256  # rows per tokenizer call: the fast tokenizer works on a chunk in parallel


@dataclass(frozen=True)
class Example:
    """One encoded row."""

    input_ids: list[int]
    labels: list[int]
    """As long as input_ids; IGNORE_INDEX where nothing is trained."""
    prompt: str
    """The user's turn that the first assistant turn answers."""
    golden_answer: str
    """The first assistant turn."""
    is_truncated: bool
    ends_with_stop: bool
    """Every trained turn that was not cut off ends with its stop token."""

    @property
    def num_trained(self) -> int:
        """Tokens that the loss is taken over."""
        return sum(label != IGNORE_INDEX for label in self.labels)

    @property
    def prompt_ids(self) -> list[int]:
        """The ids before the first trained token: what a preview continues."""
        first = next(i for i, label in enumerate(self.labels) if label != IGNORE_INDEX)
        return self.input_ids[:first]


class RowEncoder:
    """Turns conversations into examples with one tokenizer, one template, one length."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        """Take a fast tokenizer with a provable chat template.

        Args:
            tokenizer: a transformers fast tokenizer.
            max_length: longest example in tokens; longer ones lose their end.
        Raises:
            TemplateError: the template cannot be proved.
        """
        self.template = ChatTemplate(tokenizer)
        self.tokenizer = tokenizer
        self.max_length = max_length
        specials = sorted(
            {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
            | set(tokenizer.all_special_tokens),
            key=len,
            reverse=True,
        )
        self._special_text = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    def encode_all(self, conversations: list[list[Message]]) -> list[Example | BadRowError]:
        """Encode conversations, in order; what cannot be encoded comes back as its error."""
        encoded: list[Example | BadRowError] = []
        for start in range(0, len(conversations), CHUNK):
            encoded.extend(self._encode_chunk(conversations[start : start + CHUNK]))
        return encoded

    def encode(self, messages: list[Message]) -> Example:
        """Encode one conversation.

        Raises:
            BadRowError: it cannot be encoded, or nothing in it would be trained.
        """
        result = self._encode_chunk([messages])[0]
        if isinstance(result, BadRowError):
            raise result
        return result

    def _encode_chunk(self, chunk: list[list[Message]]) -> list[Example | BadRowError]:
        try:
            rendered = self.template.render_with_mask(chunk)
            prompts = self.template.render(
                [row[:turn] for row in chunk for turn in _assistant_turns(row)],
                generation_prompt=True,
            )
        except TemplateError as error:
            if len(chunk) > 1:  # find the row that the template refuses
                return [result for row in chunk for result in self._encode_chunk([row])]
            return [BadRowError(str(error), "refused by the chat template")]
        remaining = iter(prompts)
        results: list[Example | BadRowError] = []
        for row, (ids, mask) in zip(chunk, rendered, strict=True):
            own_prompts = [next(remaining) for _ in _assistant_turns(row)]
            try:
                self._refuse_special_text(row)
                spans = self._spans(row, ids, mask, own_prompts)
                results.append(self._example(row, ids, spans))
            except BadRowError as error:
                results.append(error)
        return results

    def _spans(
        self, row: list[Message], ids: list[int], mask: list[int] | None, prompts: list[list[int]]
    ) -> list[tuple[int, int]]:
        """Half-open ranges of trained ids, one per assistant turn.

        A turn begins where the prompt that asks for it ends: what a template puts there by
        itself (a header, an empty thought) is never trained. It ends with its first stop token.
        """
        starts = [shared_prefix(ids, prompt) for prompt in prompts]
        if starts[-1] != len(prompts[-1]):
            raise BadRowError(
                "the prompt of the last assistant turn is not a prefix of the whole row under the "
                "model's chat template, so training and generation would not see the same tokens",
                "template not provable",
            )
        if mask is None:
            return [self._proved_span(row, ids, start, nth) for nth, start in enumerate(starts)]
        runs = _runs(mask)
        if len(runs) != len(starts):
            raise BadRowError(
                f"the chat template marks {len(runs)} stretches as the assistant's, the row has "
                f"{len(starts)} assistant turns",
                "template not provable",
            )
        return [
            self._trim(ids, max(begin, start), end)
            for (begin, end), start in zip(runs, starts, strict=True)
        ]

    def _trim(self, ids: list[int], begin: int, end: int) -> tuple[int, int]:
        """Cut a marked stretch behind its first stop token; take that token in if it follows."""
        for position in range(begin, min(end + 1, len(ids))):
            if ids[position] in self.template.stop_ids:
                return begin, position + 1
        return begin, end

    def _proved_span(
        self, row: list[Message], ids: list[int], begin: int, nth: int
    ) -> tuple[int, int]:
        """A turn's range without a mask: from its prompt to its stop, proved by its text."""
        begin, end = self._trim(ids, begin, len(ids))
        content = row[_assistant_turns(row)[nth]]["content"].strip()
        said = self.tokenizer.decode(ids[begin : end - 1], clean_up_tokenization_spaces=False)
        if said.strip() != content:
            raise BadRowError(
                f"assistant turn {nth + 1} cannot be found in the tokens of the chat template: "
                f"expected {content[:60]!r}, found {said.strip()[:60]!r}",
                "template not provable",
            )
        return begin, end

    def _example(self, row: list[Message], ids: list[int], spans: list[tuple[int, int]]) -> Example:
        labels = [IGNORE_INDEX] * len(ids)
        for begin, end in spans:
            labels[begin:end] = ids[begin:end]
        kept = [(b, e) for b, e in spans if e <= self.max_length]
        first_turn = _assistant_turns(row)[0]
        labels = labels[: self.max_length]
        if all(label == IGNORE_INDEX for label in labels):
            raise BadRowError(
                f"nothing to train is left: the row has {len(ids)} tokens, its answer begins at "
                f"token {spans[0][0] + 1}, and hyperparams.max_length is {self.max_length}",
                "no trained token within max_length",
            )
        return Example(
            input_ids=ids[: self.max_length],
            labels=labels,
            prompt=row[first_turn - 1]["content"],
            golden_answer=row[first_turn]["content"],
            is_truncated=len(ids) > self.max_length,
            ends_with_stop=all(ids[e - 1] in self.template.stop_ids for _, e in kept),
        )

    def _refuse_special_text(self, row: list[Message]) -> None:
        for position, turn in enumerate(row):
            found = self._special_text.search(turn["content"])
            if found:
                raise BadRowError(
                    f"turn {position} ({turn['role']}) contains the text {found.group()!r}, which "
                    "the tokenizer turns into a control token; take it out of the data",
                    "control token in text",
                )


def _assistant_turns(row: list[Message]) -> list[int]:
    return [index for index, turn in enumerate(row) if turn["role"] == "assistant"]


def _runs(mask: list[int]) -> list[tuple[int, int]]:
    """Half-open ranges of ones in a mask."""
    edges = [0, *mask, 0]
    begins = [i for i in range(len(mask)) if edges[i + 1] and not edges[i]]
    ends = [i + 1 for i in range(len(mask)) if edges[i + 1] and not edges[i + 2]]
    return list(zip(begins, ends, strict=True))
