"""Models and tokenizers by name, adapters, the built-in `tiny`; torch comes with what needs it.

The short names for what people fine-tune at home stand here.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import lazy_names
from trainer.errors import ModelError

if TYPE_CHECKING:
    from trainer.models.adapter_files import load_finished_model
    from trainer.models.adapters import add_lora
    from trainer.models.load import load_model, load_tokenizer
    from trainer.models.tiny import write_demo_data

__all__ = ["add_lora", "load_finished_model", "load_model", "load_tokenizer", "write_demo_data"]

__getattr__ = lazy_names(
    __name__,
    {
        "trainer.models.adapter_files": ["load_finished_model"],
        "trainer.models.adapters": ["add_lora"],
        "trainer.models.load": ["load_model", "load_tokenizer"],
        "trainer.models.tiny": ["write_demo_data"],
    },
)


@dataclass(frozen=True)
class Alias:
    """A short name and what it stands for."""

    path: str
    """Hub id; `tiny` is built in."""
    size: str
    note: str


TINY = "tiny"

GATED = "accept its licence on the hub, then `hf auth login`"

ALIASES: dict[str, Alias] = {
    TINY: Alias("tiny", "0.8M", "built in, untrained; for trying things without a download"),
    "qwen3": Alias("Qwen/Qwen3-0.6B", "0.6B", "the usual first choice for one GPU"),
    "qwen3-0.6b": Alias("Qwen/Qwen3-0.6B", "0.6B", ""),
    "qwen3-1.7b": Alias("Qwen/Qwen3-1.7B", "1.7B", ""),
    "qwen3-4b": Alias("Qwen/Qwen3-4B", "4B", "lora on 24 GB"),
    "qwen3-8b": Alias("Qwen/Qwen3-8B", "8B", "lora on 24 GB with short rows"),
    "qwen2.5-0.5b": Alias("Qwen/Qwen2.5-0.5B-Instruct", "0.5B", ""),
    "qwen2.5-1.5b": Alias("Qwen/Qwen2.5-1.5B-Instruct", "1.5B", ""),
    "smollm2-135m": Alias("HuggingFaceTB/SmolLM2-135M-Instruct", "135M", "trains on a CPU"),
    "smollm2-360m": Alias("HuggingFaceTB/SmolLM2-360M-Instruct", "360M", ""),
    "smollm2-1.7b": Alias("HuggingFaceTB/SmolLM2-1.7B-Instruct", "1.7B", ""),
    "smollm3-3b": Alias("HuggingFaceTB/SmolLM3-3B", "3B", ""),
    "llama3.2-1b": Alias("meta-llama/Llama-3.2-1B-Instruct", "1B", GATED),
    "llama3.2-3b": Alias("meta-llama/Llama-3.2-3B-Instruct", "3B", GATED),
    "llama3.1-8b": Alias("meta-llama/Llama-3.1-8B-Instruct", "8B", GATED),
    "gemma3-270m": Alias("google/gemma-3-270m-it", "270M", GATED),
    "gemma3-1b": Alias("google/gemma-3-1b-it", "1B", GATED),
    "mistral-7b": Alias("mistralai/Mistral-7B-Instruct-v0.3", "7B", GATED),
    "phi3.5-mini": Alias("microsoft/Phi-3.5-mini-instruct", "3.8B", ""),
    "phi4-mini": Alias("microsoft/Phi-4-mini-instruct", "3.8B", ""),
}


def resolve_alias(name: str) -> str:
    """The hub id or path that `name` stands for; a name that is no alias stands for itself."""
    alias = ALIASES.get(name.lower())
    return alias.path if alias else os.path.expanduser(name)


def nearest_alias(name: str) -> str | None:
    """The alias that `name` was probably meant to be."""
    near = difflib.get_close_matches(name.lower(), ALIASES, n=1)
    return near[0] if near else None


GGUF_SUFFIX = ".gguf"


def looks_like_path(path: str) -> bool:
    """Whether a model name is written as a path; hub ids are `owner/name`."""
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1 or "\\" in path


def check_path(name: str) -> None:
    """Refuse a model name that is written as a path and leads nowhere, or to no model.

    Raises:
        ModelError: says what a model may be called.
    """
    path = resolve_alias(name)
    if Path(path).suffix.lower() == GGUF_SUFFIX:
        if not Path(path).is_file():
            raise ModelError(f"model.model_path={name}: there is no such .gguf file.")
    elif Path(path).is_file():
        raise ModelError(
            f"model.model_path={name}: this is a file; give the folder of a model, a .gguf file, "
            "an alias (`trainer models`) or a hub id."
        )
    elif looks_like_path(path) and not Path(path).is_dir():
        raise ModelError(
            f"model.model_path={name}: there is no such folder. Give an alias "
            f"({', '.join(ALIASES)}), a hub id such as Qwen/Qwen3-0.6B, or a model folder."
        )


ADAPTER_CONFIG = "adapter_config.json"


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (path / ADAPTER_CONFIG).is_file()


STATE_NAME = re.compile(
    r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"
    r"|\.(SCB|weight_format)$"
)


def is_quantization_state(name: str) -> bool:
    """Whether a tensor of a state dict says how another one is quantized."""
    return STATE_NAME.search(name) is not None
