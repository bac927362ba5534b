"""The data card as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trainer.counts import counted
from trainer.data.card import DataCard

MAX_KEYS_SHOWN, MAX_KEY_CHARS = 30, 60


def card_lines(card: DataCard) -> list[tuple[str, str]]:
    """The card as (label, text) lines: what the terminal, run.json, the page and the report show.

    A line whose count is 0 is left out where that is the usual case.
    """
    lines = [
        *_row_lines(card),
        *_length_lines(card),
        *_trained_lines(card),
        *_content_lines(card),
        ("cache", card.cache),
    ]
    return [(label, text) for label, text in lines if text]


def _row_lines(card: DataCard) -> Iterator[tuple[str, str]]:
    """Which rows there are, and on which side of the split."""
    yield "data", f"{card.dataset_path} (format {card.format}, profile {card.profile})"
    mixed = f" ({card.num_train_rows:,} per epoch with data.weights)" if card.mix else ""
    yield (
        "rows",
        f"{card.num_unique_rows:,} training{mixed}, {card.num_validation_rows:,} validation, "
        f"of {card.num_rows:,} read",
    )
    yield "streaming", card.streaming
    if card.num_left_out:
        unnamed = card.num_left_out - len(card.left_out)
        yield (
            "not read",
            f"{counted(card.num_left_out, 'file')} of no known kind: {', '.join(card.left_out)}"
            + (f" and {unnamed:,} more" if unnamed else ""),
        )
    yield "file weights", card.mix
    yield from _source_lines(card)
    yield "rejected", _rejected_text(card)
    yield "validation", card.validation
    if card.num_duplicates:
        yield (
            "duplicates",
            f"{counted(card.num_duplicates, 'row repeats', 'rows repeat')} an earlier one; all "
            "are kept",
        )
    if card.shared_prompts:
        count, prompt = card.shared_prompts[0]
        others = card.num_shared_prompts - 1
        more = (
            f" ({counted(others, 'more prompt is', 'more prompts are')} as frequent)"
            if others
            else ""
        )
        yield (
            "shared",
            f"{count:,} rows have the same prompt, {_short(prompt)}{more}: too many to hold out "
            "together, so training and validation rows may share it. To keep prompts apart, set "
            "data.validation_path or raise data.validation_split",
        )
    if card.num_final_asked:
        yield (
            "final",
            f"{counted(card.num_final_asked, 'prompt')} of the final evaluation asked during "
            "training too: there are no others; hold out more rows (data.validation_split)",
        )
    if card.num_leaked:
        prompts = ", ".join(map(_short, card.leaked_prompts))
        yield (
            "leak",
            f"{counted(card.num_leaked, 'validation row has', 'validation rows have')} a prompt "
            f"that training rows have too: {prompts}",
        )


def _source_lines(card: DataCard) -> Iterator[tuple[str, str]]:
    """What each source has of an epoch, where there are several."""
    num_rows = sum(source.num_epoch_rows for source in card.sources)
    if card.mix_epoch:
        end = (
            "the first source that runs out ends it, the next one goes on in the others"
            if card.mix_epoch == "first"
            else "it has every row at least once, and sources that are shorter again"
        )
        yield "epoch", f"{counted(num_rows, 'row')}, mixed by data.mix_probabilities: {end}"
    of = "so far" if card.streaming else "of an epoch"
    for source in card.sources:
        rows, tokens = source.num_epoch_rows, source.num_epoch_tokens
        has = f"{counted(source.num_rows, 'row')}, {counted(source.num_tokens, 'token')}"
        if card.mix_epoch:
            times = f"{rows / source.num_rows:.3g} times" if rows != source.num_rows else "once"
            has += f"; {counted(rows, 'row')} an epoch, {times} each"
        share = (
            f"{100 * rows / max(num_rows, 1):.1f} % of the rows {of}, "
            f"{100 * tokens / max(card.num_epoch_tokens, 1):.1f} % of its tokens"
        )
        where = f" ({source.source})" if source.source != source.name else ""
        yield f"source {source.name}", f"{has}: {share}{where}"


def _length_lines(card: DataCard) -> Iterator[tuple[str, str]]:
    """Tokens, and what hyperparams.max_length does to the rows."""
    epoch = f"; about {card.num_epoch_tokens:,} per epoch" if card.mix_epoch else ""
    per = " so far" if card.streaming else "" if epoch else " per epoch"
    yield (
        "tokens",
        f"{card.num_tokens:,}{per}, {card.num_trained_tokens:,} of them trained "
        f"({card.trained_pct:.1f} %){epoch}",
    )
    yield (
        "longest row",
        f"{counted(card.longest_row, 'token')}; at most {card.max_length:,} (max_length)",
    )
    yield "too long", _too_long_text(card)
    if card.num_packs:
        fill = 100 * card.num_tokens / (card.num_packs * card.max_length)
        yield (
            "packing",
            f"{counted(card.num_packs, 'sequence')} of up to {card.max_length:,} tokens, "
            f"{fill:.1f} % full",
        )


def _trained_lines(card: DataCard) -> Iterator[tuple[str, str]]:
    """Which tokens the loss is computed on, and the exceptions."""
    yield "trained", card.template
    yield (
        "stop token",
        "trained at the end of every answer that is not cut off"
        if card.is_stop_trained
        else (
            f"NOT trained in {counted(card.num_without_stop, 'row')}: the model may not learn "
            "to stop"
        ),
    )
    if card.num_thoughts:
        yield (
            "thoughts",
            f"{counted(card.num_thoughts, 'answer has', 'answers have')} one: {card.thoughts}",
        )
    if card.num_opened:
        yield (
            "prompt",
            f"the chat template ends prompts with {card.opening!r}, which a server will add; "
            f"{counted(card.num_opened, 'row')} without it: trained and previewed as they are",
        )
    if card.num_untrained_turns:
        yield (
            "untrained",
            f"{counted(card.num_untrained_turns, 'assistant turn is', 'assistant turns are')} "
            "context only, no loss",
        )
    if card.num_weighted_turns:
        yield (
            "loss weights",
            f"{counted(card.num_weighted_turns, 'turn or text has', 'turns or texts have')} a "
            "loss weight other than 0 and 1",
        )
    if card.num_openings:
        yield (
            "openings",
            f"{counted(card.num_openings, 'row begins', 'rows begin')} with an assistant turn: "
            "context only, and left out where the chat template refuses it",
        )
    if card.num_blank_questions:
        yield (
            "blank",
            f"{counted(card.num_blank_questions, 'row')} with a user turn without text: trained "
            "as they are",
        )
    if card.num_one_by_one:
        yield (
            "one by one",
            f"{counted(card.num_one_by_one, 'row')} (calls of tools, or texts that the chat "
            "template looks into) rendered several times to locate the answers: same tokens, "
            "more time",
        )
    if card.num_rendered:
        yield (
            "rendered text",
            f"{counted(card.num_rendered, 'text')} with the chat template's control tokens "
            "parsed into turns, of which only the answers are trained",
        )


def _content_lines(card: DataCard) -> Iterator[tuple[str, str]]:
    """What is added to the rows' contents, changed in them, left out of them or not used."""
    own = (
        f"; {counted(card.num_own_system, 'row keeps its', 'rows keep their')} own"
        if card.num_own_system
        else ""
    )
    yield "system prompt", (repr(card.system_prompt) if card.system_prompt else "none") + own
    for what, count in card.profile_report.items():
        yield "profile", f"{count:,} {what}"
    if card.num_stripped:
        yield (
            "stripped",
            f"the chat template leaves out text of {counted(card.num_stripped, 'row')}, such as "
            f"{_short(card.stripped_example)}",
        )
    if card.num_as_text:
        yield (
            "as text",
            f"{card.num_as_text:,} numbers, booleans or JSON values are converted to JSON text",
        )
    yield "unused keys", _unused_text(card.unused_keys)


def _unused_text(unused: Mapping[str, int]) -> str:
    ordered = sorted(unused.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [f"{_shown_key(key)} ({count:,})" for key, count in ordered[:MAX_KEYS_SHOWN]]
    more = len(ordered) - MAX_KEYS_SHOWN
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


def _shown_key(key: str) -> str:
    """A key from a file, which may hold anything, in one bounded word."""
    return key[:MAX_KEY_CHARS] if key.isprintable() else ascii(key[:MAX_KEY_CHARS])


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _too_long_text(card: DataCard) -> str:
    length, tokens = f"{card.max_length:,}", counted(card.num_cut_tokens, "token")
    if card.num_dropped:
        return (
            f"{counted(card.num_dropped, 'row')} of more than {length} tokens left out "
            f"({tokens}, data.truncation=drop)"
        )
    if card.num_split:
        return (
            f"{counted(card.num_split, 'text')} cut into {card.num_windows:,} windows of up to "
            f"{length} "
            "tokens; each token is trained once (data.truncation=split)"
        )
    if not card.num_truncated:
        return "none"
    end = "last" if card.truncation == "keep_end" else "first"
    return (
        f"{counted(card.num_truncated, 'row')} cut to the {end} {length} tokens ({tokens} removed)"
    )


def _rejected_text(card: DataCard) -> str:
    if not card.num_rejected:
        return "none"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in card.rejected.items())
    return f"{counted(card.num_rejected, 'row')}: {reasons}"
