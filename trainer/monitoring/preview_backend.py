"""create_preview_backend: from a config, or from keywords, to something that answers prompts."""

from __future__ import annotations

from typing import Any

from trainer.config.monitoring_section import MonitoringConfig
from trainer.errors import ConfigError
from trainer.preview.base import PreviewBackend, PreviewRequest, PreviewResult
from trainer.preview.http import Remote3090Backend, server_key
from trainer.preview.local import LocalPreviewBackend
from trainer.preview.openai import OpenAIPreviewBackend

__all__ = [
    "LocalPreviewBackend",
    "PreviewBackend",
    "PreviewRequest",
    "PreviewResult",
    "Remote3090Backend",
    "create_preview_backend",
]

BACKENDS: dict[str, Any] = {
    "local": LocalPreviewBackend,
    "remote_3090": Remote3090Backend,
    "openai": OpenAIPreviewBackend,
}


def create_preview_backend(
    kind: str | MonitoringConfig | None = None, **options: Any
) -> PreviewBackend:
    """Make a preview backend.

    Args:
        kind: `local`, `remote_3090` or `openai` with the options of that backend as keywords, or
            a MonitoringConfig, whose values are the defaults of the keywords.
        **options: at least model and tokenizer for `local`, host for `remote_3090`, base_url for
            `openai`.
    Raises:
        ConfigError: no such backend, or an option it needs is missing or unknown.
    """
    if isinstance(kind, MonitoringConfig):
        options = {**_from_config(kind), **options}
        kind = kind.preview_backend
    if kind == "sidecar":
        raise ConfigError(
            "monitoring.preview_backend='sidecar' belongs to a training run, which starts and ends "
            "the sidecar; use it in a config, or `trainer serve` and 'remote_3090' here."
        )
    if kind not in BACKENDS:
        raise ConfigError(
            f"monitoring.preview_backend={kind!r} is not known; choose {' or '.join(BACKENDS)}."
        )
    try:
        made: PreviewBackend = BACKENDS[kind](**options)
    except TypeError as error:
        raise ConfigError(f"preview backend {kind!r}: {error}; check the keywords.") from error
    return made


def _from_config(config: MonitoringConfig) -> dict[str, Any]:
    common = {
        "max_new_tokens": config.preview_max_tokens,
        "temperature": config.preview_temperature,
    }
    if config.preview_backend == "local":
        return common
    if config.preview_backend == "openai":
        return {**common, "base_url": config.openai_base_url, "model": config.openai_model}
    return {
        **common,
        "api_key": server_key(config.remote_3090_key_file),
        "host": config.remote_3090_host,
        "port": config.remote_3090_port,
        "timeout": config.remote_3090_timeout,
        "model_id": config.remote_3090_model_id,
    }
