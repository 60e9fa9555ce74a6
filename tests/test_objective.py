from __future__ import annotations

import dataclasses
import gc
import math
import weakref

import pytest
import torch
from conftest import objective_for

from gradinv.attack.objective import matched_parameters
from gradinv.attack.terms import (
    absolute_variation,
    bn_distance,
    cosine_distance,
    feature_distance,
    group_distance,
    l2_distance,
    layer_cosine_distance,
    luma_chroma_variation,
    paper_variation,
    relative_bn_distance,
)
from gradinv.batchnorm import (
    batch_statistics,
    forward_mode,
    inferred_statistics,
    running_statistics,
    samples_per_layer,
)
from gradinv.client import observe
from gradinv.config import AttackConfig
from gradinv.models import load_model
from gradinv.types import BatchNormStatistics, GradinvError, Preprocessing


def test_l2_distance_is_a_sum_of_norms_that_are_not_squared():
    found = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[1.0]])}
    target = {"a": torch.tensor([0.0, 4.0]), "b": torch.tensor([[-1.0]])}
    assert l2_distance(found, target).item() == pytest.approx(5 + 2)


def test_cosine_distances_by_hand():
    found = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([2.0])}
    target = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([2.0])}
    # Together: (0 + 4) / (√5 · √5); layer by layer: 0 and 1.
    assert cosine_distance(found, target).item() == pytest.approx(1 - 4 / 5)
    assert layer_cosine_distance(found, target).item() == pytest.approx(0.5)


def test_cosine_backward_agrees_with_numerical_differences():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (5, 7))
    target = {"a": first.flip(0) + 0.1, "b": second**2}
    assert torch.autograd.gradcheck(
        lambda a, b: cosine_distance({"a": a, "b": b}, target), (first.requires_grad_(), second.requires_grad_())
    )


def test_cosine_of_a_gradient_that_vanished_is_finite():
    zero = torch.zeros(3, requires_grad=True)
    distance = cosine_distance({"a": zero}, {"a": torch.ones(3)})
    (gradient,) = torch.autograd.grad(distance, zero)
    assert distance.item() == 1
    assert torch.isfinite(distance) and not torch.isnan(gradient).any()


def test_variations_by_hand():
    image = torch.zeros(1, 3, 2, 2)
    image[0, :, 0, 0] = 1.0
    # Maps over three equal channels: right (1, 0), down (1, 0), one diagonal 1, the other 0.
    assert paper_variation(image).item() == pytest.approx(3 * math.sqrt(3))
    assert absolute_variation(image).item() == pytest.approx(0.5 + 0.5)


def test_luma_chroma_variation_by_hand():
    preprocessing = Preprocessing(2, 2, std=(0.2, 0.2, 0.2))
    grey = torch.zeros(1, 3, 2, 2)
    grey[0, :, 0, 0] = 1.0
    config = AttackConfig(tv_chroma=7.0)
    assert luma_chroma_variation(grey, preprocessing, config).item() == pytest.approx(1.0)
    red = torch.zeros(1, 3, 2, 2)
    red[0, 0, 0, 0] = 1.0
    # Luma 1/3, chroma 1/2 and 1/4 of a unit.
    expected = 1 / 3 + 7 * (1 / 2 + 1 / 4)
    assert luma_chroma_variation(red, preprocessing, config).item() == pytest.approx(expected)


def test_bn_distances_by_hand():
    target = BatchNormStatistics({"bn": torch.tensor([3.0, 4.0])}, {"bn": torch.tensor([2.0, 0.0])})
    means, variances = {"bn": torch.tensor([0.0, 0.0])}, {"bn": torch.tensor([3.0, 0.0])}
    assert bn_distance(means, variances, target).item() == pytest.approx(5 + 1)
    assert relative_bn_distance(means, variances, target).item() == pytest.approx(5 / 2**0.5 + 1 / 2)


def test_a_layer_without_variance_has_no_relative_distance():
    target = BatchNormStatistics({"bn": torch.tensor([2.0])}, {"bn": torch.tensor([0.0])})
    distance = relative_bn_distance({"bn": torch.tensor([1.0])}, {"bn": torch.tensor([0.3])}, target)
    assert distance.item() == 0


def test_a_mean_near_zero_rules_no_relative_distance():
    """As that of a first layer over natural images is."""
    target = BatchNormStatistics(
        {"near": torch.tensor([1e-3]), "far": torch.tensor([1.0])},
        {name: torch.tensor([1.0]) for name in ("near", "far")},
    )
    means, variances = {"near": torch.tensor([0.5]), "far": torch.tensor([1.5])}, target.var
    assert relative_bn_distance(means, variances, target).item() == pytest.approx(0.5, abs=1e-3)


def test_features_and_group_by_hand():
    features, recovered = torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[0.0, 3.0], [1.0, 1.0]])
    assert feature_distance(features, recovered).item() == pytest.approx(0.5)
    assert group_distance(torch.full((1, 1, 2, 2), 3.0), torch.ones(1, 1, 2, 2)).item() == pytest.approx(4)


@pytest.mark.parametrize("term", [paper_variation, lambda x: group_distance(x, torch.zeros_like(x))])
def test_norms_at_zero_have_a_gradient(term):
    flat = torch.zeros(1, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(term(flat), flat)
    assert torch.equal(gradient, torch.zeros_like(flat))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"match": "cosine", "gradient": 1.0, "features": 0.5, "bn_form": "relative", "tv_form": "luma-chroma"},
        {"match": "layer-cosine", "gradient": 1.0, "layers": "layer4", "bn": "none", "tv_form": "rgb", "seeds": 1},
        {"boundary": "logits", "match": "cosine", "gradient": 1.0, "bn": "exact"},
        {"bn": "inferred", "bn_form": "relative", "match": "cosine", "gradient": 1.0},
    ],
)
def test_pixel_gradient_agrees_with_numerical_differences(small_model, small_batch, changes):
    """The double backward through the network, every term together, against finite differences."""
    pixels, labels = small_batch
    mode = "train" if changes.get("bn") == "inferred" else "eval"
    observation = observe(small_model, pixels, labels, share_bn=True, mode=mode)
    model = small_model
    model.network.double()
    objective = objective_for(model, observation, labels, AttackConfig(**changes))
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    group = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    direction = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)

    def total(step: float) -> torch.Tensor:
        return objective(images + step * direction, group).total

    images.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(images, group).total, images)
    slope = (gradient * direction).sum()
    numerical = (total(1e-7) - total(-1e-7)) / 2e-7
    torch.testing.assert_close(numerical, slope, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("form", ["raw", "relative"])
def test_the_true_images_have_no_distance_whatever_tells_the_batch_statistics(small_model, small_batch, mode, form):
    """In the client's forward mode the true images explain everything; in the other one they do not."""
    pixels, labels = small_batch
    observation = observe(small_model, pixels, labels, share_bn=True, mode=mode)
    images = small_model.preprocessing.normalise(pixels)

    def judged(bn, observation=observation):
        config = AttackConfig(match="cosine", gradient=1.0, bn=bn, bn_form=form, features=1.0, seeds=1)
        return objective_for(small_model, observation, labels, config)(images, images).raw

    for bn in ("exact", "inferred") if mode == "train" else ("exact",):
        raw = judged(bn)
        assert raw["gradient"].abs().item() < 1e-5 and raw["bn"].item() < 1e-4, bn
        # The final layer's closed form holds in both modes.
        assert raw["features"].item() < 1e-4
    assert judged("approx")["bn"].item() > 0.01
    other = dataclasses.replace(observation, mode="eval" if mode == "train" else "train")
    assert judged("exact", other)["gradient"].item() > 1e-3 and judged("exact", other)["bn"].item() > 0.01


def test_inferred_statistics_are_the_batchs_own(small_model, small_batch):
    """Two layers of different n = K·H·W, with momenta that are not torch's default."""
    small_model.network.bn1.momentum, small_model.network.bn2.momentum = 0.25, 0.01
    pixels, labels = small_batch
    observation = observe(small_model, pixels, labels, share_bn=True, mode="train")
    assert samples_per_layer(small_model, 3) == {"bn1": 3 * 64, "bn2": 3 * 16}
    inferred = inferred_statistics(small_model, observation)
    for name in ("bn1", "bn2"):
        torch.testing.assert_close(inferred.mean[name], observation.bn.mean[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inferred.var[name], observation.bn.var[name], rtol=1e-4, atol=1e-5)
    # Without (n − 1)/n the second layer would be 2 % off.
    assert ((inferred.var["bn2"] * 48 / 47 / observation.bn.var["bn2"] - 1).abs() > 0.01).all()


def test_statistics_that_cannot_be_inferred_are_one_sentence(small_model, small_batch):
    for momentum in (None, 0.0):
        small_model.network.bn2.momentum = momentum
        observation = observe(small_model, *small_batch, mode="train")
        with pytest.raises(GradinvError, match=f"The BN layer bn2 has the momentum {momentum}, .* take approx or none"):
            objective_for(small_model, observation, small_batch[1], AttackConfig(bn="inferred"))


def test_train_mode_leaves_buffers_and_modules_as_they_were_also_after_an_error(small_model, small_batch):
    network = small_model.network
    observation = observe(small_model, *small_batch, mode="train")
    objective = objective_for(small_model, observation, small_batch[1], AttackConfig(seeds=1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(3, 3, 8, 8)
    trained = objective(images, images).raw["gradient"]
    with pytest.raises(RuntimeError):
        objective(torch.randn(3, 4, 8, 8), images)
    with pytest.raises(ZeroDivisionError), forward_mode(network, "train"):
        assert network.bn1.training and not network.training
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(not module.training for module in network.modules())
    assert network.bn1.track_running_stats and not network.bn1._forward_pre_hooks
    network.train()
    with forward_mode(network, "eval"):
        assert not network.bn1.training
    assert network.bn1.training and network.training, "also a network that somebody left in train mode is given back"
    assert torch.equal(objective(images, images).raw["gradient"], trained), "the client's mode counts, not the model's"


@pytest.mark.parametrize("bn", ["approx", "exact", "inferred", "none"])
def test_the_control_without_the_gradient_needs_nothing_but_its_own_terms(small_model, small_batch, bn):
    """The matching preset asks for a stage and for recovered errors: without the gradient neither is needed."""
    pixels, labels = small_batch
    observation = observe(small_model, pixels, labels, share_bn=True, mode="train")
    config = AttackConfig.preset("matching", gradient=0.0, features=0.0, bn=bn)
    repeated = dataclasses.replace(observation, gradients={})
    objective = objective_for(small_model, repeated, labels, config)
    images = torch.randn(3, 3, 8, 8, requires_grad=True)
    judgement = objective(images, images)
    assert set(judgement.raw) == ({"tv"} if bn == "none" else {"bn", "tv"})
    (gradient,) = torch.autograd.grad(judgement.total, images)
    assert torch.isfinite(gradient).all() and gradient.any() and math.isnan(judgement.distance.item())


def test_known_norms_of_the_target_change_nothing():
    found, target = ({name: torch.randn(50) for name in "ab"} for _ in range(2))
    squares = {name: value.dot(value) for name, value in target.items()}
    for distance in (cosine_distance, layer_cosine_distance):
        assert torch.equal(distance(found, target), distance(found, target, squares))


def test_total_is_the_weighted_sum_and_zero_weights_leave_no_term(small_model, small_batch):
    pixels, labels = small_batch
    config = AttackConfig(gradient=0.0, tv=0.5, l2=0.25, bn="none", seeds=1)
    objective = objective_for(small_model, observe(small_model, pixels, labels), labels, config)
    judgement = objective(torch.ones(3, 3, 8, 8), torch.zeros(3, 3, 8, 8))
    assert set(judgement.raw) == {"tv", "l2"}
    assert judgement.total.item() == pytest.approx(0.25 * math.sqrt(3 * 3 * 64))
    assert math.isnan(judgement.distance.item())


def test_recovered_errors_give_the_clients_own_gradient_at_the_truth(small_model, small_batch):
    pixels, labels = small_batch
    observation = observe(small_model, pixels[:1], labels[:1])
    config = AttackConfig(boundary="logits", match="cosine", gradient=1.0, seeds=1)
    objective = objective_for(small_model, observation, labels[:1], config)
    found = objective.evaluate(small_model.preprocessing.normalise(pixels[:1]), torch.zeros(1)).gradients
    for name, value in observation.gradients.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_statistics_cover_every_bn_layer_and_leave_no_hook(small_model):
    with batch_statistics(small_model.network) as (means, variances):
        small_model.network(torch.zeros(2, 3, 8, 8))
    assert set(means) == set(variances) == set(running_statistics(small_model.network).mean) == {"bn1", "bn2"}
    assert not small_model.network.bn1._forward_pre_hooks


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (1, 2, 1, 1)], ids=str)
def test_statistics_are_mean_and_biased_variance_with_both_derivatives(shape):
    layer = torch.nn.Sequential(torch.nn.BatchNorm2d(shape[1]).double().eval())
    values = 3 + torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def moments(values):
        with batch_statistics(layer) as (means, variances):
            layer(values)
        return means["0"], variances["0"]

    variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(moments(values), (mean, variance))
    assert torch.autograd.gradcheck(moments, values.requires_grad_())
    assert torch.autograd.gradgradcheck(moments, values)


# Each of the three ways in which the network's results enter the terms, alone and together.
PARTED = [
    {"match": "l2"},
    {"match": "cosine", "gradient": 1.0},
    {"match": "layer-cosine", "gradient": 1.0, "layers": "layer4"},
    {"boundary": "logits", "match": "cosine", "gradient": 1.0},
    {"gradient": 0.0, "bn": "exact", "bn_weight": 1.0},
    {"gradient": 0.0, "bn": "approx", "bn_weight": 1.0, "bn_form": "relative"},
    {"gradient": 0.0, "features": 1.0},
    {"gradient": 1.0, "bn": "exact", "features": 0.5, "tv": 0.2, "l2": 0.1, "group": 0.1, "seeds": 2},
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("changes", PARTED, ids=str)
def test_micro_batches_give_what_the_whole_batch_gives(small_model, small_batch, changes, size):
    pixels, labels = small_batch
    observation = observe(small_model, pixels, labels, share_bn=True)
    alone = {"bn": "none", "tv": 0.0, "l2": 0.0, "group": 0.0, "seeds": 1}
    config = AttackConfig(**{**alone, **changes})
    images, group = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    images.requires_grad_()
    judged, gradients = [], []
    for part in (0, size):
        objective = objective_for(small_model, observation, labels, dataclasses.replace(config, micro_batch=part))
        judged.append(objective(images, group))
        gradients.append(torch.autograd.grad(judged[-1].total, images)[0])
    whole, parts = judged
    assert gradients[0].norm() > 0 and list(parts.raw) == list(whole.raw)
    assert ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item() < 1e-5
    for found, expected in ((parts.raw, whole.raw), (parts.distance, whole.distance), (parts.total, whole.total)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_only_a_micro_batch_is_in_the_network_at_a_time_and_pixels_need_no_second_pass(
    small_model, small_batch, observation
):
    sizes: list[int] = []
    small_model.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    images = torch.randn(3, 3, 8, 8, requires_grad=True)

    def gradient(size: int, **changes) -> torch.Tensor:
        sizes.clear()
        config = AttackConfig(micro_batch=size, **changes)
        judgement = objective_for(small_model, observation, small_batch[1], config)(images, images.detach())
        return torch.autograd.grad(judgement.total, images)[0]

    gradient(2)
    assert sizes == [2, 1, 2, 1]
    for whole in (0, 3, 4):
        gradient(whole)
        assert sizes == [3]
    pixels = {"gradient": 0.0, "bn": "none", "tv": 1.0, "l2": 0.5, "seeds": 1}
    torch.testing.assert_close(gradient(2, **pixels), gradient(0, **pixels))
    assert sizes == [3]
    gradient(2, **pixels)
    assert sizes == [2, 1]


def test_micro_batches_are_refused_in_train_mode(small_model, small_batch):
    observation = observe(small_model, *small_batch, mode="train")
    with pytest.raises(
        GradinvError, match=r"^In train mode BN normalises by the whole batch, .*; set micro_batch to 0\.$"
    ):
        objective_for(small_model, observation, small_batch[1], AttackConfig(micro_batch=2))
    objective_for(small_model, observation, small_batch[1], AttackConfig(micro_batch=3))  # the whole batch at once


def test_matching_can_stop_at_a_stage(small_model):
    assert matched_parameters(small_model, "all")[-1] == "fc.bias"
    assert matched_parameters(small_model, "layer4") == ["conv1.weight", "bn1.weight", "bn1.bias", "layer4.weight"]
    with pytest.raises(GradinvError, match="has no stage or node layer3"):
        matched_parameters(small_model, "layer3")
    resnet = load_model("resnet18-tiny")
    names = [name for name, _ in resnet.network.named_parameters()]
    assert matched_parameters(resnet, "layer3") == [n for n in names if not n.startswith(("layer4.", "fc."))]
    assert matched_parameters(resnet, "layer1.0.conv1") == names[: names.index("layer1.0.bn1.bias") + 1]
    assert matched_parameters(resnet, "maxpool") == names[:3]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"gradient": 0.0, "bn": "none", "tv": 0.0, "l2": 0.0, "group": 0.0},
            "Every term of the objective has weight 0",
        ),
        ({"bn": "exact"}, "did not share its BN statistics"),
        ({"bn": "inferred"}, r"did not share its running statistics .* in train mode, or take approx"),
    ],
)
def test_objectives_without_terms_or_what_they_need_are_refused(small_model, small_batch, observation, changes, why):
    with pytest.raises(GradinvError, match=why):
        objective_for(small_model, observation, small_batch[1], AttackConfig(**changes))


def test_an_objective_goes_when_nobody_holds_it(small_model, small_batch):
    """Not with the next collection of cycles: it holds a gradient and, through its terms, much of a GPU's memory."""
    labels = small_batch[1]
    objective = objective_for(small_model, observe(small_model, *small_batch), labels, AttackConfig(features=0.5))
    known = weakref.ref(objective)
    gc.disable()
    try:
        del objective
        assert known() is None
    finally:
        gc.enable()
