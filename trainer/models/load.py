"""Alias, hub id, folder or .gguf file -> tokenizer and model in the run's dtype; `locked` checks.

transformers and torch are imported inside the functions: `trainer models` and error paths need
neither.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.schema import LockedSection, LoraSection, ModelSection
from trainer.errors import ConfigError, ModelError
from trainer.models.added_tokens import add_tokens
from trainer.models.aliases import ALIASES, TINY, nearest_alias, resolve_alias
from trainer.models.chat_template import set_chat_template
from trainer.models.hub import hub_answers

GGUF_SUFFIX = ".gguf"
SAVED_BASE = "base_model"
"""Folder in a run's folder, for the base of an adapter that is on no disk and no hub."""

if TYPE_CHECKING:  # annotations only: importing torch here would slow every command
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(section: ModelSection, *, offline: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `model.model_path`.

    Raises:
        ModelError: no such model, or no fast tokenizer in it.
        ConfigError: `model.chat_template` or `model.add_tokens` cannot be used with it.
    """
    path = resolve_alias(section.model_path)
    if section.revision is not None and (path == TINY or Path(path).exists()):
        raise ConfigError(
            f"model.revision={section.revision!r} names a version on the model hub, and "
            f"model.model_path={section.model_path} is no hub id; leave model.revision empty."
        )
    if path == TINY:
        from trainer.models.tiny import load_tiny_tokenizer

        tiny = load_tiny_tokenizer()
        set_chat_template(tiny, section.chat_template)
        add_tokens(tiny, section.add_tokens)
        return tiny
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer.from_pretrained, section, path, offline, "tokenizer")
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.model_path={section.model_path}: its tokenizer is a slow one; the trained "
            "tokens can be proved with fast tokenizers only. Use a model that ships tokenizer.json."
        )
    set_chat_template(tokenizer, section.chat_template)
    add_tokens(tokenizer, section.add_tokens)
    result: PreTrainedTokenizerBase = tokenizer
    return result


def load_model(
    section: ModelSection,
    *,
    dtype: torch.dtype,
    seed: int = 42,
    offline: bool = False,
) -> PreTrainedModel:
    """Load the causal language model of `model.model_path` on the CPU.

    Args:
        dtype: dtype of the weights as loaded.
        seed: initialises the built-in `tiny` model, which has no trained weights.
    Raises:
        ModelError: no such model, or one that is not a causal language model.
    """
    path = resolve_alias(section.model_path)
    if path == TINY:
        from trainer.models.tiny import build_tiny_model, load_tiny_tokenizer

        tiny = build_tiny_model(seed=seed, vocab_size=len(load_tiny_tokenizer()), dtype=dtype)
        if section.attn_implementation != "auto":
            try:
                tiny.set_attn_implementation(section.attn_implementation)
            except (ImportError, ValueError) as error:
                raise _attention_error(section, error) from error
        return tiny
    from transformers import AutoModelForCausalLM

    extra: dict[str, Any] = {"dtype": dtype}
    if section.attn_implementation != "auto":
        extra["attn_implementation"] = section.attn_implementation
    model: PreTrainedModel = _from_pretrained(
        AutoModelForCausalLM.from_pretrained, section, path, offline, "model", **extra
    )
    if Path(path).suffix.lower() == GGUF_SUFFIX:
        _forget_quantization(model)
    return model


def _forget_quantization(model: Any) -> None:
    """The weights of a .gguf file are plain numbers once loaded; saved again, they must say so."""
    for holder in (model.config, model):
        for name in ("quantization_config", "hf_quantizer"):
            if hasattr(holder, name):
                delattr(holder, name)
    model.is_quantized = False  # else the Trainer refuses to train it
    # An adapter cannot name the file as its base: without a name, the run saves the base itself.
    model.config._name_or_path = model.name_or_path = ""


def _from_pretrained(
    loader: Any, section: ModelSection, path: str, offline: bool, what: str, **extra: Any
) -> Any:
    is_folder = Path(path).is_dir()
    # Absolute, because an adapter records its base by this name.
    folder = str(Path(path).resolve()) if is_folder else path
    if Path(path).suffix.lower() == GGUF_SUFFIX:
        folder, extra = _gguf_source(section, Path(path), extra)
        is_folder = True
    elif not is_folder and _looks_like_path(path):
        raise ModelError(
            f"model.model_path={section.model_path}: there is no such folder. Give an alias "
            f"({', '.join(ALIASES)}), a hub id such as Qwen/Qwen3-0.6B, or a model folder."
        )
    try:
        return loader(
            folder,
            revision=None if is_folder else section.revision,
            trust_remote_code=section.trust_remote_code,
            local_files_only=is_folder or offline or not hub_answers(),
            **extra,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise _load_error(section, folder, what, is_folder, error) from error


def _gguf_source(
    section: ModelSection, path: Path, extra: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The folder of a .gguf file, and the loader's arguments with the file's name.

    Raises:
        ModelError: there is no such file, or the package that reads it is missing.
    """
    if not path.is_file():
        raise ModelError(f"model.model_path={section.model_path}: there is no such .gguf file.")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"model.model_path={section.model_path}: reading .gguf files needs the package gguf; "
            "`pip install 'ultimate-trainer[gguf]'`."
        )
    return str(path.parent), {**extra, "gguf_file": path.name}


def _looks_like_path(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1 or "\\" in path


def _load_error(
    section: ModelSection, path: str, what: str, is_folder: bool, error: Exception
) -> ModelError:
    whole = " ".join(str(error).split())
    first, name = whole[:300], section.model_path
    if "flash" in first.lower() and section.attn_implementation.startswith("flash"):
        return _attention_error(section, error)
    if "trust_remote_code" in whole:
        return ModelError(
            f"model.model_path={name}: this {what} needs Python code from its own folder. If you "
            "have read that code and trust it, set model.trust_remote_code=true."
        )
    if is_folder:
        held = ", ".join(sorted(entry.name for entry in Path(path).iterdir())[:12]) or "nothing"
        return ModelError(
            f"model.model_path={name}: cannot load the {what} from this folder, which holds {held}."
            f" It must be a folder as transformers saves it. Cause: {first}"
        )
    near = nearest_alias(name)
    hint = f" Did you mean --model {near}?" if near and near != name.lower() else ""
    return ModelError(
        f"model.model_path={name}: the {what} {path!r} is not in the local cache, and the model "
        f"hub could not be asked for it or does not have it.{hint} Check the name "
        "(`trainer models` lists aliases) and the network, download it once while online, or "
        f"give a model folder. Cause: {first}"
    )


def _attention_error(section: ModelSection, error: Exception) -> ModelError:
    cause = " ".join(str(error).split()).rpartition("following error: ")[2][:300]
    return ModelError(
        f"model.attn_implementation={section.attn_implementation} cannot be used here; use auto or "
        f"sdpa. Cause: {cause}"
    )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that can produce ids the embedding does not have.

    Raises:
        ModelError: the largest token id is not below the number of embedding rows.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(
            f"the tokenizer has token ids up to {largest}, the model's embedding has {rows} rows "
            f"(ids 0 to {rows - 1}): they do not belong together. Give a folder in which both "
            "come from the same model."
        )


def context_length(config: Any) -> int | None:
    """The longest sequence of a model config in tokens, None where it does not say."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    value = getattr(text_config, "max_position_embeddings", None)
    return int(value) if value else None


def read_model_config(section: ModelSection, *, offline: bool = False) -> Any:
    """Load the model's config (a few KB) without its weights.

    Raises:
        ModelError: no such model.
    """
    path = resolve_alias(section.model_path)
    if path == TINY:
        from trainer.models.tiny import tiny_config

        return tiny_config()
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig.from_pretrained, section, path, offline, "config")


def check_locked(locked: LockedSection, section: ModelSection, config: Any) -> None:
    """Compare section `locked` with the model's config.

    Raises:
        ConfigError: a locked value differs; all differences are named.
    """
    path = resolve_alias(section.model_path)
    names = {section.model_path, path, getattr(config, "_name_or_path", "") or path}
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {
        "architecture": (getattr(config, "architectures", None) or [None])[0],
        "context_length": context_length(config),
        "vocab_size": getattr(text_config, "vocab_size", None),
    }
    wrong = [
        f"locked.{key}={wanted!r}, the model has {found[key]!r}"
        for key, wanted in locked.model_dump(exclude={"base_model"}).items()
        if wanted is not None and wanted != found[key]
    ]
    if locked.base_model is not None and resolve_alias(locked.base_model) not in names:
        wrong.insert(0, f"locked.base_model={locked.base_model!r}, the model is {path!r}")
    if wrong:
        raise ConfigError(
            f"{'; '.join(wrong)}. Section `locked` says what the model must be: choose another "
            "model.model_path, or change `locked`."
        )


def add_lora(
    model: PreTrainedModel, section: LoraSection, *, seed: int, revision: str | None = None
) -> Any:
    """Put adapters on a model and freeze the rest; all that is trained is fp32.

    Args:
        revision: of the model on the hub, recorded in the adapter.

    Returns:
        A `peft.PeftModel`.
    Raises:
        ConfigError: a target module is not in the model.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    targets: Any = section.target_modules
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(section.modules_to_save) or None,
        task_type="CAUSAL_LM",
        revision=revision,
    )
    missing = [
        name
        for name in (*(() if isinstance(targets, str) else targets), *section.modules_to_save)
        if not any(key == name or key.endswith("." + name) for key, _ in model.named_modules())
    ]
    if missing:
        leaves = sorted(
            {
                key.rsplit(".", 1)[-1]
                for key, module in model.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
        )
        raise ConfigError(
            f"lora: the model has no module named {', '.join(missing)}; its linear layers are "
            f"{', '.join(leaves)}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # PEFT copies modules_to_save in the dtype of the frozen base,
            parameter.data = parameter.data.float()  # which would lose most updates
    return adapted


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (path / "adapter_config.json").is_file()


def load_finished_model(
    folder: Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """Load `final_model/` of a run, adapters with their base.

    Args:
        folder: of the model or adapter.
        dtype: of the weights; None: fp32.
        trust_remote_code: as the run was told.
    Raises:
        ModelError: the folder holds no model, or its base cannot be loaded.
    """
    import torch

    dtype = dtype or torch.float32
    if not is_adapter_folder(folder):
        path = str(folder.resolve())
        section = ModelSection(model_path=path, trust_remote_code=trust_remote_code)
        return load_model(section, dtype=dtype)
    from peft import PeftModel

    return PeftModel.from_pretrained(
        load_model(_base_of(folder, trust_remote_code), dtype=dtype), str(folder)
    )


def _base_of(folder: Path, trust_remote_code: bool) -> ModelSection:
    """The base model of an adapter; one that the run saved itself moves with the run."""
    saved = json.loads((folder / "adapter_config.json").read_text())
    base = saved["base_model_name_or_path"]
    beside = [parent / SAVED_BASE for parent in folder.resolve().parents[:2]]
    if Path(base).name == SAVED_BASE and not Path(base).is_dir():
        base = next((str(path) for path in beside if path.is_dir()), base)
    return ModelSection(
        model_path=base, revision=saved.get("revision"), trust_remote_code=trust_remote_code
    )
