"""The card of step 0: what is trained, in labelled lines, from run.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def card_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The data card as (label, value) lines; empty where there is no card."""
    card = manifest.get("data_card")
    if not isinstance(card, Mapping):
        return []
    get = card.get
    rejected = get("rejected")
    reasons = ", ".join(f"{n} {why}" for why, n in rejected.items()) if rejected else "none"
    stop = "trained" if get("is_stop_trained") else "NOT trained: the model may never stop"
    rows = [
        ("data", f"{get('dataset_path')} ({get('format')}, profile {get('profile')})"),
        (
            "rows",
            f"{_whole(get('num_train_rows'))} train, {_whole(get('num_validation_rows'))} "
            f"validation of {_whole(get('num_rows'))} in the file",
        ),
        ("validation", get("validation")),
        (
            "tokens",
            f"{_whole(get('num_tokens'))}, of them trained "
            f"{_whole(get('num_trained_tokens'))} ({get('trained_pct')} %)",
        ),
        (
            "longest row",
            f"{_whole(get('longest_row'))} of at most {_whole(get('max_length'))} tokens",
        ),
        ("truncated", f"{_whole(get('num_truncated'))} rows"),
        ("rejected", reasons),
        ("stop token", stop),
        ("mask", get("template")),
        ("system prompt", manifest.get("system_prompt") or "none"),
        ("precision", manifest.get("precision")),
        ("device", manifest.get("device")),
    ]
    for key, label in (("num_dropped", "dropped"), ("num_duplicates", "duplicates")):
        if get(key):
            rows.append((label, f"{_whole(get(key))} rows"))
    lines = get("row_lines")  # runs of older versions have none
    rows += [
        (str(line[0]), str(line[1]))
        for line in (lines if isinstance(lines, list) else [])
        if isinstance(line, list) and len(line) == 2
    ]
    for count, prompt in (get("shared_prompts") or ())[:1]:
        rows.append(("shared", f"{_whole(count)} rows share one prompt: {prompt[:60]!r}"))
    if get("num_leaked"):
        words = f"{_whole(get('num_leaked'))} validation rows have a prompt that is also trained"
        rows.append(("leak", words))
    return [(label, str(value)) for label, value in rows if value is not None]


def card_sample(manifest: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """The first training row as (text, is trained) stretches."""
    card = manifest.get("data_card")
    sample = card.get("sample") if isinstance(card, Mapping) else None
    return [
        (str(stretch[0]), bool(stretch[1]))
        for stretch in (sample if isinstance(sample, list) else [])
        if isinstance(stretch, list) and len(stretch) == 2
    ]


def environment_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Machine and versions as (label, value) lines."""
    environment = manifest.get("environment")
    rows: list[tuple[str, str]] = []
    for key, value in (environment if isinstance(environment, Mapping) else {}).items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        if value is not None:
            rows.append((str(key).replace("_", " "), str(value)))
    return rows


def _whole(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"
