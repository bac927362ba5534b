"""create_app: the ASGI app of `trainer monitor`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from nicegui import Client, ui

from trainer.guard import Guard
from trainer.views.page.compare_page import LETTERS, ComparePage
from trainer.views.page.elements import open_page, text
from trainer.views.page.list_page import ListPage
from trainer.views.page.login import guarded_page
from trainer.views.page.run_page import RunPage
from trainer.views.page.store import PageOptions, RunStore

FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" '
    'rx="7" fill="#0b61c4"/><path d="M5 8c6 14 12 15 22 15" fill="none" stroke="#fff" '
    'stroke-width="3.5" stroke-linecap="round"/></svg>'
)

PATIENCE_S = 600.0
"""A page may take so long: a long run is read first, maybe on a machine that trains meanwhile.
NiceGUI's own limit is 3 s, after which a visitor gets its error page."""

RECONNECT_S = 20.0
"""How long a page that lost its connection is kept on the server."""


def create_app(
    store: RunStore, options: PageOptions, *, hosts: frozenset[str], key: str | None
) -> Guard:
    """The pages behind their guard.

    Args:
        store: the runs.
        hosts: names in the Host header that are answered.
        key: what visitors must give; None: nothing.
    """
    app = FastAPI(lifespan=_reading(store), docs_url=None, redoc_url=None, openapi_url=None)
    _add_pages(store, options)
    ui.run_with(
        app,
        title="ultimate-trainer",
        favicon=FAVICON,
        dark=None,
        tailwind=False,
        reconnect_timeout=RECONNECT_S,
        show_welcome_message=False,
    )
    return guarded_page(app, hosts=hosts, key=key)


def _reading(
    store: RunStore,
) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(store.refresh_forever())
        yield
        task.cancel()

    return lifespan


def _add_pages(store: RunStore, options: PageOptions) -> None:
    async def home(client: Client, request: Request) -> None:
        if store.is_one_run:
            await show(client, request, next(iter(store.readers)))
        else:
            store.num_lists += 1
            client.on_delete(lambda: setattr(store, "num_lists", store.num_lists - 1))
            ListPage(store)

    async def run(client: Client, request: Request, name: str) -> None:
        await show(client, request, store.key_of(name))

    async def show(client: Client, request: Request, key: str) -> None:
        reader = await store.load(key)
        if reader is None:
            _not_found()
            return
        _watch(client, store, key)
        query = dict(request.query_params)
        RunPage(reader, store.label(reader), options, query, is_alone=store.is_one_run)

    async def compare(client: Client, keys: str) -> None:
        wanted = list(dict.fromkeys(keys.split("/")))
        readers = [await store.load(key) for key in wanted]
        found = [reader for reader in readers if reader is not None]
        if len(found) < len(readers) or not 2 <= len(found) <= len(LETTERS):
            _not_found()
            return
        for key in wanted:
            _watch(client, store, key)
        ComparePage(store, found)

    ui.page("/", response_timeout=PATIENCE_S)(home)
    ui.page("/run/{name:path}", response_timeout=PATIENCE_S)(run)
    ui.page("/compare/{keys:path}", response_timeout=PATIENCE_S)(compare)


def _watch(client: Client, store: RunStore, key: str) -> None:
    """Keep a run up to date while this page is open."""
    store.watched[key] += 1
    client.on_delete(lambda: store.watched.subtract([key]))


def _not_found() -> None:
    open_page("no such run")
    text("p", "There is no such run here.")
    ui.link("all runs", "/")
