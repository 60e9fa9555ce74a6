"""What the server puts around Streamlit: the style sheet in its document, and a bound on what is being sent to it."""

from __future__ import annotations

import asyncio
import gzip
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from gradinv.paths import ASSETS
from gradinv.web.host import server
from gradinv.web.parts import uploads

PAGE = b"<html><head><title>x</title></head><body><div></div></body></html>"
UPLOAD = "/_stcore/upload_file/session/file"


def asked(
    middleware: type[server.Styled | server.Bounded], method: str, path: str, **headers: str
) -> tuple[dict[str, Any], bytes]:
    """The start and the body of an answer around an application that sends a page, in parts."""
    sent: list[Any] = []
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        told = [(b"content-length", str(len(PAGE)).encode()), (b"etag", b"1"), (b"content-type", b"text/html")]
        await send({"type": "http.response.start", "status": 200, "headers": told})
        await send({"type": "http.response.body", "body": PAGE[:20], "more_body": True})
        await send({"type": "http.response.body", "body": PAGE[20:]})

    async def receive() -> Any:
        raise AssertionError("nothing is to be read here")

    async def send(message: Any) -> None:
        sent.append(message)

    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": given}
    asyncio.run(middleware(application)(scope, receive, send))
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    asked_on = dict(seen[0]["headers"]) if seen else {}
    facts = {"status": sent[0]["status"], "told": told, "asked on": asked_on}
    return facts, b"".join(part["body"] for part in sent[1:])


def test_a_page_comes_with_its_style_and_the_font_of_its_headings() -> None:
    facts, body = asked(
        server.Styled, "GET", "/replay", accept="text/html,*/*", accept_encoding="gzip", range="bytes=0-"
    )
    style = (ASSETS / "style.css").read_bytes()
    assert body.endswith(b"<style>" + style + b"</style></body></html>")
    assert body.count(b'as="font"') == 1 and body.index(b'as="font"') < body.index(b"</head>")
    given = facts["told"].pop("set-cookie")
    assert given.startswith(f"{server.COOKIE}=") and "HttpOnly" in given
    assert facts["told"] == {"content-type": "text/html", "content-length": str(len(body))}
    assert facts["asked on"] == {b"accept": b"text/html,*/*"}


def test_a_browser_is_given_one_name_which_its_tabs_and_a_frame_of_another_site_keep() -> None:
    def given(**headers: str) -> str:
        told: str = asked(server.Styled, "GET", "/", accept="text/html", **headers)[0]["told"].get("set-cookie", "")
        return told

    first, second = given(), given()
    assert first != second and "SameSite=Lax" in first and "Secure" not in first
    assert given(cookie=f"other=1; {server.COOKIE}=abc") == ""
    assert "SameSite=None; Secure" in given(x_forwarded_proto="https")


def test_whatever_is_no_page_passes_as_it_is() -> None:
    facts, body = asked(server.Styled, "GET", "/static/js/index.js", accept="*/*", accept_encoding="gzip")
    assert body == PAGE and facts["told"]["etag"] == "1" and b"accept-encoding" in facts["asked on"]


def test_scripts_are_sent_compressed_once_and_as_they_are_where_that_is_asked() -> None:
    seen: list[str] = []
    script = b"let a = 1;\n" * 1000

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        status = 404 if "missing" in scope["path"] else 200
        told = [(b"content-length", str(len(script)).encode()), (b"cache-control", b"immutable")]
        await send({"type": "http.response.start", "status": status, "headers": told})
        await send({"type": "http.response.body", "body": script[:100], "more_body": True})
        await send({"type": "http.response.body", "body": script[100:]})

    packed = server.Packed(application)

    def get(path: str, **headers: bytes) -> tuple[Any, bytes]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        given = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
        scope = {"type": "http", "method": "GET", "path": path, "headers": given}
        asyncio.run(packed(scope, send, send))
        return sent[0], b"".join(part["body"] for part in sent[1:])

    for _ in range(2):
        start, body = get("/static/js/a.js", accept_encoding=b"gzip, br", if_none_match=b"1")
        told = dict(start["headers"])
        assert gzip.decompress(body) == script and told[b"content-encoding"] == b"gzip"
        assert told[b"content-length"] == str(len(body)).encode() and told[b"cache-control"] == b"immutable"
    assert seen == ["/static/js/a.js"]
    assert get("/static/js/a.js")[1] == script
    assert get("/static/js/a.js", accept_encoding=b"gzip", range=b"bytes=0-9")[1] == script
    assert get("/static/media/a.woff2", accept_encoding=b"gzip")[1] == script
    missing, _ = get("/static/js/missing.js", accept_encoding=b"gzip")
    assert missing["status"] == 404


@pytest.mark.parametrize(("size", "status"), [("20", 200), ("21", 413), ("", 413)])
def test_uploads_beyond_what_is_held_for_all_are_refused_unread(
    size: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "held", lambda: 1024 * 2**20 - 20)
    facts, body = asked(server.Bounded, "PUT", UPLOAD, content_length=size)
    assert facts["status"] == status
    assert (body == server.Bounded.FULL) is (status == 413)
    assert asked(server.Bounded, "GET", "/replay", content_length="99")[0]["status"] == 200


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps freed memory for each thread")
def test_freed_memory_is_handed_back_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(server, "TIDY", 0.001)
    monkeypatch.setattr(server.ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=trimmed.append))

    async def running() -> None:
        task = asyncio.create_task(server._tidy())
        while len(trimmed) < 3:
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(asyncio.wait_for(running(), 60))
    assert set(trimmed) == {0}
