"""`trainer serve`: a preview server on this machine, an API process and an engine process."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

import uvicorn

from trainer.commands.arguments import add_weights_flags, parse, port, whole_number
from trainer.core.finished import open_run
from trainer.core.run_folder import RunFolder
from trainer.counts import counted
from trainer.errors import EXIT_SIGTERM, ConfigError, ModelError
from trainer.models import is_adapter_folder
from trainer.monitoring.events import Waits
from trainer.net import keys_of_listener, listen, remember_key_file, url_of
from trainer.server.app import create_app
from trainer.server.bounded_http import BoundedProtocol
from trainer.server.inference_process import EngineProcess
from trainer.server.job_queue import REQUEST_TIMEOUT_S
from trainer.server.service import Origin
from trainer.server.upload import PrivateFolder
from trainer.server.weight_store import KEPT_SETS

MAX_TIMEOUT_S = 1_000_000


def run(argv: list[str]) -> int:
    """Load the model, listen, serve until a signal."""
    words = parse(_parser(), argv)
    date, origin = _find_weights(words)
    keys = keys_of_listener(words.api_key_file, words.host, "--api-key-file")
    if words.api_key_file is not None:
        remember_key_file(words.api_key_file)
    weights_dir: Path | None = words.weights_dir
    if weights_dir is not None and not weights_dir.is_dir():
        raise ConfigError(f"--weights-dir {weights_dir}: no such folder; create it first.")
    if words.wait_for_weights and words.model is None:
        raise ConfigError(
            "--wait-for-weights needs --model, which gives architecture and tokenizer."
        )
    listener = listen(words.host, words.port, "server")
    engine = EngineProcess(
        words.model,
        words.device,
        wait_for_weights=words.wait_for_weights,
        dtype=words.dtype,
        base=words.base,
        date=date,
        quantize=words.quantize,
        num_threads=words.threads,
    )
    # uvicorn raises the signal again once it is done; by default that would skip the cleaning up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_SIGTERM))
    if words.end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    store = _store()
    try:
        if words.model is not None:
            # Standard output is for whoever waits for `ready:`.
            with Waits.of(f"loading {words.model}", partial(print, file=sys.stderr, flush=True)):
                _start(engine)
        app = create_app(
            engine,
            keys=keys,
            host=words.host,
            store_dir=store.path,
            weights_dir=weights_dir,
            num_kept=words.keep_weights,
            origin=origin,
            request_timeout_s=words.request_timeout,
        )
        print(
            f"ready: {url_of(words.host, listener.getsockname()[1])} {_describe(engine)}, "
            f"key {'asked for' if keys else 'none'}",
            flush=True,
        )
        config = uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            loop="auto",
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        engine.stop()
        listener.close()
        store.remove()
    return 0


def _find_weights(words: argparse.Namespace) -> tuple[str | None, Origin]:
    """Turn RUN and --step into the folder of the weights, as if --model had named it.

    Returns:
        The date of the run (YYYY-MM-DD), and its name and step, where they are known.
    Raises:
        ConfigError: two models, or a flag that needs a run without one.
        OutputError: the run has no such weights.
    """
    if words.run is not None and words.model is not None:
        raise ConfigError(
            f"RUN ({words.run}) and --model {words.model} each name a model; give one of them."
        )
    asked = words.run
    if asked is None and words.model is not None:  # it may be an alias or a hub id too
        folder = Path(words.model)
        is_run = is_adapter_folder(folder) or (folder / RunFolder.RUN_JSON).is_file()
        asked = words.model if is_run else None
    if asked is None:
        if words.step is not None or words.base is not None:
            raise ConfigError(
                "--step and --base need the folder of a run or adapter; give it as RUN."
            )
        return None, Origin()
    found = open_run(Path(asked), step=words.step, base=words.base)
    if found.base is not None and not found.is_adapter:
        raise ConfigError(f"--base: {found.model_dir} holds a whole model, not an adapter.")
    words.model = str(found.model_dir)
    print(f"the {found.note} of {asked}", file=sys.stderr, flush=True)
    is_run = (found.folder / RunFolder.RUN_JSON).is_file()
    origin = Origin(found.folder.resolve().name if is_run else None, found.step)
    return None if found.date is None else found.date.isoformat(), origin


def _start(engine: EngineProcess) -> None:
    try:
        engine.start()
    except ModelError as error:
        # The loader names the option of a training run; here it is a flag.
        raise ModelError(str(error).replace("model.model_path=", "--model ")) from error


def _store() -> PrivateFolder:
    """A private folder (mode 700) for what is uploaded; those of killed servers go."""
    try:
        return PrivateFolder()
    except OSError as error:
        raise ConfigError(
            f"the folder for uploads cannot be created in {tempfile.gettempdir()} "
            f"({error.strerror or error}); set TMPDIR to a folder with free space."
        ) from error


def _describe(engine: EngineProcess) -> str:
    if engine.model_path is None:
        return "waiting for a model (POST /models/register)"
    weights = (engine.hello["weights_id"] or "awaited")[:12]
    where = f"{engine.hello['device']} in {engine.hello['dtype']}"
    if engine.hello["device"] == "cpu":
        threads = engine.hello["num_threads"]
        where += f" with {counted(threads, 'thread')}"
    return f"model {engine.model_path} on {where}, weights {weights}"


def _end_with_stdin() -> None:
    """End when whoever holds the other end of stdin does, however it ended."""
    # Not by sys.stdin: this thread would hold its lock when the interpreter ends after an error.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainer serve",
        description="Answer prompts with a model; take new weights from a training run.",
    )
    add_weights_flags(parser, is_run_optional=True)
    parser.add_argument(
        "--model",
        help="alias, hub id or folder; without it, the server waits for a client to name one",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=port, default=8765, help="0 picks a free one")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--threads",
        type=whole_number(1),
        metavar="N",
        help="CPU threads [OMP_NUM_THREADS, else half of the cores: training may run beside it]",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="in which weights are held and computed with; auto: bf16 for weights that are bf16, "
        "where the device computes in it, else fp32",
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        help="file with the keys of clients; required for a non-loopback --host",
    )
    parser.add_argument(
        "--weights-dir",
        type=Path,
        help="folder into which a trainer on this machine writes weights",
    )
    parser.add_argument(
        "--wait-for-weights",
        action="store_true",
        help="load architecture and tokenizer from --model; a trainer sends the weights",
    )
    parser.add_argument(
        "--quantize",
        choices=("nf4",),
        help="hold the linear layers in 4 bit, for runs with training_mode=qlora",
    )
    parser.add_argument(
        "--keep-weights",
        type=whole_number(1),
        default=KEPT_SETS,
        metavar="N",
        help="number of weight sets kept for switching back",
    )
    parser.add_argument(
        "--request-timeout",
        type=whole_number(1, MAX_TIMEOUT_S),
        default=int(REQUEST_TIMEOUT_S),
        metavar="S",
        help="longest time of one request in the engine, in seconds",
    )
    parser.add_argument(
        "--end-with-stdin", action="store_true", help="end when standard input closes"
    )
    return parser
