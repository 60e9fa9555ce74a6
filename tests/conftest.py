"""What several test files share: a network small enough to invert in a second, pictures, a server, the command line."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# Before torch is imported, here or in a process that a test starts: the threads of one wait for each other, which takes
# minutes where other work has the cores, and what is tested is small.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from gradinv import cli
from gradinv.attack.objective import Objective
from gradinv.client import observe
from gradinv.config import AttackConfig
from gradinv.models import ImageClass, Model
from gradinv.recovery.final_layer import FinalLayer
from gradinv.types import Observation, Preprocessing, Recovered
from serving import chromium

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # of a process that a test starts
PATIENCE = 900.0  # seconds after which something hangs; nothing depends on how fast it is
LONG = ("test_distributed", "test_browser", "test_abuse", "test_evaluation", "test_train", "test_hosting")

SIZE = 8
CLASSES = 6

# The gradient's direction and total variation, nothing else.
PLAIN = AttackConfig(
    match="cosine", gradient=1.0, bn="none", tv=0.02, tv_form="rgb", l2=0.0, group=0.0, noise=0.0, warmup=0
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that no process is left alone with it at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


class SmallNetwork(nn.Module):
    """Two convolutions with BN, pooled features after a ReLU, a final linear layer: a ResNet's parts, without depth."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer4 = nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.layer4(x)).relu()
        return self.fc(x.mean((2, 3)))


def solved(model: Model, observation: Observation, labels: Tensor, config: AttackConfig) -> Recovered:
    """What `recover` finds, but with these labels (B,) in their order."""
    if not config.needs_features:
        return Recovered(labels, "given", 1.0)
    fit = FinalLayer(model, observation).fit(labels)
    return Recovered(labels, "given", 1.0, fit.features.float(), fit.output_errors.float(), fit.residual, fit.scale)


def objective_for(model: Model, observation: Observation, labels: Tensor, config: AttackConfig) -> Objective:
    """The objective of a config whose labels are these."""
    return Objective(model, observation, solved(model, observation, labels, config), config)


def smooth(count: int, seed: int, coarse: int = 2, size: int = SIZE) -> Tensor:
    """Pictures (count, 3, size, size) without fine detail, pixels in [0, 1]."""
    values = torch.rand(count, 3, coarse, coarse, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(values, (size, size), mode="bilinear")


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def resnet18() -> dict[str, Tensor]:
    """Random weights of a 3-class ResNet-18, under torchvision's names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dict(torchvision.models.resnet18(num_classes=3).state_dict())


@pytest.fixture(autouse=True)
def own_main() -> Iterator[None]:
    """Streamlit's AppTest leaves the app as the main module, which a process started later would run."""
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


@pytest.fixture
def small_model() -> Model:
    """A fixed random network of 8-px images and 6 classes, with running statistics that are not the defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SmallNetwork()
        network.train()
        with torch.no_grad():
            for _ in range(20):
                network(torch.randn(16, 3, SIZE, SIZE))
            network.fc.weight *= 3
    network.eval()
    classes = tuple(ImageClass(f"n{i:08d}", f"class {i}") for i in range(CLASSES))
    return Model("small", network, "0" * 64, Preprocessing(SIZE, SIZE), classes, None)


@pytest.fixture
def small_batch() -> tuple[Tensor, Tensor]:
    """Three smooth pictures (pixels in [0, 1], (3, 3, 8, 8)) and their distinct labels."""
    return smooth(3, 1), torch.tensor([4, 1, 2])


@pytest.fixture
def observation(small_model: Model, small_batch: tuple[Tensor, Tensor]) -> Observation:
    """What the server has of this batch: its gradient in eval mode."""
    return observe(small_model, *small_batch)


# --- pictures, and who gives them out


def picture(path: Path, seed: int = 0, side: int = 40) -> Path:
    """Save a smooth picture, each seed another: → its path. As PNG, whatever the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC).save(path, format="PNG")
    return path


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


class Server(ThreadingHTTPServer):
    """Serves `files` by path and notes in `asked` what was asked for; `claim` is added to the length that it states."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.claim = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append(self.path)
        body = server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + server.claim))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Requests are not worth a line each."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# --- the page


@pytest.fixture
def own_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's queue and what it holds of visitors are the test's own, and it names no folder."""
    from gradinv import jobs
    from gradinv.web.parts import gradient, shared

    monkeypatch.delenv("GRADINV_IMAGENET", raising=False)
    # A warm worker model saves a visitor a second and would cost these tests several.
    monkeypatch.setattr(shared, "warm", lambda name: None)
    monkeypatch.setattr(shared, "owner", shared.visitor)  # what AppTest gives for cookies is no text
    monkeypatch.setattr(gradient, "_store", gradient.GradientStore())
    shared.folder.clear()
    jobs.reset()
    yield
    shared.folder.clear()
    jobs.reset()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        path = chromium() or driver.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium here: install one, or run `playwright install chromium`")
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


# --- the command line


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder and the cache are the test's own, and nothing is set by who runs it. → the folder"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADINV_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRADINV_IMAGENET", raising=False)
    monkeypatch.delenv("GRADINV_DEBUG", raising=False)
    return tmp_path


def one_sentence(text: str) -> str:
    """What the command complains of, after its name: one line that is no traceback."""
    assert text.startswith("gradinv: ") and text.endswith("\n") and "Traceback" not in text
    assert len(text.splitlines()) == 1
    return text.removeprefix("gradinv: ").rstrip("\n")


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that has to fail as bad use: → its one sentence."""
    capsys.readouterr()
    assert cli.main(args) == 2
    *aside, last = capsys.readouterr().err.splitlines(keepends=True)
    assert not aside or "--json" in args
    return one_sentence(last)
