"""`trainer chat RUN`: talk to a run's model with the run's own profile and system prompt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from trainer.commands.arguments import (
    MAX_SEED,
    add_allow_code_flag,
    add_weights_flags,
    number,
    parse,
    whole_number,
)
from trainer.core.finished import FinishedRun, open_run
from trainer.counts import counted
from trainer.preview.base import PreviewRequest, PreviewResult
from trainer.profiles import DataProfile, Message

if TYPE_CHECKING:
    from trainer.preview.local import LocalPreviewBackend

HELP = "Type a message and Enter. /reset forgets the conversation, /quit (or Ctrl-D) ends it."


def run(argv: list[str]) -> int:
    """Read turns from standard input until it ends."""
    words = parse(_parser(), argv)
    console = Console(stderr=not sys.stdin.isatty())
    finished = open_run(
        Path(words.run), step=words.step, base=words.base, allow_code=words.allow_code
    )
    profile = finished.profile()  # code that may not run is told before the seconds of loading
    with console.status(f"loading {finished.model_dir}"):
        backend = _load(finished, profile, words)
    console.print(f"{finished.folder}: {finished.note}. {HELP}", highlight=False)
    return _talk(backend, sys.stdin.isatty())


def _load(
    finished: FinishedRun, profile: DataProfile, words: argparse.Namespace
) -> LocalPreviewBackend:
    # torch takes seconds to load; mistakes on the command line are told before.
    from trainer.models.load import check_vocabulary, context_length
    from trainer.models.precision import resolve_device
    from trainer.models.quantized import place
    from trainer.preview.local import LocalPreviewBackend

    device = resolve_device(words.device)
    # A GPU that trained in half precision need not have room for fp32 weights.
    dtype = finished.dtype() if device.type == "cuda" else None
    model, tokenizer = finished.load(dtype, device)
    check_vocabulary(model, tokenizer)
    model = place(model, device)
    return LocalPreviewBackend(
        model=model,
        tokenizer=tokenizer,
        profile=profile,
        system_prompt=finished.system_prompt,
        max_new_tokens=words.max_new_tokens,
        temperature=words.temperature,
        seed=words.seed,
        max_length=context_length(model.config),
        with_special_tokens=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trainer chat", description=__doc__)
    add_weights_flags(parser)
    add_allow_code_flag(parser)
    parser.add_argument(
        "--max-new-tokens", type=whole_number(1), default=256, help="longest answer [256]"
    )
    parser.add_argument("--temperature", type=number(0), default=0.0, help="0 = greedy [0]")
    parser.add_argument(
        "--seed", type=whole_number(0, MAX_SEED), default=42, help="seed of the sampling noise [42]"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N [auto]")
    return parser


def _talk(backend: LocalPreviewBackend, is_terminal: bool) -> int:
    turns: list[Message] = []
    if backend.system_prompt is not None:
        turns.append(Message(role="system", content=backend.system_prompt))
    opening = len(turns)
    while True:
        try:
            text = input("you> " if is_terminal else "").strip()
        except EOFError:
            return 0
        if text in ("/quit", "/exit"):
            return 0
        if text == "/reset":
            del turns[opening:]
        elif text:
            turns.append(Message(role="user", content=text))
            result = _answer(backend, turns, text)
            if result.ok:
                turns.append(Message(role="assistant", content=result.text))
            else:
                turns.pop()
            print(("model> " if is_terminal else "") + _shown(result), flush=True)


def _answer(backend: LocalPreviewBackend, turns: list[Message], text: str) -> PreviewResult:
    ids = tuple(backend.render_turns(turns))
    limit = backend.settings.max_length
    if limit is not None and len(ids) >= limit:
        request = PreviewRequest(prompt=text, prompt_token_ids=ids)
        full = (
            f"{counted(len(ids), 'token')} so far, and the model's context is {limit}; /reset "
            "clears them"
        )
        return PreviewResult.failed(request, 0, full, backend.backend_type)
    return backend.preview_batch([PreviewRequest(prompt=text, prompt_token_ids=ids)], 0)[0]


def _shown(result: PreviewResult) -> str:
    if result.error_message:
        return f"[no answer: {result.error_message}]"
    return result.text + (" [cut at the limit]" if result.finish_reason == "length" else "")
