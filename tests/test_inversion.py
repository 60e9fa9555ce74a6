from __future__ import annotations

import dataclasses
import itertools
import math
import threading

import pytest
import torch
from conftest import PLAIN

from gradinv.attack.inversion import invert
from gradinv.attack.memory import estimate_memory
from gradinv.attack.optimiser import upsample
from gradinv.attack.state import RunState, Stage, learning_rate, stage_plan
from gradinv.client import observe
from gradinv.config import AttackConfig
from gradinv.execution.stepping import resolve_mode
from gradinv.metrics import constant_colour, pair, psnr
from gradinv.types import BatchNormStatistics, GradinvError

CONFIG = dataclasses.replace(PLAIN, seeds=2, iterations=60, optimiser_step="sign", projection=True)


def test_reconstruction_beats_its_start_by_4_db_and_a_constant_colour_by_1(small_model, small_batch, observation):
    pixels, labels = small_batch
    first, *_, last = invert(small_model, observation, dataclasses.replace(CONFIG, iterations=200))
    order = pair(last.consensus, last.labels, pixels, labels.tolist())
    reached = psnr(last.consensus[order], pixels)
    assert (reached - psnr(first.consensus[order], pixels)).mean() > 4
    assert (reached - psnr(constant_colour(pixels), pixels)).mean() > 1
    assert max(last.distance) < 0.1
    assert sorted(last.labels) == sorted(labels.tolist())


def test_snapshots_come_as_asked_and_are_self_contained(small_model, observation):
    snapshots = list(invert(small_model, observation, CONFIG, every=25))
    assert [snapshot.step for snapshot in snapshots] == [0, 25, 50, 60]
    assert [snapshot.final for snapshot in snapshots] == [False, False, False, True]
    assert snapshots[0].terms == {} and snapshots[0].distance == ()
    last = snapshots[-1]
    assert last.seeds.shape == (2, 3, 3, 8, 8) and last.consensus.shape == (3, 3, 8, 8)
    assert last.steps == 60 and set(last.terms) == {"gradient", "tv"}
    assert last.terms["tv"].weighted == tuple(0.02 * value for value in last.terms["tv"].raw)
    assert last.distance == last.terms["gradient"].raw and len(last.distance) == 2
    for snapshot in snapshots:
        assert not snapshot.seeds.requires_grad
        assert snapshot.seeds.min() >= 0 and snapshot.seeds.max() <= 1
    assert not torch.equal(snapshots[1].seeds, last.seeds), "a snapshot must not change with the run"
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(snapshots))


def test_interval_of_zero_seconds_shows_every_step(small_model, observation):
    config = dataclasses.replace(CONFIG, iterations=4)
    assert [s.step for s in invert(small_model, observation, config, interval=0)] == [0, 1, 2, 3, 4]


def test_same_config_gives_the_same_images_whatever_the_snapshots(small_model, observation):
    config = dataclasses.replace(CONFIG, iterations=10, noise=0.2, stages=(0.5, 0.5), group=0.1, features=0.5)
    *_, first = invert(small_model, observation, config)
    torch.manual_seed(123)
    *_, second = invert(small_model, observation, config, every=1)
    *_, other = invert(small_model, observation, dataclasses.replace(config, seed=1))
    assert torch.equal(first.seeds, second.seeds)
    assert not torch.equal(first.seeds, other.seeds)


def test_seeds_side_by_side_give_the_images_of_one_after_the_other(small_model, observation):
    """Through coarse stages, with noise and a group: to rounding, which the sign of a gradient lets grow."""
    config = dataclasses.replace(CONFIG, seeds=3, iterations=20, noise=0.2, stages=(0.5, 0.5), group=0.1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        reached = [
            [*invert(small_model, observation, dataclasses.replace(config, parallel_seeds=count))][-1]
            for count in (1, 2, 0)
        ]
    finally:
        torch.set_num_threads(before)
    assert [snapshot.parallel_seeds for snapshot in reached] == [1, 2, 2]
    assert {snapshot.stepping for snapshot in reached} == {resolve_mode("auto", small_model.device)}
    alone, two, chosen = (snapshot.seeds for snapshot in reached)
    assert torch.equal(two, chosen)
    assert (alone - two).abs().mean() < 1e-3


def test_a_seed_does_not_depend_on_how_many_others_there_are(small_model, observation):
    config = dataclasses.replace(CONFIG, iterations=5, noise=0.2)
    *_, two = invert(small_model, observation, config)
    *_, one = invert(small_model, observation, dataclasses.replace(config, seeds=1))
    assert torch.equal(two.seeds[0], one.seeds[0])
    assert not torch.equal(two.seeds[0], two.seeds[1])


def test_the_group_term_pulls_seeds_together(small_model, observation):
    def spread(group: float) -> float:
        config = dataclasses.replace(CONFIG, iterations=30, group=group)
        *_, last = invert(small_model, observation, config)
        return float((last.seeds - last.consensus).square().mean())

    assert spread(0.1) < 0.5 * spread(0.0)


# Of twelve steps, before layers were solved: the terms of both seeds; the seeds' mean and deviation, two pixels.
FROZEN: dict[str, tuple[dict[str, tuple[float, float]], tuple[float, ...]]] = {
    "paper": (
        {
            "gradient": (5.0232964, 5.8780851),
            "bn": (0.5536986, 0.5379248),
            "tv": (126.1387329, 130.1121368),
            "l2": (24.6203785, 25.0004292),
            "group": (12.0194149, 12.0194149),
        },
        (0.451016, 0.228031, 0.0, 0.752192),
    ),
    "matching": (
        {
            "features": (0.0323566, 0.0870072),
            "gradient": (0.1622872, 0.2395033),
            "bn": (0.9948112, 1.0952187),
            "tv": (0.6639817, 0.6103625),
        },
        (0.4459, 0.118951, 0.442555, 0.334563),
    ),
}


@pytest.mark.parametrize("preset", FROZEN)
def test_gradient_matching_gives_what_it_always_gave(small_model, small_batch, preset):
    observation = observe(small_model, *small_batch, share_bn=True)
    config = AttackConfig.preset(preset, seeds=2, iterations=12, layers="all", stepping="eager")
    *_, last = invert(small_model, observation, config)
    terms, pixels = FROZEN[preset]
    assert set(last.terms) == set(terms) and last.boundary == {"paper": "loss", "matching": "logits"}[preset]
    for name, values in terms.items():
        assert last.terms[name].raw == pytest.approx(values, rel=1e-4)
    seeds, consensus = last.seeds, last.consensus
    found = (seeds.mean().item(), seeds.std().item(), consensus[0, 0, 0, 0].item(), consensus[2, 1, 5, 3].item())
    assert found == pytest.approx(pixels, abs=1e-4)


def test_stop_ends_within_one_evaluation(small_model, observation):
    stop = threading.Event()
    stream = invert(small_model, observation, CONFIG, every=3, stop=stop)
    seen = [next(stream), next(stream)]
    stop.set()
    seen += stream
    assert [s.step for s in seen] == [0, 3] and not seen[-1].final


def test_stop_between_snapshots_still_yields_what_was_reached(small_model, observation):
    stop = threading.Event()
    calls = itertools.count()
    forward = small_model.network.forward

    def counted(x):
        if next(calls) == 9:
            stop.set()
        return forward(x)

    # A recorded step would not call the network; the estimate of the memory would.
    stream = invert(small_model, observation, dataclasses.replace(CONFIG, stepping="eager"), stop=stop)
    small_model.network.forward = counted
    *_, last = stream
    # Two seeds take turns: the tenth evaluation is the second of step 5, which is completed.
    assert last.step == 5


def test_network_and_its_statistics_are_unchanged(small_model, observation):
    before = {name: value.clone() for name, value in small_model.network.state_dict().items()}
    list(invert(small_model, observation, dataclasses.replace(CONFIG, iterations=2)))
    assert all(torch.equal(value, before[name]) for name, value in small_model.network.state_dict().items())
    assert all(parameter.grad is None for parameter in small_model.network.parameters())


def test_coarse_to_fine_plan_and_sizes(small_model, observation):
    config = dataclasses.replace(CONFIG, stages=(0.25, 0.3, 0.45), iterations=20)
    assert stage_plan(config, 64) == [Stage(0, 16), Stage(5, 32), Stage(11, 64)]
    assert stage_plan(CONFIG, 64) == [Stage(0, 64)]
    annealed = dataclasses.replace(CONFIG, stages=(0.5, 0.5), iterations=20, pooling=(0.3, 2.0, 0.0, 0.0))
    assert stage_plan(annealed, 64) == [
        *(Stage(0, 32, 0.3), Stage(5, 32, 2.0)),
        *(Stage(10, 64), Stage(15, 64)),
    ]
    alone = dataclasses.replace(CONFIG, iterations=10, tv_schedule=(1.0, 0.5, 0.1))
    assert stage_plan(alone, 64) == [Stage(0, 64), Stage(3, 64, None, 0.5), Stage(7, 64, None, 0.1)]
    for snapshot in invert(small_model, observation, config, every=1):
        assert snapshot.seeds.shape[-1] == 8


def test_upsampling_keeps_a_flat_image_and_the_batch_axes():
    flat = torch.full((2, 1, 3, 4, 4), 0.5)
    assert torch.equal(upsample(flat, 8), torch.full((2, 1, 3, 8, 8), 0.5))
    assert upsample(flat, 4) is flat


def test_learning_rate_warms_up_and_decays():
    config = AttackConfig(iterations=1000, warmup=50, learning_rate=0.1)
    assert learning_rate(0, config) == pytest.approx(0.1 / 50)
    assert learning_rate(49, config) == learning_rate(50, config) == pytest.approx(0.1)
    assert learning_rate(525, config) == pytest.approx(0.05)
    assert learning_rate(999, config) < 1e-5
    # A short run warms up for a tenth of it.
    assert learning_rate(1, dataclasses.replace(config, iterations=20)) == pytest.approx(0.1)


def broken(observation, name, value):
    return dataclasses.replace(observation, gradients={**observation.gradients, name: value})


def test_observations_that_do_not_fit_are_refused_in_one_sentence(small_model, small_batch, observation):
    nan = observation.gradients["conv1.weight"].clone()
    nan[0, 0, 0, 0] = math.nan
    wrapped = {**observation.gradients, "module.fc.weight": torch.zeros(6, 16)}
    zero = {name: torch.zeros_like(value) for name, value in observation.gradients.items()}
    shape = small_model.preprocessing
    train = observe(small_model, *small_batch, share_bn=True, mode="train")

    def changed(**changes):
        return dataclasses.replace(observation, **changes)

    cases = [
        (broken(observation, "conv1.weight", nan), "gradient of conv1.weight holds values that are not finite"),
        (broken(observation, "bn1.weight", torch.zeros(3)), r"bn1.weight has the shape \(3,\) instead of \(8,\)"),
        (broken(observation, "bn1.weight", torch.ones(8, dtype=torch.int64)), "bn1.weight holds torch.int64; float"),
        (broken(observation, "bn1.weight", torch.ones(8).to(torch.float8_e5m2)), "bn1.weight holds torch.float8_e5m2"),
        (changed(gradients=wrapped), "a gradient of module.fc.weight, which small does not have"),
        (changed(gradients=zero), "Every gradient of the observation is zero"),
        (changed(model_sha256="f" * 64), r"other weights of small \(sha256 ffffffff…\) .* \(sha256 00000000…\)"),
        (changed(model_name="large", model_sha256="f" * 64), "is of the network large .*, not of small .*; load that"),
        (changed(preprocessing=dataclasses.replace(shape, size=16)), "of 16-px images, the model is set to 8 px"),
        (changed(mode="training"), "must be eval or train, not 'training'"),
        (changed(mode=None), "must be eval or train, not None"),
        (changed(running=train.running), "its forward mode is eval, in which none are kept"),
        (changed(batch_size=7), "between 1 and the 6 classes, not 7"),
    ]
    for kind, whose in (("bn", "batch"), ("running", "running")):
        given = getattr(train, kind)

        def with_statistics(mean=given.mean, var=given.var, kind=kind):
            return dataclasses.replace(train, **{kind: BatchNormStatistics(mean, var)})

        cases += [
            (with_statistics(mean={"bn1": given.mean["bn1"]}), f"{whose} statistics lack the mean of the BN layer bn2"),
            (with_statistics(var={}), f"{whose} statistics lack the variance of the BN layer bn1 and 1 more"),
            (with_statistics(mean={**given.mean, "bn9": torch.ones(1)}), f"{whose} statistics name a BN layer bn9"),
            (
                with_statistics(var={**given.var, "bn1": torch.ones(5)}),
                rf"{whose} variance of the BN layer bn1 has the shape \(5,\) instead of \(8,\)",
            ),
            (
                with_statistics(mean={**given.mean, "bn1": given.mean["bn1"] * math.nan}),
                f"{whose} mean of the BN layer bn1 holds values that are not finite",
            ),
            (with_statistics(var={**given.var, "bn2": -given.var["bn2"]}), f"{whose} variance .* bn2 is negative"),
        ]
    for wrong, sentence in cases:
        with pytest.raises(GradinvError, match=sentence) as refused:
            invert(small_model, wrong, CONFIG)
        assert str(refused.value).count(". ") == 0 and str(refused.value).endswith(".")


def test_a_client_in_train_mode_is_inverted_and_its_batch_statistics_help(small_model, small_batch):
    """What the batch's own statistics take away (the images' level), only they can give back."""
    pixels, labels = small_batch
    before = {name: value.clone() for name, value in small_model.network.state_dict().items()}
    shared = observe(small_model, pixels, labels, share_bn=True, mode="train")
    reached = {}
    for bn in ("approx", "exact", "inferred", "none"):
        config = dataclasses.replace(CONFIG, iterations=200, bn=bn, bn_form="relative", bn_weight=0.1, seeds=1)
        *_, last = invert(small_model, shared, config)
        reached[bn] = psnr(last.consensus[pair(last.consensus, last.labels, pixels, labels.tolist())], pixels).mean()
        assert max(last.distance) < 0.4
        assert all(torch.equal(value, before[name]) for name, value in small_model.network.state_dict().items())
    assert min(reached["exact"], reached["inferred"]) > max(reached["none"], reached["approx"]) + 2


def test_more_seeds_than_memory_allows_are_refused_before_the_start(small_model, observation):
    config = dataclasses.replace(CONFIG, seeds=10**12)
    with pytest.raises(GradinvError, match="take fewer seeds or a smaller batch"):
        invert(small_model, observation, config)
    assert estimate_memory(small_model, 3, config) > 10**12 * 3 * 3 * 64 * 4


def test_an_objective_that_stops_being_finite_ends_the_run_with_a_sentence(small_model, observation):
    stream = invert(small_model, observation, CONFIG, every=1)
    next(stream), next(stream)
    with torch.no_grad():
        small_model.network.fc.weight.fill_(math.nan)
    with pytest.raises(GradinvError, match="stopped being finite at iteration 2"):
        next(stream)


RESUMABLE = dataclasses.replace(
    CONFIG,
    iterations=12,
    noise=0.2,
    group=0.1,
    registration="affine",
    registration_start=0.15,
    registration_interval=0.25,
    stages=(0.25, 0.25, 0.5),
    features=0.5,
    optimiser_step="gradient",
)


@pytest.mark.parametrize("changes", [{}, {"projection": False, "optimiser_step": "sign", "registration": "lazy"}])
def test_a_run_resumed_after_any_step_ends_with_the_same_bits(small_model, observation, changes, tmp_path, monkeypatch):
    """Also in the last step before a stage begins and in the first one after, and between two registrations."""
    config = dataclasses.replace(RESUMABLE, **changes)
    whole = list(invert(small_model, observation, config, every=1))
    for step in (0, 2, 3, 6, 12):
        stream = invert(small_model, observation, config, every=1)
        for snapshot in stream:
            if snapshot.step == step:
                break
        (tmp_path / "state").write_bytes(stream.state().pack())
        stream.close()
        torch.manual_seed(step)
        state = RunState.load(tmp_path / "state")
        assert state.step == step and state.seconds == snapshot.seconds
        resumed = list(invert(small_model, observation, config, every=1, resume=state))
        assert [s.step for s in resumed] == list(range(step, 13))
        assert resumed[0].seconds >= state.seconds
        for again, first in zip(resumed, whole[step:], strict=True):
            assert torch.equal(again.seeds, first.seeds) and torch.equal(again.consensus, first.consensus)
        assert [s.terms for s in resumed[1:]] == [s.terms for s in whole[step + 1 :]]
        # It can be resumed from once more: the run did not go on in it.
        *_, last = invert(small_model, observation, config, resume=state)
        assert torch.equal(last.seeds, whole[-1].seeds)


def test_a_run_stopped_within_a_step_is_resumed(small_model, observation):
    """Whatever that step had begun (a stage, a registration) is done again or kept, never twice."""
    config = dataclasses.replace(RESUMABLE, stepping="eager")  # a recorded step does not call the network
    *_, whole = invert(small_model, observation, config)
    for at in (2, 6, 7, 13, 20):
        stop, calls = threading.Event(), itertools.count()
        forward = small_model.network.forward

        def counted(x, at=at, stop=stop, calls=calls, forward=forward):
            if next(calls) == at:
                stop.set()
            return forward(x)

        small_model.network.forward = counted
        stream = invert(small_model, observation, config, stop=stop)
        *_, last = stream
        del small_model.network.forward
        assert stop.is_set() and not last.final
        *_, resumed = invert(small_model, observation, config, resume=stream.state())
        assert torch.equal(resumed.seeds, whole.seeds)


def test_states_that_cannot_be_resumed_from(small_model, observation, tmp_path):
    stream = invert(small_model, observation, RESUMABLE, every=1)
    with pytest.raises(RuntimeError, match="from its first snapshot on"):
        stream.state()
    next(stream), next(stream)
    state = stream.state()
    images = state.tensors["images"]
    for wrong in (
        dataclasses.replace(state, step=99),
        dataclasses.replace(state, tensors={}),
        dataclasses.replace(state, tensors={**state.tensors, "images": images[:, :1]}),
        dataclasses.replace(state, tensors={**state.tensors, "images": images.repeat(1, 1, 1, 8, 8)}),
        dataclasses.replace(state, tensors={**state.tensors, "generator.1": torch.zeros(3, dtype=torch.uint8)}),
    ):
        with pytest.raises(GradinvError, match=r"is that of another run \(.*\); start this one again\."):
            invert(small_model, observation, RESUMABLE, resume=wrong)
    path = tmp_path / "state.safetensors"
    with pytest.raises(GradinvError, match="There is no saved state"):
        RunState.load(path)
    packed = state.pack()
    for torn in (b"", packed[: len(packed) // 2], packed[:100], b"text"):
        path.write_bytes(torn)
        with pytest.raises(GradinvError, match="is damaged"):
            RunState.load(path)
    observation.save(path)
    with pytest.raises(GradinvError, match="is damaged"):
        RunState.load(path)


@pytest.mark.parametrize("preset", ["paper", "matching"])
def test_how_a_step_is_executed_does_not_change_it(small_model, observation, preset):
    changes = {"seeds": 2, "iterations": 12, "layers": "all", "registration_start": 0.3}
    runs = []
    for stepping in ("eager", "traced"):
        config = AttackConfig.preset(preset, **changes, stepping=stepping)
        runs.append(list(invert(small_model, observation, config, every=3)))
    for eager, traced in zip(*runs, strict=True):
        assert torch.equal(eager.seeds, traced.seeds) and eager.terms == traced.terms
