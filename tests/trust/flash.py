"""A stand-in for flash-attn on the CPU: plain attention behind the names that transformers imports.

It computes what the real kernels document: sequences end to end with borders, causal from the
bottom right, windows, soft-capping, fewer heads of keys than of queries. Like them it believes the
borders it is given, leaves tokens outside them zero, and rounds half precision differently in its
two functions. Unlike them it takes any float dtype.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from transformers import modeling_flash_attention_utils as utils
from transformers.integrations import hub_kernels
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HUB_KERNEL = "somebody/flash-kernel"
NAMES = ("flash_attention_2", "flash_attention_3", HUB_KERNEL)


@dataclass
class Calls:
    """How often each kernel was called, and how often borders were looked for in positions."""

    rows: int = 0
    varlen: int = 0
    searches: int = 0


@torch.autocast("cpu", enabled=False)  # a kernel computes in the dtype of what it is given
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> torch.Tensor:
    """One sequence: query (T, H, D), key and value (S, K, D), H a multiple of K -> (T, H, D)."""
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
    scores = torch.einsum("thd,shd->hts", query, key) * (scale or query.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    # How far each key lies behind its query; the last ones of both are at the same place.
    rows = torch.arange(len(query))[:, None] + len(key) - len(query)
    behind = rows - torch.arange(len(key))[None]
    hidden = (behind < 0) if causal else torch.zeros_like(behind, dtype=torch.bool)
    if window[0] >= 0:
        hidden = hidden | (behind > window[0])
    if window[1] >= 0:
        hidden = hidden | (-behind > window[1])
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


def package(calls: Calls) -> ModuleType:
    """The functions of flash-attn as a module."""
    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> torch.Tensor:
        calls.varlen += 1
        assert dropout_p == 0, "the stand-in has no dropout"
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        out = torch.zeros_like(q)
        borders = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
        for (q0, k0), (q1, k1) in itertools.pairwise(borders):
            q1, k1 = min(q1, q0 + int(max_seqlen_q)), min(k1, k0 + int(max_seqlen_k))
            out[q0:q1] = attend(
                q[q0:q1],
                k[k0:k1],
                v[k0:k1],
                scale=softmax_scale,
                causal=causal,
                window=window_size,
                softcap=softcap,
            )
        return out

    def flash_attn_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> torch.Tensor:
        calls.rows += 1
        assert dropout_p == 0, "the stand-in has no dropout"
        options: dict[str, Any] = {
            "scale": softmax_scale,
            "causal": causal,
            "window": window_size,
            "softcap": softcap,
        }
        # In fp32 for half precision, where the other one computes in the dtype it is given.
        wide = [part if part.dtype == torch.float64 else part.float() for part in (q, k, v)]
        rows = [attend(*row, **options) for row in zip(*wide, strict=True)]
        return torch.stack(rows).to(q.dtype)

    def flash_attn_with_kvcache(*_: Any, **__: Any) -> torch.Tensor:
        raise NotImplementedError("paged attention is not part of the stand-in")

    for function in (flash_attn_varlen_func, flash_attn_func, flash_attn_with_kvcache):
        setattr(module, function.__name__, function)
    return module


@contextmanager
def installed() -> Iterator[Calls]:
    """transformers finds the stand-in as flash-attn 2 and 3 and as a kernel of the hub."""
    calls = Calls()
    kernel = package(calls)
    padding = ModuleType("flash_attn.bert_padding")
    vars(padding).update(pad_input=utils._pad_input, unpad_input=utils._unpad_input)
    modules = {
        "flash_attn": kernel,
        "flash_attn.bert_padding": padding,
        "flash_attn_interface": kernel,
    }
    search = utils.prepare_fa_kwargs_from_position_ids

    def counted(position_ids: torch.Tensor) -> Any:
        calls.searches += 1
        return search(position_ids)

    with ExitStack() as stack:

        def replace(holder: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(holder, name, value))

        stack.enter_context(mock.patch.dict(sys.modules, modules))
        for version in (2, 3):
            replace(utils, f"is_flash_attn_{version}_available", _yes)
            entry = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[version]
            here = {"general_availability_check": _yes, "supported_devices": ((_yes, "cpu"),)}
            stack.enter_context(mock.patch.dict(entry, here))
        replace(hub_kernels, "is_kernels_available", _yes)
        replace(hub_kernels, "get_kernel", mock.Mock(return_value=kernel))
        replace(utils, "prepare_fa_kwargs_from_position_ids", counted)
        replace(utils, "_loaded_implementation", None)
        for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            stack.enter_context(mock.patch.dict(functions._global_mapping))
        yield calls


def _yes(**_: Any) -> bool:
    return True
