"""`trainer monitor RUN_OR_FOLDER`: the live page."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

import uvicorn

from trainer.commands.arguments import parse, port
from trainer.counts import counted
from trainer.errors import EXIT_SIGTERM
from trainer.net import is_loopback, key_with_scope, keys_of_listener, listen, url_of
from trainer.views.page.own_server import OwnServer
from trainer.views.page.store import PageOptions, RunStore


def run(argv: list[str]) -> int:
    """Listen and serve until a signal."""
    words = parse(_parser(), argv)
    keys = keys_of_listener(words.key_file, words.host, "--key-file")
    key = key_with_scope(keys, "publish") if keys else None
    store = RunStore(Path(words.folder))
    listener = listen(words.host, words.port, "monitor")
    # NiceGUI takes most of a second to import: mistakes are told before.
    from trainer.views.page.site import create_app

    own_server = OwnServer() if words.ask else None
    options = PageOptions(
        is_control_allowed=words.allow_control,
        worker_hosts=frozenset(words.allow_worker),
        own_server=own_server,
    )
    app = create_app(store, options, hosts=_names(words.host, words.allow_host), key=key)
    num_runs, url = len(store.readers), url_of(words.host, listener.getsockname()[1])
    found = counted(num_runs, "run") if num_runs else "waiting for a run"
    print(
        f"monitor: {url} ({found} in {words.folder}; "
        f"control {'on' if words.allow_control else 'off'}, "
        f"key {'asked for' if key else 'none'}). Ctrl-C ends it.",
        flush=True,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_SIGTERM))
    logging.getLogger("nicegui").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app,
        http="httptools",
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        if own_server is not None:
            own_server.close()
        listener.close()
    return 0


def _names(host: str, more: list[str]) -> frozenset[str]:
    """Names in a Host header that are ours: others come from somebody else's name server."""
    names = {"localhost", "127.0.0.1", "::1", host.lower(), *(name.lower() for name in more)}
    return frozenset(names if is_loopback(host) or more else {*names, *_own_names()})


def _own_names() -> set[str]:
    """Addresses and names of this machine."""
    import socket

    import psutil

    found = {
        address.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    return {*found, socket.gethostname().lower(), socket.getfqdn().lower()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainer monitor",
        description="Show a run, or all runs of a folder, while they happen and afterwards.",
    )
    parser.add_argument(
        "folder",
        metavar="RUN_OR_FOLDER",
        help="folder of a run or of runs; waited for if it is not there",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    parser.add_argument("--port", type=port, default=8080, help="0 picks a free one [8080]")
    parser.add_argument(
        "--key-file",
        type=Path,
        help="file with the key of the page; required for a non-loopback --host",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another host name under which the page may be opened; may be repeated",
    )
    parser.add_argument(
        "--allow-control",
        action="store_true",
        help="allow the page to control runs: preview now, save, stop, mark as best",
    )
    parser.add_argument(
        "--allow-worker",
        action="append",
        default=[],
        metavar="HOST",
        help="another machine whose worker may be queried; may be repeated",
    )
    parser.add_argument(
        "--ask",
        action="store_true",
        help="let the page ask ended runs: the first question starts a server on this machine "
        "with the run's final_model, ended after 10 minutes without one",
    )
    return parser
