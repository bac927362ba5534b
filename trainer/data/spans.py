"""Which tokens of a rendered conversation the assistant writes, proved turn by turn.

A turn begins where the prompt that asks for it ends: what a template puts there by itself (a
header, an empty thought) is never trained. It ends with its first stop token. Generation markers
give the turns where there are any; else they are found by rendering the prompt of every turn. In
both cases the text found must be the text of the row.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.rows import BadRowError
from trainer.data.template import ChatTemplate, shared_prefix
from trainer.data.turns import num_openings
from trainer.profiles import Message


@dataclass(frozen=True)
class Spans:
    """The trained stretches of one row."""

    ranges: list[tuple[int, int]]
    """Half-open ranges of ids, one per assistant turn, each with its stop token if it has one."""
    stripped: tuple[str, ...]
    """Text of the row's turns that the template leaves out of the tokens."""


def assistant_turns(row: list[Message]) -> list[int]:
    """Positions of the assistant's turns that answer something: those behind a user turn."""
    roles = [turn["role"] for turn in row]
    first = roles.index("user") if "user" in roles else 0
    return [index for index, role in enumerate(roles) if role == "assistant" and index > first]


class SpanFinder:
    """Finds and proves the trained stretches of rows under one template."""

    def __init__(self, template: ChatTemplate) -> None:
        """Take the template whose ids will be searched."""
        self.template = template

    def find(
        self, row: list[Message], ids: list[int], mask: list[int] | None, prompts: list[list[int]]
    ) -> Spans:
        """The trained stretches of one row.

        Args:
            row: the turns.
            ids: the whole row under the model's own template.
            mask: 1 where markers say that the assistant writes; None where there are none.
            prompts: for each assistant turn the ids of the turns before it, with the header that
                asks for an answer.
        Raises:
            BadRowError: it cannot be proved which tokens are the assistant's.
        """
        starts = [shared_prefix(ids, prompt) for prompt in prompts]
        self._check_last_prompt(ids, starts[-1], prompts[-1])
        # Greetings before the first user turn have marks too, and no prompt that asks for them.
        runs = _runs(mask)[num_openings(row) :] if mask is not None else []
        if len(runs) == len(starts):
            ranges = [
                self._trim(ids, max(begin, start), end)
                for (begin, end), start in zip(runs, starts, strict=True)
            ]
        else:
            ranges = [self._trim(ids, start, len(ids)) for start in starts]
        stripped = self._stripped_prompts(row, ids, ranges)
        for nth, (span, turn) in enumerate(zip(ranges, assistant_turns(row), strict=True)):
            stripped += self._prove(row[turn], ids, span, nth)
        return Spans(ranges, tuple(stripped))

    def _check_last_prompt(self, ids: list[int], start: int, prompt: list[int]) -> None:
        if start == len(prompt):
            return
        expected = self._decode(prompt[max(start - 4, 0) : start + 8])
        found = self._decode(ids[max(start - 4, 0) : start + 8])
        raise BadRowError(
            "the prompt of the last assistant turn is not a prefix of the whole row under the "
            "model's chat template, so training and generation would not see the same tokens: "
            f"at token {start} the prompt goes on {expected!r}, the row {found!r}",
            "template not provable",
        )

    def _trim(self, ids: list[int], begin: int, end: int) -> tuple[int, int]:
        """Cut a marked stretch behind its first stop token; take that token in if it follows."""
        for position in range(begin, min(end + 1, len(ids))):
            if ids[position] in self.template.stop_ids:
                return begin, position + 1
        return begin, end

    def _prove(
        self, turn: Message, ids: list[int], span: tuple[int, int], nth: int
    ) -> tuple[str, ...]:
        """Check that a stretch says what its turn says; return what the template left out."""
        said, content = self._said(ids, span), turn["content"].strip()
        if turn.get("tool_calls"):
            return self._prove_calls(turn, said, nth)
        if said.split() == content.split():  # templates choose the spacing round a thought
            return ()
        if said and said in content:
            before, after = (part.strip() for part in content.split(said, 1))
            if not self._is_beside(ids, span, before, after):
                return tuple(part for part in (before, after) if part)
        raise BadRowError(
            f"assistant turn {nth + 1} cannot be found in the tokens of the chat template: tokens "
            f"{span[0]} to {span[1]} should say {content[:60]!r}, but say {said[:60]!r}",
            "template not provable",
        )

    def _prove_calls(self, turn: Message, said: str, nth: int) -> tuple[str, ...]:
        """Check that a stretch names every function that its turn calls, after what it says."""
        names = [str(call.get("function", call).get("name", "")) for call in turn["tool_calls"]]
        missing = [name for name in names if not name or name not in said]
        if missing:
            raise BadRowError(
                f"assistant turn {nth + 1} calls {', '.join(map(repr, missing))}, which the "
                f"model's chat template does not write; its tokens say {said[:60]!r}",
                "template without tool calls",
            )
        content = turn["content"].strip()
        return () if content in said else (content,)

    def _is_beside(self, ids: list[int], span: tuple[int, int], before: str, after: str) -> bool:
        """Whether the rest of a turn stands beside the stretch, which is too small then."""
        left = self._decode(ids[: span[0]]).rstrip()
        right = self._decode(ids[span[1] :]).lstrip()
        return bool((before and left.endswith(before)) or (after and right.startswith(after)))

    def _said(self, ids: list[int], span: tuple[int, int]) -> str:
        begin, end = span
        if end > begin and ids[end - 1] in self.template.stop_ids:
            end -= 1
        return self._decode(ids[begin:end]).strip()

    def _stripped_prompts(
        self, row: list[Message], ids: list[int], ranges: list[tuple[int, int]]
    ) -> tuple[str, ...]:
        """Turns of others that are not, whole and in order, in the text between the answers."""
        between: list[int] = []
        position = 0
        for begin, end in ranges:
            between += ids[position:begin]
            position = end
        text = self._decode(between + ids[position:])
        missing = []
        answers = assistant_turns(row)
        for index, turn in enumerate(row):
            content = turn["content"].strip()
            if index in answers or not content:
                continue
            at = text.find(content)
            if at < 0:
                missing.append(content)
            else:  # each character of the text can prove one turn only
                text = text[:at] + "\0" + text[at + len(content) :]
        return tuple(missing)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.template.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text


def _runs(mask: list[int]) -> list[tuple[int, int]]:
    """Half-open ranges of ones in a mask."""
    edges = [0, *mask, 0]
    begins = [i for i in range(len(mask)) if edges[i + 1] and not edges[i]]
    ends = [i + 1 for i in range(len(mask)) if edges[i + 1] and not edges[i + 2]]
    return list(zip(begins, ends, strict=True))
