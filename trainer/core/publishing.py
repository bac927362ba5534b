"""Previews that are made elsewhere: copies of this run's weights, and whoever answers by them."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from trainer.child import half_the_cores
from trainer.config.monitoring_section import MonitoringConfig
from trainer.core.canary import build_canary
from trainer.core.drift_plan import DriftPlan
from trainer.core.early_checks import measures_golden
from trainer.core.run import Prepared, is_main_process
from trainer.core.run_folder import RunFolder
from trainer.errors import ConfigError, PreviewError
from trainer.exchange import AwayError
from trainer.files import replace_file
from trainer.models.adapters import adapted_parameters
from trainer.models.chat_template import chat_template_hash, is_dated, tokenizer_hash
from trainer.models.precision import resolve_device
from trainer.models.train_on import base_section
from trainer.monitoring.processes import hear, say
from trainer.net import remember_key_file, url_of
from trainer.preview.base import PreviewRequest
from trainer.preview.golden import golden_parts
from trainer.preview.http import server_key
from trainer.preview.local import LocalPreviewBackend
from trainer.preview.scheduler import Lane, batches_of
from trainer.profiles import DataProfile, known_profiles
from trainer.publish.children import Announce, RemoteWorker, SidecarWorker, Worker
from trainer.publish.client import WorkerClient
from trainer.publish.identity import (
    Canary,
    adapter_config,
    adapter_tensors,
    base_tensors,
    canonical_tensors,
    config_hash,
)
from trainer.publish.lane import PublishedPreviews
from trainer.publish.shards import FollowingLane, ShardSnapshotter
from trainer.publish.snapshot import SHARED_MEMORY, Snapshotter, arena_folder, is_in_memory
from trainer.publish.wire import PreviewPrompt, ServerHashes

PUBLISHED = ("sidecar", "remote_3090")
"""Backends that get this run's weights; others have weights of their own."""

SIDECAR_S = 900.0
"""Seconds a prompt may take on a sidecar, which is slow on a CPU, and known to be alive."""

NUM_SLOTS = {"http": 2, "dir": 3}
"""With `dir` the server reads the newest file where it lies: one more is in use."""


@dataclass(frozen=True)
class PublishingRun:
    """The run whose weights are published."""

    prepared: Prepared
    model: Any
    folder: RunFolder
    notice: Callable[[str, Literal["info", "warning", "error"]], None]
    drift: DriftPlan | None = None

    @property
    def instead(self) -> str:
        """What to set where its weights cannot be published."""
        is_sharded = self.prepared.is_sharded
        return f"monitoring.{'inference_interval=0' if is_sharded else 'preview_backend=local'}"


def build_published(
    run: PublishingRun,
    requests: list[PreviewRequest],
    local: LocalPreviewBackend,
    evaluation: Sequence[PreviewRequest] = (),
) -> PublishedPreviews:
    """The lane of `sidecar` and `remote_3090`.

    Args:
        evaluation: prompts that are answered for scores only.
    Raises:
        ConfigError: the server is misconfigured; one that is away is only told.
        PreviewError: no room for copies of the weights.
    """
    backend, is_adapter = (
        run.prepared.config.monitoring.preview_backend,
        hasattr(run.model, "peft_config"),
    )
    if is_adapter:
        _check_publishable(run.model, backend, run.instead)
    transport = "dir" if backend == "sidecar" else "http"
    snapshots = _snapshotter(run.prepared, run.model)
    base = _base(run) if is_adapter else None
    num_slots = NUM_SLOTS[transport]
    if is_spooled := bool(run.prepared.config.deciding_scores):
        num_slots += max(run.prepared.config.monitoring.score_lag - 1, 0)
    room = snapshots.layout.size * num_slots + (base.layout.size if base else 0)
    folder = arena_folder(room, run.folder.path, instead=run.instead)
    if SHARED_MEMORY.exists() and not is_in_memory(folder):
        run.notice(
            f"previews need {room / 2**20:.0f} MiB for copies of the weights, for which "
            f"{SHARED_MEMORY} or the memory limit of this container has no room (docker run "
            f"--shm-size=...): they are files in {run.folder.path}, and preview steps take longer",
            "warning",
        )
    try:
        canary = build_canary(run.prepared, run.model, requests)
        worker, setup = _worker_and_setup(run, folder, transport, requests, local, canary)
        setup["evaluation"] = _evaluation_bodies(run, setup["previews"], evaluation)
        if base is not None:
            setup["adapter"] = adapter_config(run.model).model_dump()
            setup["base_path"] = str(_write_base(base, folder))
        return PublishedPreviews(
            worker=worker,
            setup=setup,
            snapshotter=snapshots,
            folder=folder,
            num_slots=num_slots,
            requests=requests,
            canary=canary,
            matches=run.prepared.profile.matches,
            parts_of=partial(golden_parts, run.prepared.tokenizer, run.prepared.profile),
            backend_type=backend,
            evaluation=evaluation,
            is_spooled=is_spooled,
            notice=lambda text: run.notice(text, "warning"),
            log=run.folder.log("publisher"),
        )
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise PreviewError(
                f"previews need copies of the weights in {folder.parent}, which cannot be written "
                f"({error.strerror}); free some room, or set {run.instead}."
            ) from error
        raise


def _snapshotter(prepared: Prepared, model: Any) -> Snapshotter:
    """Copies of what this run trains: its weights, or its adapters."""
    tensors_of = adapter_tensors if hasattr(model, "peft_config") else canonical_tensors
    travel, device = prepared.precision.compute_dtype, prepared.device
    if prepared.is_sharded:
        return ShardSnapshotter(model, tensors_of, travel, device, say=say)
    return Snapshotter(tensors_of(model), travel, device)


def build_following(
    prepared: Prepared, model: Any, requests: Sequence[PreviewRequest]
) -> FollowingLane:
    """The part of the other processes of a sharded run in what `build_published` makes."""
    snapshots = _snapshotter(prepared, model)
    canary = build_canary(prepared, model, requests)
    assert isinstance(snapshots, ShardSnapshotter), "only of a sharded run"
    return FollowingLane(snapshots, hear, canary.score if canary is not None else None)


def agree_on_previews(lane: Lane | None) -> bool:
    """Have all processes of a sharded run know whether its weights are copied, and who copies what.

    Only the main process has looked whether there is room for copies. The processes of its machine
    write into its arenas; those of other machines only take part in the gathers.

    Returns:
        Whether they are copied. If not, the other processes have nothing to wait for.
    """
    if is_main_process():
        arenas = lane.arenas if isinstance(lane, PublishedPreviews) else []
        paths = [str(one.path) for one in arenas]
        say(json.dumps(paths))
    else:
        paths = json.loads(hear())
    if not paths:
        return False
    assert isinstance(lane, PublishedPreviews | FollowingLane), "every process is ready for it"
    snapshots = lane.snapshotter
    assert isinstance(snapshots, ShardSnapshotter), "of a sharded run"
    if not is_main_process() and os.environ["RANK"] == os.environ["LOCAL_RANK"]:
        snapshots.open_arenas([Path(path) for path in paths])
    snapshots.share_out()
    return True


def _check_publishable(model: Any, backend: str, instead: str) -> None:
    """Refuse adapters that a preview server does not take.

    Raises:
        ConfigError: they are on the stacked weights of experts.
    """
    experts = adapted_parameters(model)
    if experts:
        raise ConfigError(
            f"monitoring.preview_backend={backend}: adapters of this run are on parameters of "
            f"experts ({experts[0]}), which a preview server does not take; set "
            f"{instead}, or name linear layers only: "
            "lora.target_modules=q_proj,k_proj,v_proj,o_proj."
        )


def _worker_and_setup(
    run: PublishingRun,
    folder: Path,
    transport: str,
    requests: Sequence[PreviewRequest],
    local: LocalPreviewBackend,
    canary: Canary | None,
) -> tuple[Worker, dict[str, Any]]:
    """The server, and the publisher's first line."""
    name, own = run.prepared.config.profile.name, run.prepared.profile
    profile = _profile_for_worker(name, own, local, run.instead)
    name = _run_name(run.folder.path)
    hashes = ServerHashes(
        config_hash=config_hash(run.model.config),
        tokenizer_hash=tokenizer_hash(run.prepared.tokenizer),
        chat_template_hash=chat_template_hash(run.prepared.tokenizer),
    )
    worker, key, weights_dir = _worker(run, folder, hashes, profile[0], name)
    is_http = transport == "http"
    return worker, {
        "key": key,
        "run": name,
        "transport": transport,
        "timeout_s": run.prepared.config.monitoring.remote_3090_timeout if is_http else SIDECAR_S,
        "weights_dir": str(weights_dir) if weights_dir else None,
        "folder": str(folder),
        "hashes": hashes.model_dump(),
        "model": _model_name(run) if is_http else None,
        "quantize": _quantize(run),
        "template_date": run.prepared.date.isoformat()
        if is_dated(run.prepared.tokenizer)
        else None,
        "previews": _previews(run, requests, local, profile, canary),
        "num_samples": run.prepared.config.monitoring.num_preview_samples,
        "drift_prompts": run.drift.prompts if run.drift is not None else [],
        "drift_path": str(run.drift.path.resolve()) if run.drift is not None else None,
    }


def _quantize(run: PublishingRun) -> Literal["nf4"] | None:
    """How a server is to quantize its copy of the base; None where what is on disk says it."""
    return "nf4" if run.prepared.config.hyperparams.training_mode == "qlora" else None


def _model_name(run: PublishingRun) -> str:
    """What a server without a model may load: of an adapter that is trained on, its base."""
    return base_section(run.prepared.config.model).model_path


def _run_name(path: Path) -> str:
    """Names this run on a server; another start of the same run is another name."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name).strip("-._")[:80]
    return f"{words or 'run'}-{secrets.token_hex(4)}"


def profile_by_name(name: str) -> bool:
    """Whether a preview server knows a profile by its name, and needs no code of the user's."""
    return ":" not in name and name in known_profiles()


def _profile_for_worker(
    name: str, profile: DataProfile, local: LocalPreviewBackend, instead: str
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Name, options and stop strings that stand for the profile on the worker.

    Raises:
        ConfigError: it has code that a worker would have to run and does not know by name.
    """
    options = dict(profile.options)
    if profile_by_name(name):
        return name, options, ()
    stop_ids = local.settings.stop_ids
    if profile.logits_processors(local.tokenizer, stop_ids=stop_ids):
        raise ConfigError(
            f"profile.name={name} has logits processors, and a preview server takes profiles by "
            "name, never as code: install it as an entry point in group trainer.profiles "
            f"(docs/profiles.md), or set {instead}."
        )
    return "plain", {}, tuple(profile.stop_strings)


def _worker(
    run: PublishingRun, folder: Path, hashes: ServerHashes, profile: str, name: str
) -> tuple[Worker, str | None, Path | None]:
    """The server of this run, its key, and the folder of transport `dir`."""
    monitoring = run.prepared.config.monitoring
    key_file = folder / "key" if monitoring.preview_backend == "sidecar" else None
    announce = _announcer(run, key_file, name)
    if monitoring.preview_backend == "sidecar":
        key = secrets.token_hex(32)
        worker, weights_dir = _sidecar(run, folder, key, announce)
        return worker, key, weights_dir
    url = url_of(monitoring.remote_3090_host or "", monitoring.remote_3090_port)
    secret = server_key(monitoring.remote_3090_key_file)
    client = WorkerClient(url, secret, run=name, transport="http", timeout_s=10.0)
    try:
        info = client.check(hashes, profile, _model_name(run), _quantize(run))
        travel = run.prepared.precision.name
        if info.dtype_option == "bf16" and travel != "bf16":
            raise ConfigError(
                f"the preview server at {url} was started with --dtype bf16, and this run "
                f"publishes {travel} weights, which it would round; start it with --dtype auto or "
                "fp32, or set hyperparams.fp_precision=bf16."
            )
        wanted = monitoring.remote_3090_model_id
        if wanted is not None and wanted != info.model_id:
            raise ConfigError(
                f"monitoring.remote_3090_model_id={wanted}: the server at {url} holds "
                f"{info.model_id!r}."
            )
    except AwayError as error:
        run.notice(f"previews: {error}", "warning")
    finally:
        client.close()
    return RemoteWorker(url, announce), secret, None


def _announcer(run: PublishingRun, key_file: Path | None, name: str) -> Announce:
    """Writes worker.json, by which the live page finds the server; never the key itself."""
    folder, monitoring = run.folder, run.prepared.config.monitoring

    def announce(url: str | None, pid: int | None) -> None:
        if url is None:
            folder.worker_json.unlink(missing_ok=True)
            return
        key = key_file or monitoring.remote_3090_key_file
        if key:
            remember_key_file(key)
        folder.write_json(
            folder.worker_json,
            {
                "url": url,
                "run": name,
                "key_file": str(key) if key else None,
                "backend": monitoring.preview_backend,
                "model_id": None,
                "system_prompt": run.prepared.data.system_prompt,
                "pid": pid,
            },
        )

    return announce


def _sidecar(
    run: PublishingRun, folder: Path, key: str, announce: Announce
) -> tuple[SidecarWorker, Path]:
    monitoring, config = run.prepared.config.monitoring, run.model.config
    if getattr(config, "auto_map", None):
        raise ConfigError(
            "monitoring.preview_backend=sidecar: this model needs code from its own folder, which "
            f"a preview server does not run; set {run.instead}."
        )
    device = resolve_device(monitoring.sidecar_device)
    model_dir, weights_dir, key_file = folder / "model", folder / "weights", folder / "key"
    weights_dir.mkdir(mode=0o700)
    config.save_pretrained(model_dir)
    run.prepared.tokenizer.save_pretrained(model_dir)
    replace_file(key_file, key + "\n", mode=0o600)
    threads = 1 if run.prepared.device.type == "cpu" else half_the_cores()
    worker = SidecarWorker(
        model_dir=model_dir,
        weights_dir=weights_dir,
        key_file=key_file,
        device=str(device),
        num_threads=monitoring.sidecar_num_threads or threads,
        announce=announce,
        log=run.folder.log("sidecar"),
    )
    return worker, weights_dir


def _previews(
    run: PublishingRun,
    requests: Sequence[PreviewRequest],
    local: LocalPreviewBackend,
    profile: tuple[str, dict[str, Any], tuple[str, ...]],
    canary: Canary | None,
) -> dict[str, Any]:
    """What every `POST /previews` of this run has in common."""
    monitoring: MonitoringConfig = run.prepared.config.monitoring
    return {
        "prompts": [PreviewPrompt.values_of(one) for one in requests],
        "profile": profile[0],
        "profile_options": profile[1],
        "stop": list(profile[2]),
        "stop_ids": sorted(local.settings.stop_ids),
        "max_new_tokens": monitoring.preview_max_tokens,
        "temperature": monitoring.preview_temperature,
        "seed": run.prepared.config.environment.seed,
        "golden_logprobs": measures_golden(run.prepared.config, len(requests)),
        "canary": list(canary.rows) if canary is not None else None,
    }


def _evaluation_bodies(
    run: PublishingRun, previews: Mapping[str, Any], requests: Sequence[PreviewRequest]
) -> list[dict[str, Any]]:
    """The same for the prompts that are answered for scores only: greedily, and batch by batch."""
    measures = measures_golden(run.prepared.config, len(requests))
    return [
        {
            **previews,
            "prompts": [PreviewPrompt.values_of(one) for one in batch],
            "temperature": 0.0,
            "golden_logprobs": measures,
            "canary": None,
        }
        for batch in batches_of(requests)
    ]


def _base(run: PublishingRun) -> Snapshotter:
    return Snapshotter(
        base_tensors(run.model), run.prepared.precision.load_dtype, run.prepared.device
    )


def _write_base(base: Snapshotter, folder: Path) -> Path:
    """The frozen weights under the adapters, once per run."""
    arena = base.arena(folder / "base")
    base.copy(arena)()
    return arena.path
