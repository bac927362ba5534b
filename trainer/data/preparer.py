"""Rows -> examples: cleaned, rewritten by the profile, encoded, and given the keys of the split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from trainer.data import encode
from trainer.data.encode import RowEncoder
from trainer.data.layouts import check_text_row
from trainer.data.rows import (
    IGNORE_INDEX,
    TOKENS_ROLE,
    BadRowError,
    Example,
    is_text,
    is_tokens,
)
from trainer.data.tools import tool_names, tools_of
from trainer.data.turns import assistant_turns, check_messages
from trainer.profiles import DataProfile, Message

Conversation = tuple[int, list[Message]]
"""The index of a row among all rows of the run's files, and its turns."""


AS_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Outcome:
    """What became of one row: its examples with their keys, or an error."""

    examples: tuple[Example, ...] = ()
    key: str = ""
    """Hash of the row's content."""
    group: str = ""
    """Hash of its prompt, the turns before the first answer; of plain text, of the text."""
    error: BadRowError | None = None
    is_profiles: bool = False
    """The error is one of the row as the profile left it."""


@dataclass(frozen=True)
class Begun:
    """Rows that are rewritten and rendered."""

    rows: Sequence[Conversation]
    refused: list[BadRowError | None]
    """Of each row: why the profile's row cannot be used."""
    encoding: list[encode.Begun]
    """Of those that can."""


class Preparer:
    """Cleans, transforms, prompts and encodes rows; the same in whatever process."""

    def __init__(
        self, profile: DataProfile, encoder: RowEncoder, system_prompt: str | None, seed: int
    ) -> None:
        """Keep what decides the rows.

        Args:
            profile: rewrites them.
            encoder: makes their tokens.
            system_prompt: system turn of rows that bring none.
            seed: of the split and of the profile's transform.
        """
        self.profile, self.encoder = profile, encoder
        self.system_prompt, self.seed = system_prompt, seed
        self._counts: dict[str, int] = {}
        self._own_system = self._words([Message(role="system", content=system_prompt or "")])

    def prepare(self, rows: Sequence[Conversation]) -> list[Outcome]:
        """What becomes of each row, in order."""
        return self.finish(self.begin(rows))

    def begin(self, rows: Sequence[Conversation], pool: Executor | None = None) -> Begun:
        """Clean, transform and render rows; the next ones may be begun before these are finished.

        Args:
            pool: tokenizes meanwhile.
        """
        usable: list[list[Message]] = []
        refused: list[BadRowError | None] = []
        for index, messages in rows:
            try:
                usable.append(self._conversation(index, messages))
                refused.append(None)
            except BadRowError as error:
                text = f"after profile {self.profile.name!r}: {error}"
                refused.append(BadRowError(text, error.reason))
        return Begun(rows, refused, self.encoder.begin(usable, pool))

    def finish(self, begun: Begun) -> list[Outcome]:
        """As `prepare`."""
        results = iter(self.encoder.finish(begun.encoding))
        outcomes = []
        for (_, messages), refusal in zip(begun.rows, begun.refused, strict=True):
            if refusal is not None:
                outcomes.append(Outcome(error=refusal, is_profiles=True))
                continue
            result = next(results)
            if isinstance(result, BadRowError):
                outcomes.append(Outcome(error=result))
            else:
                outcomes.append(Outcome((result, *result.rest), *self._keys(messages)))
        return outcomes

    def report(self) -> dict[str, int]:
        """What the profile did to the rows, in whatever process, as counts for the data card."""
        own = self.profile.report()
        longer, shorter = sorted((own, self._counts), key=len, reverse=True)
        return {key: own.get(key, 0) + self._counts.get(key, 0) for key in {**longer, **shorter}}

    def add_report(self, counts: dict[str, int]) -> None:
        """Add what the profile counted in another process."""
        longer, shorter = sorted((counts, self._counts), key=len, reverse=True)
        self._counts = {
            key: counts.get(key, 0) + self._counts.get(key, 0) for key in {**longer, **shorter}
        }

    def _keys(self, messages: list[Message]) -> tuple[str, str]:
        """The key of the cleaned content, and that of the turns before the first answer.

        Rows that are trained alike go to one side, and so do rows that ask the same: in the second
        key flags and greetings make no difference. Of a plain text both are of the text.
        """
        if is_tokens(messages):
            return self._token_keys(messages[0])
        turns = self._words(messages)
        key = content_key(turns, self.seed)
        for turn in turns:
            turn.pop("weight", None)
        answers = assistant_turns(turns)
        prompt = turns[: answers[0]] if answers else turns
        # A system turn like the run's asks the same as none.
        if prompt[:1] == self._own_system:
            prompt = prompt[1:]
        return key, content_key(prompt, self.seed)

    def _token_keys(self, turn: Message) -> tuple[str, str]:
        """The same of a row of tokens, whose prompt are those before the first trained one."""
        key = content_key([turn], self.seed)
        labels = turn["labels"]
        length = next(n for n, label in enumerate(labels) if label != IGNORE_INDEX)
        if length <= 1 and IGNORE_INDEX not in labels[1:]:  # no prompt: like a plain text
            length = len(labels)
        asked = Message(role=TOKENS_ROLE, content="", input_ids=turn["input_ids"][:length])
        return key, content_key([asked], self.seed)

    def _words(self, messages: list[Message]) -> list[Message]:
        turns = [turn.copy() for turn in messages]
        for turn in turns:
            turn["content"] = " ".join(self.profile.clean(turn["content"]).split())
        return turns

    def _conversation(self, index: int, messages: list[Message]) -> list[Message]:
        if is_tokens(messages):
            return messages
        clean = [turn.copy() for turn in messages]
        for turn in clean:
            turn["content"] = self.profile.clean(turn["content"])
            if "reasoning_content" in turn:
                turn["reasoning_content"] = self.profile.clean(turn["reasoning_content"])
        if is_text(clean):
            return [turn for turn in clean if check_text_row(turn["content"])]
        if type(self.profile).transform is DataProfile.transform:
            # What cleaning leaves as it is was checked when it was read.
            turns = clean if clean == messages else check_messages(clean)
            return with_system_prompt(turns, self.system_prompt)
        turns = self.profile.transform(clean, index=index, seed=self.seed)
        if _called(turns) != _called(messages):
            raise BadRowError("tool calls were lost or changed", "tool calls lost")
        if _weights(turns) != _weights(messages):
            raise BadRowError(
                "the flags that say which turns are trained were lost; a profile's transform must "
                "copy the turns that it changes",
                "flags lost",
            )
        if tools_of(turns) != tools_of(messages):
            raise BadRowError("the row's tools were lost or changed", "tools lost")
        if _num_thoughts(turns) < _num_thoughts(clean) and not self.profile.drops_thoughts:
            raise BadRowError("thoughts were lost (`reasoning_content`)", "thoughts lost")
        # A profile can leave nothing to train, such as an answer of which nothing remains.
        return with_system_prompt(check_messages(turns), self.system_prompt)


def content_key(messages: list[Message], seed: int) -> str:
    """A hash of a row's content and the seed, hex; equal rows have equal keys."""
    content = AS_JSON.encode(messages)
    return hashlib.sha256(f"{seed}\n{content}".encode()).hexdigest()


def _called(messages: list[Message]) -> list[str]:
    return [name for turn in messages for name in tool_names(turn.get("tool_calls", []))]


def _num_thoughts(messages: list[Message]) -> int:
    return sum(bool(turn.get("reasoning_content", "").strip()) for turn in messages)


def _weights(messages: list[Message]) -> list[float]:
    """Of the assistant's turns; empty where each is trained like any other."""
    weights = [turn.get("weight", 1.0) for turn in messages if turn["role"] == "assistant"]
    return weights if any(weight != 1 for weight in weights) else []


def with_system_prompt(turns: list[Message], system_prompt: str | None) -> list[Message]:
    """Put the run's system turn first, unless the conversation brings its own."""
    if system_prompt is None or turns[0]["role"] == "system":
        return turns
    return [Message(role="system", content=system_prompt), *turns]
