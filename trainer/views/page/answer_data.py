"""One answer of a run beside its golden answer, and all answers of a step, as plain data."""

from __future__ import annotations

import math
from typing import Any

from trainer.counts import counted
from trainer.preview.base import PreviewResult
from trainer.views.differences import Fold, Piece, compare, folded
from trainer.views.run_reader import RunReader
from trainer.views.timeline import facts_of, golden_tokens, golden_words, mark_of
from trainer.views.words import mark_of as sign_of

SHOWN_CHARS = 20_000
"""Longest text sent to a page; files hold all of it."""

CELL_CHARS = 400
"""Longest text in the table of all answers, around its first difference."""


def answer_of(reader: RunReader, prompt: int, step: int | None) -> dict[str, Any] | None:
    """One answer with its difference from golden; None where there is none.

    Args:
        prompt: its place among the prompts of the run.
        step: None for the newest; a step without an answer gives the one before it.
    """
    lines = list(reader.previews.timelines.values())
    if not 0 <= prompt < len(lines) or not len(lines[prompt]):
        return None
    line = lines[prompt]
    index = len(line) - 1
    if step is not None:
        index = max((n for n, one in enumerate(line.steps) if one <= step), default=0)
    result = line[index]
    before = next((line[i] for i in range(index - 1, -1, -1) if line[i].ok), None)
    return {
        "prompt": prompt,
        "step": result.step,
        "verdict": line.judged.words,
        "change": line.judged.change,
        "is_same_as_before": before is not None and result.ok and before.text == result.text,
        **_shown(result),
    }


def final_answer_of(reader: RunReader, number: int) -> dict[str, Any] | None:
    """One answer of the final evaluation."""
    final = reader.final_evaluation
    if final is None or not 0 <= number < len(final.answers):
        return None
    result = final.answers[number]
    words = {True: "right", False: "wrong", None: "not compared"}[result.matches]
    shown = _shown(result)
    return {"prompt": number, "step": result.step, "verdict": words, "change": "", **shown}


def _shown(result: PreviewResult) -> dict[str, Any]:
    golden, text = result.golden_answer, result.text
    found = compare(_cut(golden), _cut(text)) if golden is not None and result.ok else None
    return {
        "mark": mark_of(result),
        "question": _cut(result.prompt),
        "golden": None if golden is None else _cut(golden),
        "text": _cut(text),
        "raw": _cut(result.raw_text),
        "error": None if result.ok else _cut(result.error_message or "no answer"),
        "facts": facts_of(result),
        "samples": [
            [sign_of(one), _cut(one.text if one.ok else one.error_message or "")]
            for one in result.samples
        ],
        "golden_pieces": _pieces(found.reference_thought, found.reference) if found else None,
        "text_pieces": _pieces(found.text_thought, found.text) if found else None,
        "words": found.words if found else "",
        "tokens": [[one.text, round(one.probability, 4)] for one in golden_tokens(result)],
        "tokens_words": golden_words(result) or "",
        "scores": {
            name: value
            for name, value in result.scores.items()
            if value is not None and math.isfinite(value)
        },
    }


def _pieces(thought: str, pieces: tuple[Piece, ...]) -> list[list[str]]:
    parts = [
        ["fold", part.text] if isinstance(part, Fold) else [part.kind, part.text]
        for part in folded(pieces)
    ]
    return [["thought", thought], *parts] if thought else parts


def _cut(text: str) -> str:
    if len(text) <= SHOWN_CHARS:
        return text
    more = len(text) - SHOWN_CHARS
    return f"{text[:SHOWN_CHARS]}\n... and {counted(more, 'more character')} in the run's files"


def answers_of_step(reader: RunReader, step: int) -> list[dict[str, Any]]:
    """All answers of a step for a table, each around its first difference."""
    found = []
    for number, line in enumerate(reader.previews.timelines.values()):
        result = line.of_step(step)
        if result is None:
            continue
        golden = result.golden_answer
        sides = None
        if golden is not None and result.ok:
            one = compare(golden[:SHOWN_CHARS], result.text[:SHOWN_CHARS])
            sides = [_around(one.reference), _around(one.text)]
        plain = result.text if result.ok else result.error_message or "no answer"
        found.append(
            {
                "prompt": number,
                "mark": mark_of(result),
                "golden": sides[0] if sides else [["same", (golden or "")[:CELL_CHARS]]],
                "text": sides[1] if sides else [["same", plain[:CELL_CHARS]]],
                "score": _score_words(result),
            }
        )
    return found


def _around(pieces: tuple[Piece, ...]) -> list[list[str]]:
    """At most CELL_CHARS of a side, its first difference among them."""
    first = next((n for n, piece in enumerate(pieces) if piece.kind != "same"), 0)
    found, left = [], CELL_CHARS
    if first:
        before = "".join(piece.text for piece in pieces[:first])
        is_cut = len(before) > CELL_CHARS // 3
        found.append(["same", ("..." if is_cut else "") + before[-(CELL_CHARS // 3) :]])
        left -= min(len(before), CELL_CHARS // 3)
    for piece in pieces[first:]:
        if left <= 0:
            return [*found, ["same", "..."]]
        found.append([piece.kind, piece.text[:left]])
        left -= len(piece.text)
    return found


def _score_words(result: PreviewResult) -> str:
    parts = []
    if result.golden_probability is not None:
        parts.append(f"golden {100 * result.golden_probability:.1f} %")
    parts += [f"{name} {value:.3g}" for name, value in result.scores.items() if value is not None]
    return ", ".join(parts)
