"""The lessons Labels, Who was in the batch? and Defences: their arithmetic on a small network, their pages headless."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from headless import PATIENCE, opened, sound, text
from PIL import Image
from streamlit.testing.v1 import AppTest
from torch import Tensor

from gradinv import metrics, sources
from gradinv.client import observe
from gradinv.defenses import clip, gaussian_epsilon, gaussian_sigma, parse
from gradinv.gallery import Gallery, pooled
from gradinv.models import Model
from gradinv.recovery.final_layer import EXPLAINED
from gradinv.sources import Picture
from gradinv.types import GradinvError
from gradinv.web.pages import batch, defences
from gradinv.web.pages import labels as labels_page
from gradinv.web.parts import gradient, lessons, markup, shared, showcase, ways
from gradinv.web.parts.lessons import Candidate, Pool
from gradinv.web.parts.uploads import Upload


@pytest.fixture(autouse=True)
def fresh(elsewhere, own_server, monkeypatch):
    """Nothing is left of other tests, and nothing set by who runs this; pixels are searched for in two steps."""
    monkeypatch.setattr(ways, "SEARCH", 2)


def picture(key: str, title: str = "") -> Picture:
    return Picture(key, None, "", title or key, None, lambda: (Image.new("RGB", (8, 8), "teal"), []))


def pool_of(labels: list[int | None], views: list[int] | None = None, features: Tensor | None = None) -> Pool:
    candidates = tuple(
        Candidate(picture(f"p{place}"), label, views[place] if views else 0) for place, label in enumerate(labels)
    )
    features = torch.eye(len(labels)) if features is None else features
    return Pool("test", candidates, Gallery(Path("."), tuple(Path(item.picture.key) for item in candidates), features))


# --- the batch


def test_a_draw_is_repeated_by_its_numbers_and_a_larger_one_holds_a_smaller():
    pool = pool_of([label for label in range(10) for _ in range(3)])
    drawn = pool.draw(12, 2, 5)
    assert drawn == pool.draw(12, 2, 5) and drawn != pool.draw(12, 2, 6)
    assert pool.draw(7, 2, 5) == drawn[:7]
    assert set(Counter(pool.labels(drawn).tolist()).values()) == {2}
    assert len(set(pool.labels(pool.draw(10, 1, 0)).tolist())) == 10


def test_a_class_gives_its_picture_as_it_is_first_and_repeats_only_where_classes_run_out():
    pool = pool_of([0, 0, 1, 1, None], views=[3, 0, 0, 1, 0])
    assert set(pool.draw(2, 1, 0)) == {1, 2}
    assert set(pool.draw(99, 1, 0)) == {0, 1, 2, 3}  # what the network does not know is no one's batch


def test_views_are_mirrored_and_cropped():
    image = Image.new("RGB", (100, 100), "white")
    image.putpixel((20, 15), (0, 0, 0))
    assert lessons.seen(image, 0) is image
    assert lessons.seen(image, 1).getpixel((79, 15)) == (0, 0, 0)
    assert lessons.seen(image, 2).size == (70, 70) and lessons.seen(image, 2).getpixel((5, 5)) == (0, 0, 0)
    assert lessons.seen(image, 3).getpixel((64, 5)) == (0, 0, 0)


# --- the attack


def test_the_attack_reads_labels_and_features_and_clipping_hides_neither(small_model, small_batch):
    pixels, labels = small_batch
    own = pooled(small_model, pixels)
    observation = observe(small_model, pixels, labels)
    for shared_one in (observation, clip(observation, 1e-3)):
        found = lessons.attack(small_model, shared_one)
        order, similarity = metrics.aligned(found.features, own)
        assert found.labels[order].tolist() == labels.tolist()
        assert min(similarity) > 0.9999 and found.residual < EXPLAINED


def test_repeated_labels_are_read_behind_clipping_although_the_scale_is_lost():
    network, pool = shared.model("resnet18-tiny"), lessons.samples("resnet18-tiny")
    assert "counts 4 times: as it is, mirrored, cropped, cropped and mirrored." in pool.counted
    assert pool.counted.endswith(f"so {len(pool.candidates)} are searched.")
    places = pool.draw(8, 2, 0)
    labels, observation = pool.labels(places), clip(lessons.observed_final(network, pool, places), 0.1)
    plain = lessons.readings(network, observation)
    assert max(metrics.labels_right(read.tolist(), labels.tolist()) for read in plain.values()) < 8
    found = lessons.attack(network, observation)
    assert found.method == "ilrg, rescaled" and found.residual < EXPLAINED
    assert metrics.labels_right(found.labels.tolist(), labels.tolist()) == 8


def test_counting_what_is_right_and_putting_features_in_the_pictures_order():
    assert metrics.labels_right([1, 1, 2, 3], [1, 2, 2, 4]) == 2
    assert lessons.found([7, 7, 3], [3, 7, 9]) == 2
    features = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    order, similarity = metrics.aligned(features[[2, 0, 1]] * 5, features)
    assert order == [1, 2, 0] and similarity == pytest.approx([1, 1, 1])


# --- the gradient's picture, and what the methods read


def test_the_picture_shows_the_rows_with_the_most_negative_minima_and_where_these_lie():
    gradient = torch.zeros(30, 60)
    gradient[7, 50], gradient[3, 9], gradient[12] = -2.0, -1.0, 0.5
    drawn = labels_page.picture(gradient, [f"class {place}" for place in range(30)], 2, {7: 1, 12: 3})
    labels = drawn.layout.yaxis.ticktext
    assert labels[:2] == ("<b>class 7 ●</b>", "class 3") and "<b>class 12 ×3 ●</b>" in labels
    heat, first, others = drawn.data
    assert [heat.customdata[place][first.x[place]][1] for place in (0, 1)] == [50, 9]
    assert heat.z[0][first.x[0]] == -2 and len(others.x) == len(labels) - 2
    hidden = labels_page.picture(gradient, ["<i>x</i>"] * 30, 2, None)
    assert set(hidden.layout.yaxis.ticktext) == {"&lt;i&gt;x&lt;/i&gt;"}


def test_the_bars_are_the_minima_and_the_biases_times_the_batch_size():
    gradient, bias = torch.tensor([[0.5, 1.0], [-1.0, 0.0], [-3.0, 2.0]]), torch.tensor([0.1, -0.25, -0.5])
    drawn = labels_page.bars(gradient, bias, ["a", "b", "c"], 2, {2: 2})
    assert [bar.y for bar in drawn.data] == [(-3,), (-1, 0.5), (-1,), pytest.approx((-0.5, 0.2))]
    assert [bar.customdata for bar in drawn.data[:2]] == [("c",), ("b", "a")]


def test_the_table_marks_wrong_counts_and_none_while_the_truth_is_hidden():
    found = {
        "ilrg": labels_page.Reading({0: 2, 1: 1}, 1.0),
        "llg": labels_page.Reading({}, 0.0, "It <cannot>."),
    }
    table = labels_page.table(found, ["<a>", "b"], {0: 2, 1: 1}, 3)
    assert table.count('aria-label="wrong"') == 2  # llg's cells of both classes
    assert "<td>3 of 3</td><td>0 of 3</td>" in table
    assert "&lt;a&gt;" in table and "It &lt;cannot&gt;." in table
    hidden = labels_page.table(found, ["a", "b"], None, 3)
    assert "wrong" not in hidden and "Truth" not in hidden and "of 3" not in hidden


# --- what a defence costs


def test_distortion_by_layer_and_in_all_is_the_one_by_hand():
    own = {"a.weight": torch.tensor([3.0, 0.0]), "a.bias": torch.tensor([4.0]), "b.weight": torch.tensor([1.0])}
    sent = {"a.weight": torch.tensor([0.0, 0.0]), "a.bias": torch.tensor([4.0]), "b.weight": torch.tensor([0.0])}
    layers, whole = defences.distortion(own, sent)
    assert list(layers) == ["a", "b"]
    assert (layers["a"].error, layers["a"].cosine) == pytest.approx((3 / 5, 16 / (5 * 4)))
    assert layers["b"] == defences.Distortion(1.0, 0.0)
    assert (whole.error, whole.cosine) == pytest.approx((math.sqrt(10 / 26), 16 / math.sqrt(26 * 16)))
    scaled, _ = defences.distortion(own, {name: value / 10 for name, value in own.items()})
    assert (scaled["b"].error, scaled["b"].cosine) == pytest.approx((0.9, 1))


def test_the_privacy_statement_needs_clipping_and_noise():
    assert "nothing random is added" in defences.privacy(["prune:0.9"])
    assert "without clipping" in defences.privacy(["noise:1"])
    alone = defences.privacy(["clip:0.3"])
    assert "none" in alone and f"σ = {gaussian_sigma(0.6, 8, 1e-5):.3g}" in alone
    both = defences.privacy(["clip:0.3", "noise:1", "quantise:4"])
    assert f"(ε, δ) = ({gaussian_epsilon(0.6, 1, 1e-5):.3g}, 1e-5)" in both and "next to none" not in both
    assert "next to none, since an ε above 10" in defences.privacy(["clip:1", "noise:1e-4"])
    for norm, noise in itertools.product(lessons.STRENGTHS["clip"][1], lessons.STRENGTHS["noise"][1]):
        assert "nan" not in defences.privacy([f"clip:{norm}", f"noise:{noise}"])


# --- who was in the batch


def test_matches_are_marked_only_when_the_batch_may_be_seen_and_the_residual_is_said_in_words():
    assert "the client’s own" in batch.trust(EXPLAINED / 2)
    assert "**13 % of the last layer’s gradient unexplained**" in batch.trust(0.13)
    pool = pool_of([0, 1])
    pool = replace(pool, candidates=(Candidate(picture("p0", "<b>one</b>"), 0), *pool.candidates[1:]))
    hidden = batch.lineup(pool, ["lion"], [[0, 1]], [[0.9996, 0.5]], None, None)
    assert "✓" not in hidden and "✗" not in hidden and "&lt;b&gt;one" in hidden and "1.000" in hidden
    shown = batch.lineup(pool, ["lion"], [[0, 1]], [[0.9996, 0.5]], (0,), ["data:x"])
    assert shown.index("✓") < shown.index("✗") and "learned prior" in shown


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes that the small network knows, and one that it does not."""
    root = tmp_path / "imagenet"
    for wnid, colours in (("n00000001", ("red", "blue")), ("n00000004", ("lime",)), ("n99999999", ("black",))):
        (root / wnid).mkdir(parents=True)
        for colour in colours:
            Image.new("RGB", (8, 8), colour).save(root / wnid / f"{colour}.png")
    monkeypatch.setenv("GRADINV_IMAGENET", str(root))
    return root


def test_the_servers_folder_is_searched_whole_and_drawn_from_where_classes_are_known(folder, small_model):
    pool = batch.folder_pool(small_model)
    assert [item.label for item in pool.candidates] == [1, 1, 4, None]
    assert sorted(pool.draw(9, 2, 0)) == [0, 1, 2] and not pool.counted
    places = pool.draw(2, 1, 0)
    found = lessons.attack(small_model, lessons.observed_final(small_model, pool, places))
    assert sorted(found.labels.tolist()) == [1, 4]
    assert lessons.found(pool.gallery.match(found.features, 1)[1].flatten().tolist(), places) == 2


def test_the_folder_is_looked_at_once_and_a_failure_is_a_sentence_until_it_is_forgotten(
    folder, small_model, monkeypatch
):
    monkeypatch.setattr(batch, "_indices", {})

    def refuse(name: str) -> Model:
        raise GradinvError(f"No {name} today.")

    monkeypatch.setattr(batch, "load_model", refuse)
    index = batch.Index.of("small")
    index.thread.join(PATIENCE)
    assert batch.Index.of("small") is index and index.problem == "No small today." and index.pool is None
    batch.Index.forget("small")
    monkeypatch.setattr(batch, "load_model", lambda name: small_model)
    index = batch.Index.of("small")
    index.thread.join(PATIENCE)
    assert index.pool is not None and (index.done, index.total) == (4, 4)


# --- the pages


def visit(name: str, **address: str) -> AppTest:
    """Open a page at an address, as a new visitor."""
    app = opened(AppTest.from_function(_page, default_timeout=PATIENCE, args=(name,)), **address)
    assert not app.error
    return app


def _page(name: str) -> None:
    import importlib

    importlib.import_module(f"gradinv.web.pages.{name}").page()


HOSTILE = {
    "network": "../../etc/passwd",
    "batch_size": "-5",
    "repeats": "nan",
    "draw": "9" * 400,
    "clip": "<script>",
    "noise": "nan",
    "among": "folder",
    "truth": "\x00",
    "reveal": "perhaps",
}


@pytest.mark.parametrize("name", ["labels", "batch", "defences"])
def test_a_page_opens_and_ignores_a_hostile_address(name):
    app = visit(name, **HOSTILE)
    assert (app.slider(key="batch_size").value, app.slider(key="repeats").value) == (8, 1)
    assert app.slider(key="draw").value == 0
    assert "passwd" not in text(app) and "<script>" not in text(app)


@pytest.mark.parametrize("name", ["labels", "batch"])
def test_a_visitors_own_pictures_are_the_batch_and_among_those_that_are_searched(name):
    app = visit(name, reveal="true")
    own = [Upload(f"own{place}", known) for place, known in enumerate(sources.gallery()[:3])]
    app.session_state[lessons.OWN] = own
    said = text(sound(app.run()))
    assert not app.error
    assert "The batch is 3 pictures of your own" in said
    assert "3 of 3" in said if name == "batch" else "**3 pictures of" in said
    assert "of your own;" not in text(sound(app.button(key="own-remove").click().run()))


@pytest.mark.parametrize("name", ["labels", "batch", "defences"])
def test_a_gradient_of_ones_own_takes_the_batchs_place(name, monkeypatch):
    solving = [1000.0]  # seconds, before which the page asks
    monkeypatch.setattr("gradinv.pace.solving", lambda *_: solving[0])
    app = visit(name, batch_size="1", **({"clip": "0.3"} if name == "defences" else {}))
    data = gradient.sample("resnet18-tiny", lessons.SAMPLE[:1])
    solving[0] = 1.0
    app.session_state.visitor = "me"
    app.session_state.gradient = gradient.read(data, "mine.safetensors", "me")
    said = text(sound(app.run()))
    assert not app.error and "mine.safetensors" in said and "Nobody here has the pictures" in said
    assert "goldfish" in said
    # Nothing is held against a truth that nobody has.
    assert not any(word in said for word in ("Truth", "labels right", "Labels right", "PSNR"))
    if name == "defences":
        assert "Pixels are searched for below" in said and "Defended: rebuilt, read as" in said
    solving[0] = 1000.0
    assert "mine.safetensors" not in text(sound(app.button(key="gradient-remove").click().run()))


def test_labels_that_repeat_are_beyond_column_minimum_and_the_truth_is_hidden_on_request():
    app = visit("labels", batch_size="4", repeats="2", draw="3")
    said = text(app)
    assert "**4 pictures of 2 classes**" in said
    assert "Here **2 of 4** of these rows are classes of the batch, which holds 2 classes." in said
    columns = said.split("<tfoot>")[1].split("</tfoot>")[0]
    assert columns.startswith("<tr><td>Right</td><td>4</td><td>4 of 4</td><td>2 of 4</td>")  # truth, auto, minimum
    assert "100 % sure" in said
    said = text(sound(app.toggle(key="truth").set_value(False).run()))
    assert "of these rows" not in said and "Truth" not in said and "In the batch:" not in said
    assert "Hidden picture of the batch" in said


def test_the_batch_is_found_and_marked_after_it_was_revealed_and_shuffling_draws_another():
    app = visit("batch", draw="1")
    assert "pictures found" not in text(app) and "✓" not in text(app)
    sound(app.toggle(key="reveal").set_value(True).run())
    assert "<dt>pictures found</dt><dd>8 of 8</dd>" in text(app)
    assert text(app).count("✓") == 8 and "the client’s own" in text(app)
    before = [item.value for item in app.markdown if "gi-strip" in item.value]
    app.button(key="shuffle").click().run()
    assert app.slider(key="draw").value != 1
    assert [item.value for item in app.markdown if "gi-strip" in item.value] != before


def test_clipping_costs_length_only_and_strong_noise_leaves_nothing():
    said = text(visit("defences", batch_size="2", clip="0.1"))
    assert "<tr><td>Defended</td><td>2 of 2</td><td>2 of 2</td>" in said
    assert "<dt>cosine</dt><dd>1.0000</dd>" in said and "clipped to a norm of 0.1" in said
    said = text(visit("defences", batch_size="2", clip="0.1", noise="1"))
    assert "<tr><td>No defence</td><td>2 of 2</td><td>2 of 2</td>" in said
    assert "<tr><td>Defended</td><td>2 of 2</td>" not in said
    assert "<dt>cosine</dt><dd>0.00" in said


def test_defences_link_to_the_recorded_run_behind_one_beside_its_undefended_twin():
    links = [item.proto for item in visit("defences", batch_size="2").get("page_link")]
    pairs = showcase.defended()
    assert [link.query_string for link in links] == [f"run={one.name}&beside={other.name}" for one, other in pairs]
    for link, (one, other) in zip(links, pairs, strict=True):
        assert one.pictures == other.pictures and not one.defences
        assert all(parse(text).note in link.label for text in other.defences)
    assert ("four", "noise") in [(one.name, other.name) for one, other in pairs]


def test_numbers_are_short():
    said = {0.8571: "0.86", 9.13e-7: "9.1e-7", 2.011e6: "2e6", 1e-10: "1e-10", math.inf: "inf"}
    assert {value: markup.number(value) for value in said} == said
