"""The queue, its places, leases, limits and failures, with work that ends when the test says so."""

from __future__ import annotations

import dataclasses
import queue
import threading
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from conftest import PATIENCE, Clock

from gradinv import jobs
from gradinv.config import AttackConfig
from gradinv.defenses import prune
from gradinv.jobs import Handle, JobManager, JobState, Limits, Status
from gradinv.models import Model, load_model
from gradinv.recording.replay import Recording
from gradinv.types import GradinvError, Observation
from gradinv.web.parts.inversion import Inversion, Originals, Progress, Shared, Solving


@dataclass(eq=False)
class Scripted:
    """Work that does what the test sends: publishes numbers, raises errors, ends on None or when it is stopped."""

    cost: int = 1
    size: int = 10
    orders: queue.Queue[object] = field(default_factory=queue.Queue)
    problem: str | None = None
    remaining: float | None = None

    def then(self, *orders: object) -> Scripted:
        for order in orders:
            self.orders.put(order)
        return self

    def check(self) -> None:
        if self.problem is not None:
            raise GradinvError(self.problem)

    def __call__(self, handle: Handle) -> Status:
        while True:
            order = self.orders.get(timeout=PATIENCE)
            if isinstance(order, BaseException):
                raise order
            if order == "stop":
                return "stopped" if handle.stop.wait(PATIENCE) else "done"
            if order is None:
                return "done"
            handle.publish(order, self.size, self.remaining)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def manager(clock):
    made = JobManager(
        Limits(cost=100, waiting=3, retained=2, retained_bytes=100, retained_seconds=3600, lease=60), clock=clock
    )
    yield made
    made.close(PATIENCE)


def begun(manager: JobManager, work: Scripted) -> str:
    job = manager.submit(work)
    assert manager.wait(job, lambda state: state.status == "running", PATIENCE)
    return job


def ended(manager: JobManager, job: str) -> JobState:
    assert manager.wait(job, lambda state: state.finished, PATIENCE)
    return manager.state(job)


def still_works(manager: JobManager, user: str | None = None) -> bool:
    return ended(manager, manager.submit(Scripted().then(None), user)).status == "done"


def test_jobs_run_one_at_a_time_in_order_and_know_their_place(manager):
    works = [Scripted() for _ in range(3)]
    jobs = [begun(manager, works[0]), manager.submit(works[1]), manager.submit(works[2])]
    states = [manager.state(job) for job in jobs]
    assert [(state.status, state.place) for state in states] == [("running", 0), ("queued", 1), ("queued", 2)]
    works[0].then(None)
    assert manager.wait(jobs[1], lambda state: state.status == "running", PATIENCE)
    last = manager.state(jobs[2])
    assert (last.status, last.place) == ("queued", 1)
    works[1].then(None)
    works[2].then(None)
    assert ended(manager, jobs[2]).status == "done"


def test_the_latest_update_is_seen_by_every_watcher_and_kept_at_the_end(manager):
    job = begun(manager, work := Scripted())
    work.then("one", "two")
    assert manager.wait(job, lambda state: state.update == "two", PATIENCE)
    work.then(None)
    assert ended(manager, job).update == "two"


def test_ids_cannot_be_guessed_and_unknown_ones_are_nothing(manager):
    assert len(manager.submit(Scripted().then(None))) >= 20
    assert manager.state("0") is None
    manager.cancel("0")


def test_a_running_job_is_stopped_and_keeps_what_it_published(manager):
    job = begun(manager, Scripted().then("picture", "stop"))
    manager.cancel(job)
    state = ended(manager, job)
    assert (state.status, state.update, state.reason) == ("stopped", "picture", None)
    manager.cancel(job)
    assert manager.state(job) == state, "what has ended is not stopped once more"


def test_a_queued_job_is_cancelled_at_once_and_never_runs(manager):
    running, waiting = Scripted(), Scripted()
    first, second = begun(manager, running), manager.submit(waiting)
    manager.cancel(second)
    state = manager.state(second)
    assert (state.status, state.place) == ("stopped", 0)
    waiting.then("ran")
    running.then(None)
    ended(manager, first)
    assert still_works(manager) and waiting.orders.qsize() == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GradinvError("Take fewer seeds."), "Take fewer seeds."),
        (MemoryError(), "The machine ran out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "The machine ran out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "The GPU ran out of memory"),
        (RuntimeError("CUDA error: out of memory"), "The GPU ran out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "The GPU ran out of memory"),
        (ZeroDivisionError("secret"), "The run failed unexpectedly (ZeroDivisionError)"),
        (SystemExit(1), "The run failed unexpectedly (SystemExit)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_failed_job_says_why_in_one_sentence_and_the_worker_lives_on(manager, error, expected):
    state = ended(manager, manager.submit(Scripted().then("picture", error)))
    assert state.status == "failed" and state.update == "picture"
    assert state.reason.startswith(expected) and state.reason.count(".") == 1 and "\n" not in state.reason
    assert "secret" not in state.reason
    assert still_works(manager)


def test_what_is_too_large_or_wrong_or_one_too_many_is_refused(manager):
    with pytest.raises(GradinvError, match=r"2\.5 times as large"):
        manager.submit(Scripted(cost=250))
    with pytest.raises(GradinvError, match="Choose at least one picture"):
        manager.submit(Scripted(problem="Choose at least one picture."))
    begun(manager, running := Scripted())
    for _ in range(3):
        manager.submit(Scripted())
    with pytest.raises(GradinvError, match="3 runs are waiting already"):
        manager.submit(Scripted())
    running.then("stop")


def test_a_running_job_whose_page_is_closed_makes_room_when_another_waits(manager, clock):
    abandoned = begun(manager, Scripted().then("picture", "stop"))
    clock.now += 61
    assert still_works(manager)
    state = manager.state(abandoned)
    assert (state.status, state.update) == ("stopped", "picture") and "closed while others waited" in state.reason


def test_a_lapsed_lease_alone_stops_nothing_and_the_tab_that_comes_back_finds_its_result(manager, clock):
    job = begun(manager, work := Scripted())
    clock.now += 10_000
    work.then("picture", None)
    state = ended(manager, job)
    assert (state.status, state.update) == ("done", "picture")


def test_a_watched_job_is_not_dropped(manager, clock):
    first = begun(manager, running := Scripted())
    for _ in range(5):
        clock.now += 50
        manager.state(first)
    manager.submit(Scripted().then(None))
    running.then(None)
    assert ended(manager, first).status == "done"


def test_an_abandoned_place_in_the_queue_goes_to_those_who_still_wait(manager, clock):
    first, left = begun(manager, running := Scripted()), manager.submit(Scripted())
    clock.now += 61
    manager.state(first)
    stays = manager.submit(Scripted().then(None))
    assert manager.state(stays).place == 1 and manager.state(left).status == "stopped"
    running.then(None)
    ended(manager, stays)


def run_to_the_end(manager: JobManager, size: int) -> str:
    job = manager.submit(Scripted(size=size).then("picture", None))
    ended(manager, job)
    return job


def kept(manager: JobManager, *jobs: str) -> list[bool]:
    return [manager.state(job) is not None for job in jobs]


def test_only_so_many_finished_jobs_are_kept(manager):
    jobs = [run_to_the_end(manager, 1) for _ in range(4)]
    assert kept(manager, *jobs) == [False, False, True, True]


def test_only_so_many_bytes_are_kept_but_always_the_newest(manager):
    small, large = run_to_the_end(manager, 60), run_to_the_end(manager, 70)
    assert kept(manager, small, large) == [False, True]
    huge = run_to_the_end(manager, 1000)
    assert kept(manager, large, huge) == [False, True]


def test_jobs_that_nobody_watches_are_forgotten_first(manager, clock):
    watched, left = run_to_the_end(manager, 1), run_to_the_end(manager, 1)
    clock.now += 61
    manager.state(watched)
    newest = run_to_the_end(manager, 1)
    assert kept(manager, watched, left, newest) == [True, False, True]


def test_closing_ends_everything_and_a_later_job_still_runs(manager):
    jobs = begun(manager, Scripted().then("stop")), manager.submit(Scripted())
    manager.close(PATIENCE)
    assert [manager.state(job).status for job in jobs] == ["stopped", "stopped"]
    assert still_works(manager)


def test_a_visitor_has_one_unfinished_job_and_others_are_not_kept_from_theirs(manager):
    first = manager.submit(work := Scripted(), "ada")
    with pytest.raises(GradinvError, match="Your last run has not ended yet"):
        manager.submit(Scripted(), "ada")
    assert (manager.unfinished("ada"), manager.unfinished("bob"), manager.unfinished(None)) == (first, None, None)
    manager.submit(Scripted().then(None), "bob")
    work.then(None)
    ended(manager, first)
    assert still_works(manager, "ada")


def test_those_who_wait_are_told_how_long_by_the_pace_of_what_runs(manager, clock):
    running, waiting = Scripted(cost=10, remaining=60.0), Scripted(cost=20)
    first = begun(manager, running)
    second, third = manager.submit(waiting), manager.submit(Scripted())

    def waits() -> list[float | None]:
        return [manager.state(job).wait for job in (first, second, third)]

    assert waits() == [None, None, None]
    clock.now += 40
    running.then("picture")
    assert manager.wait(first, lambda state: state.update == "picture", PATIENCE)
    # 40 s gone and 60 to go for a cost of 10: the next, twice as large, takes 200 s.
    assert waits() == [None, pytest.approx(60), pytest.approx(260)]
    clock.now += 30
    assert waits() == [None, pytest.approx(30), pytest.approx(230)]
    manager.cancel(third)
    for work in (running, waiting):
        work.then(None)
    ended(manager, second)


def test_a_finished_job_is_kept_only_so_long_after_the_last_look(manager, clock):
    job = run_to_the_end(manager, 1)
    for pause, expected in ((3600, True), (60 + 3600 + 1, False)):
        clock.now += pause
        assert kept(manager, job) == [expected]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lost_worker_is_replaced_and_its_job_has_failed(manager, monkeypatch):
    def die(_: BaseException) -> str:
        raise SystemExit

    first = begun(manager, lost := Scripted())
    second = manager.submit(Scripted().then(None))
    worker = manager._worker
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "sentence", die)
        lost.then(ValueError())
        worker.join(PATIENCE)
    assert not worker.is_alive()
    assert ended(manager, second).status == "done"
    state = manager.state(first)
    assert (state.status, state.reason) == ("failed", "The server lost this run; start it again.")


def test_every_limit_is_read_from_the_environment():
    assert Limits.from_environment({}) == Limits()
    assert Limits.from_environment({"GRADINV_MAX_COST": "1e9"}).cost == 1e9
    names = [item.name for item in dataclasses.fields(Limits)]
    numbers = {f"GRADINV_MAX_{name.upper()}": str(place) for place, name in enumerate(names, 7)}
    assert list(dataclasses.astuple(Limits.from_environment(numbers))) == list(range(7, 7 + len(names)))
    assert all(name in (Limits.__doc__ or "") for name in names)
    for wrong in ("much", "-1", "0", "nan", "inf"):
        with pytest.raises(GradinvError, match="GRADINV_MAX_WAITING must be a positive number such as 20"):
            Limits.from_environment({"GRADINV_MAX_WAITING": wrong})


def test_there_is_one_manager_until_it_is_reset():
    jobs.reset()
    one = jobs.manager()
    assert jobs.manager() is one
    jobs.reset()
    assert jobs.manager() is not one
    jobs.reset()


# The inversion as a job: the smallest real one, ResNet-18 on 32-px pictures.


def inversion(iterations: int = 3) -> Inversion:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    config = AttackConfig.preset("demo", seeds=2, iterations=iterations)
    return Inversion(small, Originals(pixels, (3, 7)), config)


@cache
def small() -> Model:
    return load_model("resnet18-tiny", device="cpu", image_size=32)


@dataclass(eq=False)
class Listener:
    stop: threading.Event = field(default_factory=threading.Event)
    updates: list[Progress] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    solving: list[Solving] = field(default_factory=list)
    # With so many updates it stops the run: of pictures, or of the solving.
    enough: int = -1
    layers: int = -1

    def publish(self, update: Progress | Solving, size: int, remaining: float | None = None) -> None:
        if isinstance(update, Solving):
            assert not self.updates
            self.solving.append(update)
        else:
            assert remaining == update.remaining
            self.updates.append(update)
            self.sizes.append(size)
        if len(self.updates) == self.enough or len(self.solving) == self.layers:
            self.stop.set()


@pytest.fixture(scope="module")
def listener():
    """Who has heard a run to its end."""
    listener = Listener()
    assert inversion()(listener) == "done"
    return listener


def test_an_inversion_publishes_pictures_from_the_start_to_the_end_and_records_them(listener):
    first, last = listener.updates[0], listener.updates[-1]
    assert (first.step, first.remaining) == (0, None)
    assert (last.step, last.steps, last.remaining) == (3, 3, 0)
    pictures = last.pictures
    assert len(pictures.consensus) == len(pictures.psnr) == len(pictures.restored) == 2
    assert [len(row) for row in pictures.seeds] == [2, 2]
    rows = (pictures.consensus, *pictures.seeds)
    assert all(uri.startswith("data:image/webp;base64,") for row in rows for uri in row)
    assert set(pictures.restored) == {3, 7}
    assert listener.sizes[-1] > listener.sizes[0] > 0
    recording = Recording.open(last.store)
    assert recording.run["status"] == "done"
    assert recording.steps[-1] == 3
    assert [row["step"] for row in last.curves] == [row["step"] for row in recording.curves]
    assert recording.run["metrics"]["consensus"]["psnr"] == pytest.approx(pictures.psnr)


def test_a_stopped_inversion_ends_early_with_its_last_pictures_recorded(monkeypatch):
    monkeypatch.setattr(Inversion, "KEPT", 1000)  # bytes, so that nothing is kept to go on with
    listener = Listener(enough=2)
    assert inversion(iterations=1000)(listener) == "stopped"
    last = listener.updates[-1]
    assert last.step < 1000 and last.kept is None
    recording = Recording.open(last.store)
    assert recording.run["status"] == "stopped" and recording.steps[-1] == last.step
    assert recording.images("consensus") is not None


def test_the_layers_are_published_one_by_one_before_the_pictures_and_recorded(listener):
    first, *others = listener.solving
    assert first.layers == () and first.boundary is None and len(first.nodes) == 16
    for count, (before, after) in enumerate(zip(listener.solving, others, strict=False), 1):
        assert len(after.layers) == count and after.layers[:-1] == before.layers
        assert after.boundary is None and after.seconds >= before.seconds
    last = listener.updates[-1]
    undrawn = [[dataclasses.replace(layer, tiles=()) for layer in s.layers] for s in (last.solving, others[-1])]
    assert undrawn[0] == undrawn[1] and last.total == last.solving.seconds + last.seconds
    assert all(len(layer.tiles) == 2 for layer in last.solving.layers), "those that came fast are drawn afterwards"
    names = [layer.name for layer in last.solving.layers]
    assert set(names) <= set(first.nodes) and last.solving.boundary in names and last.solving.stopped
    top = last.solving.layers[0]
    assert (top.name, top.shape, top.numbers) == ("layer4.1.conv1", (512, 1, 1), 512) and max(top.errors) < 1e-3
    run = Recording.open(last.store).run
    assert [node["name"] for node in run["recovered"]["nodes"]] == names and run["boundary"] == last.solving.boundary


def test_what_a_layer_holds_is_shown_of_each_picture_in_the_originals_order(listener):
    # The labels are restored in their own order; the pictures are given in the other one.
    own, other = inversion().originals, Listener()
    dataclasses.replace(inversion(), client=Originals(own.pixels.flip(0), own.labels[::-1]))(other)
    tiles, turned = (
        {layer.name: layer.tiles for layer in heard.updates[-1].solving.layers}["layer4.0"]
        for heard in (listener, other)
    )
    assert len(tiles) == 2 and tiles[0] != tiles[1] and turned == tiles[::-1]


def test_a_stopped_run_goes_on_to_where_it_would_have_come_without_the_stop(monkeypatch):
    monkeypatch.setattr(Inversion, "INTERVAL", 0.0)
    whole, first, second = Listener(), Listener(enough=4), Listener()
    assert inversion(iterations=12)(whole) == "done"
    assert inversion(iterations=12)(first) == "stopped"
    last = first.updates[-1]
    assert last.kept is not None and 0 < last.step < 12 and first.sizes[-1] > last.kept.size
    going = dataclasses.replace(inversion(iterations=12), before=last.kept)
    assert going.cost < inversion(iterations=12).cost
    assert going(second) == "done"
    assert [solving.layers for solving in second.solving] == [last.solving.layers]
    end = second.updates[-1]
    assert end.pictures.consensus == whole.updates[-1].pictures.consensus and end.kept is None
    assert Recording.open(end.store).steps == Recording.open(whole.updates[-1].store).steps
    # The run that was stopped is as it was.
    assert Recording.open(last.store).run["status"] == "stopped"


def test_a_client_with_a_defence_shares_what_it_leaves_and_the_recording_says_so():
    own = inversion().originals
    config = AttackConfig.preset("matching", seeds=1, iterations=1)
    work = Inversion(small, dataclasses.replace(own, defences=("prune:0.9",)), config)
    plain, pruned = (originals.observed(small(), config) for originals in (own, work.originals))
    expected = prune(plain, 0.9)
    assert all(torch.equal(value, expected.gradients[name]) for name, value in pruned.gradients.items())
    assert not all(torch.equal(value, plain.gradients[name]) for name, value in pruned.gradients.items())
    listener = Listener()
    assert work(listener) == "done"
    assert Recording.open(listener.updates[-1].store).run["client"]["defences"] == ["prune:0.9"]


def test_a_gradient_that_was_taken_already_serves_unless_more_than_it_leaks():
    work, model = inversion(), small()
    taken = work.originals.observed(model, work.config)
    client = dataclasses.replace(work.originals, known=lambda: taken)
    assert client.observed(model, work.config) is taken
    assert client.observed(model, dataclasses.replace(work.config, bn="exact")).bn is not None
    assert client.observed(model, dataclasses.replace(work.config, bn="inferred")).mode == "train"
    pruned = dataclasses.replace(client, defences=("prune:0.9",)).observed(model, work.config)
    assert 0 < pruned.gradients["conv1.weight"].count_nonzero() < taken.gradients["conv1.weight"].count_nonzero()


def test_what_is_stopped_while_the_layers_are_solved_claims_nothing_of_those_below():
    listener = Listener(layers=3)
    assert inversion(iterations=1000)(listener) == "stopped"
    last = listener.updates[-1]
    assert last.step == 0 and len(last.solving.layers) == 2 and last.solving.boundary is None
    assert Recording.open(last.store).run["status"] == "stopped"


def test_a_network_that_is_searched_through_as_a_whole_solves_no_layers():
    listener = Listener()
    work = dataclasses.replace(inversion(), config=AttackConfig.preset("matching", seeds=1, iterations=2))
    assert work(listener) == "done"
    assert [solving.nodes for solving in listener.solving] == [()]
    last = listener.updates[-1]
    assert last.solving.boundary == "logits" and last.pictures.activations is None and last.pictures.distance > 0


def test_a_long_run_records_no_more_frames_than_it_should(monkeypatch):
    monkeypatch.setattr(Inversion, "INTERVAL", 0.0)
    monkeypatch.setattr(Inversion, "FRAMES", 2)
    listener = Listener()
    inversion(iterations=6)(listener)
    assert [update.step for update in listener.updates] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert Recording.open(listener.updates[-1].store).steps == [0, 3, 6]


def test_cost_and_check_of_an_inversion():
    work = inversion()
    assert work.cost == 2 * 32 * 32 * 3 * 2
    work.check()
    with pytest.raises(GradinvError, match="Choose at least one picture"):
        Inversion(work.load, Originals(work.originals.pixels[:0], ()), work.config).check()
    with pytest.raises(GradinvError, match="needs a class"):
        Inversion(work.load, Originals(work.originals.pixels, (3,)), work.config).check()


def test_a_shared_gradient_is_inverted_to_the_same_pictures_without_anything_to_compare_them_with(listener):
    own = inversion()
    observation = own.originals.observed(small(), own.config)
    given = Inversion(own.load, Shared(2, 32, lambda: observation), own.config)
    given.check()
    assert given.cost == own.cost and given.client.batch_size == 2 and given.originals is None
    without = Listener()
    assert given(without) == "done"
    last = without.updates[-1]
    assert sorted(last.pictures.consensus) == sorted(listener.updates[-1].pictures.consensus)
    assert without.updates[0].pictures.activations is None
    assert last.pictures.activations is not None and 0 < last.pictures.activations < 2
    assert last.pictures.distance is None  # no gradient is compared below a solved layer
    assert last.pictures.psnr == (None, None) and set(last.pictures.restored) == {3, 7}
    recording = Recording.open(last.store)
    assert recording.run["metrics"] is None and recording.run["labels"]["true"] is None
    assert not [name for name in last.store.names() if "original" in name]
    assert given.pictures(recording.snapshot(3)).restored == last.pictures.restored


def test_a_shared_gradient_that_is_gone_fails_the_run_in_one_sentence(manager):
    def gone() -> Observation:
        raise GradinvError("Bring it again.")

    work = Inversion(small, Shared(1, 1, gone), AttackConfig.preset("demo", seeds=1, iterations=1))
    state = ended(manager, manager.submit(work))
    assert (state.status, state.reason) == ("failed", "Bring it again.")
