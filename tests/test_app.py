"""The page, run headless: choosing, the preview, a real run from the button to the numbers, and what can go wrong."""

from __future__ import annotations

import io
import re
import threading
import zipfile
from collections.abc import Callable
from typing import Any

import headless
import numpy as np
import pytest
from conftest import encoded
from headless import PATIENCE, address, group, press, sound, text, wait
from PIL import Image
from streamlit.testing.v1 import AppTest

from gradinv import jobs, pace
from gradinv.config import AttackConfig
from gradinv.jobs import Handle, Status, manager
from gradinv.recording.replay import Recording
from gradinv.recording.stores import MemoryStore
from gradinv.sources import Credit, gallery, search
from gradinv.types import GradinvError
from gradinv.web.parts import inversion, markup, pick, settings, shared, uploads
from gradinv.web.parts.pick import FIRST
from gradinv.web.run import ended, facts

pytestmark = pytest.mark.usefixtures("own_server")

TINY = {"model": "resnet18-tiny", "seeds": "1", "iterations": "1"}


def visit(**given: str) -> AppTest:
    """Open the page at an address, as a new visitor."""
    return headless.visit(**(given if "job" in given else {**TINY, **given}))


def start(**given: str) -> AppTest:
    """Open the page and press its button."""
    return sound(visit(**given).button(key="start").click().run())


def board(app: AppTest) -> str:
    """The markup of the pictures that a run shows."""
    return next(item.value for item in app.markdown if "gi-board" in item.value)


def command(app: AppTest) -> str:
    """The command line that does the same."""
    return next(item.value for item in app.code if item.value.startswith("gradinv invert"))


def recorded(app: AppTest) -> Recording:
    """What the page's run has recorded."""
    return Recording.open(manager().state(address(app)["job"]).update.store)


def test_the_page_opens_ready_to_start():
    app = visit()
    assert not app.error and not app.warning
    assert [item.picture.key for item in app.session_state.batch] == list(FIRST)
    assert "4 of 4 labels read from the gradient alone" in text(app)
    assert "the network with all its weights" in text(app)
    assert "**4 pictures** of 64 px · resnet18-tiny · 1 seed × 1 iteration" in text(app)
    assert not app.button(key="start").disabled
    # Author, licence and that it was cropped stand at every picture.
    cards = [item.value for item in app.markdown if 'class="gi-card"' in item.value]
    assert len(cards) == 4
    assert all("https://creativecommons.org/" in card and ", cropped" in card for card in cards)
    assert "Kevin Pluck</a>" in cards[2] and "CC BY 2.0</a>" in cards[2]


def test_picking_in_the_gallery_changes_the_batch_and_the_address():
    app = visit(pictures="goldfish")
    grid = group(app, "gallery_grid")
    assert grid.value == ["goldfish"]
    sound(grid.set_value(["goldfish", "bison"]).run())
    assert address(app)["pictures"] == "goldfish.bison"
    assert "2 of 2 labels" in text(app)
    press(app, "Remove")
    assert address(app)["pictures"] == "bison"
    # A search keeps what was picked.
    app.text_input(key="gallery_search").set_value("king penguin").run()
    grid = group(app, "gallery_grid")
    assert len(grid.options) == 1
    grid.set_value(["penguin"]).run()
    assert address(app)["pictures"] == "bison.penguin"
    app.text_input(key="gallery_search").set_value("submarine").run()
    assert "the ImageNet folder, the public sample set or an upload." in app.info[0].value


def test_everyday_names_find_pictures():
    everyday = {
        "cat": {"tabby", "chelsea", "lion"},
        "Birds": {"goose", "penguin"},
        "monkey": {"chimpanzee", "orangutan"},
        "food": {"pizza"},
        "insect": {"bee", "mantis", "dragonfly"},
    }
    pictures = gallery(shared.model("resnet18-tiny"))
    assert {word: {picture.key for picture in search(pictures, word)} for word in everyday} == everyday


def test_the_command_line_that_does_the_same_is_shown():
    app = visit(pictures="goldfish.tree-frog", seeds="3", set_stages="0.5, 0.5", set_box="false")
    expected = "gradinv invert goldfish tree-frog --model resnet18-tiny --preset demo"
    assert command(app) == f"{expected} --seeds 3 --iterations 1 --no-projection --stages 0.5,0.5"
    assert "command" not in text(visit(pictures=""))


def test_how_long_a_run_takes_is_told_before_the_first_and_follows_what_is_measured(monkeypatch):
    monkeypatch.setattr(pace, "probe", lambda model: 0.1)
    app = visit(pictures="goldfish", preset="matching", seeds="2", iterations="1000")
    assert "2 seeds × 1,000 iterations · about 2 min" in text(app)  # 0.7 of the probe for each
    network, config = shared.model("resnet18-tiny"), AttackConfig.preset("matching", seeds=2, iterations=1000)
    for _ in range(2):
        pace.measured(network, config, 1, 4 * pace.estimate(network, config, 1))
    assert "about 2 min" not in text(visit(pictures="goldfish", preset="matching", seeds="2", iterations="1000"))


def test_a_run_has_the_chosen_size_and_leads_back_to_it():
    app = visit(pictures="goldfish", size="128")
    assert "**1 picture** of 128 px" in text(app) and "--image-size 128" in command(app)
    app = wait(start(pictures="goldfish", size="96", preset="matching"))
    assert "1 picture of 96 px" in text(app)
    assert recorded(app).run["model"]["image_size"] == 96 and recorded(app).images("consensus").shape[-1] == 96
    other = press(visit(job=address(app)["job"]), "New run")
    assert address(other)["size"] == "96" and "of 96 px" in text(other)


def test_a_random_draw_has_the_size_that_was_asked_for():
    app = visit()
    app.number_input(key="draw_size").set_value(3).run()
    press(app, "Draw at random")
    assert len(app.session_state.batch) == 3
    app.number_input(key="draw_size").set_value(100).run()
    press(app, "Draw at random")
    assert "There are only 23 pictures to draw 100 from" in text(app)
    assert len(app.session_state.batch) == 3


def test_a_class_that_the_model_lacks_is_named_and_can_be_removed():
    app = visit(pictures="goldfish.tiger")
    assert "does not know the class of the gallery's tiger" in text(app)
    assert app.button(key="start").disabled
    press(app, "Remove what cannot be used")
    assert not app.button(key="start").disabled


def test_repeated_classes_are_counted_or_warned_of():
    app = visit(pictures="tabby.chelsea")
    assert "2 of 2 labels read" in text(app) and "100 % sure of them" in text(app)
    assert "Some pictures share a class" not in text(app)
    app = visit(pictures="tabby.chelsea", preset="paper")
    assert "Some pictures share a class" in text(app)
    assert "1 of 2 labels read" in text(app) and "Read by column-minimum" in text(app)


def test_hostile_addresses_do_no_harm():
    app = visit(pictures="../../etc.<script>", model="nothing", seeds="-1", iterations="many", bn="'", preset="x")
    assert "Choose at least one picture." in text(app) and app.button(key="start").disabled


def test_numbers_in_the_address_that_no_setting_takes_are_dropped_and_said():
    app = visit(model="resnet50-tiny", seeds="1e999", iterations="9" * 400)
    assert not app.error
    (said,) = (item.value for item in app.warning)  # several are a list
    assert "- The address asks for seeds=1e999, but" in said
    assert f"- The address asks for iterations={'9' * 40}…, but" in said
    assert "seeds" not in app.query_params and address(app)["model"] == "resnet50-tiny"


def test_every_setting_is_read_from_the_address():
    app = visit(
        set_match="l2", set_tv="0.3", set_stages="0.5, 0.5", set_box="false", set_seed="5", bn="none", seeds="2"
    )
    assert "None: the attack does without." in text(app) and "2 seeds × 1 iteration" in text(app)
    shown = (
        app.selectbox(key="set_match").value,
        app.number_input(key="set_tv").value,
        app.toggle(key="set_projection").value,
    )
    assert shown == ("l2", 0.3, False)
    assert app.text_input(key="set_stages").value == "0.5, 0.5" and app.number_input(key="set_seed").value == 5


def test_a_preset_brings_its_own_settings():
    app = visit(seeds="3")
    group(app, "preset").set_value("paper").run()
    sound(app)
    assert app.number_input(key="seeds").value == 8
    assert app.number_input(key="iterations").value == 20_000
    assert app.selectbox(key="set_match").value == "l2"
    labels = [app.number_input(key=f"set_{name}").label for name in ("bn_weight", "tv", "tv_chroma", "learning_rate")]
    assert labels == ["BN weight", "TV", "TV chroma", "Learning rate"]
    # What cannot be is one sentence.
    sound(app.text_input(key="set_stages").set_value("half").run())
    assert "Numbers separated by commas are expected" in text(app) and app.button(key="start").disabled
    app.text_input(key="set_stages").set_value("0.5, 0.4").run()
    assert "sum to 1" in text(app)


def test_more_seeds_than_memory_are_refused_before_the_start(monkeypatch):
    monkeypatch.setattr("gradinv.attack.memory.estimate_memory", lambda *_: 10**15)
    app = visit(seeds="9")
    assert "take fewer seeds or a smaller batch" in text(app)
    assert app.button(key="start").disabled


def test_a_model_that_needs_a_download_says_so_and_a_failed_one_is_one_sentence(monkeypatch):
    def fail(name: str) -> None:
        raise GradinvError("The weights of resnet50 could not be downloaded; take resnet50-tiny.")

    app = visit(model="resnet50")
    assert "98 MB" in text(app)
    labels = [button.label for button in app.button]
    assert "Load resnet50" in labels and "Rebuild the pictures" not in labels
    monkeypatch.setattr(shared, "load_model", fail)
    press(app, "Load resnet50")
    assert "could not be downloaded" in app.error[0].value


def test_an_unexpected_error_is_one_sentence_without_a_traceback(monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a secret of the server")

    monkeypatch.setattr(pick, "gallery", fail)
    app = visit()
    assert app.error[0].value == "This page failed unexpectedly (ZeroDivisionError); the server's log says more."


def test_a_run_from_the_button_to_the_numbers():
    app = start(pictures="goldfish.tabby")
    assert "job" in app.query_params
    app = wait(app)
    said = text(app)
    assert "**Finished** after 1 of 1 iteration" in said
    boards = [item.value for item in app.markdown if "gi-board" in item.value]
    assert len(boards) == 1
    for alt in ("Original: goldfish", "Original: tabby", "Reconstruction of goldfish", "Reconstruction of tabby"):
        assert boards[0].count(f'alt="{alt}"') == 1
    # A single seed is its own consensus: neither is said, nor shown twice. Below it, what a layer holds of each.
    assert boards[0].count("<img") == 6 and boards[0].count('alt="What ') == 2
    assert "consensus" not in said and "Seed" not in boards[0]
    assert "2 of 2 right" in said and "constant colour" in said
    # No picture's PSNR stands without its baseline.
    assert len(re.findall(r"<small>[\d.]+\u00a0dB \(constant\u00a0[\d.]+\)</small>", boards[0])) == 2
    assert len(app.get("download_button")) == 4
    assert len(app.get("plotly_chart")) == 2

    # On paper it is one page with pictures, numbers, settings and credits.
    state = manager().state(address(app)["job"])
    page = ended._summary(facts.Run.of(state), state.update, recorded(app), [("in all", "<1 s>")]).decode()
    assert page.count("<img ") == 2 * 2 and page.count('src="data:image/webp;base64,') == 4
    assert "finished: 1 of 1 iterations" in page and "&lt;1 s&gt;" in page and "<1 s>" not in page
    assert "<dt>boundary</dt><dd>auto</dd>" in page and "2 of 2 right" in page
    assert "creativecommons.org" in page and not re.search(r'(src|href)="(?!data:image|https://)', page)

    # Another tab with the link sees the same, and a new run starts from the same settings and pictures.
    other = visit(job=address(app)["job"])
    assert [item.value for item in other.markdown if "gi-board" in item.value] == boards
    press(other, "New run")
    assert "job" not in other.query_params
    assert address(other)["pictures"] == "goldfish.tabby"
    assert "**2 pictures** of 64 px · resnet18-tiny · 1 seed × 1 iteration" in text(other)
    # The address has them too, for whoever gets it; what is so by default it leaves out.
    assert (address(other)["iterations"], address(other)["seeds"]) == ("1", "1")
    assert settings.MODEL == "resnet18-tiny" and "model" not in other.query_params


def test_a_finished_run_is_replayed_and_presented_and_its_originals_hidden_until_the_reveal():
    app = wait(start(pictures="goldfish", preset="matching", iterations="2"))
    last = board(app)
    sound(app.select_slider[0].set_value(0).run())  # an earlier step
    assert board(app) != last
    sound(app.toggle(key="hide").set_value(True).run())
    assert "Hidden original" in board(app) and "gi-right" not in board(app)
    assert "goldfish" not in text(app)
    sound(app.toggle(key="hide").set_value(False).run())
    sound(app.button(key="present").click().run())
    assert address(app)["present"] == "1"
    assert "goldfish" not in text(app) and "gi-presenting" in text(app)
    assert not app.get("download_button") and not app.get("plotly_chart") and not app.toggle
    app.button(key="reveal").click().run()
    assert 'alt="Original: goldfish"' in text(app)
    # The link leads a class to the same, with everything hidden again.
    assert "goldfish" not in text(visit(job=address(app)["job"], present="1"))
    sound(app.button(key="present").click().run())
    assert "present" not in app.query_params and len(app.get("download_button")) == 4


def test_the_seeds_of_a_single_picture_stand_side_by_side():
    app = wait(start(pictures="goldfish", seeds="2"))
    top, seeds = board(app).split('<div class="gi-board ')[1:]
    assert top.startswith("gi-n1") and top.count("<img") == 3
    assert seeds.startswith("gi-n2") and seeds.count("<img") == 2


class Blocking:
    """Work that lasts until it is stopped."""

    cost = 1

    def check(self) -> None:
        pass

    def __call__(self, handle: Handle) -> Status:
        handle.stop.wait(PATIENCE)
        return "stopped"


def test_a_run_waits_its_turn_of_which_a_visitor_has_one_and_can_leave():
    blocking = manager().submit(Blocking())
    app = start(pictures="goldfish")
    job = address(app)["job"]
    assert "Place 1 in the queue" in text(app) and "starts by itself" in text(app)
    press(app, "New run")
    assert "Your last run has not ended yet" in text(app)
    assert "start" not in [button.key for button in app.button]
    press(app, "Back to it")
    assert address(app)["job"] == job and "Place 1 in the queue" in text(app)
    # Others have theirs.
    other = start(pictures="goldfish")
    assert address(other)["job"] != job and "Place 2 in the queue" in text(other)
    press(app, "Leave the queue")
    assert "cancelled before it began" in text(app.run())
    for one in (address(other)["job"], blocking):
        manager().cancel(one)


def test_stop_keeps_what_there_is(monkeypatch):
    begun = threading.Event()
    take = inversion.Inversion.pictures

    def noticed(self: inversion.Inversion, snapshot: object) -> inversion.Pictures:
        begun.set()
        return take(self, snapshot)  # type: ignore[arg-type]

    monkeypatch.setattr(inversion.Inversion, "pictures", noticed)
    app = start(pictures="goldfish", iterations="100000")
    assert begun.wait(PATIENCE)
    app = wait(app, lambda state: isinstance(state.update, inversion.Progress))
    assert "of 100,000" in text(app)
    press(app, "Stop and keep the result")
    app = wait(app)
    assert "**Stopped** after" in text(app)
    assert len(app.get("download_button")) == 4

    # And it goes on from there, as a run of its own.
    before, stopped = address(app)["job"], manager().state(address(app)["job"])
    assert stopped is not None
    app.button(key="go-on").click().run()
    sound(app)
    assert address(app)["job"] != before
    going = manager().state(address(app)["job"])
    assert going is not None and going.work.before is stopped.update.kept  # type: ignore[attr-defined]
    app = wait(app, lambda state: isinstance(state.update, inversion.Progress))
    assert manager().state(address(app)["job"]).update.step >= stopped.update.step  # type: ignore[union-attr]
    manager().cancel(address(app)["job"])
    wait(app)


def test_the_same_batch_runs_again_behind_a_defence():
    app = wait(start(pictures="goldfish.tabby", preset="matching"))
    before = address(app)["job"]
    app.select_slider(key="again-noise").set_value("1e-2").run()
    press(app, "Start this run")
    assert address(app)["job"] != before
    app = wait(app)
    assert "The client’s defence: Gaussian noise of standard deviation 0.01" in text(app)
    assert recorded(app).run["client"]["defences"] == ["noise:1e-2"]
    # Its settings lead back to it.
    other = press(visit(job=address(app)["job"]), "New run")
    assert address(other)["noise"] == "1e-2" and other.select_slider(key="noise").value == "1e-2"


def test_a_finished_run_runs_again_with_a_learned_prior():
    app = wait(start(pictures="goldfish.tabby", iterations="2"))
    before = address(app)["job"]
    app = wait(press(app, "The same, with a learned prior"))
    assert address(app)["job"] != before and "with-prior" not in {button.key for button in app.button}
    assert recorded(app).run["config"]["start"] == "decoder" and "Learned prior" in text(app)


def test_a_run_that_cannot_follow_leaves_the_finished_one_on_the_page(monkeypatch):
    app = wait(start(pictures="goldfish.tabby", iterations="2"))
    before = address(app)["job"]

    def refused(*_: Any) -> str:
        raise GradinvError("The queue is full; try again later.")

    monkeypatch.setattr(jobs.JobManager, "submit", refused)
    app = press(app, "The same, with a learned prior")
    assert [error.value for error in app.error] == ["The queue is full; try again later."]
    assert address(app)["job"] == before and "Finished" in text(app)


def test_what_a_client_shares_behind_a_defence_is_what_the_server_reads():
    assert "2 of 2 labels" in text(visit(pictures="goldfish.tabby"))
    app = visit(pictures="goldfish.tabby", noise="1", preset="matching")
    assert "Gaussian noise of standard deviation 1 is added" in text(app)
    assert "2 of 2 labels" not in text(app)
    assert "--defence noise:1 " in command(app)


def test_each_layer_that_is_solved_shows_before_there_is_a_picture(monkeypatch):
    held, reached = threading.Event(), threading.Event()
    publish = jobs._Job.publish

    def slowly(self: jobs._Job, update: Any, size: int, remaining: float | None = None) -> None:
        publish(self, update, size, remaining)
        if isinstance(update, inversion.Solving) and len(update.layers) == 2:
            reached.set()
            held.wait(PATIENCE)

    monkeypatch.setattr(jobs._Job, "publish", slowly)
    app = start(pictures="goldfish.tabby", iterations="2")
    try:
        assert reached.wait(PATIENCE)
        sound(app.run())
        said = text(app)
        assert "Layers: 2 of 16 solved" in said and said.count('class="gi-exact"') == 2
        # The second from the top, of a picture of 64 px.
        assert "Solved: layer4.0, 2,048 numbers of each picture (512 × 2 × 2) known exactly." in said
        assert "Reconstruction of" not in said and "nan" not in said
    finally:
        held.set()
    app = wait(app)
    said = text(app)
    assert "Solved without a search in " in said and "Pixels are searched for below " in said
    run = recorded(app).run
    assert f"searched for below {run['boundary']} only" in said
    assert said.count('class="gi-exact"') + said.count('class="gi-near"') == len(run["recovered"]["nodes"]) > 4


def test_a_failed_run_says_why_and_the_next_one_works(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise GradinvError("The gradient of fc.weight holds values that are not finite.")

    with monkeypatch.context() as patch:
        patch.setattr(inversion, "invert", fail)
        app = wait(start(pictures="goldfish", preset="matching"))
    assert [item.value for item in app.error] == ["The gradient of fc.weight holds values that are not finite."]
    press(app, "New run")
    app.button(key="start").click().run()
    assert "**Finished**" in text(wait(app))


def test_a_run_that_is_not_kept_is_said_so_and_one_beyond_the_servers_limit_refused(monkeypatch):
    monkeypatch.setenv("GRADINV_MAX_COST", "4096")
    app = visit(job="nobody-knows-this")
    assert "not kept here any more" in text(app)
    press(app, "Start a new run")
    assert "job" not in app.query_params and "The client’s pictures" in text(app)
    app = start(pictures="goldfish.bison")
    assert "2.0 times as large as this server accepts" in app.error[0].value
    assert "job" not in app.query_params
    assert address(app)["pictures"] == "goldfish.bison"


def picture_file(kind: str = "PNG") -> bytes:
    levels = np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    return encoded(Image.fromarray(levels), kind)


def source(app: AppTest, name: str) -> AppTest:
    return group(app, "source").set_value(name).run()


def test_uploads_are_classified_by_the_model_or_the_visitor_and_bad_ones_are_one_sentence():
    app = source(visit(pictures="goldfish"), "upload")
    files = {"mine.png": picture_file(), "text.png": b"not a picture", "no.png": b""}
    sound(app.file_uploader[0].set_value([(name, data, "image/png") for name, data in files.items()]).run())
    said = text(app)
    assert "text.png is not a picture" in said and "no.png is an empty file" in said
    # Where they were brought, not above the batch.
    assert [item.type for item in app.main if item.type in ("file_uploader", "warning")] == ["file_uploader", "warning"]
    assert [item.source for item in app.session_state.batch] == ["gallery", "upload"]
    assert ">predicted: " in said
    sound(next(box for box in app.selectbox if box.label == "Class of mine").set_value(7).run())
    assert "**2 pictures**" in text(app) and ">predicted: " not in text(app)
    assert address(app)["pictures"] == "goldfish"


def test_an_imagenet_folder_is_searched_by_class_name(tmp_path, monkeypatch):
    for wnid in ("n01443537", "n02123045", "n00000001"):
        (tmp_path / wnid).mkdir()
        for number in range(2):
            (tmp_path / wnid / f"{wnid}_{number}.JPEG").write_bytes(picture_file("JPEG"))
    (tmp_path / "n02123045" / "damaged.JPEG").write_bytes(b"nothing")
    assert "ImageNet folder" not in group(visit(), "source").options
    monkeypatch.setenv("GRADINV_IMAGENET", str(tmp_path))
    app = source(visit(pictures=""), "folder")
    sound(app)
    assert app.selectbox(key="folder_class").options == ["goldfish (n01443537)", "tabby (n02123045)"]
    app.text_input(key="folder_search").set_value("tabby").run()
    grid = group(app, "folder_grid")
    assert len(grid.options) == 2 and "damaged.JPEG is not a picture" in text(app)
    sound(grid.set_value(["n02123045/n02123045_1.JPEG"]).run())
    assert "1 of 1 labels" in text(app)
    press(app, "Draw at random")
    assert len(app.session_state.batch) == 4


def test_what_users_write_is_escaped():
    tile = markup.Tile("data:,", '"><script>', "<b>bold</b>")
    shown = markup.board([markup.Row("<i>", [tile])])
    assert "<script" not in shown and "<b>bold" not in shown and "<i>" not in shown
    assert "&lt;b&gt;bold" in shown


def test_durations_are_said_as_people_do():
    said = {None: "–", 0.4: "0 s", 59.6: "1 min 00 s", 3599: "59 min 59 s", 7320: "2 h 02 min"}
    assert {seconds: markup.duration(seconds) for seconds in said} == said


def test_wrongly_restored_labels_stand_beside_what_they_should_have_been():
    shown = markup.labels(["a", "b", "a"], ["a", "c", "b"], "llg", 0.256)
    assert "Read by llg, which is 26 % sure of them." in shown
    assert shown.count("restored correctly:") == 2 and shown.count("restored wrongly:") == 1
    assert "2 of 3 labels" in shown
    assert "<td>a</td><td><span" in shown.split("restored wrongly:")[0]


def test_a_large_upload_is_kept_small():
    assert uploads._shrunk(Image.new("RGB", (1024, 2048))).size == (288, 576)
    assert uploads._shrunk(Image.new("RGB", (100, 300))).size == (100, 300)


def test_an_error_in_a_tick_is_one_sentence_too(monkeypatch):
    def fail(*_: object) -> str:
        raise ZeroDivisionError

    blocking = manager().submit(Blocking())
    monkeypatch.setattr(markup, "board", fail)
    app = start(pictures="goldfish")
    assert app.error[0].value == "This page failed unexpectedly (ZeroDivisionError); the server's log says more."
    manager().cancel(blocking)


def test_the_archive_carries_the_credits_of_the_originals():
    store = MemoryStore({"run.json": b"{}"})
    credit = Credit("Ada", "CC BY 2.0", "https://example.org/licence", "https://example.org/picture", "cropped")
    known = facts.Facts("resnet18-tiny", 64, "demo", (), (), (), ("lion", "mine"), (credit, None), ())
    with zipfile.ZipFile(io.BytesIO(ended._archive(store, known))) as archive:
        assert archive.namelist() == ["README.txt", "images/CREDITS.txt", "run.json"]
        credits = archive.read("images/CREDITS.txt").decode()
    assert credits.count("\n") == 1 and credits.startswith("original_00.png: lion, Ada, CC BY 2.0, cropped ")
    assert credit.licence_url in credits and credit.source in credits


def test_others_who_have_the_link_watch_and_neither_stop_a_run_nor_start_it_again():
    app = start(pictures="goldfish", iterations="100000")
    job = address(app)["job"]
    own, others = ({button.key for button in one.button} for one in (app.run(), visit(job=job)))
    assert {"stop", "again"} <= own and not {"stop", "again"} & others
    assert "somebody else has started" in text(visit(job=job))
    manager().cancel(job)
    own, others = ({button.key for button in one.button} for one in (wait(app), visit(job=job)))
    assert "again" in own and not {"again", "go-on"} & others


def test_a_visitors_own_pictures_are_kept_in_the_visit_only():
    asked: list[str] = []

    def cache(scope: str = "global", **_: object) -> Callable[..., Any]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            def find(*given: Any) -> Any:
                asked.append(scope)
                return function(*given)

            return find

        return decorate

    double = shared.kept(cache, lambda source, _: source == "upload")(lambda source, value: 2 * value)
    assert (double("gallery", 2), double("upload", 3)) == (4, 6)
    assert asked == ["global", "session"]
