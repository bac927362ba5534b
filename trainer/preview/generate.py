"""The only code that samples tokens: used in the training process and by a worker alike.

One left-padded batch, one `generate` call. A logits processor samples with one number per row and
token that is a function of (seed, prompt, position, sample), so it depends neither on the order of
prompts nor on the device nor on the global random state; with temperature 0 the most likely token
wins.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import StoppingCriteriaList

from trainer.config.monitoring_section import MIN_TEMPERATURE
from trainer.models.devices import any_algorithm
from trainer.preview.samples import sample_seed

STOP_WINDOW = 48
"""Tokens at the end that are decoded to look for a stop string, at least."""


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate, apart from the prompts."""

    max_new_tokens: int
    temperature: float
    seed: int
    stop_strings: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    pad_id: int = 0
    max_length: int | None = None
    """Longest prompt and answer together, in tokens; None = no limit."""


@dataclass(frozen=True)
class Generation:
    """One answer as token ids."""

    token_ids: list[int]
    """Generated ids up to the stop; the stop token itself and pads are not in it."""
    raw_ids: list[int]
    """The same with the stop token, if there is one."""
    is_stopped: bool
    """False when the answer was cut at the limit."""


class NoiseProcessor(LogitsProcessor):  # type: ignore[misc]
    """Samples the softmax at a temperature, so that the argmax of what comes out is the sample.

    The cumulative distribution is inverted where the scores are: one number per row and token is
    drawn, however large the vocabulary, and equal scores give equal tokens on every device.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        temperature: float,
        seed: int,
        samples: Sequence[int] = (),
    ) -> None:
        """Derive one seed per row from the run's seed, the row's prompt ids and its sample.

        Args:
            samples: number of each row's sample; empty: 0 for all.
        """
        self.temperature = temperature
        self.seeds = [
            _row_seed(prompt, sample_seed(seed, sample))
            for prompt, sample in zip(prompts, samples or [0] * len(prompts), strict=True)
        ]
        self.position = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take scores (B, V), return scores (B, V) float32: 0 for the sample, -inf elsewhere."""
        drawn = [uniform(seed, self.position) for seed in self.seeds]
        self.position += 1
        # fp32 sums of 150,000 probabilities would be off by more than a rare token's own.
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        scores = scores.to(wide)
        # The maximum first: divided by a tiny temperature, it would be infinite.
        scores = (scores - scores.amax(-1, keepdim=True)) / self.temperature
        sums = scores.softmax(-1).cumsum(-1)  # (B, V)
        total = sums[:, -1:]
        target = torch.tensor(drawn, dtype=wide).to(scores.device)[:, None] * total
        target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
        # The first sum above the target: a token of probability 0 raises no sum.
        chosen = torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[-1] - 1)
        sampled = torch.full(scores.shape, -torch.inf, device=scores.device)
        return sampled.scatter_(-1, chosen, 0.0)


def uniform(row_seed: int, position: int) -> float:
    """A number in [0, 1) for one row and position; neighbours of either have unrelated ones."""
    digest = hashlib.blake2b(f"{row_seed}:{position}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _row_seed(prompt: Sequence[int], seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{','.join(map(str, prompt))}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


class StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Ends a row when its answer contains a stop string, however the tokenizer splits it."""

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str], prompt_width: int) -> None:
        """Look only behind `prompt_width` tokens, the padded prompt."""
        self.tokenizer, self.stop_strings, self.width = tokenizer, stop_strings, prompt_width
        # A token is a byte at least. Some more: the first ones may decode otherwise than in place.
        longest = max((len(stop.encode()) for stop in stop_strings), default=0)
        self.window = max(STOP_WINDOW, longest + 8)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return (B,) bool: rows that are done."""
        tail = input_ids[:, max(self.width, input_ids.shape[1] - self.window) :].tolist()
        texts = self.tokenizer.batch_decode(tail, clean_up_tokenization_spaces=False)
        done = [any(stop in text for stop in self.stop_strings) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    processors: Sequence[Any] = (),
    samples: Sequence[int] = (),
) -> list[Generation]:
    """Continue every prompt; the caller chooses mode, autocast and device of the model.

    Args:
        model: a causal language model with `generate`.
        tokenizer: decodes for stop strings; nothing of it is changed.
        prompts: token ids, B rows of any length.
        settings: limits, temperature, stops.
        processors: the profile's, state per row; run before temperature and noise.
        samples: number of each row's sample; empty: 0 for all.
    Returns:
        B generations in the order of the prompts.
    """
    device = next(model.parameters()).device
    input_ids, mask = left_pad(prompts, settings.pad_id)
    width = input_ids.shape[1]
    room = settings.max_new_tokens
    if settings.max_length is not None:
        room = max(1, min(room, settings.max_length - width))
    chain = LogitsProcessorList(processors)
    if settings.temperature >= MIN_TEMPERATURE:
        chain.append(NoiseProcessor(prompts, settings.temperature, settings.seed, samples))
    stopping = StoppingCriteriaList()
    if settings.stop_strings:
        stopping.append(StopStrings(tokenizer, settings.stop_strings, width))
    # On a GPU the cumulative sum of sampling has no deterministic algorithm.
    with _own_generation_config(model), _without_router_loss(model), any_algorithm():
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=_config(settings, room),
            logits_processor=chain,
            stopping_criteria=stopping,
        )
    rows: list[list[int]] = output[:, width:].tolist()
    return [_finish(row, tokenizer, settings) for row in rows]


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack prompts with their ends aligned.

    Returns:
        input_ids and attention_mask, both (B, T) int64.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


@contextlib.contextmanager
def _without_router_loss(model: Any) -> Iterator[None]:
    """Have a mixture of experts make no router loss, which wants a mask of the prompt's length."""
    configs = {id(one): one for one in (model.config, model.config.get_text_config())}.values()
    asking = [one for one in configs if getattr(one, "output_router_logits", False)]
    try:
        for one in asking:
            one.output_router_logits = False
        yield
    finally:
        for one in asking:
            one.output_router_logits = True


@contextlib.contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Hide the model folder's generation config while we generate.

    transformers fills whatever a given config leaves open from the model's own one, which may ask
    for sampling, top-k or penalties: a preview would then show something else than what these
    weights say.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    holders = [holder for holder in (model, base) if hasattr(holder, "generation_config")]
    before = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        for holder, config in zip(holders, before, strict=True):
            holder.generation_config = config


def _config(settings: GenerationSettings, room: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=room,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(settings.stop_ids) or None,
        pad_token_id=settings.pad_id,
    )


def _finish(row: list[int], tokenizer: Any, settings: GenerationSettings) -> Generation:
    """Cut a row behind its first stop token or stop string; what follows is padding."""
    for position, token in enumerate(row):
        if token in settings.stop_ids:
            row = row[: position + 1]
            break
    is_stopped = bool(row) and row[-1] in settings.stop_ids
    body = row[:-1] if is_stopped else row
    if settings.stop_strings:
        cut = _first_stop_string(body, tokenizer, settings.stop_strings)
        if cut is not None:
            return Generation(body[:cut], body[:cut], True)
    return Generation(body, row, is_stopped)


def _first_stop_string(body: list[int], tokenizer: Any, stop_strings: Sequence[str]) -> int | None:
    """How many leading tokens hold the first complete stop string; None if there is none."""

    def holds(count: int) -> bool:
        text = tokenizer.decode(body[:count], clean_up_tokenization_spaces=False)
        return any(stop in text for stop in stop_strings)

    if not holds(len(body)):
        return None
    low, high = 1, len(body)
    while low < high:  # bisect: once complete, a stop string stays in the text
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
