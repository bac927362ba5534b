"""HeldModel: the model in the engine process, and how its weights are replaced as a whole.

A swap happens between two batches, in two parts. `_prepare` reads and checks everything and changes
nothing: whatever fails there is a refusal, and the old weights go on answering. What it gives then
copies; an error there is not caught, so that the process ends and half a weight set never answers.
"""

from __future__ import annotations

import copy
import datetime as dt
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from trainer.config.training_sections import ModelSection
from trainer.errors import ConfigError, TrainerError
from trainer.models import GGUF_SUFFIX, is_adapter_folder, resolve_alias
from trainer.models.adapter_files import load_merged, tokenizer_section
from trainer.models.chat_template import chat_template_hash, fix_date, tokenizer_hash
from trainer.models.load import (
    check_vocabulary,
    load_model,
    load_tokenizer,
    read_model_config,
)
from trainer.models.precision import DTYPES, computes_in_bf16, resolve_device
from trainer.models.quantized import check_bitsandbytes, place, quantization_of, set_dtype
from trainer.publish.identity import (
    adapter_tensors,
    canonical_tensors,
    config_hash,
    model_manifest,
)
from trainer.publish.wire import AdapterConfig, WeightsManifest
from trainer.server.quantized_base import (
    BadQuantizationError,
    entries_of,
    frame_of,
    load_quantized,
    outline_of,
)
from trainer.server.token_watch import watch_layers

logger = logging.getLogger(__name__)

Change = Callable[[], None]


class UnanswerableError(Exception):
    """The request cannot be answered by this model; the caller gets `status`."""

    def __init__(self, message: str, status: int = 422) -> None:
        """Take what the client is told and its HTTP status."""
        super().__init__(message)
        self.status = status


class HeldModel:
    """A model, its tokenizer, and the identity of the weights that it holds now."""

    def __init__(
        self,
        model_path: str,
        device: str,
        *,
        wait_for_weights: bool,
        dtype: str = "auto",
        base: str | None = None,
        date: dt.date | None = None,
        quantize: bool = False,
    ) -> None:
        """Load the model, its linear layers in the bits that they are quantized to.

        Args:
            model_path: an adapter's folder too; it is merged into its base.
            dtype: in which the weights are held and computed with: `bf16`, `fp32`, or `auto`: bf16
                for weights that are bf16, where the device computes in it, else fp32.
            wait_for_weights: take architecture and tokenizer from `model_path`, and answer
                nothing before a trainer has sent weights.
            base: where an adapter's base is now.
            date: of the run that made the weights; their template prints this one.
            quantize: make nf4 of plain weights, as runs with training_mode=qlora do.
        Raises:
            TrainerError: no such model, or no such device, or it does not compute in this dtype.
        """
        self.section, self._quantize = ModelSection(model_path=model_path), quantize
        self._folder, self._base_path = Path(resolve_alias(model_path)), base
        self.device, self.wanted_dtype = resolve_device(device), dtype
        if dtype == "bf16" and self.device.type == "cuda" and not computes_in_bf16(self.device):
            raise ConfigError(
                f"--dtype bf16: {torch.cuda.get_device_name(self.device)} has no bf16 arithmetic; "
                "use auto or fp32."
            )
        self.date: dt.date | None = None
        """What a chat template that prints the date prints over the own weights; None: today's."""
        self.tokenizer = load_tokenizer(tokenizer_section(self.section, base))
        self.date = date
        fix_date(self.tokenizer, date)
        self._check: Callable[..., None] | None = None
        self._adapter: AdapterConfig | None = None
        self.base: Any = self._load(wait_for_weights, self.device)
        self.dtype: torch.dtype = self.base.dtype
        """Of the weights as they are held now, those that are not quantized."""
        self.is_quantized = quantization_of(self.base.config) is not None
        if not (wait_for_weights and self.is_quantized):
            self.base = place(self.base, self.device)
        self.config_hash = config_hash(self.base.config)
        self.manifest = self._manifest(wait_for_weights)
        self.model: Any = self.base
        if not (wait_for_weights and self.is_quantized):
            self._take_up(self.base)
        self.original_id = None if wait_for_weights else self.manifest.weights_id
        self.weights_id = self.base_id = self.original_id

    def _dtype_for(self, *, is_bf16: bool) -> torch.dtype:
        """In which weights are held that are bf16, or are not."""
        if self.wanted_dtype != "auto":
            return DTYPES[self.wanted_dtype]
        can = is_bf16 and computes_in_bf16(self.device)
        return torch.bfloat16 if can else torch.float32

    def _load(self, wait_for_weights: bool, device: torch.device) -> Any:
        """The model as it was at the start; only from a folder or the hub is it on `device`.

        A quantized one that waits has no memory yet.
        """
        if self._quantize:
            check_bitsandbytes("--quantize nf4")
        if wait_for_weights:
            from transformers import AutoModelForCausalLM

            config = read_model_config(self.section)
            if quantization_of(config) is not None:
                return frame_of(config)
            # What will be sent is not known yet: the smaller one, whose numbers mean nothing.
            dtype = self._dtype_for(is_bf16=True)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        elif is_adapter_folder(self._folder):
            model = load_merged(self._folder, base=self._base_path)
            set_dtype(model, self._dtype_for(is_bf16=False))
        else:
            model = load_model(
                self.section, dtype=self._own_dtype(), device=device, quantize=self._quantize
            )
        check_vocabulary(model, self.tokenizer)
        return model.eval()

    def _own_dtype(self) -> torch.dtype:
        """For the weights of `--model`, which its config names."""
        if Path(resolve_alias(self.section.model_path)).suffix.lower() == GGUF_SUFFIX:
            return self._dtype_for(is_bf16=False)
        config = read_model_config(self.section)
        named = getattr(config, "dtype", None)
        if self._quantize or quantization_of(config) is not None:
            return named or torch.float32  # out of which a run quantizes it too
        return self._dtype_for(is_bf16=named == torch.bfloat16)

    @property
    def dtype_name(self) -> str:
        """`bf16` or `fp32`: what answers are computed in."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def _manifest(self, wait_for_weights: bool) -> WeightsManifest:
        """What the weights are as they were loaded; of a model without any: their names."""
        if not (wait_for_weights and self.is_quantized):
            return model_manifest(self.base, self.tokenizer)
        return WeightsManifest(
            config_hash=self.config_hash,
            tokenizer_hash=tokenizer_hash(self.tokenizer),
            chat_template_hash=chat_template_hash(self.tokenizer),
            tensors=entries_of(outline_of(self.base)),
        )

    def _take_up(self, base: Any) -> None:
        """Hold this plain model from now on, and answer with it."""
        if self.is_quantized:
            self.dtype = self._dtype_for(is_bf16=base.dtype == torch.bfloat16)
            set_dtype(base, self.dtype)
        self.model = self.base = base.eval()
        self._adapter = None
        if self._check is not None:
            watch_layers(base, self._check)

    def watch_layers(self, check: Callable[..., None]) -> None:
        """Call `check` before every layer of every forward pass."""
        self._check = check
        watch_layers(self.base, check)

    def load_weights(
        self,
        path: str | None,
        weights_id: str,
        *,
        adapter: AdapterConfig | None = None,
        base_id: str | None = None,
        base_path: str | None = None,
    ) -> None:
        """Copy a verified safetensors file over the model's weights, in place.

        Args:
            path: None: the weights that the model was loaded with.
            adapter: the file holds these adapters, on the full weights `base_id`.
            base_path: file of those, where they may have to be loaded first.
        Raises:
            UnanswerableError: not the model's tensors, or something is gone; nothing changed.
        """
        try:
            changes = self._prepare(path, weights_id, adapter, base_id, base_path)
        except UnanswerableError:
            raise
        except Exception as error:  # a file can be wrong in any way, and nothing is changed yet
            logger.warning("weights %s are refused", weights_id[:12], exc_info=True)
            raise UnanswerableError(
                f"these weights cannot be loaded ({type(error).__name__}); the server's log says "
                "more"
            ) from error
        self.weights_id = None  # from here on they are neither the old nor the new ones
        for change in changes:
            change()
        self.weights_id = weights_id

    # ---- first everything that can be refused

    def _prepare(
        self,
        path: str | None,
        weights_id: str,
        adapter: AdapterConfig | None,
        base_id: str | None,
        base_path: str | None,
    ) -> list[Change]:
        if adapter is None:
            return [self._full(path, weights_id)]
        if path is None:
            raise UnanswerableError("an adapter comes in a file")
        _check_adapter(_present(path), self._outline(), adapter)
        changes = []
        if self.base_id != base_id:
            if base_id is None:
                raise UnanswerableError("an adapter names its base")
            changes.append(self._full(base_path, base_id))
        return [*changes, lambda: self._put_adapter(path, adapter)]

    def _full(self, path: str | None, weights_id: str) -> Change:
        """Check a full set; what it gives replaces the weights of the plain model by it."""
        if path is None:
            return self._original(weights_id)
        if self.is_quantized:
            return self._quantized(_present(path), weights_id)
        self._check_full(_present(path))
        dtype = self._dtype_for(is_bf16=_is_bf16(path))

        def change() -> None:
            self._take_off()
            self._hold_in(dtype)
            _copy(path, canonical_tensors(self.base))
            self.base_id = weights_id

        return change

    def _quantized(self, path: str, weights_id: str) -> Change:
        """Load a quantized base beside the one that answers; what it gives takes it up."""
        try:
            fresh = load_quantized(path, self.base.config, self.device)
        except BadQuantizationError as error:
            raise UnanswerableError(str(error)) from error
        return self._change_base(fresh, weights_id)

    def _change_base(self, fresh: Any, weights_id: str) -> Change:
        def change() -> None:
            self._take_up(fresh)
            self.base_id = weights_id

        return change

    def _check_full(self, path: str) -> None:
        # The names of the plain model, whatever adapters are on it now.
        mine = {entry.name: tuple(entry.shape) for entry in self.manifest.tensors}
        _compare(path, mine)

    def _original(self, weights_id: str) -> Change:
        if weights_id != self.original_id:
            raise UnanswerableError("this server does not hold these weights", 409)
        # On the CPU: the device need not have room for two models. Quantized ones are small, and
        # come on the device by which their bits were made.
        place_of = self.device if self.is_quantized else torch.device("cpu")
        try:
            loaded = self._load(False, place_of)
        except (TrainerError, OSError) as error:
            logger.warning("the model could not be loaded again: %s", error)
            raise UnanswerableError(
                "the model that the server was started with is no longer there", 409
            ) from error
        if self.is_quantized:
            return self._change_base(loaded, weights_id)
        fresh = canonical_tensors(loaded)

        def change() -> None:
            self._take_off()
            self._hold_in(loaded.dtype)
            with torch.no_grad():
                for name, target in canonical_tensors(self.base).items():
                    target.copy_(fresh[name])
            self.base_id = weights_id

        return change

    def _outline(self) -> Any:
        """The plain model's modules and shapes, without memory for the weights."""
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(self.base.config)
        if self.is_quantized:
            return frame_of(config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    # ---- then the changes

    def _take_off(self) -> None:
        """The plain model, without adapters."""
        if self._adapter is not None:
            self.model, self._adapter = self.model.unload(), None

    def _hold_in(self, dtype: torch.dtype) -> None:
        """Make room for weights in another dtype, one tensor after the other.

        Only what is saved with a model: its code computes rotations and the like in fp32.
        """
        if dtype == self.dtype:
            return
        for tensor in canonical_tensors(self.base).values():
            if tensor.dtype == self.dtype:
                tensor.data = torch.empty_like(tensor, dtype=dtype)
        self.dtype = self.base.config.dtype = dtype

    def _put_adapter(self, path: str, adapter: AdapterConfig) -> None:
        if self._adapter != adapter:
            self._take_off()
            self.model = _with_adapter(self.base, adapter).eval()
            self._adapter = adapter
        _copy(path, adapter_tensors(self.model))


def _check_adapter(path: str, outline: Any, adapter: AdapterConfig) -> None:
    """Build the adapters on a model without memory, and compare them with a file.

    Raises:
        UnanswerableError: they cannot be built, or the file holds others.
    """
    names = {name for name, _ in outline.named_modules()}
    for name in (*adapter.target_modules, *adapter.modules_to_save):
        if not any(one == name or one.endswith("." + name) for one in names):
            raise UnanswerableError(f"the model has no module {name!r}")
    missing = [name for name in adapter.target_modules if name not in names]
    if missing:
        raise UnanswerableError(f"the model has no module {missing[0]!r}")
    for name, ids in adapter.trainable_tokens.items():
        _check_rows(dict(outline.named_modules()).get(name), name, ids)
    try:
        with torch.device("meta"):
            wrapped = _with_adapter(outline, adapter)
    except Exception as error:  # peft's own words: it raises ValueError, TypeError and others
        words = " ".join(str(error).split())[:200]
        raise UnanswerableError(
            f"the adapter cannot be applied to these modules: {words}"
        ) from error
    _compare(path, {name: tuple(value.shape) for name, value in adapter_tensors(wrapped).items()})


def _check_rows(module: Any, name: str, ids: Sequence[int]) -> None:
    """Rows of single tokens are an embedding's or a head's, each once.

    Raises:
        UnanswerableError: they are not.
    """
    if (
        not isinstance(module, nn.Embedding | nn.Linear)
        or getattr(module, "bias", None) is not None
    ):
        raise UnanswerableError(f"{name!r} is no embedding and no head without a bias")
    if len(set(ids)) < len(ids) or max(ids) >= module.weight.shape[0]:
        raise UnanswerableError(f"the rows of tokens do not fit {name!r}")


def _with_adapter(base: Any, adapter: AdapterConfig) -> Any:
    """Put adapters on named modules of a model."""
    # peft takes over a second to import, and most servers never see an adapter.
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        target_modules=list(adapter.target_modules),
        modules_to_save=list(adapter.modules_to_save) or None,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        trainable_token_indices=dict(adapter.trainable_tokens) or None,
        ensure_weight_tying=adapter.ensure_weight_tying,
        # PEFT reads these names as patterns of the ends of names.
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in adapter.ranks.items()},
        alpha_pattern={f"^{re.escape(name)}": value for name, value in adapter.alphas.items()},
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    return get_peft_model(base, config)


def _present(path: str) -> str:
    """A path whose file is there.

    Raises:
        UnanswerableError: it is not.
    """
    if not Path(path).is_file():
        raise UnanswerableError(
            "the file of these weights no longer exists; publish them again", 409
        )
    return path


def _is_bf16(path: str) -> bool:
    """Whether the weights of a file, as far as they are floating numbers, are all bf16."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        found = {file.get_slice(name).get_dtype() for name in names}
    return "BF16" in found and not found & {"F64", "F32", "F16"}


def _compare(path: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare names and shapes of a file with those that are needed.

    Raises:
        UnanswerableError: they differ.
    """
    with safe_open(path, framework="pt") as file:
        found = set(file.keys())
        if found != set(shapes):
            odd = sorted(found ^ set(shapes))
            raise UnanswerableError(f"the file's tensors differ from the model's: {odd[0][:200]!r}")
        for name, shape in shapes.items():
            if tuple(file.get_slice(name).get_shape()) != shape:
                raise UnanswerableError(f"{name} differs in shape from the model's")


def _copy(path: str, targets: dict[str, torch.Tensor]) -> None:
    """Copy every tensor of a file that was compared before."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, target in targets.items():
            target.copy_(file.get_tensor(name))
