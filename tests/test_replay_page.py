"""The page Replay: the bundled runs, what the player is given, the player itself in Chromium, and hostile addresses."""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from headless import PATIENCE, address, opened
from PIL import Image
from streamlit.testing.v1 import AppTest
from torch import Tensor

from gradinv.attack.inversion import invert
from gradinv.client import observe
from gradinv.config import AttackConfig
from gradinv.images import from_grid
from gradinv.models import Model, tiny_classes
from gradinv.paths import ASSETS
from gradinv.recording.recorder import Recorder
from gradinv.recording.replay import Recording
from gradinv.recording.stores import DirectoryStore, MemoryStore
from gradinv.sources import Credit, find, gallery
from gradinv.types import GradinvError
from gradinv.web.pages import replay
from gradinv.web.parts import markup, showcase

BUNDLED = sorted((ASSETS / "runs").glob("*.zip"))
CONFIG = AttackConfig(seeds=2, iterations=4, group=0.0, registration="lazy", meetings=(0.5,))
PICTURES = ("goldfish", "tabby", "lion")
RECORDED: dict[str, Recording] = {}  # by name, once for all tests


@pytest.fixture(scope="module")
def recipe():
    """assets/runs/record.py."""
    spec = importlib.util.spec_from_file_location("record", ASSETS / "runs" / "record.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["record"] = module  # a dataclass looks its module up there
    spec.loader.exec_module(module)
    return module


def record(folder: Path, model: Model, batch: tuple[Tensor, Tensor], config: AttackConfig = CONFIG) -> Recording:
    """A run of the small network, in a folder."""
    pixels, labels = batch
    observation = observe(model, pixels, labels)
    recorder = Recorder(
        DirectoryStore(folder),
        config=config,
        model=model,
        observation=observation,
        originals=pixels,
        labels=labels.tolist(),
    )
    for _ in recorder.follow(invert(model, observation, config, every=1)):
        pass
    return Recording.open(folder)


@pytest.fixture
def installed(recipe, tmp_path, tmp_path_factory, monkeypatch, small_model, small_batch):
    """Two runs of the small network in place of the bundled ones: `four`, and `other` of one seed, twice as long."""
    configs = {"four": CONFIG, "other": AttackConfig(seeds=1, iterations=8, group=0.0)}
    target = tmp_path / "assets" / "runs"
    target.mkdir(parents=True)
    found = {}
    for name, config in configs.items():
        if name not in RECORDED:
            RECORDED[name] = record(tmp_path_factory.mktemp("recorded") / name, small_model, small_batch, config)
        shutil.copytree(RECORDED[name].store.path, tmp_path / name)
        found[name] = RECORDED[name]
        told = recipe.about(recipe.Run("four", f"The run <{name}>", "A story & more.", PICTURES))
        files = {file: found[name].store.read(file) for file in found[name].store.names()}
        told = {**told, "place": list(configs).index(name)}
        packed = MemoryStore({**files, "about.json": json.dumps(told).encode()}).zip()
        (target / f"{name}.zip").write_bytes(packed)
    caches = (showcase.library, replay.packed, replay._card, showcase._frames)
    monkeypatch.setattr(showcase, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(recipe, "HERE", target)
    for cached in caches:
        cached.cache_clear()
    yield found
    for cached in caches:
        cached.cache_clear()


def unpacked(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """What the player reads: the header, and all pictures."""
    length = int.from_bytes(data[:4], "little")
    header, rest = json.loads(data[4 : 4 + length]), data[4 + length :]
    pictures = []
    for run in header["runs"]:
        for size in [*(size for size, _ in run["frames"]), *run["originals"]]:
            pictures.append(rest[:size])
            rest = rest[size:]
    assert rest == b""
    return header, pictures


# --- the bundled runs


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_bundled_run_is_whole_and_credited(path, recipe):
    assert path.stat().st_size < recipe.LIMIT
    recording = Recording.open(path)
    run = recording.run
    assert run["status"] == "done" and run["iterations"]["done"] == run["iterations"]["total"]
    assert not [name for name in recording.store.names() if name.endswith(".safetensors")]
    assert len(recording.steps) >= 50 and recording.steps[-1] == run["iterations"]["total"]
    for step in recording.steps:
        assert recording.snapshot(step).seeds.shape[0] == run["config"]["seeds"]
    measured = run["metrics"]
    assert len(measured["consensus"]["psnr"]) == len(run["labels"]["true"])
    assert all(value is not None for value in measured["baseline"]["psnr"] + measured["consensus"]["ssim"])

    own = next(item for item in recipe.RUNS if item.name == path.stem)
    bundled = showcase.library()[path.stem]
    assert json.loads(recording.store.read("about.json")) == recipe.about(own)
    assert bundled.command == "gradinv " + " ".join(own.arguments) and run["model"]["name"] == own.model
    assert len(bundled.pictures) == len(run["labels"]["true"]) == len(own.pictures)
    with (ASSETS / "samples" / "samples.csv").open(newline="", encoding="utf-8") as file:
        tiny = {row["file"]: row["tiny_wnid"] for row in csv.DictReader(file)}
    for (title, credit), name, label in zip(bundled.pictures, own.pictures, run["labels"]["true"], strict=True):
        picture = find(gallery(), name)
        assert (title, credit) == (picture.title, picture.credit) and credit.author and credit.licence
        assert tiny_classes()[label].wnid == tiny[f"{name}.jpg"]


def test_first_page_has_its_run_and_the_pairs_can_be_recorded(recipe):
    names = [run.name for run in recipe.RUNS]
    assert {name for pair in showcase.PAIRS.values() for name in pair} <= set(names)
    assert list(showcase.library()) == [name for name in names if name in showcase.library()]
    frames, _, _ = showcase._frames()
    assert len(frames) == showcase._MOVING


# --- recording them


def test_recipe_records_packs_and_goes_on(recipe, installed, tmp_path, monkeypatch, small_model, small_batch, capsys):
    called: list[list[str]] = []
    ends = [1, 0]

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        called.append(command)
        folder = Path(command[-1])
        if code := ends.pop(0):  # interrupted: what was recorded stays
            folder.mkdir(parents=True)
            state = {**installed["four"].run, "status": "stopped"}
            (folder / "run.json").write_text(json.dumps(state))
        else:
            record(folder, small_model, small_batch)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(recipe.subprocess, "run", run)
    own = recipe.RUNS[1]
    work, target = tmp_path / "work", recipe.HERE / f"{own.name}.zip"
    with pytest.raises(SystemExit, match="one is not done; call this again"):
        recipe.record(own, work)
    recipe.record(own, work)
    folder = str(work / own.name)
    begun, resumed = (command[1:] for command in called)
    assert begun == ["-m", "gradinv", *own.arguments, "--out", folder]
    assert resumed == ["-m", "gradinv", "invert", "--resume", folder]
    assert json.loads(MemoryStore.unpack(target).read("about.json"))["title"] == own.title
    listed = capsys.readouterr().out

    packed = target.read_bytes()
    recipe.record(own, work)  # done: nothing is called, nothing changes
    assert len(called) == 2 and target.read_bytes() == packed and capsys.readouterr().out == listed

    told = recipe.Run(own.name, "A better title", own.story, own.pictures, own.options)
    monkeypatch.setattr(recipe, "RUNS", (told,))
    recipe.record(told, work)
    assert json.loads(MemoryStore.unpack(target).read("about.json"))["title"] == "A better title"
    with pytest.raises(SystemExit, match="made by another command"):
        other = recipe.Run(own.name, own.title, own.story, own.pictures, ("--seeds", "3"))
        monkeypatch.setattr(recipe, "RUNS", (other,))
        recipe.record(other, work)


def test_recipe_refuses_what_is_too_large(recipe, installed, tmp_path, monkeypatch):
    own = recipe.RUNS[1]
    shutil.copytree(tmp_path / "four", tmp_path / "work" / own.name)
    monkeypatch.setattr(recipe, "LIMIT", 1000)
    with pytest.raises(SystemExit, match="more than 1,000"):
        recipe.record(own, tmp_path / "work")
    assert not (recipe.HERE / f"{own.name}.zip").exists()


# --- reading a zip


def test_damaged_zip_is_one_sentence(installed, tmp_path, monkeypatch):
    path = tmp_path / "assets" / "runs" / "four.zip"
    data = path.read_bytes()

    def refused() -> None:
        with pytest.raises(GradinvError, match=r"four\.zip.*\.$"):
            Recording.open(path)

    for damaged in (b"no zip", data[: len(data) // 2], data.replace(b"WEBP", b"WEBQ")):
        path.write_bytes(damaged)
        refused()
    path.write_bytes(data)
    with monkeypatch.context() as patch:
        patch.setattr("gradinv.recording.stores.ZIP_LIMIT", 1000)
        refused()
    path.unlink()
    refused()


# --- what the player is given


def test_player_is_given_the_recorded_pictures(installed, small_batch):
    header, pictures = unpacked(replay.packed("four", "other"))
    four, other = header["runs"]
    own = installed["four"]
    assert pictures[: len(four["frames"])] == [own.frame(step) for step in own.steps]
    assert four["steps"] == own.steps and four["total"] == 4 and other["total"] == 8
    assert {kind for _, kind in four["frames"]} == {"image/webp"} and four["side"] == 8
    originals = pictures[len(four["frames"]) :][: len(four["originals"])]
    for data, pixels in zip(originals, small_batch[0], strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert torch.allclose(from_grid(image, 1)[0, 0], pixels, atol=1 / 255)
    assert four["classes"] == ["class 4", "class 1", "class 2"]
    assert four["restored"] == [own.class_name(own.run["labels"]["restored"][place]) for place in four["order"]]
    assert four["titles"] == list(PICTURES)


def test_player_is_given_the_curves(installed):
    four, other = unpacked(replay.packed("four", "other"))[0]["runs"]
    rows = installed["four"].curves
    assert len(four["psnr"]) == 3 and len(other["psnr"]) == 1  # each seed where there are several, then the consensus
    assert four["psnr"][1] == [row["psnr"] for row in rows if row["seed"] == 1]
    assert four["psnr"][-1] == [row["consensus_psnr"] for row in rows if row["seed"] == 0]
    assert four["meetings"] == [2] and other["meetings"] == []
    assert four["distance"][0] is None  # no gradient is compared before the first step
    last = [row["distance"] for row in rows if row["step"] == 4]
    assert four["distance"][-1] == pytest.approx(sum(last) / 2)
    baseline = installed["four"].run["metrics"]["baseline"]["psnr"]
    assert four["baseline"] == pytest.approx(sum(baseline) / 3)


def test_damaged_description_is_one_sentence(installed, tmp_path):
    path = tmp_path / "assets" / "runs" / "other.zip"
    files = {name: MemoryStore.unpack(path).read(name) for name in MemoryStore.unpack(path).names()}
    path.write_bytes(MemoryStore({**files, "about.json": b'{"title": 1}'}).zip())
    with pytest.raises(GradinvError, match="What is told about the run other is damaged; record it again"):
        showcase.library()


# --- the first page's


def strips() -> list[str]:
    """What the first page's strips say in Markdown."""
    code = "import streamlit as st\nfrom gradinv.web.parts import showcase\nst.session_state.there = showcase.moving()"
    app = AppTest.from_string(code, default_timeout=60).run()
    assert not app.exception
    assert app.session_state.there is bool(app.markdown)
    return [item.value for item in app.markdown]


def picture(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_first_page_moves_and_begins_with_the_last_picture(installed, tmp_path):
    frames, steps, originals = showcase._frames()
    assert len(frames) == len(steps) > 1 and list(steps) == sorted(steps)
    assert {picture(uri).size for uri in (*frames, originals)} == {(3 * 128, 128)}
    recorded = installed["four"]
    last = recorded.snapshot(recorded.steps[-1]).consensus[list(showcase.library()["four"].order)]
    sent = from_grid(picture(frames[-1]).convert("RGB").resize((3 * last.shape[-1], last.shape[-1])), 3)
    assert (sent.flatten() - last[None].flatten()).abs().mean() < 0.05
    shown = re.findall(r"!\[([^\]]+)\]\((data:image/webp;base64,[^)]+)\)", "".join(strips()))
    assert [uri for _, uri in shown] == [frames[-1], originals]
    # It credits what it shows.
    words = strips()[-1]
    for name in PICTURES:
        credit = find(gallery(), name).credit
        assert credit is not None and credit.author in words and credit.licence in words
    restored = installed["four"].run["labels"]["restored"]
    right = sum((Counter(restored) & Counter(installed["four"].run["labels"]["true"])).values())
    assert f"gave away {right} of their 3 classes" in words
    # It does without a recorded run.
    (tmp_path / "assets" / "runs" / "four.zip").unlink()
    showcase.library.cache_clear()
    assert strips() == []


def test_a_name_is_no_markdown():
    credit = Credit("[a](b) *c* $d$ <e>", "CC0", "javascript:f", "https://example.org/a_(b)")
    assert markup.credit_words(credit) == r"[\[a\](b) \*c\* \$d\$ \<e\>](<https://example.org/a_(b)>), CC0"


# --- the page


def open_page(**given: str) -> AppTest:
    page = AppTest.from_string("from gradinv.web.pages import replay\n\nreplay.page()", default_timeout=PATIENCE)
    return opened(page, **given)


def shown(app: AppTest) -> str:
    """The runs that the player shows."""
    (player,) = app.get("bidi_component")
    return str(unpacked(player.proto.bytes)[0]["name"])


def test_page_opens_with_the_first_run_or_those_that_the_address_names(installed):
    app = open_page()
    assert shown(app) == "four" and not app.warning and not app.error
    html = " ".join(item.proto.body for item in app.get("html"))
    assert "Pictures:" in html and all(name in html for name in PICTURES)
    assert "The run &lt;four&gt;" in html and "<four>" not in html
    assert shown(open_page(run="other")) == "other"
    assert shown(open_page(run="four", beside="other", step="4")) == "four other"
    assert shown(open_page(run="four", beside="four")) == "four"


HOSTILE = ("../../x", "", "FOUR", "<script>alert(1)</script>", "four\x00", "x" * 5000)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        *(({"run": name}, "names a recorded run that is not there; it can name four, other.") for name in HOSTILE),
        ({"run": "four", "beside": HOSTILE[0]}, "names a recorded run that is not there"),
        *(
            ({"step": step}, "is not a whole number; the run plays from its start.")
            for step in ("-1", "1e9", "..", "²")
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_in_the_address_is_one_sentence(given, said, installed):
    app = open_page(**given)
    assert shown(app) == "four"
    (warning,) = app.warning
    assert said in warning.value


def test_choice_is_kept_in_the_address(installed):
    app = open_page(run="four", beside="other", step="4")
    app.selectbox(key="replay-beside").set_value(None).run()
    assert shown(app) == "four" and address(app) == {"run": "four"}  # the step was another picture's
    app.selectbox(key="replay-beside").set_value("other").run()
    assert shown(app) == "four other" and address(app) == {"run": "four", "beside": "other"}
    app.button_group(key="replay-run").set_value("other").run()
    assert shown(app) == "other" and address(app) == {"run": "other"}


def test_a_presentation_shows_the_player_alone_until_it_is_left(installed):
    app = open_page(run="four", beside="other")
    next(button for button in app.button if button.label.startswith("Present")).click().run()
    assert address(app) == {"run": "four", "beside": "other", "present": "1"} and shown(app) == "four other"
    assert any('class="gi-presenting"' in item.proto.body for item in app.get("html"))
    assert not app.selectbox and not app.expander and not app.get("button_group")
    (leave,) = app.button
    leave.click().run()
    assert address(app) == {"run": "four", "beside": "other"} and app.selectbox
    assert not any('class="gi-presenting"' in item.proto.body for item in app.get("html"))


def test_page_without_runs_says_so(installed, tmp_path):
    for path in (tmp_path / "assets" / "runs").glob("*.zip"):
        path.unlink()
    (error,) = open_page().error
    assert error.value.startswith("No recorded run is installed")


# --- the player in a browser, without the page around it

HOST = """async ([html, css, js, data]) => {
  const host = document.querySelector('#host'), tree = host.shadowRoot ?? host.attachShadow({mode: 'open'});
  if (!tree.childElementCount) tree.innerHTML = `<style>${css}</style>${html}`;
  window.play ??= (await import(URL.createObjectURL(new Blob([js], {type: 'text/javascript'})))).default;
  const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
  window.leave = play({data: bytes, parentElement: tree});
}"""
FIND = "document.querySelector('#host').shadowRoot.querySelector"
# The visible canvases' pixels, and whether they are those of the frame's last row (the consensus).
PIXELS = """() => [...document.querySelector('#host').shadowRoot.querySelectorAll('canvas')]
  .filter(canvas => canvas.checkVisibility())
  .map(canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data])"""


class Player:
    """The player in a tab of its own at an address, in which it shows runs."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab
        self.requests: list[str] = []
        tab.route(
            "http://player.test/**", lambda route: route.fulfill(body='<div id="host"></div>', content_type="text/html")
        )
        tab.on("request", lambda request: self.requests.append(request.url))

    def open(self, *names: str, query: str = "") -> None:
        self.tab.goto(f"http://player.test/replay{query}")
        self.show(*names)

    def show(self, *names: str) -> None:
        parts = [showcase.part("player", kind) for kind in ("html", "css", "js")]
        self.tab.evaluate(HOST, [*parts, base64.b64encode(replay.packed(*names)).decode()])

    def ask(self, element: str, what: str) -> Any:
        return self.tab.evaluate(f"{FIND}('{element}').{what}")

    def step(self) -> str:
        return str(self.ask(".step", "textContent"))


@pytest.fixture
def player(browser, installed):
    """One for whom nothing moves by itself."""
    context = browser.new_context(reduced_motion="reduce")
    tab, problems = context.new_page(), []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    yield Player(tab)
    context.close()
    assert problems == []


@pytest.mark.browser
def test_player_draws_the_recorded_frames(player, installed):
    player.open("four", query="?step=4")
    player.tab.wait_for_function(f"({PIXELS})()[0].some(value => value)")
    recording = installed["four"]
    snapshot, order = recording.snapshot(4), recording.order()

    def drawn() -> Tensor:
        """The visible tiles (N, 3, S, S) in [0, 1]."""
        return torch.tensor(player.tab.evaluate(PIXELS)).float().reshape(-1, 8, 8, 4)[..., :3].permute(0, 3, 1, 2) / 255

    assert torch.allclose(drawn(), snapshot.consensus[order], atol=3 / 255)
    player.tab.get_by_text("Show the seeds").click()
    assert torch.allclose(drawn(), snapshot.seeds[:, order].flatten(0, 1), atol=3 / 255)
    player.tab.get_by_text("Show the consensus").click()
    assert len(drawn()) == 3


@pytest.mark.browser
def test_player_hides_the_originals_until_they_are_revealed(player):
    player.open("four")
    words = f"{FIND}('.panels').innerText"
    assert not player.tab.get_by_alt_text("Original: goldfish").is_visible()
    assert "class 4" not in player.tab.evaluate(words) and "picture 1" in player.tab.evaluate(words)
    player.tab.get_by_text("Reveal the originals").click()
    assert player.tab.get_by_alt_text("Original: goldfish").is_visible() and "class 4" in player.tab.evaluate(words)
    player.show("four", "other")  # another run keeps what was chosen
    assert player.tab.get_by_alt_text("Original: goldfish").count() == 2
    player.tab.get_by_text("Hide the originals").click()
    assert not player.tab.get_by_alt_text("Original: goldfish").first.is_visible()


@pytest.mark.browser
def test_player_obeys_the_keyboard_and_notes_the_step(player):
    player.open("four", query="?run=four")
    assert player.step() == "Step 4 of 4"  # who wants no motion sees the end
    player.tab.keyboard.press("ArrowLeft")
    assert player.step() == "Step 3 of 4" and player.tab.url.endswith("?run=four&step=3")
    assert player.ask(".mark", "style.left") == "75%" and player.ask(".slider", "ariaValueText") == "step 3 of 4"
    player.tab.keyboard.press("Space")
    assert player.ask(".play", "textContent") == "❚❚ Pause"
    player.tab.wait_for_function(f"{FIND}('.step').textContent === 'Step 4 of 4'")
    player.tab.wait_for_function(f"{FIND}('.play').textContent === '▶ Play'")
    player.tab.keyboard.press("ArrowRight")
    assert player.step() == "Step 4 of 4"
    player.ask(".slider", "focus()")
    player.tab.keyboard.press("Home")
    assert player.step() == "Step 0 of 4"
    assert player.requests == ["http://player.test/replay?run=four"]  # all of it without the server


@pytest.mark.browser
def test_keys_reach_the_player_after_a_run_was_chosen_with_the_mouse(player):
    player.open("four", query="?step=2")
    choice = '<div class="st-key-replay-run"><button>another</button></div>'
    player.tab.evaluate(f"document.body.insertAdjacentHTML('beforeend', '{choice}')")
    player.tab.get_by_role("button", name="another").click()
    player.tab.wait_for_function("document.activeElement === document.body")
    player.tab.keyboard.press("ArrowRight")
    assert player.step() == "Step 3 of 4"


@pytest.mark.browser
def test_player_shows_two_runs_at_the_same_step(player):
    player.open("four", "other", query="?step=6")
    assert player.step() == "Step 6 of 8"
    marks = player.tab.evaluate(
        "[...document.querySelector('#host').shadowRoot.querySelectorAll('.mark')].map(mark => mark.style.left)"
    )
    assert set(marks[:2]) == {"50%"} and set(marks[2:]) == {"75%"}  # the shorter one waits at its end
    assert player.tab.get_by_text("The run <four>").is_visible()


@pytest.mark.browser
def test_player_takes_any_step_in_the_address(player):
    for step in ("-5", "abc", "1e99", "%00"):
        player.open("four", query=f"?step={step}")
        assert player.step() in {"Step 0 of 4", "Step 1 of 4", "Step 4 of 4"}


@pytest.mark.browser
def test_player_plays_by_itself(browser, installed):
    tab = browser.new_page()
    player = Player(tab)
    player.open("four")
    assert player.ask(".play", "textContent") == "❚❚ Pause"
    player.show("four")  # a new theme, for one, calls it again
    tab.wait_for_function(f"{FIND}('.step').textContent !== 'Step 0 of 4'")
    tab.evaluate("leave()")
    assert player.ask(".panels", "childElementCount") == 0
    tab.close()
