"""LoRA: adapters put on a model, saved, opened with their base again, and merged into it."""

from __future__ import annotations

import difflib
import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer.config.schema import LoraSection, ModelSection
from trainer.errors import ConfigError, ModelError
from trainer.files import SAVED_BASE as SAVED_BASE
from trainer.files import library_errors
from trainer.models import is_adapter_folder
from trainer.models.load import load_model, looks_like_path, read_model_config
from trainer.models.precision import check_mergeable, save_full

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_lora(
    model: PreTrainedModel, section: LoraSection, *, seed: int, revision: str | None = None
) -> Any:
    """Put adapters on a model and freeze the rest; all that is trained is fp32.

    Args:
        revision: of the model on the hub, recorded in the adapter.

    Returns:
        A `peft.PeftModel`.
    Raises:
        ConfigError: a target module is not in the model, or is of a kind that takes no adapter.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    targets: Any = section.target_modules
    _check_names(model, section)
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(section.modules_to_save) or None,
        task_type="CAUSAL_LM",
        revision=revision,
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT finds out by itself that GPT-2's layers are stored (in, out), and says so.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            # A tied head gets adapters of its own; `merge_adapter` unties it.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
    except ValueError as error:  # PEFT's words for a model that has nothing to adapt
        raise ConfigError(
            f"lora.target_modules={targets} cannot be used with this model: "
            f"{' '.join(str(error).split())[:300]} {_choice(model)}"
        ) from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # PEFT copies modules_to_save in the dtype of the frozen base,
            parameter.data = parameter.data.float()  # which would lose most updates
    return adapted


def _check_names(model: Any, section: LoraSection) -> None:
    """All names are the model's, targets can be adapted, saved ones can be trained."""
    targets = () if isinstance(section.target_modules, str) else section.target_modules
    modules = dict(model.named_modules())
    for option, names in (
        ("target_modules", targets),
        ("modules_to_save", section.modules_to_save),
    ):
        for name in names:
            found = [module for key, module in modules.items() if _is_named(key, name)]
            if not found:
                near = difflib.get_close_matches(name, _leaves(modules), n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ConfigError(
                    f"lora.{option}: the model has no module named {name}.{hint} {_choice(model)}"
                )
            if option == "target_modules" and not all(map(_takes_adapter, found)):
                kind = type(next(one for one in found if not _takes_adapter(one))).__name__
                raise ConfigError(
                    f"lora.target_modules: {name} is a {kind}, which takes no adapter. "
                    f"{_choice(model)} To train it whole, name it in lora.modules_to_save."
                )
            if option == "modules_to_save" and name in targets:
                raise ConfigError(
                    f"lora: {name} is in target_modules and in modules_to_save; name it in one."
                )
            if option == "modules_to_save" and not all(map(_is_trainable, found)):
                raise ConfigError(
                    f"lora.modules_to_save: the weights of {name} are quantized and cannot be "
                    "trained; name it in lora.target_modules instead."
                )


def _is_named(key: str, name: str) -> bool:
    return key == name or key.endswith("." + name)


def _takes_adapter(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D)


def _is_trainable(module: Any) -> bool:
    return all(parameter.is_floating_point() for parameter in module.parameters())


def _leaves(modules: Iterable[str]) -> list[str]:
    return sorted({key.rsplit(".", 1)[-1] for key in modules} - {""})


def _choice(model: Any) -> str:
    """Names that can be given instead."""
    names = _leaves(key for key, module in model.named_modules() if _takes_adapter(module))
    return (
        f"Layers that take an adapter: {', '.join(names)}; all-linear is the linear ones but the "
        "head."
    )


# ---- an adapter added to its base's weights: untied first where only one side of a tie has one


ADAPTED = ".base_layer."


def merge_adapter(model: Any) -> Any:
    """Add the adapters of a PEFT model to its weights, in place, and take them off.

    A head that is tied to the embedding stays so where both are still equal. Else the config says
    that it is not tied, so that whoever loads the model keeps both.

    Args:
        model: with plain weights; in fp32, or small updates are lost.
    Returns:
        The plain model.
    """
    was_tied = _is_tied(model.get_base_model())
    _untie_adapted(model.get_base_model())
    with warnings.catch_warnings():
        # Both are about ties, which are dealt with here.
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings")
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        merged = model.merge_and_unload()
    if was_tied:
        _settle_tie(merged)
    return merged


def has_true_tie(model: Any) -> bool:
    """Whether embedding and head are equal where the config says that they are one.

    transformers keeps both where they differ, other programs believe the config.
    """
    embedding, head = _ends(model)
    return not _is_tied(model) or head is None or torch.equal(embedding.weight, head.weight)


def _ends(model: Any) -> tuple[Any, Any]:
    """Embedding and head; what adapters wrap is looked at itself."""

    def inner(module: Any) -> Any:
        return module.get_base_layer() if hasattr(module, "get_base_layer") else module

    return inner(model.get_input_embeddings()), inner(model.get_output_embeddings())


def _is_tied(model: Any) -> bool:
    config = model.config
    return bool(
        getattr(config, "tie_word_embeddings", False)
        or getattr(config.get_text_config(), "tie_word_embeddings", False)
    )


def _untie_adapted(model: Any) -> None:
    """Give each parameter that several modules share its own copy where one has an adapter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        if len(shared) > 1 and any(ADAPTED in name for name in shared):
            for name in shared[1:]:
                path, _, leaf = name.rpartition(".")
                owner = model.get_submodule(path)
                old = getattr(owner, leaf)
                copy = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
                setattr(owner, leaf, copy)


def _settle_tie(model: Any) -> None:
    """One tensor again where embedding and head are equal; else a config that says they differ."""
    embedding, head = _ends(model)
    if head is None:
        return
    is_equal = torch.equal(embedding.weight, head.weight)
    if is_equal:
        head.weight = embedding.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = is_equal


# ---- adapters on disk: saved without copies of the base, opened with it again
#
# Beside PEFT's files lies `base.json`: the name of the base and short hashes of its weights, by
# which a base that was moved or changed meanwhile is known again.


BASE_RECORD = "base.json"

SAMPLES = 1024
"""Weights of each matrix that go into its hash, evenly spread."""


def describe_base(model: Any) -> dict[str, Any]:
    """What `base.json` says of a model: its name, and a hash of each matrix.

    Hashes are of a sample in bf16, so that they do not depend on whether it was loaded in fp32 or
    bf16. In fp16 small weights were rounded otherwise: such a model has no hashes.
    """
    matrices = {
        name: _sample_hash(parameter)
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.float32, torch.bfloat16) and parameter.ndim > 1
    }
    return {"name": model.config._name_or_path, "sha256_of_samples": matrices}


def _sample_hash(parameter: torch.Tensor) -> str:
    flat = parameter.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLES)].to(torch.bfloat16).cpu().contiguous()
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter of a PEFT model, and what is known of its base (`model.base_record`)."""
    # PEFT would add the base's embeddings where they have adapters; they are the base's own.
    model.save_pretrained(folder, save_embedding_layers=False)
    record = getattr(model, "base_record", None)
    if record is not None:
        (folder / BASE_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_finished_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    base: str | None = None,
    device: torch.device | None = None,
) -> Any:
    """Load a model folder as a run leaves it, an adapter with its base.

    Args:
        folder: of the model or adapter.
        dtype: of the weights; None: fp32.
        trust_remote_code: as the run was told.
        base: folder or hub id of an adapter's base, where it is no longer at its old place.
        device: where quantized weights are loaded to; all others come on the CPU.
    Raises:
        ModelError: the folder holds no model, or its base cannot be loaded or is another one.
    """
    dtype = dtype or torch.float32
    if not is_adapter_folder(folder):
        if base is not None:
            raise ModelError(
                f"{folder}: these are all weights of a model, not an adapter; leave --base out."
            )
        path = str(folder.resolve())
        section = ModelSection(model_path=path, trust_remote_code=trust_remote_code)
        return load_model(section, dtype=dtype, device=device)
    section = base_of(folder, trust_remote_code=trust_remote_code, base=base)
    try:
        model = load_model(section, dtype=dtype, device=device)
    except ModelError as error:
        raise ModelError(_of_base(folder, error)) from error
    check_base(folder, model)
    return _put_on(model, folder)


def load_merged(folder: Path, *, base: str | None) -> Any:
    """An adapter and its base as one plain model in fp32.

    Raises:
        ModelError: the base is gone, another one, or quantized.
    """
    config = read_base_config(folder, trust_remote_code=False, base=base)
    check_mergeable(config, f"{folder}: the base of this adapter")
    return merge_adapter(load_finished_model(folder, base=base))


def tokenizer_section(section: ModelSection, base: str | None) -> ModelSection:
    """Where the tokenizer of a model or adapter is: with an adapter, or else with its base."""
    folder = Path(section.model_path)
    if not is_adapter_folder(folder) or (folder / "tokenizer.json").is_file():
        return section
    return base_of(folder, trust_remote_code=section.trust_remote_code, base=base)


def read_base_config(folder: Path, *, trust_remote_code: bool, base: str | None) -> Any:
    """The model config of an adapter's base, without its weights.

    Raises:
        ModelError: the base is gone.
    """
    try:
        return read_model_config(base_of(folder, trust_remote_code=trust_remote_code, base=base))
    except ModelError as error:
        raise ModelError(_of_base(folder, error)) from error


def _of_base(folder: Path, error: ModelError) -> str:
    """The loader's words name an option of training; here it is an adapter's base."""
    words = str(error).replace("model.model_path=", "")
    return f"{folder}: the base of this adapter: {words} --base says where it is."


def base_of(folder: Path, *, trust_remote_code: bool = False, base: str | None) -> ModelSection:
    """The base model of an adapter; one that the run saved itself moves with the run.

    Args:
        base: takes the place of what the adapter says.
    Raises:
        ModelError: it is no longer there, or the adapter names none.
    """
    saved = _adapter_config(folder)
    named = saved.get("base_model_name_or_path")
    if base is not None:
        return ModelSection(model_path=base, trust_remote_code=trust_remote_code)
    if not named:
        raise ModelError(
            f"{folder}: the adapter does not say what its base is; give --base FOLDER_OR_HUB_ID."
        )
    if not Path(named).exists():
        beside = [parent / SAVED_BASE for parent in folder.resolve().parents[:2]]
        found = [path for path in beside if Path(named).name == SAVED_BASE and path.is_dir()]
        if not found and looks_like_path(named):
            raise ModelError(
                f"{folder}: the base of this adapter was in {named}, and there is no such folder "
                "now. Say where it is: --base FOLDER_OR_HUB_ID."
            )
        named = str(found[0]) if found else named
    return ModelSection(
        model_path=named, revision=saved.get("revision"), trust_remote_code=trust_remote_code
    )


def _adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise TypeError("it holds no object")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read ({error}).") from error
    return saved


def check_base(folder: Path, model: Any) -> None:
    """Compare a loaded base with what is recorded beside the adapter, as far as it is.

    Raises:
        ModelError: its weights are others.
    """
    path = folder / BASE_RECORD
    if not path.is_file():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = dict(record["sha256_of_samples"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read ({error!r}); remove it to go without.") from error
    found = describe_base(model)["sha256_of_samples"]
    common = sorted(set(known) & set(found))
    other = [name for name in common if known[name] != found[name]]
    if other:
        raise ModelError(
            f"{folder}: {model.config._name_or_path} is not the base that this adapter was trained "
            f"on, which was {record['name']}: {len(other)} of {len(common)} matrices differ "
            f"({other[0]} is the first). Give that one: --base FOLDER_OR_HUB_ID."
        )


def _put_on(model: Any, folder: Path) -> Any:
    """The adapter on its base.

    Raises:
        ModelError: their shapes or names differ.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, UserWarning) as error:
        cause = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{folder}: this adapter does not fit {model.config._name_or_path}, which must be the "
            f"model it was trained on; give that one: --base FOLDER_OR_HUB_ID. Cause: {cause}"
        ) from error


def write_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    stop_ids: frozenset[int],
    use_cache: bool,
) -> None:
    """Write model (or adapter) and tokenizer.

    Args:
        model: the unwrapped model; its own weights are not changed.
        dtype, stop_ids, use_cache: as of `save_full`; adapters stay fp32.
    Raises:
        OSError: the folder cannot be written.
    """
    with library_errors():
        if hasattr(model, "peft_config"):
            save_adapter(model, folder)
        else:
            save_full(model, folder, dtype, stop_ids, use_cache)
        tokenizer.save_pretrained(folder)
