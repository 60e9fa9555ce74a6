"""What the server does beside running the pages: it answers once all is loaded, and styles Streamlit's document."""

from __future__ import annotations

import asyncio
import ctypes
import gzip
import importlib
import re
import secrets
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import streamlit as st

from gradinv.paths import ASSETS

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

COOKIE = "gradinv-visitor"
"""What the server calls a browser, so that its tabs are one visitor: a random name, forgotten when it is closed."""
TIDY = 60.0  # seconds between two times that freed memory is handed back, which takes some milliseconds

# A presentation that is opened by its link is large from the start: else all of it would grow once the page's own mark
# is there, which then takes the place of this one.
_PRESENTING = b"""<script>(() => {
  const asked = new URLSearchParams(location.search);
  const large = asked.has('job') || asked.has('tour') || location.pathname.endsWith('/replay');
  if (asked.get('present') !== '1' || !large) return;
  const mark = document.createElement('div');
  mark.className = 'gi-presenting';
  document.body.append(mark);
  new MutationObserver((_, observer) => {
    if (!document.querySelector('.stHtml .gi-presenting, [data-testid="stAlert"]')) return;
    mark.remove();
    observer.disconnect();
  }).observe(document.body, {childList: true, subtree: true});
})()</script>"""
_STATIC = Path(st.__file__).parent / "static"
_FONTS = _STATIC / "static" / "media"
_HEADINGS = "SourceSerif*Roman*.woff2"


def middleware() -> list[Any]:
    """For `st.App`."""
    wrapped = importlib.import_module("starlette.middleware").Middleware  # comes with Streamlit
    return [wrapped(Styled), wrapped(Bounded), wrapped(Packed)]


class Styled:
    """ASGI middleware that puts the style sheet into Streamlit's document, and has the headings' font loaded at once.

    Both would else come after the first parts of a page, and these would move. At the end of the body, the style sheet
    wins over rules of Streamlit's that are as specific.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self._head = b"".join(
            f'<link rel="preload" href="./static/media/{font.name}" as="font" type="font/woff2" crossorigin>'.encode()
            for font in _FONTS.glob(_HEADINGS)
        )
        self._style = _PRESENTING + b"<style>" + (ASSETS / "style.css").read_bytes() + b"</style>"

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        if scope["type"] != "http" or b"text/html" not in headers.get(b"accept", b""):
            await self._app(scope, receive, send)
            return
        cookies = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1"))
        whole = [(name, value) for name, value in scope["headers"] if name != b"range"]
        start, body = await _whole(self._app, {**scope, "headers": whole}, receive)
        for end, added in ((b"</head>", self._head), (b"</body>", self._style)):
            body = body.replace(end, added + end, 1)
        # Those of the file let browsers keep a document with an older style sheet.
        kept = [(name, value) for name, value in start["headers"] if name.lower() not in (b"etag", b"last-modified")]
        given = [] if COOKIE in cookies else [(b"set-cookie", _cookie(scope, headers))]
        await _answer(send, {**start, "headers": [*kept, *given]}, body)


def _cookie(scope: Message, headers: Mapping[bytes, bytes]) -> bytes:
    """The visitor's name as a header. In another site's frame, as a hosted Space is shown, browsers send a cookie only
    where it says so, and take such a one over https only."""
    secure = b"https" in (headers.get(b"x-forwarded-proto", b""), scope.get("scheme", "").encode())
    kind = "SameSite=None; Secure; Partitioned" if secure else "SameSite=Lax"
    return f"{COOKIE}={secrets.token_urlsafe(16)}; Path=/; HttpOnly; {kind}".encode()


LEVEL = 6  # of compression; the best, 9, takes three times as long and gives a few percent less
_prepared: dict[str, bytes] = {}  # by name, which says the content's hash too, what every page needs


def prepare() -> None:
    """Compress what Streamlit's document names, all of which a browser asks for before it paints anything."""
    document = (_STATIC / "index.html").read_text(encoding="utf-8")
    for name in re.findall(r"\./static/((?:js|css)/[\w.-]+)", document):
        file = _STATIC / "static" / name
        if file.is_file():
            _prepared[file.name] = gzip.compress(file.read_bytes(), LEVEL)


class Packed:
    """ASGI middleware that sends Streamlit's scripts and style sheets compressed, each compressed once.

    Streamlit sends them as they are; together they are three times as large. They never change while a server runs.
    """

    KINDS = (".js", ".css")
    MOST = 500  # files that are kept; Streamlit has fewer, and nobody is to fill the memory with invented paths

    def __init__(self, app: Application) -> None:
        self._app = app
        self._packed: dict[str, tuple[Message, bytes]] = {}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        path = scope.get("path", "")
        wanted = scope["type"] == "http" and scope["method"] == "GET" and "/static/" in path
        accepted = b"gzip" in headers.get(b"accept-encoding", b"") and b"range" not in headers
        if not (wanted and accepted and path.endswith(self.KINDS)):
            await self._app(scope, receive, send)
            return
        if path not in self._packed:
            start, body = await _whole(self._app, scope, receive)
            if start["status"] != 200 or len(self._packed) >= self.MOST:
                await _answer(send, start, body)
                return
            if (small := _prepared.get(path.rpartition("/")[2])) is None:
                small = await asyncio.to_thread(gzip.compress, body, LEVEL)
            told = [(b"content-encoding", b"gzip"), (b"vary", b"accept-encoding")]
            self._packed[path] = {**start, "headers": [*start["headers"], *told]}, small
        await _answer(send, *self._packed[path])


async def _answer(send: Send, start: Message, body: bytes) -> None:
    """Send an answer at once, with its length."""
    kept = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
    await send({**start, "headers": [*kept, (b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


async def _whole(app: Application, scope: Message, receive: Receive) -> tuple[Message, bytes]:
    """An application's answer: its start, and all of its body."""
    start: Message = {}
    body = b""

    async def take(message: Message) -> None:
        nonlocal start, body
        if message["type"] == "http.response.start":
            start = message
        else:
            body += message.get("body", b"")

    # Not what a browser has already of it: this is for all of them.
    left_out = (b"if-none-match", b"if-modified-since", b"accept-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name not in left_out]
    await app({**scope, "headers": headers}, receive, take)
    return start, body


class Bounded:
    """ASGI middleware that refuses uploads where all visitors' together would take more than the server may hold.

    The pages let a file go once they have read it, but whoever sends some by hand could have them held for as long as
    the visit lasts.
    """

    ADDRESS = "/_stcore/upload_file/"
    FULL = b"This server holds as many files of visitors as it can; try again in a few minutes."

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "PUT" and self.ADDRESS in scope["path"]:
            uploads, jobs = (importlib.import_module(f"gradinv.{name}") for name in ("web.parts.uploads", "jobs"))
            told = dict(scope["headers"]).get(b"content-length", b"")
            size = int(told) if told.isdigit() else st.get_option("server.maxUploadSize") * 2**20
            if uploads.held() + size > jobs.manager().limits.gradients:
                kind = [(b"content-type", b"text/plain")]
                await _answer(send, {"type": "http.response.start", "status": 413, "headers": kind}, self.FULL)
                return
        await self._app(scope, receive, send)


@asynccontextmanager
async def ready(app: object) -> AsyncIterator[None]:
    """No visitor waits for imports, which take seconds: until they are done, the server does not answer.

    What the first page shows first is made in the meantime between then and the first visit.
    """
    # Here, since Streamlit wants its server to be there when they are imported.
    names = ("web.parts.showcase", "web.parts.settings", "web.parts.shared", "pace")
    showcase, settings, shared, pace = (importlib.import_module(f"gradinv.{name}") for name in names)
    importlib.import_module("gradinv.web.pages.live")

    def rest() -> None:
        prepare()
        showcase.prepare()
        pace.probe(shared.model(settings.MODEL, size=settings.SIZE))

    threading.Thread(target=rest, name="gradinv-ready", daemon=True).start()
    tidying = asyncio.create_task(_tidy())
    yield
    tidying.cancel()


async def _tidy() -> None:
    """Hand freed memory back to the system now and then. Streamlit has a thread for each rerun, and glibc keeps what
    each has freed: without this a busy server grows by some MB a minute though nothing is held."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    while trim is not None:
        await asyncio.sleep(TIDY)
        await asyncio.to_thread(trim, 0)
