"""Metrics against values worked out by hand, and pairing of reconstructions with originals."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from gradinv import metrics
from gradinv.gallery import Gallery, iip, pooled
from gradinv.models import Model
from gradinv.types import GradinvError


def random_pixels(count: int, side: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_known_error_per_image() -> None:
    originals = torch.full((3, 3, 8, 8), 0.5)
    images = originals.clone()
    images[0] += 0.1  # mean squared error 0.01: 20 dB
    images[1, 0] += 0.1  # one channel of three: 0.01 / 3, so 10·log10(300)
    images[2, :, :4] -= 0.5  # half of the pixels by 0.5: 0.125
    expected = torch.tensor([20.0, 10 * math.log10(300), -10 * math.log10(0.125)], dtype=torch.float64)
    torch.testing.assert_close(metrics.psnr(images, originals), expected, rtol=1e-6, atol=1e-6)


def test_measure_has_null_where_a_number_is_not_finite() -> None:
    originals = random_pixels(3)
    images = originals.clone()
    images[1] = float("nan")
    images[2] = 1 - images[2]
    measured = metrics.measure(images, originals)
    assert measured["psnr"][0] is None and measured["psnr"][1] is None and measured["ssim"][1] is None
    assert measured["ssim"][0] == pytest.approx(1)
    assert measured["psnr"][2] == pytest.approx(float(metrics.psnr(images[2:], originals[2:])))
    json.dumps(measured, allow_nan=False)


def test_ssim_is_the_formula_on_every_seven_by_seven_window() -> None:
    a, b = random_pixels(1, 9, seed=1), random_pixels(1, 9, seed=2)
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for channel in range(3):
        for top in range(3):
            for left in range(3):
                x = a[0, channel, top : top + 7, left : left + 7].double().numpy().ravel()
                y = b[0, channel, top : top + 7, left : left + 7].double().numpy().ravel()
                covariance = np.cov(x, y)  # unbiased, as scikit-image takes it
                values.append(
                    (2 * x.mean() * y.mean() + c1)
                    * (2 * covariance[0, 1] + c2)
                    / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2))
                )
    assert float(metrics.ssim(a, b)[0]) == pytest.approx(float(np.mean(values)), abs=1e-7)


def test_constant_colour_is_the_mean_and_the_best_constant() -> None:
    originals = random_pixels(2)
    baseline = metrics.constant_colour(originals)
    assert baseline.shape == originals.shape
    torch.testing.assert_close(baseline[1, 2, 3, 4], originals[1, 2].mean())
    for shift in (-0.01, 0.01):
        assert (metrics.psnr(baseline + shift, originals) < metrics.psnr(baseline, originals)).all()


@pytest.mark.parametrize(
    ("looks_like", "restored", "labels", "expected"),
    [
        # Labels count, even against the distance: each reconstruction looks exactly like an original of another one.
        ([1, 2, 0], [7, 1, 4], [7, 1, 4], [0, 1, 2]),
        ([1, 2, 0], [4, 7, 1], [7, 1, 4], [1, 2, 0]),
        # Within a label that repeats the distance does.
        ([1, 3, 0, 2], [3, 5, 5, 5], [5, 3, 5, 5], [2, 0, 3, 1]),
        # Label 8 was not in the batch: its image is the one left for the original of label 4.
        ([2, 0, 1], [9, 8, 1], [1, 4, 9], [2, 1, 0]),
        # Two that are wrong are assigned by the distance.
        ([1, 0, 2], [70, 80, 9], [1, 4, 9], [1, 0, 2]),
        # Of the two originals of label 6 the nearer one takes the reconstruction of 6, the other what is left.
        ([1, 2, 0], [6, 2, 30], [6, 6, 2], [2, 0, 1]),
    ],
)
def test_pairing_is_by_label_and_then_by_distance(
    looks_like: list[int], restored: list[int], labels: list[int], expected: list[int]
) -> None:
    originals = random_pixels(len(labels))
    assert metrics.pair(0.9 * originals[looks_like], restored, originals, labels).tolist() == expected


def test_pairing_within_a_label_is_optimal_not_greedy() -> None:
    originals = torch.tensor([0.6, 0.9]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    images = torch.tensor([0.7, 0.1]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    # The nearest two, 0.6 and 0.7, would leave 0.9 with 0.1: 0.01 + 0.64. The other way round is 0.25 + 0.04.
    assert metrics.pair(images, [2, 2], originals, [2, 2]).tolist() == [1, 0]


def test_a_diverged_image_is_still_paired() -> None:
    originals = random_pixels(3)
    images = originals[[2, 1, 0]].clone()
    images[1] = float("nan")
    assert metrics.pair(images, [3, 3, 3], originals, [3, 3, 3]).tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("images", "originals"),
    [((2, 3, 8, 8), (3, 3, 8, 8)), ((2, 3, 8, 8), (2, 3, 9, 9)), ((3, 8, 8), (3, 8, 8)), ((2, 1, 8, 8), (2, 1, 8, 8))],
)
def test_shapes_that_do_not_fit(images: tuple[int, ...], originals: tuple[int, ...]) -> None:
    for metric in (metrics.psnr, metrics.ssim, metrics.fft2d):
        with pytest.raises(GradinvError, match="one to one"):
            metric(torch.zeros(images), torch.zeros(originals))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: metrics.pair(random_pixels(2), [1], random_pixels(2), [1, 2]), "2 images need as many"),
        (lambda: metrics.ssim(torch.zeros(1, 3, 6, 9), torch.zeros(1, 3, 6, 9)), "at least 7"),
        (lambda: metrics.lpips(random_pixels(1, 30), random_pixels(1, 30)), "at least 31"),
    ],
)
def test_what_a_metric_needs(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(GradinvError, match=said):
        call()


def test_columns_of_a_table_by_hand() -> None:
    measured = {
        "seeds": [{"psnr": [10.0, 20.0], "ssim": [0.1, 0.2]}, {"psnr": [14.0, None], "ssim": [0.3, 0.4]}],
        "consensus": {"psnr": [13.0, 23.0], "ssim": [0.5, 0.6]},
        "baseline": {"psnr": [1.0, 2.0], "ssim": [0.7, 0.8]},
    }
    expected = [
        [12.0, None],
        [13.0, 23.0],
        [1.0, 2.0],
        [pytest.approx(0.2), pytest.approx(0.3)],
        [0.5, 0.6],
        [0.7, 0.8],
    ]
    assert metrics.columns(measured) == expected
    assert metrics.mean([1.0, 2.0]) == 1.5 and metrics.mean([]) is None


# --- FFT2D


def test_fft2d_is_its_equation() -> None:
    for height, width in ((6, 8), (5, 7), (7, 6), (8, 1)):
        generator = torch.Generator().manual_seed(height)
        a, b = (torch.rand(2, 3, height, width, generator=generator) for _ in range(2))
        expected = []
        for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True):
            # numpy's transform is not orthonormal: |F|² / HW is that of the orthonormal one, and its mean one more.
            squares = (np.abs(np.fft.fft2(x)) - np.abs(np.fft.fft2(y))) ** 2 / (height * width) ** 2
            expected.append(np.mean(np.sqrt(squares.sum(axis=(1, 2)))))
        torch.testing.assert_close(metrics.fft2d(a, b), torch.tensor(expected), rtol=1e-10, atol=1e-12)


# --- LPIPS


@pytest.fixture
def unknown_network() -> Iterator[None]:
    """What was found before is forgotten, and what is found here too."""
    metrics._lpips_network.cache_clear()
    yield
    metrics._lpips_network.cache_clear()


@pytest.mark.usefixtures("unknown_network")
def test_lpips_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    images = random_pixels(2, 32)
    with pytest.raises(
        GradinvError, match=r"needs the package lpips; install it with pip install 'gradinv\[metrics\]'"
    ):
        metrics.lpips(images, images)
    measured = metrics.measure(images, images.flip(3))
    assert measured["lpips"] == [None, None] and None not in measured["fft2d"]
    # What is kept of the reason is not what was raised, which holds the frames of all who asked, and what they held.
    kept = metrics._lpips_network()
    assert isinstance(kept, GradinvError) and kept.__traceback__ is None


@pytest.mark.usefixtures("unknown_network")
def test_lpips_without_the_weights_asks_once_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def unreachable(request: Any, *_: Any, **__: Any) -> None:
        asked.append(request.full_url)
        raise URLError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", types.ModuleType("lpips"))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    images = random_pixels(1, 32)
    for _ in range(2):
        with pytest.raises(
            GradinvError, match=r"AlexNet's weights .* no route to host.*alexnet-owt-7be5be79\.pth into "
        ):
            metrics.lpips(images, images)
    assert metrics.measure(images, images)["lpips"] == [None]
    assert len(asked) == 1 and not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("unknown_network")
def test_lpips_on_damaged_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lpips", types.ModuleType("lpips"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    path = tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth"
    path.parent.mkdir()
    path.write_bytes(b"no weights")
    with pytest.raises(GradinvError, match="could not be downloaded or read") as raised:
        metrics.lpips(random_pixels(1, 32), random_pixels(1, 32))
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.usefixtures("unknown_network")
def test_lpips_runs_on_the_weights_that_torchvision_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package around an AlexNet that was not trained: whether its weights arrive where they belong."""
    pytest.importorskip("lpips", reason="the package lpips is not installed")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        alexnet = torchvision.models.alexnet(weights=None)
    published = type(torchvision.models.AlexNet_Weights.IMAGENET1K_V1)
    monkeypatch.setattr(published, "get_state_dict", lambda *_, **__: alexnet.state_dict())
    images, originals = random_pixels(3, 33), random_pixels(3, 33, seed=1)
    distances = metrics.lpips(images, originals)
    assert distances.shape == (3,) and distances.dtype == torch.float64 and (distances > 0).all()
    assert metrics.lpips(images, images).tolist() == [0, 0, 0]
    torch.testing.assert_close(metrics.lpips(images[1:2], originals[1:2]), distances[1:2])
    network = metrics._lpips_network()
    assert not network.training
    x = random_pixels(1, 64)
    torch.testing.assert_close(network.get_submodule("net")(x)[-1], alexnet.features[:12](x))


def test_lpips_of_shifted_and_of_other_pictures() -> None:
    pytest.importorskip("lpips", reason="the package lpips is not installed")
    file = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    if not (Path(torch.hub.get_dir()) / "checkpoints" / file).is_file():
        pytest.skip("AlexNet's weights are not here")
    images = random_pixels(2, 64)
    blurred = torch.nn.functional.avg_pool2d(images, 5, 1, 2)
    near, far = metrics.lpips((images + 0.02).clamp(max=1), images), metrics.lpips(blurred, images)
    assert (near < far).all() and (near >= 0).all()


def test_only_the_metrics_that_are_asked_for() -> None:
    assert list(metrics.measure(random_pixels(1), random_pixels(1), ("fft2d", "psnr"))) == ["fft2d", "psnr"]
    assert metrics.measure(random_pixels(1, 30), random_pixels(1, 30))["lpips"] == [None]


# --- IIP


def test_iip_is_whether_the_nearest_picture_is_the_own(small_model: Model) -> None:
    pixels = random_pixels(5, 8)
    gallery = Gallery(Path("."), tuple(Path(f"{i}.png") for i in range(5)), pooled(small_model, pixels))
    images = pixels[[3, 1, 4]] + 0.01
    assert iip(small_model, images, [3, 1, 4], gallery).tolist() == [True, True, True]
    assert iip(small_model, images, [3, 2, 4], gallery).tolist() == [True, False, True]
    images[0] = float("nan")
    for place in range(5):  # whatever place a search among NaN answers, it is no identification
        assert iip(small_model, images, [place, 1, 4], gallery).tolist() == [False, True, True]


def test_iip_needs_a_place_in_the_gallery_for_each_image(small_model: Model) -> None:
    pixels = random_pixels(2, 8)
    gallery = Gallery(Path("."), (Path("a.png"), Path("b.png")), pooled(small_model, pixels))
    for own in ([0], [0, 2], [-1, 0]):
        with pytest.raises(GradinvError, match="2 images need as many places of originals among the gallery's 2"):
            iip(small_model, pixels, own, gallery)
