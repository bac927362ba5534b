"""Whose answer it is: hashes that name weights, config and tokenizer, and the canary.

Prompt, golden answer, step and comparison of a result are the trainer's own; text and counts are
the worker's. The canary decides whether they are shown: the log-probability of some golden answers,
computed on both sides, can only agree when the weights do.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.files import canonical_hash
from trainer.models import is_quantization_state
from trainer.models.adapters import adapted_modules
from trainer.models.chat_template import chat_template_hash, tokenizer_hash
from trainer.models.quantized import comparable
from trainer.preview.base import (
    PreviewRequest,
    PreviewResult,
    WeightsProof,
    golden_figures,
    is_match,
)
from trainer.publish.wire import AdapterConfig, TensorEntry, WeightsManifest

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# Keys of a config that differ between two loads of the same architecture.
VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


def canonical_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by their Hugging Face names, tied ones once, sorted by name.

    The parameters themselves, as in the two functions below: detach before changing them. With
    quantized weights come the tensors that say how they are quantized, as in a saved model.
    """
    saved = model.state_dict(keep_vars=True)
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    found |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    found |= {name: value for name, value in saved.items() if is_quantization_state(name)}
    return {name: found[name] for name in sorted(found)}


TRAINED = (".lora_", ".modules_to_save.", ".trainable_tokens_delta.")
"""Parts of the names of what an adapter run trains."""


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What an adapter run trains (`modules_to_save` too), sorted by name, of a PEFT model.

    The adapter's own name is left out of the names, so that both sides may call it as they like.
    """
    found = {
        name.removesuffix(".default").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if any(part in name for part in TRAINED)
    }
    return {name: found[name] for name in sorted(found)}


def base_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The weights under the adapters of a PEFT model, by the names of the plain model."""
    found = {
        _plain_name(name): value
        for name, value in canonical_tensors(model.get_base_model()).items()
        if not any(part in name for part in (*TRAINED, ".trainable_tokens_original."))
    }
    return {name: found[name] for name in sorted(found)}


def _plain_name(name: str) -> str:
    for part in (".token_adapter.", ".base_layer.", ".original_module."):
        name = name.replace(part, ".")
    return name


def adapter_config(model: Any) -> AdapterConfig:
    """How the adapters of a PEFT model are built, with every target module by its full name."""
    config, base = model.peft_config["default"], model.get_base_model()
    targets = sorted(adapted_modules(model))
    ranks = {name: base.get_submodule(name).r["default"] for name in targets}
    alphas = {name: base.get_submodule(name).lora_alpha["default"] for name in targets}
    return AdapterConfig(
        r=config.r,
        alpha=config.lora_alpha,
        target_modules=targets,
        modules_to_save=sorted(config.modules_to_save or ()),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        ranks={name: rank for name, rank in ranks.items() if rank != config.r},
        trainable_tokens=_token_rows(base),
        ensure_weight_tying=bool(config.ensure_weight_tying),
        alphas={name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha},
    )


def _token_rows(base: Any) -> dict[str, list[int]]:
    """Rows of tokens by module; a tied head has none of its own."""
    adapters = {
        name: module.token_adapter
        for name, module in base.named_modules()
        if hasattr(module, "token_adapter")
    }
    return {
        name: list(one.token_indices["default"])
        for name, one in adapters.items()
        if one.tied_adapter is None
    }


def tensor_hash(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's bytes, as safetensors lays them out."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def tensor_entry(name: str, tensor: torch.Tensor) -> TensorEntry:
    """Name, dtype, shape and hash of one tensor."""
    return TensorEntry.model_validate(
        {
            "name": name,
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "sha256": tensor_hash(tensor),
        }
    )


def config_hash(config: Any) -> str:
    """Hash of a model config, without names, versions and dtype."""
    plain = json.loads(config.to_json_string(use_diff=False))
    plain = {key: value for key, value in plain.items() if key not in VOLATILE}
    if plain.get("quantization_config"):
        plain["quantization_config"] = comparable(plain["quantization_config"])
    return canonical_hash(plain)


def model_manifest(model: Any, tokenizer: Any) -> WeightsManifest:
    """The manifest of a model as it is now; its `weights_id` names the weights."""
    return WeightsManifest(
        config_hash=config_hash(model.config),
        tokenizer_hash=tokenizer_hash(tokenizer),
        chat_template_hash=chat_template_hash(tokenizer),
        tensors=[tensor_entry(name, tensor) for name, tensor in canonical_tensors(model).items()],
    )


# ---- answers of a worker, judged


NOISE_FP32 = 5e-4
"""Nats by which the log-probability of one golden token may differ between two machines that
compute in fp32 with the same numbers. Measured in docs/previews.md."""

NOISE_HALF = 0.1
"""The same where the trainer's attention kernel takes half precision only."""

CANARY_TOKENS = 64
"""Golden tokens that are scored, where the run's prompts have so many."""


@dataclass(frozen=True)
class Canary:
    """Golden answers that both sides score, as one sum over all their tokens."""

    rows: tuple[int, ...]
    """Their places among the requests."""
    num_tokens: int
    tolerance: float
    """Nats by which one token may differ. Tokens differ independently, so a sum of n may differ by
    sqrt(n) of it, and their mean by 1/sqrt(n)."""
    score: Callable[[], torch.Tensor]
    """The trainer's own sum of them under the weights as they are now: a scalar on its device."""

    def disagreement(self, mine: float | None, theirs: float | None) -> str | None:
        """Why the two sums cannot come from the same weights; None when they agree."""
        if mine is None or theirs is None:
            return "the worker returned no canary"
        allowed = self.tolerance * math.sqrt(self.num_tokens) + 1e-6 * abs(mine)
        if math.isfinite(mine) and math.isfinite(theirs) and abs(mine - theirs) <= allowed:
            return None
        return (
            f"the canary's log-probability is {theirs:.5f} there and {mine:.5f} here, and may "
            f"differ by {allowed:.5f}"
        )


def results_of(
    answer: dict[str, Any],
    requests: Sequence[PreviewRequest],
    step: int,
    *,
    canary: tuple[Canary | None, float | None],
    matches: Callable[[str, str], bool],
    parts_of: GoldenParts,
    backend_type: str,
    visible_s: float,
) -> list[PreviewResult]:
    """Judge the answers of one step.

    Args:
        answer: the publisher's event `done`: weights_id, results, golden_logprobs, canary_logprob.
        canary: the canary, if there is one, and the trainer's own sum for this step.
        matches: the profile's comparison of an answer with golden.
        parts_of: golden ids -> what a result says of them.
    """
    proof: WeightsProof = "published"
    if canary[0] is not None:
        wrong = canary[0].disagreement(canary[1], answer["canary_logprob"])
        if wrong is not None:
            message = f"mismatch, not shown: {wrong}; other weights, or another computation"
            return [PreviewResult.failed(one, step, message, backend_type) for one in requests]
        proof = "verified"
    scores = answer["golden_logprobs"] or [None] * len(requests)
    return [
        _result(request, found, score, matches, parts_of).model_copy(
            update={
                "step": step,
                "weights_id": answer["weights_id"],
                "weights": proof,
                "backend_type": backend_type,
                "visible_s": round(visible_s, 3),
            }
        )
        for request, found, score in zip(requests, answer["results"], scores, strict=True)
    ]


def canary_rows(requests: Sequence[PreviewRequest]) -> tuple[int, ...]:
    """Places of the shortest requests that have CANARY_TOKENS golden tokens between them.

    All that have golden ids, where those are fewer; the mean of many tokens tells weights apart
    that differ by one step, and a single short answer does not.
    """
    usable = sorted(
        (len(one.prompt_token_ids) + len(one.golden_token_ids), len(one.golden_token_ids), index)
        for index, one in enumerate(requests)
        if one.prompt_token_ids and one.golden_token_ids
    )
    rows: list[int] = []
    total = 0
    for _, num_golden, index in usable:
        if total >= CANARY_TOKENS:
            break
        rows.append(index)
        total += num_golden
    return tuple(sorted(rows))


HEALTH = frozenset({"empty", "repeats", "never_stopped", "template_leak", "copies_prompt"})


GoldenParts = Callable[[Sequence[int]], dict[str, Any]]

NO_PARTS = dict.fromkeys(
    ("golden_tokens", "golden_token_ids", "golden_token_bytes", "golden_is_frame")
)

NOT_MEASURED = {"golden_logprobs": None, "golden_probability": None}


def _plausible(theirs: PreviewResult) -> PreviewResult:
    """A worker's counts and flags as far as they can be true; the text is data and stays."""
    seconds, rate = theirs.generation_time_sec, theirs.tokens_per_sec
    return theirs.model_copy(
        update={
            "tokens_generated": max(0, theirs.tokens_generated),
            "generation_time_sec": seconds if math.isfinite(seconds) else 0.0,
            "tokens_per_sec": rate if math.isfinite(rate) else 0.0,
            "health": tuple(flag for flag in theirs.health if flag in HEALTH),
        }
    )


def _result(
    request: PreviewRequest,
    found: dict[str, Any],
    score: list[float] | None,
    matches: Callable[[str, str], bool],
    parts_of: GoldenParts,
) -> PreviewResult:
    """One answer: the worker's words about it, our own about everything else."""
    theirs = _plausible(PreviewResult.model_validate(found))
    golden, ids = request.golden_answer, request.golden_token_ids
    is_scored = score is not None and ids is not None and len(score) == len(ids)
    parts, measured = NO_PARTS, NOT_MEASURED
    if score is not None and ids is not None and is_scored:
        parts = parts_of(ids)
        measured = golden_figures(score, parts.get("golden_is_frame"))
    return theirs.model_copy(
        update={
            "prompt": request.prompt,
            "prompt_id": request.prompt_id,
            "held_out": request.held_out,
            "golden_answer": golden,
            "matches": is_match(request, theirs.text, matches) if theirs.ok else None,
            **parts,
            **measured,
            "scores": {},
            "samples": (),
        }
    )
