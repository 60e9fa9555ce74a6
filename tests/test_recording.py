"""A run is recorded, interrupted in every way, and played back."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import encoded
from PIL import Image
from torch import Tensor, nn

from gradinv import __version__, metrics, paths
from gradinv.attack.inversion import invert
from gradinv.client import observe
from gradinv.config import AttackConfig
from gradinv.images import to_image
from gradinv.models import ImageClass, Model
from gradinv.recording import recorder as recorder_module
from gradinv.recording.recorder import Recorder, thinned
from gradinv.recording.replay import Recording, Resumption
from gradinv.recording.stores import DirectoryStore, MemoryStore, Store
from gradinv.types import GradinvError, Observation, Preprocessing, Snapshot, TermValues

SIDE = 16
CONFIG = AttackConfig(seeds=2, iterations=4)
# The second original's class comes back first: the snapshots' order is not the originals'.
TRUE, RESTORED = [5, 1], (1, 5)


def smooth(count: int, phase: float) -> Tensor:
    """Pixels (count, 3, 16, 16) without fine detail, which a lossy frame keeps."""
    ramp = torch.linspace(0, 1, SIDE)
    rows = [0.5 + 0.4 * torch.sin(3 * ramp[:, None] + 2 * ramp + phase + index) for index in range(count)]
    return torch.stack(rows)[:, None].expand(count, 3, SIDE, SIDE).contiguous()


ORIGINALS = smooth(2, 0.0)
ORIGINAL = to_image(ORIGINALS[0])


@pytest.fixture
def model():
    classes = tuple(ImageClass(f"n{index}", f"class {index}") for index in range(6))
    return Model("toy", nn.Linear(2, 6), "ab" * 32, Preprocessing(SIDE, SIDE), classes, 12.5)


def snapshot(step: int, steps: int = 4) -> Snapshot:
    seeds = torch.stack([smooth(2, 1.0 + seed + 0.1 * step) for seed in range(2)])
    terms = {"gradient": TermValues((0.1 / 3, 2.0), (0.5, 1.0 + step)), "tv": TermValues((0.25, 0.5), (1.0, 2.0))}
    return Snapshot(
        step=step,
        steps=steps,
        seeds=seeds,
        consensus=seeds.mean(0),
        terms=terms if step else {},
        distance=(0.9 - 0.1 * step, 0.8 - 0.1 * step) if step else (),
        seconds=step / 4,
        labels=RESTORED,
    )


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture
def start(model, store):
    """Begins a recording of two pictures, in `store` unless another one is given."""
    observation = Observation({}, 2, model.preprocessing, model.name, model.sha256)

    def start(other: Store | None = None, **options: object) -> Recorder:
        usual = {"config": CONFIG, "model": model, "observation": observation, "originals": ORIGINALS, "labels": TRUE}
        return Recorder(other or store, **{**usual, **options})

    return start


@pytest.fixture
def whole(start):
    """A recording of three steps to the end."""
    return follow(start())


def replayed(recording: Recording) -> list[Snapshot]:
    return [recording.snapshot(step) for step in recording.steps]


def follow(made: Recorder, steps: tuple[int, ...] = (0, 2, 4)) -> Recorder:
    for _ in made.follow(snapshot(step) for step in steps):
        pass
    return made


def test_run_json_says_what_ran_on_what_and_what_came_out(tmp_path, start):
    made = follow(start(DirectoryStore(tmp_path / "run")))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run == made.run
    assert run["format"] == 1 and run["status"] == "done"
    assert AttackConfig.from_dict(run["config"]) == CONFIG
    model = {"name": "toy", "weights": "toy", "sha256": "ab" * 32, "accuracy": 12.5, "image_size": SIDE}
    assert run["model"] == model
    assert run["every"] is None and run["client"] == {"batch_size": 2, "mode": "eval", "defences": []}
    assert run["environment"] == {
        "gradinv": __version__,
        "torch": torch.__version__,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "ranks": 1,
    }
    assert run["labels"] == {"true": TRUE, "restored": list(RESTORED), "method": "column-minimum", "confidence": None}
    assert run["iterations"] == {"done": 4, "total": 4}
    assert run["seconds"] == 1.0 and run["seconds_per_iteration"] == 0.25
    assert run["peak_memory_mb"] > 10 and run["recording_seconds"] > 0


def test_how_steps_were_executed_and_what_read_the_labels_is_recorded_and_replayed(start, store):
    made = start()
    sure = {"label_method": "ilrg", "label_confidence": 0.75}
    last = dataclasses.replace(snapshot(4), stepping="traced", parallel_seeds=2, **sure)
    list(made.follow(iter([snapshot(0), last])))
    opened = Recording.open(store)
    environment, labels, shown = opened.run["environment"], opened.run["labels"], opened.snapshot(4)
    assert (environment["stepping"], environment["parallel_seeds"]) == ("traced", 2)
    assert (labels["method"], labels["confidence"]) == ("ilrg", 0.75)
    assert (shown.label_method, shown.label_confidence) == ("ilrg", 0.75)


def test_metrics_are_per_image_in_the_originals_order(whole):
    run, last = whole.run, snapshot(4)
    assert run["metrics"]["consensus"] == metrics.measure(last.consensus[[1, 0]], ORIGINALS)
    assert run["metrics"]["seeds"] == [metrics.measure(seed[[1, 0]], ORIGINALS) for seed in last.seeds]
    assert run["metrics"]["baseline"] == metrics.measure(metrics.constant_colour(ORIGINALS), ORIGINALS)


def test_directory_layout(tmp_path, start):
    store = DirectoryStore(tmp_path / "deep" / "run")
    follow(start(store))
    pictures = [
        f"images/{prefix}_0{index}.png" for prefix in ("consensus", "original", "seed0", "seed1") for index in (0, 1)
    ]
    frames = [f"frames/00000{step}.webp" for step in (0, 2, 4)]
    assert store.names() == sorted(["run.json", "curves.csv", *frames, *pictures])
    assert [path for path in (tmp_path / "deep" / "run").rglob(".*")] == []
    with Image.open(tmp_path / "deep" / "run" / "frames" / "000002.webp") as frame:
        assert frame.format == "WEBP" and frame.size == (2 * SIDE, 3 * SIDE)


def test_curves_csv_has_a_row_a_record_and_seed(whole, store):
    lines = store.read("curves.csv").decode().splitlines()
    assert lines[0] == (
        "step,seed,seconds,distance,psnr,consensus_psnr,gradient.raw,gradient.weighted,tv.raw,tv.weighted"
    )
    assert len(lines) == 1 + 3 * 2
    # The start has no terms and no distance yet.
    assert lines[1].startswith("0,0,0.0,,") and lines[1].endswith(",,,,")
    row = whole.curves[3]
    assert (row["step"], row["seed"], row["distance"]) == (2, 1, snapshot(2).distance[1])
    assert row["gradient.raw"] == 2.0 and row["gradient.weighted"] == 3.0
    assert row["psnr"] == float(metrics.psnr(snapshot(2).seeds[1][[1, 0]], ORIGINALS).mean())
    assert row["consensus_psnr"] == float(metrics.psnr(snapshot(2).consensus[[1, 0]], ORIGINALS).mean())


def test_replay_is_the_live_stream(whole, store):
    shown = replayed(Recording.open(store))
    assert [one.step for one in shown] == [0, 2, 4]
    for one in shown:
        live = snapshot(one.step)
        # Numbers come back exactly, pixels as closely as the lossy frames allow.
        for name in ("steps", "terms", "distance", "seconds", "labels"):
            assert getattr(one, name) == getattr(live, name), name
        assert one.seeds.shape == live.seeds.shape and one.consensus.shape == live.consensus.shape
        assert (one.seeds - live.seeds).abs().mean() < 0.02
        assert (one.consensus - live.consensus).abs().mean() < 0.02
    assert shown[-1].final and not shown[0].final


def test_final_images_are_lossless_and_follow_the_originals(whole, store):
    opened, last = Recording.open(store), snapshot(4)
    kept = {"original": ORIGINALS, "seed1": last.seeds[1][[1, 0]], "consensus": last.consensus[[1, 0]]}
    for prefix, expected in kept.items():
        assert (opened.images(prefix) - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert opened.images("seed2") is None and opened.order() == [1, 0]


def test_without_originals(start, store):
    made = follow(start(originals=None, labels=None), (0, 4))
    assert made.run["status"] == "done" and made.run["metrics"] is None and made.run["labels"]["true"] is None
    assert made.curves[-1]["psnr"] is None
    opened = Recording.open(store)
    assert opened.originals() is None and opened.order() == [0, 1]
    assert (opened.images("consensus") - snapshot(4).consensus).abs().max() < 0.01
    assert len(replayed(opened)) == 2


@pytest.mark.parametrize("steps", [(0, 2), ()])
def test_a_stream_that_ends_early_is_stopped(start, steps, store):
    made = follow(start(), steps)
    opened = Recording.open(store)
    assert made.run["status"] == "stopped" and [one.step for one in replayed(opened)] == list(steps)
    assert (made.run["metrics"] is not None) == (opened.images("consensus") is not None) == bool(steps)


def test_closing_stops_the_run_and_the_stream_behind_it(start, store):
    closed = []

    def endless() -> Iterator[Snapshot]:
        try:
            yield from (snapshot(step, steps=1000) for step in range(1000))
        finally:
            closed.append(True)

    made = start()
    stream = made.follow(endless())
    next(stream), next(stream)
    stream.close()
    assert made.run["status"] == "stopped" and closed == [True]
    opened = Recording.open(store)
    assert opened.steps == [0, 1] and opened.images("seed1") is not None


def test_closing_after_the_last_step_is_done_and_the_same_state_twice_is_recorded_once(start):
    made = start()
    stream = made.follow(snapshot(step) for step in (0, 4, 4))
    next(stream), next(stream), next(stream)
    stream.close()
    assert made.run["status"] == "done" and [row["step"] for row in made.curves] == [0, 0, 4, 4]


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (KeyboardInterrupt(), "stopped", None),
        (GradinvError("It stopped being finite."), "failed", "It stopped being finite."),
        (RuntimeError("no kernel"), "failed", "RuntimeError: no kernel"),
    ],
    ids=["Ctrl-C", "refused", "unexpected"],
)
def test_what_is_raised_ends_the_run_and_keeps_it(error, status, sentence, start, store):
    def breaking() -> Iterator[Snapshot]:
        yield snapshot(0)
        yield snapshot(2)
        raise error

    made = start()
    with pytest.raises(type(error)):
        list(made.follow(breaking()))
    opened = Recording.open(store)
    assert opened.run["status"] == made.run["status"] == status
    assert opened.run.get("error") == sentence
    assert opened.steps == [0, 2] and opened.run["metrics"] is not None


@pytest.mark.parametrize("lost", [1, 5, 25])
def test_a_torn_last_line_is_ignored(lost, whole, store):
    store.write("curves.csv", store.read("curves.csv")[:-lost])
    opened = Recording.open(store)
    # Seed 1 of step 4 is torn, so that step is not complete.
    assert opened.steps == [0, 2]
    assert (opened.curves[-1]["step"], opened.curves[-1]["seed"]) == (4, 0)


def test_readable_after_any_write_was_the_last(start):
    """What a kill leaves behind: the state after each single write, and while a replacement was under way."""
    states: list[dict[str, bytes]] = []

    class Watched(MemoryStore):
        def write(self, name: str, data: bytes) -> None:
            super().write(name, data)
            states.append(dict(self._files))

        def append(self, name: str, data: bytes) -> None:
            super().append(name, data[: len(data) // 2])
            states.append(dict(self._files))
            super().append(name, data[len(data) // 2 :])
            states.append(dict(self._files))

    follow(start(Watched()))
    counts = []
    # Until then the folder is not a run.
    begun = next(index for index, files in enumerate(states) if "run.json" in files)
    assert begun == len(ORIGINALS)
    for files in states[begun:]:
        opened = Recording.open(MemoryStore(files))
        counts.append(len(replayed(opened)))
        assert opened.run["status"] in ("running", "done")
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 3


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    store = DirectoryStore(tmp_path)
    store.write("run.json", b"old")

    def killed(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(paths.os, "replace", killed)
    with pytest.raises(SystemExit):
        store.write("run.json", b"new")
    assert store.read("run.json") == b"old" and store.names() == ["run.json"]


def test_a_full_disk_fails_and_keeps_what_was_there(start):
    class Full(MemoryStore):
        room = 12

        def write(self, name: str, data: bytes) -> None:
            if self.room == 0:
                raise GradinvError("The disk is full.")
            self.room -= 1
            super().write(name, data)

    made = start(full := Full())
    with pytest.raises(GradinvError, match="is full"):
        follow(made)
    assert made.run["status"] == "failed" and "is full" in made.run["error"]
    opened = Recording.open(full)
    assert opened.run["status"] == "running" and opened.steps[:2] == [0, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_real_full_device(tmp_path):
    (tmp_path / "curves.csv").symlink_to("/dev/full")
    with pytest.raises(GradinvError, match=r"^The disk of .* is full; free some space or choose another folder\.$"):
        DirectoryStore(tmp_path).append("curves.csv", b"1,2\n")


def test_an_unwritable_folder_shows_before_the_run(tmp_path, start):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(GradinvError, match=r"^Nothing can be written to .*file/run \(not a directory\)"):
        start(DirectoryStore(tmp_path / "file" / "run"))


def test_looking_into_a_folder_makes_nothing(tmp_path):
    with pytest.raises(GradinvError, match=r"is not a recorded run: it holds no run\.json"):
        Recording.open(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is damaged"),
        (b"[]", "is damaged"),
        (b'{"format": 1}', "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b'{"format": 2, "status": "done"}', "was recorded in format 2, and this version reads format 1"),
    ],
)
def test_a_folder_with_something_else(content, sentence):
    with pytest.raises(GradinvError, match=sentence):
        Recording.open(MemoryStore({"run.json": content}))


def test_a_run_of_a_registration_that_is_gone_still_opens():
    store = MemoryStore.unpack(paths.ASSETS / "runs" / "registered.zip")
    run = json.loads(store.read("run.json"))
    run["config"]["registration"] = "flow"
    store.write("run.json", json.dumps(run).encode())
    recording = Recording.open(store)
    assert recording.run["config"]["registration"] == "flow"
    assert recording.snapshot(recording.steps[-1]).seeds.shape[0] == run["config"]["seeds"]


def test_a_damaged_table_or_frame(whole, store):
    frame = store.read("frames/000002.webp")
    for damaged, sentence in ((b"RIFF", r"000002\.webp .* is damaged"), (encoded(ORIGINAL, "WEBP"), "does not fit")):
        store.write("frames/000002.webp", damaged)
        with pytest.raises(GradinvError, match=sentence):
            replayed(Recording.open(store))
    store.write("frames/000002.webp", frame)
    store.write("curves.csv", b"step,seed\n0,x\n")
    with pytest.raises(GradinvError, match="is damaged"):
        Recording.open(store)


def test_steps_that_were_not_recorded(whole, store):
    opened = Recording.open(store)
    with pytest.raises(GradinvError, match="no record of step 3"):
        opened.snapshot(3)
    with pytest.raises(GradinvError, match="no frame of step 3"):
        opened.frame(3)


def test_a_mosaic_too_large_for_webp(start, store, monkeypatch):
    monkeypatch.setattr(recorder_module, "WEBP_LIMIT", 2 * SIDE)
    follow(start())
    opened = Recording.open(store)
    assert "frames/000004.png" in store.names() and opened.steps == [0, 2, 4]
    assert (opened.snapshot(4).seeds - snapshot(4).seeds).abs().max() < 0.01


def test_a_diverged_run_is_recorded(start, store):
    made, last = start(), snapshot(4)
    gone = dataclasses.replace(last, seeds=torch.full_like(last.seeds, math.nan), terms={}, distance=(math.nan,) * 2)
    list(made.follow(iter([snapshot(0), gone])))
    assert made.run["metrics"]["seeds"][0]["psnr"] == [None, None]
    assert math.isnan(Recording.open(store).snapshot(4).distance[1])


def test_originals_and_labels_go_together(start):
    with pytest.raises(GradinvError, match="give both or neither"):
        start(labels=None)
    with pytest.raises(GradinvError, match="observation is of 2 images, but 1 originals"):
        start(originals=ORIGINALS[:1], labels=[1])


@pytest.mark.parametrize(
    ("steps", "gap", "kept"),
    [
        ((0, 2, 3, 5, 6, 9, 10), 3, [0, 3, 6, 9, 10]),
        ((0, 1, 3, 4), 3, [0, 3, 4]),
        ((0, 1, 2, 3, 4, 5, 6), 2.5, [0, 3, 5, 6]),
        ((4, 5, 6, 7, 8, 9, 10), 3, [4, 6, 9, 10]),
        ((0, 3), 3, [0, 3]),
        ((0, 9, 10), 20, [0, 10]),
        ((), 3, []),
    ],
)
def test_thinned_keeps_every_so_many_steps_and_the_last(steps, gap, kept):
    assert [one.step for one in thinned((snapshot(step, steps=10) for step in steps), gap)] == kept


def test_memory_store_as_a_zip(whole, store):
    with zipfile.ZipFile(io.BytesIO(store.zip())) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == store.names()
        assert archive.read("run.json") == store.read("run.json")


def test_class_names_of_known_models(whole, store):
    opened = Recording.open(store)
    for name, label, expected in (("toy", 3, "class 3"), ("resnet18-tiny", 0, "goldfish"), ("resnet50", 1, "goldfish")):
        opened.run["model"]["name"] = name
        assert opened.class_name(label) == expected


def test_a_real_run_live_and_replayed(start, small_model, small_batch, store):
    pixels, labels = small_batch
    config = AttackConfig.preset("demo", iterations=6, seeds=2, stages=(), layers="all")
    observation = observe(small_model, pixels, labels)
    made = start(config=config, model=small_model, observation=observation, originals=pixels, labels=labels.tolist())
    live = list(made.follow(invert(small_model, observation, config, every=2)))
    shown = replayed(Recording.open(store))
    assert [one.step for one in shown] == [one.step for one in live] == [0, 2, 4, 6]
    assert shown[0].terms == live[0].terms == {} and shown[0].distance == live[0].distance == ()
    for one, other in zip(shown, live, strict=True):
        assert one.terms == other.terms and one.distance == other.distance and one.labels == other.labels
    assert set(live[-1].terms) >= {"gradient", "tv", "bn"}
    # The images that are kept are those that were measured, to half a grey level.
    kept = metrics.psnr(Recording.open(store).images("consensus"), pixels)
    assert kept.tolist() == pytest.approx(made.run["metrics"]["consensus"]["psnr"], abs=0.2)


# --- resume


@pytest.fixture
def resumable(start, small_model, small_batch):
    """Begins a recording of a real run on the small network, one record a step. → it and the run's stream"""
    observation = observe(small_model, *small_batch)

    def resumable(store: Store, **options: object) -> tuple[Recorder, Iterator[Snapshot]]:
        stream = invert(small_model, observation, RESUMABLE, every=1)
        first = next(stream)
        usual = {"model": small_model, "observation": observation, "originals": None, "labels": None, "every": 1}
        usual |= {"config": RESUMABLE, "defences": ["clip:1"], "state": stream.state}
        return start(store, **{**usual, **options}), itertools.chain([first], stream)

    return resumable


RESUMABLE = AttackConfig(
    seeds=2, iterations=6, bn="none", group=0.1, registration="lazy", stages=(0.5, 0.5), match="cosine", gradient=1.0
)


def resume(path: Path, model: Model) -> tuple[Recorder, Iterator[Snapshot]]:
    """Go on with the run in a folder. → its recorder, and the stream, of which nothing has been taken"""
    left = Resumption.open(path)
    stream = invert(model, left.observation, left.config, every=1, resume=left.state)
    made = Recorder(
        left.store,
        config=left.config,
        model=model,
        observation=left.observation,
        originals=left.originals,
        labels=left.run["labels"]["true"],
        every=left.run["every"],
        defences=left.run["client"]["defences"],
        state=stream.state,
        resumed=left,
    )
    return made, thinned(stream, left.run["every"])


def content(path: Path) -> dict[str, object]:
    """Every file but for the times that it tells."""
    found: dict[str, object] = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if name == "run.json":
            run = json.loads(file.read_text())
            found[name] = {key: run[key] for key in run if "second" not in key and "memory" not in key}
        elif name == "curves.csv":
            found[name] = [",".join(line.split(",")[:2] + line.split(",")[3:]) for line in file.read_text().split("\n")]
        elif file.is_file():
            found[name] = file.read_bytes()
    return found


def test_resumed_after_a_kill_at_any_write_the_folder_is_that_of_a_whole_run(tmp_path, small_model, resumable):
    """The process ends at each single write or removal of a run in turn: before it, and half-way through an append."""

    class Killed(BaseException):
        pass

    class Mortal(DirectoryStore):
        left = 10**6

        def _live(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise Killed

        def write(self, name: str, data: bytes) -> None:
            self._live()
            super().write(name, data)

        def append(self, name: str, data: bytes) -> None:
            if self.left <= 0:
                super().append(name, data[: len(data) // 2])
            self._live()
            super().append(name, data)

        def remove(self, name: str) -> None:
            self._live()
            super().remove(name)

    whole = Mortal(tmp_path / "whole")
    made, stream = resumable(whole)
    list(made.follow(stream))
    assert "state.safetensors" not in whole.names() and "observation.safetensors" not in whole.names()
    expected = content(whole.path)
    writes = 10**6 - whole.left
    resumed, unbegun = 0, 0
    for after in range(writes):
        folder = tmp_path / f"killed{after}"
        store = Mortal(folder)
        store.left = after
        try:
            made, stream = resumable(store)
            list(made.follow(stream))
        except Killed:
            pass
        if not (folder / "run.json").exists():
            unbegun += 1
            with pytest.raises(GradinvError, match="is not a recorded run"):
                Resumption.open(folder)
            continue
        if json.loads((folder / "run.json").read_text())["status"] == "done":
            continue  # only leftovers were to be removed
        made, stream = resume(folder, small_model)
        list(made.follow(stream))
        assert content(folder) == expected, f"killed after {after} of {writes} writes"
        resumed += 1
    assert unbegun == 3 and resumed > 20


def test_a_run_stopped_between_two_records_leaves_no_trace_of_that(
    tmp_path, small_model, small_batch, resumable, monkeypatch
):
    monkeypatch.setattr(recorder_module, "_STATE_PAUSE", 0)
    known = {"originals": small_batch[0], "labels": small_batch[1].tolist(), "every": 4}
    for name, last in (("whole", 6), ("cut", 5)):
        made, stream = resumable(DirectoryStore(tmp_path / name), **known)
        list(made.follow(thinned(itertools.islice(stream, last + 1), 4)))
    cut = Recording.open(tmp_path / "cut")
    assert cut.run["status"] == "stopped" and cut.steps == [0, 4, 5] and cut.images("consensus") is not None
    left = Resumption.open(tmp_path / "cut")
    assert left.steps == {0, 4} and left.originals is not None
    made, stream = resume(tmp_path / "cut", small_model)
    assert Recording.open(tmp_path / "cut").images("consensus") is None and made.run["status"] == "running"
    assert made.run["metrics"] is None
    list(made.follow(stream))
    again, whole = content(tmp_path / "cut"), content(tmp_path / "whole")
    # The originals are kept with 8 bits, from which these pictures, made of numbers, differ.
    for found in (again, whole):
        del found["run.json"], found["curves.csv"]
    assert again == whole and Recording.open(tmp_path / "cut").steps == [0, 4, 6]


def test_what_cannot_be_resumed_is_one_sentence(tmp_path, resumable):
    made, stream = resumable(DirectoryStore(tmp_path / "run"))
    shown = made.follow(stream)
    for _ in range(3):
        next(shown)

    def refused(sentence: str, change: str, content: bytes | None) -> None:
        folder = tmp_path / "changed"
        shutil.copytree(tmp_path / "run", folder)
        if content is None:
            (folder / change).unlink()
        else:
            (folder / change).write_bytes(content)
        with pytest.raises(GradinvError, match=sentence) as why:
            Resumption.open(folder)
        assert len(str(why.value).splitlines()) == 1 and str(why.value).endswith(".")
        shutil.rmtree(folder)

    def changed(**changes: object) -> bytes:
        return json.dumps({**made.run, **changes}).encode()

    whole = (tmp_path / "run" / "state.safetensors").read_bytes()
    refused("it holds no state.safetensors; start it again", "state.safetensors", None)
    refused("it holds no observation.safetensors; start it again", "observation.safetensors", None)
    refused("saved state .* is damaged .*; start the run again", "state.safetensors", whole[: len(whole) // 2])
    refused("Cannot read an observation", "observation.safetensors", b"torn")
    refused("is done; show it with: gradinv replay", "run.json", changed(status="done"))
    refused("was recorded in format 2, and this version reads format 1", "run.json", changed(format=2))
    refused("its originals are missing", "run.json", changed(labels={**made.run["labels"], "true": [0, 1, 2]}))
    old = {name: value for name, value in made.run.items() if name not in ("every", "client")}
    refused("was recorded by gradinv .*, which could not resume", "run.json", json.dumps(old).encode())
    with pytest.raises(GradinvError, match="is not a recorded run"):
        Resumption.open(tmp_path / "nowhere")
    assert Recording.open(MemoryStore({"run.json": json.dumps(old).encode()})).steps == [], "but it can be shown"


def test_saving_the_state_costs_little(resumable, monkeypatch):
    """A save that takes a second is done once in fifty."""
    clock = [0.0]
    monkeypatch.setattr(recorder_module.time, "perf_counter", lambda: clock[0])
    saved: list[float] = []

    class Slow(MemoryStore):
        def write(self, name: str, data: bytes) -> None:
            if name == "state.safetensors":
                clock[0] += 1
                saved.append(clock[0])
            super().write(name, data)

    def slowly() -> Iterator[Snapshot]:
        for step in range(400):
            clock[0] += 1
            yield dataclasses.replace(snapshot(step, steps=400), labels=(4, 1, 2))

    made, _ = resumable(Slow())
    list(made.follow(slowly()))
    assert 3 < len(saved) <= 1 + clock[0] / 101
    assert all(after - before >= 51 for before, after in itertools.pairwise(saved))
