"""The attack below a solved node: what its objective is, what runs where none is solved, and how it is searched."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading

import pytest
import torch
from conftest import objective_for, smooth, solved
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

from gradinv.attack.boundary import boundary_of, matching_instead, settled
from gradinv.attack.inversion import invert
from gradinv.attack.memory import estimate_memory
from gradinv.attack.objective import Objective
from gradinv.attack.optimiser import HISTORY, LBFGS
from gradinv.attack.state import RunState
from gradinv.attack.terms import KnownActivations, activation_distance, smooth_variation
from gradinv.client import observe
from gradinv.config import APART, AttackConfig
from gradinv.defenses import clip
from gradinv.execution.stepping import evaluate
from gradinv.models import ImageClass, Model
from gradinv.network import Segment, parts_of
from gradinv.types import GradinvError, Observation, Preprocessing, Recovered, SolvedNode

SIZE, CLASSES = 32, 5
NODES = ("maxpool", "layer1.0", "layer2.0.conv1", "layer2.0")
# The solved activations, a little smoothness, and nothing else.
BELOW = AttackConfig(
    seeds=2,
    iterations=24,
    gradient=0.0,
    boundary="layer1.0",
    activations=1.0,
    bn="none",
    tv=0.01,
    tv_form="smooth",
    l2=0.0,
    group=0.0,
    noise=0.0,
    optimiser="l-bfgs",
    start_scale=0.3,
)


@pytest.fixture
def model() -> Model:
    """A random ResNet of four blocks for 32-px images, with running statistics that are not the defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=64)
        network.train()
        with torch.no_grad():
            network(torch.randn(8, 3, SIZE, SIZE))
    network.eval()
    classes = tuple(ImageClass(f"n{i:08d}", f"class {i}") for i in range(CLASSES))
    return Model("resnet", network, "1" * 64, Preprocessing(SIZE, SIZE), classes, None)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Two smooth pictures (pixels in [0, 1]) and their labels."""
    return smooth(2, 1, 4, SIZE), torch.tensor([3, 1])


def known(model: Model, batch: tuple[Tensor, Tensor], scale: float = 1.0, error: float = 0.0) -> Recovered:
    """What would be solved of a batch whose labels are in this order: the true activations and cotangents."""
    pixels, labels = batch
    top = parts_of(model.network).nodes[-1]
    images = model.preprocessing.normalise(pixels).requires_grad_()
    values = Segment(model.network, top, NODES)(images)
    logits = model.final_layer(values[top].relu().mean((2, 3)))
    cotangents = torch.autograd.grad(scale * F.cross_entropy(logits, labels), [values[name] for name in NODES])
    nodes = tuple(
        SolvedNode(
            name=name,
            activation=values[name].detach().relu(),
            cotangent=cotangent,
            method="exact",
            error=torch.full((len(labels),), error),
            residual=0.0,
            equations=1,
            unknowns=1,
            mended=0.0,
            seconds=0.0,
        )
        for name, cotangent in zip(NODES, cotangents, strict=True)
    )
    features = values[top].relu().mean((2, 3)).detach()
    errors = (logits.softmax(1) - F.one_hot(labels, CLASSES)).detach()
    return Recovered(labels, "given", 1.0, features, errors, 0.0, scale, nodes[::-1], "Below there are no more.")


def change(config: AttackConfig, **changes: object) -> AttackConfig:
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


# --- the objective


@pytest.mark.parametrize("node", NODES)
def test_a_segments_gradient_is_the_whole_networks(model, batch, node):
    """At the true images, with the cotangent of its upper end: for all parameters below, also behind clipping."""
    observation = clip(observe(model, *batch), 0.1)
    scale = 0.1 / math.sqrt(sum(float(g.square().sum()) for g in observe(model, *batch).gradients.values()))
    config = change(BELOW, boundary=node, gradient=1.0, match="l2", activations=0.0)
    objective = Objective(model, observation, known(model, batch, scale), config)
    images = model.preprocessing.normalise(batch[0])
    found = objective.evaluate(images, images).gradients
    past = {name for name in observation.gradients if "layer2.0.downsample" in name and node == "layer2.0.conv1"}
    assert set(found) == set(parts_of(model.network).below(node)) | past
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, observation.gradients[name], rtol=1e-4, atol=1e-7)
    assert objective(images, images).raw["gradient"].item() < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activations": 0.0, "gradient": 1.0, "match": "cosine"},
        {"gradient": 1.0, "match": "l2", "boundary": "layer2.0.conv1"},
        {"gradient": 1.0, "match": "cosine", "layers": "layer1", "boundary": "maxpool", "tv_form": "paper"},
        {"bn": "approx", "bn_form": "relative", "bn_weight": 0.5},
        {"pooling": (2.0,), "group": 0.1},
    ],
    ids=str,
)
def test_a_segments_pixel_gradient_agrees_with_numerical_differences(model, batch, changes):
    pixels, labels = batch
    observation = observe(model, pixels, labels)
    model.network.double()
    pixels = pixels.double()
    config = change(BELOW, **changes)
    objective = Objective(model, observation, known(model, (pixels, labels)), config)
    if config.pooling:
        objective = objective.annealed(config.pooling[0], 0.7)
    generator = torch.Generator().manual_seed(5)
    images, group, direction = torch.randn(3, 2, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)

    def total(step: float) -> Tensor:
        return objective(images + step * direction, group).total

    slope = (evaluate(objective, images, group).gradient * direction).sum()
    numerical = (total(1e-7) - total(-1e-7)) / 2e-7
    torch.testing.assert_close(numerical.detach(), slope, rtol=1e-4, atol=1e-8)


def test_the_true_images_have_no_distance_to_the_solved_activations(model, batch):
    images = model.preprocessing.normalise(batch[0])
    objective = Objective(model, observe(model, *batch), known(model, batch), change(BELOW, boundary="maxpool"))
    raw = objective(images, images).raw
    assert set(raw) == {"activations", "tv"} and raw["activations"].item() < 1e-10
    assert objective(images.flip(0), images).raw["activations"].item() > 0.01


def test_the_true_images_have_none_either_where_activations_of_units_that_are_off_are_noise(model, batch):
    """As the convex step leaves them: small values where there is nothing. The cotangent tells which units are off."""
    exact, images = known(model, batch), model.preprocessing.normalise(batch[0])
    noise = torch.Generator().manual_seed(2)
    nodes = [
        dataclasses.replace(
            node, activation=node.activation + 1e-4 * torch.rand(node.activation.shape, generator=noise)
        )
        for node in exact.nodes
    ]
    values = Segment(model.network, nodes[0].name, NODES)(images)
    for node in nodes:
        distance = activation_distance(values, {node.name: KnownActivations.of(node, images)})
        assert distance.max() < 1e-5, node.name


@pytest.mark.parametrize("size", [1, 2])
def test_a_segment_in_micro_batches_is_the_whole(model, batch, size):
    config = change(BELOW, gradient=1.0, match="cosine", bn="approx", bn_weight=0.1, micro_batch=size)
    observation, recovered = observe(model, *batch), known(model, batch)
    images, group = torch.randn(2, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    one, other = (
        evaluate(Objective(model, observation, recovered, own), images, group)
        for own in (config, change(config, micro_batch=0))
    )
    assert ((one.gradient - other.gradient).norm() / other.gradient.norm()).item() < 1e-5
    torch.testing.assert_close(dict(one.raw), dict(other.raw), rtol=1e-5, atol=1e-6)


def test_activation_distance_by_hand():
    """Where a > 0 the pre-activation is compared, where a = 0 its positive part."""
    activation = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    node = SolvedNode("layer1.0", activation, None, "exact", torch.tensor([0.0, 0.2]), 0.0, 1, 1, 0.0, 0.0)
    values = torch.tensor([[3.0, -1.0, 2.0, -7.0], [1.0, 2.0, -1.0, 0.0]]).view(2, 1, 2, 2)
    one = KnownActivations.of(node, values, trusted=0.2)
    # (0 + 5² + 2² + 0) / 25 of the first; of the second 1 / 4 at half the weight.
    expected = (29 / 25 + 0.5 * 1 / 4) / 2
    assert activation_distance({"layer1.0": values}, {"layer1.0": one}).mean().item() == pytest.approx(expected)


def test_weak_channels_count_as_much_as_strong_ones():
    activation = torch.tensor([3.0, 4.0, 1.0, 0.0]).view(1, 2, 1, 2)
    node = SolvedNode("layer1.0", activation, None, "exact", torch.zeros(1), 0.0, 1, 1, 0.0, 0.0)
    values = activation + torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 2, 1, 2)
    # Mean squares 12.5 and 0.5, and a tenth of 6.5 more each.
    strong, weak = 1 / (12.5 + 0.65), 1 / (0.5 + 0.65)
    expected = (strong + weak) / (25 * strong + 1 * weak)
    one = KnownActivations.of(node, values)
    assert activation_distance({"layer1.0": values}, {"layer1.0": one}).mean().item() == pytest.approx(expected)


@pytest.mark.parametrize("spoilt", ["zeros", "infinite error", "not a number"])
def test_an_image_of_which_nothing_is_known_counts_nothing(spoilt):
    activation, error = torch.ones(2, 1, 2, 2), torch.zeros(2)
    if spoilt == "infinite error":
        error[0] = math.inf
    else:
        activation[0] = 0.0 if spoilt == "zeros" else math.nan
    node = SolvedNode("layer1.0", activation, None, "exact", error, 0.0, 1, 1, 0.0, 0.0)
    values = torch.full((2, 1, 2, 2), 3.0, requires_grad=True)
    distance = activation_distance(
        {"layer1.0": values}, {"layer1.0": KnownActivations.of(node, values.detach())}
    ).mean()
    (gradient,) = torch.autograd.grad(distance, values)
    assert distance.item() == pytest.approx(4 / 2) and not gradient[0].any() and gradient[1].all()


def test_smooth_variation_by_hand():
    config = AttackConfig(tv_chroma=7.0)
    grey = torch.zeros(1, 3, 2, 2)
    grey[0, :, 0, 0] = 1.0
    # Two differences of √3 · 0.2 of luma, of 12 values.
    expected = [2 * (math.hypot(3**0.5 * 0.2, 0.02) - 0.02) / 12]
    preprocessing = Preprocessing(2, 2, std=(0.2, 0.2, 0.2))
    assert smooth_variation(grey, preprocessing, config).tolist() == pytest.approx(expected)
    blue = torch.zeros(1, 3, 2, 2)
    blue[0, 2, 0, 0] = 1.0
    parts_of = [3**-0.5, 0.0, 7 * 2 * 6**-0.5]
    expected = [2 * sum(math.hypot(0.2 * part, 0.02) - 0.02 for part in parts_of) / 12]
    assert smooth_variation(blue, preprocessing, config).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("boundary", ["loss", "logits"])
def test_behind_clipping_the_true_images_explain_the_gradient(small_model, small_batch, boundary):
    """The client's rescaling is solved with the features, and multiplies the own gradient: 134 without that."""
    pixels, labels = small_batch
    observation = clip(observe(small_model, pixels, labels), 0.01)
    config = AttackConfig(boundary=boundary, match="l2", features=1.0, gradient=1.0, bn="none", seeds=1)
    images = small_model.preprocessing.normalise(pixels)
    recovered = solved(small_model, observation, labels, config)
    distance = Objective(small_model, observation, recovered, config)(images, images).raw["gradient"]
    unaware = dataclasses.replace(recovered, scale=1.0)
    without = Objective(small_model, observation, unaware, config)(images, images).raw["gradient"]
    assert recovered.scale < 0.1 and distance.item() < 1e-4 < 1e-3 * without.item()


# --- where the boundary is


def test_auto_is_the_lowest_node_that_is_solved_well_enough(model, batch):
    recovered = known(model, batch)
    auto = change(BELOW, boundary="auto")
    assert settled(model, recovered, auto) == change(BELOW, boundary="maxpool")
    rough = tuple(
        dataclasses.replace(node, error=torch.tensor([0.9, 0.9])) if node.name == "maxpool" else node
        for node in recovered.nodes
    )
    assert settled(model, dataclasses.replace(recovered, nodes=rough), auto).boundary == "layer1.0"


def test_where_no_node_is_solved_the_matching_preset_runs_with_what_was_chosen(model, batch):
    recovered = dataclasses.replace(known(model, batch), nodes=())
    config = AttackConfig.preset("demo", "resnet18-tiny", seeds=7, iterations=33, bn="exact", pooling=(1.0,) * 8)
    model = dataclasses.replace(model, name="resnet18-tiny")
    found = settled(model, recovered, config)
    assert found == AttackConfig.preset("matching", "resnet18-tiny", seeds=7, iterations=33, bn="exact")
    assert found == matching_instead(model, config)
    usual = settled(model, recovered, AttackConfig.preset("demo", "resnet18-tiny"))
    assert usual == AttackConfig.preset("matching", "resnet18-tiny") and usual.iterations == 800
    # Neither with labels that explain nothing, nor where only the last stage is solved.
    for doubtful in (
        dataclasses.replace(known(model, batch), residual=0.7),
        dataclasses.replace(recovered, nodes=(dataclasses.replace(known(model, batch).nodes[0], name="layer4.0"),)),
    ):
        assert settled(model, doubtful, config) == found
    unsolved = settled(model, dataclasses.replace(recovered, features=None, output_errors=None), config)
    assert (unsolved.boundary, unsolved.features) == ("loss", 0.0)


def test_seeds_meet_below_the_first_stage_only_and_what_was_chosen_stays(model, batch):
    recovered = known(model, batch)
    demo = AttackConfig.preset("demo")
    for boundary in ("maxpool", "layer1"):
        assert settled(model, recovered, change(demo, boundary=boundary)).meetings == demo.meetings != ()
    found = settled(model, recovered, change(demo, boundary="layer2"))
    assert found == change(demo, boundary="layer2.0", **APART) and found.meetings == ()
    chosen = change(demo, boundary="layer2", meetings=(0.5,))
    assert settled(model, recovered, chosen).meetings == (0.5,)


def test_the_control_and_other_boundaries_stay_as_they_are(model, batch):
    recovered = known(model, batch)
    control = change(BELOW, boundary="auto", activations=0.0)
    assert settled(model, dataclasses.replace(recovered, nodes=()), control) == change(control, boundary="loss")
    for boundary in ("loss", "logits"):
        assert settled(model, recovered, change(BELOW, boundary=boundary)).boundary == boundary
    assert settled(model, recovered, change(BELOW, boundary="layer2")).boundary == "layer2.0"


def test_a_node_that_is_not_solved_is_one_sentence(model, batch):
    sentence = (
        r"^The activations of layer3\.0 could not be solved, down to maxpool only \(Below .*\); set boundary to auto"
    )
    with pytest.raises(GradinvError, match=sentence):
        settled(model, known(model, batch), change(BELOW, boundary="layer3"))
    with pytest.raises(GradinvError, match=r"has no node 'layer3\.7'"):
        settled(model, known(model, batch), change(BELOW, boundary="layer3.7"))


def test_the_images_are_held_to_the_boundary_and_its_blocks_output(model, batch):
    recovered = known(model, batch)

    def held(boundary: str) -> list[str]:
        return [node.name for node in boundary_of(model, recovered, change(BELOW, boundary=boundary)).solved]

    assert held("layer1.0") == ["layer1.0"]
    assert held("layer2.0.conv1") == ["layer2.0.conv1", "layer2.0"]


def test_without_a_cotangent_the_next_one_above_is_pulled_back(model, batch):
    recovered = known(model, batch)
    nodes = tuple(
        dataclasses.replace(node, cotangent=None) if node.name == "layer1.0" else node for node in recovered.nodes
    )
    config = change(BELOW, gradient=1.0, match="l2")
    objective = Objective(model, observe(model, *batch), dataclasses.replace(recovered, nodes=nodes), config)
    images = model.preprocessing.normalise(batch[0])
    assert "layer2.0.conv1.weight" in objective.evaluate(images, images).gradients
    assert objective(images, images).raw["gradient"].item() < 1e-4
    without = tuple(dataclasses.replace(node, cotangent=None) for node in recovered.nodes)
    with pytest.raises(GradinvError, match=r"^No cotangent is known at or above layer1\.0; set gradient to 0"):
        Objective(model, observe(model, *batch), dataclasses.replace(recovered, nodes=without), config)


def test_only_a_nodes_segment_has_a_soft_maximum(small_model, small_batch):
    config = AttackConfig(pooling=(1.0, 0.0))
    with pytest.raises(GradinvError, match=r"^The stem's maximum is softened where a node is the boundary only"):
        objective_for(small_model, observe(small_model, *small_batch), small_batch[1], config)


def test_memory_is_that_of_whatever_may_run(small_model):
    auto = AttackConfig.preset("demo", layers="all")
    either = (change(auto, boundary="layer1"), matching_instead(small_model, auto))
    assert estimate_memory(small_model, 4, auto) == max(estimate_memory(small_model, 4, own) for own in either)


# --- the search


@pytest.fixture
def observation(model: Model, batch: tuple[Tensor, Tensor]) -> Observation:
    return observe(model, *batch)


def test_the_search_finds_the_pictures_and_its_objective_never_rises(model, batch, observation):
    config = change(BELOW, iterations=150, seeds=1, boundary="maxpool", tv=0.0)
    snapshots = list(invert(model, observation, config, every=1, recovered=known(model, batch)))
    assert snapshots[-1].boundary == "maxpool"
    values = [snapshot.terms["activations"].raw[0] for snapshot in snapshots[1:]]
    best = list(itertools.accumulate(values, min))
    assert best[-1] < 0.02 * best[0]
    off = [float((snapshot.consensus - batch[0]).square().mean()) for snapshot in snapshots]
    assert off[-1] < 0.3 * off[0]


ANNEALED = change(
    BELOW, pooling=(0.5, 2.0, 0.0), tv_schedule=(1.0, 0.5, 0.2), group=0.01, stages=(0.5, 0.5), meetings=(0.7,)
)


def test_a_run_resumed_after_any_step_ends_with_the_same_bits(model, batch, observation, tmp_path):
    """Also in the last step before a stage begins and in the first one after."""
    config, recovered = change(ANNEALED, stepping="traced"), known(model, batch)
    whole = list(invert(model, observation, config, every=1, recovered=recovered))
    for step in (0, 7, 8, 12, 16, 17):
        stream = invert(model, observation, config, every=1, recovered=recovered)
        for snapshot in stream:
            if snapshot.step == step:
                break
        (tmp_path / "state").write_bytes(stream.state().pack())
        stream.close()
        state = RunState.load(tmp_path / "state")
        resumed = list(invert(model, observation, config, every=1, resume=state, recovered=recovered))
        assert [s.step for s in resumed] == list(range(step, 25))
        for again, first in zip(resumed, whole[step:], strict=True):
            assert torch.equal(again.seeds, first.seeds)
        assert [s.terms for s in resumed[1:]] == [s.terms for s in whole[step + 1 :]]


def test_a_run_stopped_within_a_step_is_resumed(model, batch, observation):
    config, recovered = change(ANNEALED, stepping="eager"), known(model, batch)
    *_, whole = invert(model, observation, config, recovered=recovered)
    convolve = model.network.conv1.forward
    for at in (0, 3, 16, 33, 34):  # two evaluations a step; the ninth begins a stage, after the 17th they meet
        stop, calls = threading.Event(), itertools.count()

        def counted(x, at=at, stop=stop, calls=calls):
            if next(calls) == at:
                stop.set()
            return convolve(x)

        stream = invert(model, observation, config, stop=stop, recovered=recovered)
        model.network.conv1.forward = counted
        *_, last = stream
        del model.network.conv1.forward
        assert stop.is_set() and last.step == (at + 1) // 2
        *_, resumed = invert(model, observation, config, resume=stream.state(), recovered=recovered)
        assert torch.equal(resumed.seeds, whole.seeds)


@pytest.mark.parametrize("optimiser", ["l-bfgs", "adam"])
def test_seeds_that_meet_go_on_from_their_mean(model, batch, observation, optimiser):
    recovered = known(model, batch)
    apart = change(BELOW, optimiser=optimiser, iterations=8)

    def seeds_of(config: AttackConfig) -> list[Tensor]:
        return [s.seeds for s in invert(model, observation, config, every=1, recovered=recovered)]

    never, met = seeds_of(apart), seeds_of(change(apart, meetings=(0.5,), meeting_scale=0.0))
    for one, other in zip(never[:4], met[:4], strict=True):
        assert torch.equal(one, other)
    # Means are of normalised images, which the pixels in [0, 1] are up to rounding.
    torch.testing.assert_close(met[4], never[4].mean(0).expand_as(met[4]), atol=1e-5, rtol=0)
    assert torch.equal(met[8][0], met[8][1]) and not torch.equal(met[8], met[4])
    told = change(apart, meetings=(0.5,), iterations=2)
    assert [s.meetings for s in invert(model, observation, told, recovered=recovered)] == [(1,), (1,)]
    noisy = seeds_of(change(apart, meetings=(0.5,), meeting_scale=0.3))
    apart_by = (noisy[4][0] - noisy[4][1]).std()
    assert 0.01 < apart_by < 0.2  # 0.3 · √2 in normalised units, of pixels that end at 0 and 1
    alone = change(apart, seeds=1)
    for one, other in zip(seeds_of(alone), seeds_of(change(alone, meetings=(0.5,))), strict=True):
        assert torch.equal(one, other)


def test_a_state_of_adam_is_not_one_of_l_bfgs(model, batch, observation):
    stream = invert(model, observation, BELOW, recovered=known(model, batch))
    next(stream)
    state = stream.state()
    tensors = {name: value for name, value in state.tensors.items() if not name.startswith("lbfgs.")}
    with pytest.raises(GradinvError, match="is that of another run"):
        invert(
            model, observation, BELOW, resume=dataclasses.replace(state, tensors=tensors), recovered=known(model, batch)
        )


def test_annealing_is_seen_in_the_terms(model, batch, observation):
    """Each stage has its own weight of total variation, and the last one the true maximum."""
    config = change(BELOW, seeds=1, iterations=6, pooling=(0.5, 2.0, 0.0), tv_schedule=(1.0, 0.5, 0.25))
    recovered = known(model, batch)
    snapshots = list(invert(model, observation, config, every=1, recovered=recovered))
    shares = [s.terms["tv"].weighted[0] / s.terms["tv"].raw[0] for s in snapshots[1:]]
    assert shares == pytest.approx([0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025])
    objective = Objective(model, observation, recovered, config)
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    soft, sharp, exact = (objective.annealed(beta, 1.0)(images, images).raw["activations"] for beta in (0.5, 500, None))
    assert (sharp - exact).abs() < 1e-2 * exact and (soft - exact).abs() > 0.1 * exact


def test_values_that_are_not_finite_end_the_run_with_a_sentence(model, batch, observation):
    stream = invert(model, observation, change(BELOW, stepping="eager"), every=1, recovered=known(model, batch))
    next(stream), next(stream)
    with torch.no_grad():
        model.network.conv1.weight.fill_(math.nan)
    with pytest.raises(GradinvError, match=r"^The objective stopped being finite at iteration 2\d;"):
        list(stream)


def test_each_image_is_searched_for_on_its_own_where_no_term_mixes_them(model, batch, observation):
    recovered, config = known(model, batch), change(BELOW, seeds=1)
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    objective = Objective(model, observation, recovered, config)
    found = evaluate(objective, images, images)
    assert objective.separable and found.parts.shape == (2,)
    assert found.parts.sum().item() == pytest.approx(objective(images, images).total.item())
    changed = torch.cat([images[:1], images.flip(0)[1:]])
    assert torch.allclose(evaluate(objective, changed, images).parts[0], found.parts[0])
    for mixing in ({"l2": 0.1}, {"group": 0.1, "seeds": 2}, {"gradient": 1.0}, {"tv_form": "rgb"}):
        other = Objective(model, observation, recovered, change(config, **mixing))
        assert not other.separable and evaluate(other, images, images).parts.shape == (1,)
    stream = invert(model, observation, config, recovered=recovered)
    next(stream)
    assert stream.state().tensors["lbfgs.numbers"].shape == (1, 2 * 6)


# --- L-BFGS alone


def searched(function, steps: int, size: int = 4) -> tuple[LBFGS, list[float]]:
    """Minimise a function of pixels (1, 3, size, size), of two seeds with different starts."""
    preprocessing = Preprocessing(size, size)
    starts = torch.randn(2, 1, 3, size, size, generator=torch.Generator().manual_seed(0))
    optimiser = LBFGS(preprocessing, starts * 0.2, separable=False)
    best = []
    for step in range(steps):
        gradients, values = [], []
        for images in optimiser.trial:
            leaf = images.clone().requires_grad_()
            value = function(leaf * torch.tensor(preprocessing.std).view(3, 1, 1), step)
            gradients.append(torch.autograd.grad(value, leaf)[0])
            values.append(value.detach().view(1))
        gradient = torch.stack(gradients)
        assert optimiser.usable(gradient, torch.stack(values))
        optimiser.step(gradient, torch.stack(values), 0.0)
        best.append(max(optimiser._numbers[:, 0].tolist()))
    return optimiser, best


def test_a_badly_scaled_valley_is_followed_to_its_bottom():
    scale = torch.logspace(0, 3, 48).view(1, 3, 4, 4)
    _, best = searched(lambda pixels, _: (scale * (pixels - 0.1).square()).sum(), 60)
    assert best[-1] < 1e-4 * best[0] and all(a >= b * (1 - 1e-6) for a, b in itertools.pairwise(best))


def test_a_corner_is_no_end():
    """Where no step goes down the point stays, and the run goes on."""
    optimiser, best = searched(lambda pixels, _: (pixels - 0.1).abs().sum(), 6 * HISTORY)
    assert best[-1] < 0.05 * best[0] and all(a >= b * (1 - 1e-6) for a, b in itertools.pairwise(best))
    assert optimiser.images.isfinite().all()


def test_a_value_that_is_not_finite_is_a_step_too_far():
    def holed(pixels: Tensor, step: int) -> Tensor:
        value = (pixels - 0.1).square().sum()
        return value / 0 if step in (3, 4, 9) else value

    _, best = searched(holed, 40)
    assert best[-1] < 1e-4 * best[0]
