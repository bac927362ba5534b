"""Profile `regime3`: short symbolic answers between `<<ANS_START>>` and `<<ANS_END>>`."""

from __future__ import annotations

from trainer.profiles.profile import DataProfile, Message

ANS_START = "<<ANS_START>>"

ANS_END = "<<ANS_END>>"


class Regime3Profile(DataProfile):
    """Wraps every assistant turn in the markers and compares what stands between them."""

    name = "regime3"
    system_prompt_template = (
        "Write the answer in canonical form, (op arg1 arg2) = result, between "
        f"{ANS_START} and {ANS_END}. Write nothing else."
    )
    stop_strings = (ANS_END,)

    def transform(self, messages: list[Message], *, index: int, seed: int) -> list[Message]:
        """Wrap the assistant's words; marked turns stay, half-marked ones are completed."""
        turns = [turn.copy() for turn in messages]
        for turn in turns:
            if turn["role"] == "assistant" and not turn.get("tool_calls"):
                turn["content"] = wrap_answer(turn["content"])
        return turns

    def matches(self, answer: str, golden: str) -> bool:
        """Compare what stands between the markers; an answer without both markers is wrong."""
        said = between_markers(answer)
        meant = between_markers(wrap_answer(golden))
        return said is not None and meant is not None and said.split() == meant.split()


def wrap_answer(text: str) -> str:
    """Put `text` between the markers; a marker that is there already is kept, not doubled."""
    body = text.strip()
    if ANS_START not in body:
        body = f"{ANS_START} {body}"
    if ANS_END not in body.split(ANS_START, 1)[1]:
        # An end marker in front of the start marker closes nothing, so it does not count.
        body = f"{body} {ANS_END}"
    return body


def between_markers(text: str) -> str | None:
    """What stands between the first start marker and the next end marker; None without both."""
    _, start, rest = text.partition(ANS_START)
    inner, end, _ = rest.partition(ANS_END)
    return inner.strip() if start and end else None
