"""A gradient that a visitor brings: what is accepted and held, and the page from the upload to the end of a run."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from conftest import ROOT, Clock
from headless import address, group, press, sound, text, visit, wait
from streamlit.testing.v1 import AppTest
from torch.nn.functional import cross_entropy

from gradinv.checks import check_observation
from gradinv.client import observe
from gradinv.jobs import Limits, manager
from gradinv.models import MODELS, load_model
from gradinv.recording.replay import Recording
from gradinv.types import GradinvError, Observation, Preprocessing
from gradinv.web.parts import gradient
from gradinv.web.parts.gradient import GradientStore
from gradinv.web.run import ended, facts

pytestmark = pytest.mark.usefixtures("own_server")

PICTURES = ("goldfish", "tabby")
QUICK = {"source": "gradient", "model": "resnet18-tiny", "seeds": "1", "iterations": "1"}


@pytest.fixture(scope="module")
def model():
    return load_model("resnet18-tiny", device="cpu")


@pytest.fixture(scope="module")
def file():
    """What the page itself offers as a sample."""
    return gradient.sample("resnet18-tiny", PICTURES)


@pytest.fixture(scope="module")
def observation(file):
    return Observation.unpack(file, "sample")


# --- the sample and the example


def test_the_example_is_that_of_the_readme_and_makes_what_it_says(model, tmp_path, monkeypatch):
    assert gradient.EXAMPLE in (ROOT / "docs" / "your-own-gradient.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(gradient.EXAMPLE, {"pixels": torch.rand(2, 3, 64, 64), "labels": torch.tensor([3, 5])})
    check_observation(model, Observation.load("mine.safetensors"))
    assert cross_entropy.__name__ in gradient.EXAMPLE


# --- what is held


LIMITS = Limits(gradient=100, gradients=250, lease=60, retained_seconds=1000)


def nothing() -> Observation:
    raise AssertionError("loaded again")


def test_several_who_bring_the_same_hold_it_once_until_the_last_has_left(observation):
    shelf = GradientStore()
    assert shelf.put("a", "ada", 100, LIMITS, lambda: observation) is observation
    assert shelf.put("a", "bob", 100, LIMITS, nothing) is observation
    assert shelf.size == 100
    shelf.leave("a", "ada")
    assert shelf.find("a", "bob") is observation
    shelf.leave("a", "bob")
    assert shelf.size == 0
    with pytest.raises(GradinvError, match="not kept here any more"):
        shelf.find("a", "bob")


def test_what_nobody_looks_at_makes_room_and_what_is_looked_at_stays(observation):
    clock = Clock()
    shelf = GradientStore(clock)
    for key in ("a", "b"):
        shelf.put(key, key, 100, LIMITS, lambda: observation)
    with pytest.raises(GradinvError, match="as many gradients of visitors as it can"):
        shelf.put("c", "c", 100, LIMITS, nothing)
    clock.now += 61
    shelf.find("a", "a")
    shelf.put("c", "c", 100, LIMITS, lambda: observation)
    assert shelf.size == 200
    assert shelf.find("a", "a") is shelf.find("c", "c") is observation
    with pytest.raises(GradinvError, match="bring it again"):
        shelf.find("b", "b")
    clock.now += 1001
    shelf.put("d", "d", 10, LIMITS, lambda: observation)
    assert shelf.size == 10


def test_what_cannot_be_loaded_takes_no_room():
    shelf = GradientStore()

    def damaged() -> Observation:
        raise GradinvError("Damaged.")

    with pytest.raises(GradinvError, match="Damaged"):
        shelf.put("a", "ada", 100, LIMITS, damaged)
    assert shelf.size == 0


# --- what is accepted


def test_the_sample_is_accepted_with_what_it_says_of_itself(file, observation, model):
    check_observation(model, observation)
    found = gradient.accept(file, "mine.safetensors", "ada")
    assert dataclasses.asdict(found) == {
        "key": found.key,
        "name": "mine.safetensors",
        "size": len(file),
        "model": "resnet18-tiny",
        "batch_size": 2,
        "side": 64,
        "mode": "eval",
        "leaks": (False, False),
        "notes": (),
        "update": False,
    }
    assert list(found.shared("ada").find().gradients) == [name for name, _ in model.network.named_parameters()]


def test_what_has_too_many_bytes_is_not_even_read(file, monkeypatch):
    monkeypatch.setenv("GRADINV_MAX_GRADIENT", str(2**20))
    monkeypatch.setattr(Observation, "unpack", nothing)
    with pytest.raises(GradinvError, match="mine has more than the 1 MB that a gradient may have here"):
        gradient.accept(file, "mine", "ada")


def test_the_limits_fit_the_bundled_networks():
    accepted = Limits().gradient / 2**20
    config = (ROOT / ".streamlit" / "config.toml").read_text(encoding="utf-8")
    assert f"maxUploadSize = {accepted:g}\n" in config
    for name in ("resnet18-tiny", "resnet50-tiny", "resnet50"):
        with torch.device("meta"):
            network = torchvision.models.get_model(MODELS[name].arch, num_classes=MODELS[name].classes)
        assert 4 * sum(parameter.numel() for parameter in network.parameters()) + 2**16 < Limits().gradient


# What check_observation refuses of any observation is tested with the attack, in test_inversion.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another network": ({"model_name": "mine"}, "a network that this page does not have"),
    "other weights": ({"model_sha256": "f" * 64}, "other weights of resnet18-tiny"),
    "a name of another": ({"model_name": "resnet50-tiny"}, "resnet50-tiny"),
    "not loaded": ({"model_name": "resnet50"}, "of resnet50, which is not loaded here"),
    "no names": ({"gradients": {}}, "holds no gradient"),
    "NaN": ({"gradients": {"fc.bias": torch.full((200,), math.nan)}}, "fc.bias holds values that are not finite"),
    "many": ({"batch_size": 10**300}, "of more than the 200 pictures that a batch may have"),
    "mode": ({"mode": "x"}, "forward mode must be eval or train"),
    "size": (
        {"preprocessing": Preprocessing(512, 512)},
        "is of 512-px pictures, and resnet18-tiny takes 8 to 256 px here",
    ),
    "scale": (
        {"preprocessing": Preprocessing(64, 64, std=1.0)},
        "was made with mean .* and std 1, 1, 1, and resnet18-t",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_inverted_is_one_sentence_and_not_held(kind, observation):
    changes, said = BAD[kind]
    with pytest.raises(GradinvError, match=said):
        gradient.accept(dataclasses.replace(observation, **changes).pack(), "mine", "ada")
    assert gradient._store.size == 0


@pytest.mark.parametrize(
    "data",
    [b"", b"\x89PNG\r\n\x1a\n" + bytes(99), bytes(range(256)) * 99, safetensors.torch.save({"a": torch.ones(2)})],
    ids=["empty", "picture", "random", "weights"],
)
def test_what_is_no_gradient_is_one_sentence(data, file):
    with pytest.raises(GradinvError, match=r"mine(:| is) .*\.$"):
        gradient.accept(data, "mine", "ada")
    with pytest.raises(GradinvError, match="no complete safetensors file"):
        gradient.accept(file[:-1], "mine", "ada")


def test_what_it_carries_of_bn_statistics_is_said(model):
    pixels, labels = torch.rand(2, 3, 64, 64), torch.tensor([1, 2])
    cases = [({"share_bn": True}, "exact"), ({"mode": "train"}, "inferred")]
    for options, said in cases:
        found = gradient.accept(observe(model, pixels, labels, **options).pack(), "mine", "ada")  # type: ignore[arg-type]
        assert f"“{said}” can be chosen" in gradient.STATISTICS[found.leaks]


# --- the page


def bring(app: AppTest, data: bytes, name: str = "mine.safetensors") -> AppTest:
    return sound(app.file_uploader[0].set_value((name, data, "application/octet-stream")).run())


def accepted(app: AppTest) -> bool:
    """Nothing is complained of, and the run can be started."""
    return not app.error and not app.warning and not app.button(key="start").disabled


def test_nothing_can_be_started_before_a_gradient_is_there_and_bad_ones_are_one_sentence():
    app = visit(**QUICK)
    assert "Bring a gradient first." in text(app) and app.button(key="start").disabled
    assert gradient.EXAMPLE.strip() in app.code[0].value
    bring(app, b"\x89PNG\r\n\x1a\n" + bytes(99), "cat.safetensors")
    (said,) = (item.value for item in app.warning)
    assert not app.error and said.startswith("Cannot read an observation from cat.safetensors: ")
    assert [item.type for item in app.main if item.type in ("file_uploader", "warning")] == ["file_uploader", "warning"]
    assert app.button(key="start").disabled


def test_a_gradient_is_shown_inverted_and_downloaded_without_its_pictures(file):
    # Another network is chosen: the file names its own.
    app = bring(visit(source="gradient", model="resnet50-tiny", iterations="7"), file)
    said = text(app)
    assert accepted(app) and "**mine.safetensors**" in said and "It carries no BN statistics" in said
    assert "the mean gradient of 2 pictures of 64 × 64 px on resnet18-tiny, taken in eval mode" in said
    assert "2 labels read from the gradient alone" in said and "True class" not in said
    chooser = group(app, "model")
    assert chooser.value == "resnet18-tiny" and chooser.disabled
    app.number_input(key="seeds").set_value(2).run()
    app.number_input(key="iterations").set_value(1).run()
    assert "**a gradient of 2 pictures** of 64 px · resnet18-tiny · 2 seeds × 1 iteration" in text(app)
    app = wait(app.button(key="start").click().run())
    said, job = text(app), address(app)["job"]
    assert "**Finished** after 1 of 1 iteration" in said and "misfit of the solved activations" in said
    assert "distance of the gradients" not in said and "nan" not in said
    assert "PSNR" not in said and "Original" not in said and "constant colour" not in said
    board = next(item.value for item in app.markdown if "gi-board" in item.value)
    assert board.count("<img") == 2 * 4 and "gi-hidden" not in board and "<small></small>" not in board
    assert "goldfish" in board and "gi-right" not in board
    assert not app.error and not app.toggle
    assert len(app.get("download_button")) == 4 and len(app.get("plotly_chart")) == 2

    state = manager().state(job)
    assert state is not None
    recorded = Recording.open(state.update.store)
    assert recorded.run["metrics"] is None and recorded.run["client"]["batch_size"] == 2
    run = facts.Run.of(state)
    page = ended._summary(run, state.update, recorded, []).decode()
    assert page.count("<img ") == 2 * 3 and "PSNR" not in page and "<h2>Numbers</h2>" not in page
    archive = ended._archive(state.update.store, run.facts)
    assert b"CREDITS" not in archive and b"original" not in archive and b"consensus_00.png" in archive

    # Present: nothing to reveal. Another tab: the same. A new run: the gradient is still there.
    sound(app.button(key="present").click().run())
    assert "reveal" not in [button.key for button in app.button]
    assert "gi-board" in text(app) and "Rebuilt from the gradient alone" in text(app)
    other = visit(job=job)
    assert board in [item.value for item in other.markdown]
    assert len(press(other, "New run").session_state.batch) == 4
    app.button(key="present").click().run()
    assert "**mine.safetensors**" in text(press(app, "New run"))
    press(app, "Remove")
    assert "No gradient yet." in text(app) and gradient._store.size == 0


def test_what_the_file_lacks_cannot_be_chosen_and_at_the_gallery_the_pictures_count_again(file, monkeypatch):
    app = bring(visit(**QUICK, bn="exact"), file)
    assert "bn=exact is not possible; take approx or none" in text(app)
    assert app.button(key="start").disabled
    for statistics in ("approx", "none"):
        group(app, "bn").set_value(statistics).run()
        assert not app.button(key="start").disabled
    sound(group(app, "source").set_value("gallery").run())
    assert "**4 pictures** of 64 px · resnet18-tiny" in text(app)
    group(app, "source").set_value("gradient").run()
    assert "**a gradient of 2 pictures**" in text(app)
    # One that made room for others is said so.
    monkeypatch.setattr(gradient, "_store", GradientStore())
    sound(app.run())
    assert "bring it again" in text(app) and app.button(key="start").disabled


def test_a_run_beyond_the_servers_limit_is_refused(file, monkeypatch):
    monkeypatch.setenv("GRADINV_MAX_COST", "4096")
    app = bring(visit(**QUICK), file)
    app.button(key="start").click().run()
    assert "2.0 times as large as this server accepts" in app.error[0].value and "job" not in app.query_params


def test_no_session_of_the_page_writes_a_gradient_to_disk():
    assert ".save(" not in inspect.getsource(gradient).replace(gradient.EXAMPLE, "")


def test_what_a_gradient_is_found_to_be_is_said_and_an_update_is_taken_as_one(observation, model):
    weights = dict(model.network.named_parameters())
    decayed = {name: value + 5e-3 * weights[name].detach() for name, value in observation.gradients.items()}
    app = bring(visit(**QUICK), dataclasses.replace(observation, gradients=decayed).pack())
    assert not app.error and "2 labels read from the gradient alone" in text(app)
    (said,) = (item.value for item in app.warning)
    assert "weight decay, 0.005 times the weights" in said
    updated = bring(visit(**QUICK), observation.negated().pack())
    assert not updated.warning and not updated.error
    assert accepted(updated) and "a weight update, whose negative is the mean gradient" in text(updated)
    assert "2 labels read from the gradient alone" in text(updated)
    assert "--update" in next(item.value for item in updated.code if "gradinv invert" in item.value)


@pytest.mark.parametrize("side", [32, 96])
def test_a_gradient_of_another_size_is_accepted(side, model):
    given = observe(model.at(side), torch.rand(2, 3, side, side), torch.tensor([1, 2]))
    app = bring(visit(**QUICK, preset="matching"), given.pack())
    assert accepted(app) and f"of {side} × {side} px on resnet18-tiny" in text(app)
    assert "2 labels read from the gradient alone" in text(app)
    app = wait(app.button(key="start").click().run())
    assert not app.error and "**Finished** after 1 of 1 iteration" in text(app)
