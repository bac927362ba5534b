"""Alias, hub id, folder or .gguf file -> tokenizer and model that fit; `locked` checks."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.schema import LockedSection
from trainer.config.training_sections import ModelSection
from trainer.errors import ConfigError, ModelError
from trainer.models import (
    GGUF_SUFFIX,
    TINY,
    check_path,
    is_adapter_folder,
    nearest_alias,
    resolve_alias,
)
from trainer.models.attention import attention_error
from trainer.models.chat_template import set_chat_template
from trainer.models.quantized import check_loadable, keep_layout, nf4, place, quantization_of
from trainer.models.shard_files import has_shards, load_sharded
from trainer.net import hub_answers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def embedding_rows(model: PreTrainedModel) -> int:
    """Number of rows of a model's embedding: token ids are below it."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that can produce ids the embedding does not have.

    A padding token of its own may lie beyond: no model reads it (`harmless_pad_id`).

    Raises:
        ModelError: the largest token id is not below the number of embedding rows.
    """
    rows = embedding_rows(model)
    largest = max(id_ for id_ in _readable_ids(tokenizer))
    if largest >= rows:
        raise ModelError(
            f"the tokenizer has token ids up to {largest}, the model's embedding has {rows} rows "
            f"(ids 0 to {rows - 1}): they do not belong together. Give a folder in which both "
            "come from the same model."
        )


def _readable_ids(tokenizer: Any) -> set[int]:
    """All ids but that of a padding token that is nothing else."""
    others = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    spare = {tokenizer.pad_token} - others
    return {id_ for token, id_ in tokenizer.get_vocab().items() if token not in spare}


def harmless_pad_id(tokenizer: Any, rows: int) -> int:
    """An id that fills short rows: the tokenizer's own where the embedding has it.

    What is filled is masked and has no label, so that any id below `rows` will do.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and 0 <= candidate < rows:
            return int(candidate)
    return 0


def drop_pad_beyond(config: Any) -> None:
    """Forget a model config's padding id that its embedding does not have.

    torch refuses to build an embedding with such an id.
    """
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows = getattr(text_config, "vocab_size", None)
    for one in (config, text_config):
        pad = getattr(one, "pad_token_id", None)
        if rows is not None and pad is not None and not -rows <= pad < rows:
            one.pad_token_id = None


# ---- `model.add_tokens`: new tokens of the tokenizer, and the rows of the embedding that they need


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Make each of `tokens` one id; they are plain text, and not hidden like special tokens.

    Raises:
        ConfigError: the tokenizer has one of them already, or one is named twice.
    """
    known = set(tokenizer.get_vocab())
    wrong = [
        token for at, token in enumerate(tokens) if token in known or token in list(tokens)[:at]
    ]
    if wrong:
        raise ConfigError(
            f"model.add_tokens names {', '.join(map(repr, wrong))}, which the tokenizer has "
            "already; remove it."
        )
    tokenizer.add_tokens(list(tokens))


def grow_embeddings(model: Any, ids: Sequence[int]) -> None:
    """Give the ids of added tokens rows in the embedding and the head: the mean of the others.

    Rows that the model has to spare are used; else it is made larger.
    """
    import torch

    old = model.get_input_embeddings().weight.shape[0]
    rows = sorted({*ids, *range(old, max(ids) + 1)})  # those between are of a padding token
    if max(ids) >= old:
        # Without HF's own initialisation, which draws from the global random state.
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    seen: set[int] = set()
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for parameter in () if module is None else module.parameters(recurse=False):
                if id(parameter) not in seen:  # a tied head is the embedding itself
                    seen.add(id(parameter))
                    mean = parameter[: rows[0]].float().mean(dim=0)
                    parameter[rows] = mean.to(parameter.dtype)


# ---- loading: tokenizer, model in the run's dtype, `locked` checks
#
# transformers and torch are imported inside the functions: `trainer models` and error paths need
# neither.


def is_gguf(model_path: str) -> bool:
    """Whether a model is a .gguf file, whose weights are unpacked when it is loaded."""
    return Path(resolve_alias(model_path)).suffix.lower() == GGUF_SUFFIX


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
            f"model.model_path={section.model_path} is not a hub id; leave model.revision empty."
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
    device: torch.device | None = None,
    quantize: bool = False,
) -> PreTrainedModel:
    """Load the causal language model of `model.model_path`.

    Args:
        dtype: dtype of the weights as loaded.
        seed: initialises the built-in `tiny` model, which has no trained weights.
        device: where the weights are to be; on a GPU they are read there one by one, so that the
            CPU never holds a model. None: the CPU.
        quantize: make nf4 of plain weights; those that are quantized already stay as they are.
    Raises:
        ModelError: no such model, or one that is not a causal language model.
    """
    path = resolve_alias(section.model_path)
    if quantize and (path == TINY or Path(path).suffix.lower() == GGUF_SUFFIX):
        return _quantized_copy(
            load_model(section, dtype=dtype, seed=seed, offline=offline), section, dtype, device
        )
    if path == TINY:
        from trainer.models.tiny import build_tiny_model, load_tiny_tokenizer

        tiny = build_tiny_model(seed=seed, vocab_size=len(load_tiny_tokenizer()), dtype=dtype)
        if section.attn_implementation != "auto":
            try:
                tiny.set_attn_implementation(section.attn_implementation)
            except (ImportError, ValueError) as error:
                raise attention_error(section.attn_implementation, error) from error
        return place(tiny, device or "cpu")
    from transformers import AutoModelForCausalLM

    extra: dict[str, Any] = {"dtype": dtype}
    if section.attn_implementation != "auto":
        extra["attn_implementation"] = section.attn_implementation
        if section.trust_remote_code:
            extra["allow_all_kernels"] = True
    if Path(path).suffix.lower() != GGUF_SUFFIX:
        extra["config"] = read_model_config(section, offline=offline)
        is_quantized = quantization_of(extra["config"]) is not None
        if quantize and not is_quantized:
            extra["quantization_config"] = nf4(dtype)
        is_gpu = device is not None and device.type == "cuda"
        if is_gpu or quantize or is_quantized:
            extra["device_map"] = {"": str(device or "cpu")}
    loader = AutoModelForCausalLM.from_pretrained
    if has_shards(Path(path)):
        extra.pop("device_map", None)  # shards are put together on the CPU
        loader = load_sharded
    model: PreTrainedModel = _from_pretrained(loader, section, path, offline, "model", **extra)
    if Path(path).suffix.lower() == GGUF_SUFFIX:
        _forget_quantization(model)
    keep_layout(model)
    return place(model, device or "cpu")


def _quantized_copy(
    plain: Any, section: ModelSection, dtype: torch.dtype, device: torch.device | None
) -> PreTrainedModel:
    """The nf4 copy of a model that is in no folder; weights are quantized while they are read."""
    with tempfile.TemporaryDirectory(prefix="trainer-base-") as folder:
        # transformers would write on rank 0 alone, and every process has a folder of its own.
        plain.should_save_on_this_rank = lambda is_main_process: True
        plain.save_pretrained(folder)
        del plain.should_save_on_this_rank
        copy = section.model_copy(update={"model_path": folder})
        model = load_model(copy, dtype=dtype, device=device, quantize=True)
    model.config._name_or_path = model.name_or_path = ""
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


def check_is_model(section: ModelSection) -> None:
    """Refuse the folder of an adapter where a whole model is needed.

    Raises:
        ModelError: it is one.
    """
    if is_adapter_folder(Path(resolve_alias(section.model_path))):
        raise ModelError(
            f"model.model_path={section.model_path}: this folder holds an adapter, not a whole "
            "model. To train the adapter on, set hyperparams.training_mode=lora; to train all "
            f"weights, merge it first (`trainer export {section.model_path} --merge --output "
            "MERGED`) and give MERGED; to go on with the run that made it, use --resume."
        )


def _from_pretrained(
    loader: Any, section: ModelSection, path: str, offline: bool, what: str, **extra: Any
) -> Any:
    is_folder = Path(path).is_dir()
    # Absolute, because an adapter records its base by this name.
    folder = str(Path(path).resolve()) if is_folder else path
    if Path(path).suffix.lower() == GGUF_SUFFIX:
        folder, extra = _gguf_source(section, Path(path), extra)
        is_folder = True
    check_path(section.model_path)
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
    check_path(section.model_path)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"model.model_path={section.model_path}: reading .gguf files needs the package gguf; "
            "`pip install 'ultimate-trainer[gguf]'`."
        )
    return str(path.parent), {**extra, "gguf_file": path.name}


def _load_error(
    section: ModelSection, path: str, what: str, is_folder: bool, error: Exception
) -> ModelError:
    whole = " ".join(str(error).split())
    first, name = whole[:300], section.model_path
    if "flash" in first.lower() and section.attn_implementation.startswith("flash"):
        return attention_error(section.attn_implementation, error)
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


def context_length(config: Any) -> int | None:
    """The longest sequence of a model config in tokens, None where it does not say."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    value = getattr(text_config, "max_position_embeddings", None)
    return int(value) if value else None


def read_model_config(section: ModelSection, *, offline: bool = False) -> Any:
    """Load the model's config (a few KB) without its weights.

    Raises:
        ModelError: no such model, an adapter, or quantized weights that cannot be used.
    """
    check_is_model(section)
    path = resolve_alias(section.model_path)
    if path == TINY:
        from trainer.models.tiny import tiny_config

        return tiny_config()
    from transformers import AutoConfig

    config = _from_pretrained(AutoConfig.from_pretrained, section, path, offline, "config")
    check_loadable(config, f"model.model_path={section.model_path}")
    drop_pad_beyond(config)
    return config


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
