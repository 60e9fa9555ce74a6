from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import smooth
from torch.nn import functional as F

from gradinv.client import observe
from gradinv.config import AttackConfig
from gradinv.recovery.final_layer import EXPLAINED, FinalLayer, recover_features
from gradinv.recovery.recover import recover
from gradinv.types import GradinvError, Observation


def true_features(model, pixels):
    seen = []
    handle = model.final_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.network(model.preprocessing.normalise(pixels))
    handle.remove()
    return seen[0]


def test_features_and_errors_of_each_image_are_recovered(small_model, small_batch):
    pixels, labels = small_batch
    observation = observe(small_model, pixels, labels)
    recovered = recover_features(small_model, observation, labels)
    truth = true_features(small_model, pixels)
    torch.testing.assert_close(recovered.features, truth, rtol=1e-3, atol=1e-3)
    assert recovered.residual < 1e-5
    errors = small_model.final_layer(truth).softmax(1) - F.one_hot(labels, 6)
    torch.testing.assert_close(recovered.output_errors, errors, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("repeated", [[3, 3, 0], [2, 2, 2], [1, 4, 4, 4], [0, 0, 5, 5]])
def test_images_that_share_a_label_are_told_apart(small_model, repeated):
    labels = torch.tensor(repeated)
    pixels = smooth(len(labels), 2)
    recovered = recover_features(small_model, observe(small_model, pixels, labels), labels)
    truth = true_features(small_model, pixels)
    assert recovered.residual < EXPLAINED
    similar = F.cosine_similarity(recovered.features[:, None], truth[None], dim=2)
    nearest = similar.argmax(1)
    assert sorted(nearest.tolist()) == list(range(len(labels)))  # each image once
    assert labels[nearest].tolist() == repeated
    # The pictures are alike: without this bound one mixture for all would pass.
    assert similar.max(1).values.min() > 0.9999


def test_the_absent_classes_alone_tell_the_labels(small_model):
    """From a guess with two labels wrong, of a rescaled gradient."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Identity())
    network.fc = torch.nn.Linear(9, 12)
    model = dataclasses.replace(small_model, network=network)
    labels = torch.tensor([3, 3, 3, 0, 7])
    features = torch.rand(5, 9)
    with torch.no_grad():
        errors = network.fc(features).softmax(1) - F.one_hot(labels, 12)
    gradients = {"fc.weight": 0.2 * errors.T @ features / 5, "fc.bias": 0.2 * errors.mean(0)}
    observation = Observation(gradients, 5, model.preprocessing, model.name, model.sha256)
    layer = FinalLayer(model, observation)
    present = torch.zeros(12, dtype=torch.bool)
    present[[0, 3, 5, 7]] = True
    found = [sorted(reading.tolist()) for reading in layer.readings(torch.tensor([0, 0, 7, 7, 3]), present)]
    assert sorted(labels.tolist()) in found
    present[:8] = True  # four classes are left for five images
    assert list(layer.readings(labels, present)) == []


def test_one_matrix_of_second_derivatives_by_finite_differences(small_model, small_batch):
    """Jᵀr is half the gradient of the cost that the descent lowers."""
    pixels, labels = small_batch
    layer = FinalLayer(small_model, observe(small_model, pixels, labels))
    given = F.one_hot(labels, 6).double()
    state = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian, gradient = layer._normal_equations(state, given)
    for index in range(state.numel()):
        step = torch.zeros(state.numel(), dtype=torch.float64)
        step[index] = 1e-6
        ahead, behind = (layer._cost(state + sign * step.view_as(state), given) for sign in (1, -1))
        assert float(gradient[index]) == pytest.approx((ahead - behind) / 4e-6, rel=1e-4, abs=1e-9)
    assert torch.linalg.eigvalsh(hessian).min() > -1e-12
    torch.testing.assert_close(hessian, hessian.T)


def test_a_gradient_that_was_changed_is_not_explained(small_model, small_batch):
    pixels, labels = small_batch
    observation = observe(small_model, pixels, labels)
    generator = torch.Generator().manual_seed(0)
    residuals = []
    for share in (0.01, 0.1, 1.0):
        noisy = {
            name: value + share * value.square().mean().sqrt() * torch.randn(value.shape, generator=generator)
            for name, value in observation.gradients.items()
        }
        recovered = recover_features(small_model, dataclasses.replace(observation, gradients=noisy), labels)
        assert torch.isfinite(recovered.features).all() and (recovered.features >= 0).all()
        residuals.append(recovered.residual)
    assert EXPLAINED < residuals[0] < residuals[1] < residuals[2]


@pytest.mark.parametrize("factor", [1e-4, 0.3, 50.0])
def test_a_rescaled_gradient_gives_the_same_features(small_model, small_batch, factor):
    """Clipping multiplies the whole gradient by an unknown number, which hides nothing."""
    pixels, labels = small_batch
    observation = observe(small_model, pixels, labels)
    scaled = dataclasses.replace(
        observation, gradients={name: factor * value for name, value in observation.gradients.items()}
    )
    recovered = recover_features(small_model, scaled, labels)
    assert recovered.residual < EXPLAINED
    assert recovered.scale == pytest.approx(factor, rel=1e-3)
    torch.testing.assert_close(recovered.features, true_features(small_model, pixels), rtol=1e-3, atol=1e-3)


def test_gradients_without_an_answer_are_refused(small_model, observation, small_batch):
    gradients = observation.gradients
    infinite = {name: value * float("inf") for name, value in gradients.items()}
    unbiased = {name: value for name, value in gradients.items() if name != "fc.bias"}
    for given, why in ((infinite, "not finite"), (unbiased, "where the final layer has a bias and its gradient")):
        with pytest.raises(GradinvError, match=why):
            recover_features(small_model, dataclasses.replace(observation, gradients=given), small_batch[1])


def test_one_image_is_solved_exactly(small_model, small_batch):
    """For K = 1 the ratio ∇W[y] / ∇b[y] is the feature itself."""
    pixels, labels = small_batch[0][:1], small_batch[1][:1]
    recovered = recover_features(small_model, observe(small_model, pixels, labels), labels)
    torch.testing.assert_close(recovered.features, true_features(small_model, pixels), rtol=1e-4, atol=1e-5)


def test_the_label_of_one_image_follows_from_the_absent_classes(small_model, small_batch):
    """Nothing is unknown then: R is the bias column alone."""
    pixels, labels = small_batch
    layer = FinalLayer(small_model, observe(small_model, pixels[:1], labels[:1]))
    present = torch.zeros(6, dtype=torch.bool)
    present[labels[:1]] = True
    assert [reading.tolist() for reading in layer.readings(torch.tensor([0]), present, starts=1)] == [
        labels[:1].tolist()
    ]


def test_residual_tells_wrong_labels(small_model, small_batch):
    pixels, labels = small_batch
    observation = observe(small_model, pixels, labels)
    right = recover_features(small_model, observation, labels).residual
    wrong = recover_features(small_model, observation, torch.tensor([0, 3, 5])).residual
    assert wrong > 10 * right


def test_as_many_images_as_classes_are_refused(small_model):
    labels = torch.arange(6)
    observation = observe(small_model, torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), labels)
    with pytest.raises(GradinvError, match="fewer images than the 6 classes, not for 6"):
        recover_features(small_model, observation, labels)
    for features, advice in ((1.0, "set features to 0 and boundary to loss"), (0.0, "set boundary to loss")):
        with pytest.raises(GradinvError, match=f"not for 6; {advice}"):
            recover(small_model, observation, AttackConfig(boundary="logits", features=features))
