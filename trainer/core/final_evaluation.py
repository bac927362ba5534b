"""The final evaluation: every held-out prompt answered once, greedily, and compared with golden."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.data.dataset import HeldOutPrompt
from trainer.preview.base import PreviewRequest, to_json_line
from trainer.preview.local import LocalPreviewBackend

PROMPTS_AT_ONCE = 50


def evaluate_answers(
    backend: LocalPreviewBackend,
    prompts: Sequence[HeldOutPrompt],
    *,
    step: int,
    max_new_tokens: int,
    path: Path,
) -> dict[str, Any]:
    """Answer all prompts with temperature 0 and write one line each.

    Returns:
        exact_match (share), matched, num_prompts, failed, and the path of the answers.
    """
    backend.settings = dataclasses.replace(backend.settings, temperature=0.0)
    results = []
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            requests = [
                PreviewRequest(
                    prompt=held.prompt,
                    prompt_token_ids=held.prompt_ids,
                    golden_answer=held.golden_answer,
                    prompt_id=held.prompt_id,
                    held_out=held.is_held_out,
                )
                for held in prompts[start : start + PROMPTS_AT_ONCE]
            ]
            batch = backend.preview_batch(requests, step, max_new_tokens=max_new_tokens)
            file.writelines(json.dumps(to_json_line(result)) + "\n" for result in batch)
            results += batch
    matched = sum(result.matches is True for result in results)
    return {
        "exact_match": matched / max(len(results), 1),
        "matched": matched,
        "num_prompts": len(results),
        "failed": sum(not result.ok for result in results),
        "answers": str(path),
    }
