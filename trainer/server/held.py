"""HeldModel: the model in the engine process, and how its weights are replaced as a whole.

A swap happens between two batches. Everything that can be refused is refused before the first
tensor is copied; an error in the middle is not caught, so that the process ends and half a weight
set never answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trainer.config.schema import ModelSection
from trainer.models.adapter import load_merged, tokenizer_section
from trainer.models.aliases import resolve_alias
from trainer.models.load import (
    is_adapter_folder,
    load_model,
    load_tokenizer,
    read_model_config,
)
from trainer.models.precision import resolve_device
from trainer.models.quantized import check_takes_weights, place
from trainer.models.vocabulary import check_vocabulary
from trainer.preview.identity import (
    adapter_tensors,
    canonical_tensors,
    config_hash,
    model_manifest,
)
from trainer.preview.wire import AdapterConfig


class RefusedError(Exception):
    """The request cannot be answered by this model; the caller gets `status`."""

    def __init__(self, message: str, status: int = 422) -> None:
        """Take what the client is told and its HTTP status."""
        super().__init__(message)
        self.status = status


class HeldModel:
    """A model, its tokenizer, and the identity of the weights that it holds now."""

    def __init__(
        self, model_path: str, device: str, *, wait_for_weights: bool, base: str | None = None
    ) -> None:
        """Load the model in fp32.

        Args:
            model_path: an adapter's folder too; it is merged into its base.
            wait_for_weights: take architecture and tokenizer from `model_path`, and answer
                nothing before a trainer has sent weights.
            base: where an adapter's base is now.
        Raises:
            TrainerError: no such model, or no such device.
        """
        self.section = ModelSection(model_path=model_path)
        self._folder, self._base_path = Path(resolve_alias(model_path)), base
        self.device = resolve_device(device)
        self.tokenizer = load_tokenizer(tokenizer_section(self.section, base))
        self.base = self._load(wait_for_weights)
        self.model: Any = self.base
        self.config_hash = config_hash(self.base.config)
        self.manifest = model_manifest(self.base, self.tokenizer)
        self.original_id = None if wait_for_weights else self.manifest.weights_id
        self.weights_id = self.base_id = self.original_id
        self._adapter: AdapterConfig | None = None

    def _load(self, wait_for_weights: bool) -> Any:
        if wait_for_weights:
            from transformers import AutoModelForCausalLM

            config = read_model_config(self.section)
            check_takes_weights(config, f"--model {self.section.model_path}")
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        elif is_adapter_folder(self._folder):
            model = load_merged(self._folder, base=self._base_path)
        else:
            model = load_model(self.section, dtype=torch.float32, device=self.device)
        check_vocabulary(model, self.tokenizer)
        return place(model, self.device).eval()

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
            RefusedError: the tensors are not the model's, or the base is gone; nothing changed.
        """
        if path is not None and not Path(path).is_file():
            raise RefusedError("the file of these weights is gone; publish them again", 409)
        if path is None:
            self._load_original(weights_id)
        elif adapter is None:
            self._load_full(path, weights_id)
        else:
            if self.base_id != base_id:
                self._load_base(base_id, base_path)
            self._load_adapter(path, adapter)
        self.weights_id = weights_id

    def _load_full(self, path: str, weights_id: str) -> None:
        if self._adapter is not None:
            self.model, self._adapter = self.model.unload(), None
        _copy(path, canonical_tensors(self.base), self._poison)
        self.base_id = weights_id

    def _load_base(self, base_id: str | None, base_path: str | None) -> None:
        if base_path is not None and base_id is not None:
            if not Path(base_path).is_file():
                raise RefusedError("the file of the base weights is gone; publish them again", 409)
            self._load_full(base_path, base_id)
        else:
            self._load_original(base_id)

    def _load_original(self, weights_id: str | None) -> None:
        if weights_id is None or weights_id != self.original_id:
            raise RefusedError("these weights are not held here", 409)
        fresh = canonical_tensors(self._load(False))
        if self._adapter is not None:
            self.model, self._adapter = self.model.unload(), None
        self._poison()
        with torch.no_grad():
            for name, target in canonical_tensors(self.base).items():
                target.copy_(fresh[name])
        self.base_id = weights_id

    def _load_adapter(self, path: str, adapter: AdapterConfig) -> None:
        if self._adapter != adapter:
            if self._adapter is not None:
                self.model, self._adapter = self.model.unload(), None
            self.model = _with_adapter(self.base, adapter).eval()
            self._adapter = adapter
            self.weights_id = None  # its adapters are fresh ones until the copy below
        _copy(path, adapter_tensors(self.model), self._poison)

    def _poison(self) -> None:
        """From here on the weights are neither the old nor the new ones."""
        self.weights_id = None


def _with_adapter(base: Any, adapter: AdapterConfig) -> Any:
    """Put adapters on named modules of a model.

    Raises:
        RefusedError: the model has no such modules.
    """
    # peft takes over a second to import, and most servers never see an adapter.
    from peft import LoraConfig, get_peft_model

    names = {name for name, _ in base.named_modules()}
    missing = [name for name in adapter.target_modules if name not in names]
    if missing:
        raise RefusedError(f"the model has no module {missing[0]!r}")
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        target_modules=list(adapter.target_modules),
        modules_to_save=list(adapter.modules_to_save) or None,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    return get_peft_model(base, config)


def _copy(path: str, targets: dict[str, torch.Tensor], begin: Any) -> None:
    """Check names and shapes, then copy every tensor."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        if set(file.keys()) != set(targets):
            raise RefusedError(f"the tensors of {Path(path).name[:12]} are not the model's")
        for name, target in targets.items():
            if tuple(file.get_slice(name).get_shape()) != tuple(target.shape):
                raise RefusedError(f"{name} has another shape than the model's")
        begin()
        for name, target in targets.items():
            target.copy_(file.get_tensor(name))
