"""The final evaluation on the page of a run that ended: score, kinds of prompts, wrong rows."""

from __future__ import annotations

from nicegui import ui

from trainer.monitor.final_evaluation import FinalEvaluation
from trainer.monitor.live.elements import answer, box, diff, mark, text
from trainer.monitor.previews import mark_of
from trainer.monitor.word_diff import word_diff
from trainer.preview.base import PreviewResult

MAX_WRONG = 100
"""Wrong rows on the page; the others are in final_evaluation.jsonl."""
MAX_OPEN = 10
"""More wrong rows than this are folded: the curves stand below them."""


def show_final_evaluation(final: FinalEvaluation) -> None:
    """Build it here."""
    text("p", f"{final.score_words} of the held-out prompts answered as golden.")
    if final.by_word_words:
        text("p", f"By the first word of the prompt: {final.by_word_words}.")
    if not final.wrong:
        return
    with ui.expansion(f"wrong ({len(final.wrong)})", value=len(final.wrong) <= MAX_OPEN):
        for result in final.wrong[:MAX_WRONG]:
            _show_wrong(result)
        more = len(final.wrong) - MAX_WRONG
        if more > 0:
            text("p", f"and {more} more in final_evaluation.jsonl", "dim")


def _show_wrong(result: PreviewResult) -> None:
    with box("div", "said wrong-row"):
        mark(mark_of(result))
        text("span", f" {result.prompt}")
        with box("div", "side-by-side"):
            with box("div", "said"):
                text("div", "golden", "label")
                answer(result.golden_answer or "-")
            with box("div", "said"):
                text("div", "generated, what differs marked", "label")
                if result.ok and result.golden_answer is not None:
                    diff(word_diff(result.golden_answer, result.text))
                else:
                    answer(result.text if result.ok else result.error_message or "")
