from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import smooth
from torch.nn import functional as F

from gradinv.client import observe
from gradinv.recovery.labels import METHODS, bias_corrected, column_minimum, ilrg, llg, restore_labels
from gradinv.types import GradinvError, Observation


def changed(observation, **gradients):
    kept = {
        name: value for name, value in observation.gradients.items() if f"{name}".replace(".", "_") not in gradients
    }
    new = {name.replace("_", ".", 1): value for name, value in gradients.items() if value is not None}
    return dataclasses.replace(observation, gradients={**kept, **new})


def test_column_minimum_by_hand():
    # Rows are classes. Minima: 0.1, -0.5, -0.2, 0.0. A row's sum would have preferred class 2 to class 1.
    gradient = torch.tensor([[0.1, 0.3], [-0.5, 0.9], [-0.2, -0.2], [0.0, 0.2]])
    assert column_minimum(gradient, 1).tolist() == [1]
    assert column_minimum(gradient, 2).tolist() == [1, 2]
    assert column_minimum(gradient, 3).tolist() == [1, 2, 3]


def test_bias_corrected_by_hand():
    # m = -0.9 / 3 = -0.3: classes 1 and 2 once, most negative first; left are 1: -0.4, 2: +0.1, so class 1 again.
    assert bias_corrected(torch.tensor([0.5, -0.7, -0.2, 0.4]), 3).tolist() == [1, 2, 1]


def test_llg_by_hand():
    # Row sums 0.5, -0.7, -0.2, 0.4 and m = -0.9 / 3 · 5/4 = -0.375: class 1 has -0.325 left, class 2 has +0.175.
    gradient = torch.tensor([[0.2, 0.3], [-0.3, -0.4], [-0.1, -0.1], [0.4, 0.0]])
    assert llg(gradient, 3).tolist() == [1, 2, 1]


def test_ilrg_counts_by_hand():
    """Where all images of a class have the same features the linear system is exact."""
    features = torch.tensor([[3.0, 0.0], [0.0, 2.0]])[[0, 0, 0, 1, 1]]
    labels = torch.tensor([0, 0, 0, 2, 2])
    weight, bias = torch.tensor([[0.3, 0.1], [0.2, 0.0], [0.0, 0.4], [0.1, 0.1]]), torch.zeros(4)
    errors = F.linear(features, weight, bias).softmax(1) - F.one_hot(labels, 4)
    found = ilrg(errors.T @ features / 5, errors.mean(0), weight, bias, 5)
    assert sorted(found.tolist()) == [0, 0, 0, 2, 2]
    assert found[0] == 0


@pytest.mark.parametrize("method", METHODS)
def test_restores_every_label_of_a_distinct_batch(small_model, small_batch, method):
    pixels, labels = small_batch
    restored = restore_labels(small_model, observe(small_model, pixels, labels), method)
    assert sorted(restored.labels.tolist()) == [1, 2, 4]
    assert restored.labels.dtype == torch.int64
    assert restored.confidence > 0.99
    assert restored.method == method or method == "auto"


def test_auto_counts_repeated_labels_and_is_sure(small_model):
    for seed in range(5):
        labels = torch.tensor([3, 3, 0, 5])
        restored = restore_labels(small_model, observe(small_model, smooth(4, seed), labels))
        assert sorted(restored.labels.tolist()) == [0, 3, 3, 5]
        assert restored.confidence > 0.99


@pytest.mark.parametrize("true", [[0, 2, 4], [3, 3, 3]])
def test_behind_noise_auto_falls_back_to_a_plain_reading(small_model, true):
    """A corrected reading would fit the noise: here every residual is large, so none decides."""
    labels = torch.tensor(true)
    observation = observe(small_model, smooth(3, 2), labels)
    generator = torch.Generator().manual_seed(0)
    noisy = dataclasses.replace(
        observation,
        gradients={
            name: value + 0.1 * value.abs().max() * torch.randn(value.shape, generator=generator)
            for name, value in observation.gradients.items()
        },
    )
    restored = restore_labels(small_model, noisy)
    assert restored.method == ("column-minimum" if len(set(true)) == 3 else "ilrg")
    assert sorted(restored.labels.tolist()) == true
    # That of the reading itself, not of the best fit that the search met with other labels.
    assert restored.confidence == restore_labels(small_model, noisy, restored.method).confidence < 0.1


def test_a_wrong_reading_is_not_trusted(small_model):
    """Column-minimum cannot repeat a label: the features do not explain the gradient, and the confidence says so."""
    observation = observe(small_model, smooth(4, 0), torch.tensor([3, 3, 0, 5]))
    assert restore_labels(small_model, observation, "column-minimum").confidence < 0.5


@pytest.mark.parametrize("method", ["auto", "llg", "bias-corrected", "ilrg"])
def test_more_images_than_classes(small_model, method):
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 3, 3, 3])
    restored = restore_labels(small_model, observe(small_model, smooth(9, 0), labels), method)
    assert restored.labels.shape == (9,)
    assert set(restored.labels.tolist()) <= set(range(6)) and 0 <= restored.confidence <= 0.9
    right = torch.minimum(restored.labels.bincount(minlength=6), labels.bincount(minlength=6)).sum()
    assert right >= 8


def test_without_a_bias_two_methods_are_left(small_model, small_batch):
    observation = changed(observe(small_model, *small_batch), fc_bias=None)
    restored = restore_labels(small_model, observation)
    assert restored.method in ("column-minimum", "llg")
    assert sorted(restored.labels.tolist()) == [1, 2, 4]
    assert restored.confidence <= 0.9
    for method in ("bias-corrected", "ilrg"):
        with pytest.raises(GradinvError, match=f"^{method} reads the gradient of the final layer's bias"):
            restore_labels(small_model, observation, method)


@pytest.mark.parametrize("spoil", ["noise", "prune", "quantise", "zero"])
@pytest.mark.parametrize("method", METHODS)
def test_defended_gradients_lower_the_confidence(small_model, small_batch, spoil, method):
    observation = observe(small_model, *small_batch)
    generator = torch.Generator().manual_seed(0)

    def spoilt(value):
        if spoil == "noise":
            return value + 0.3 * value.abs().max() * torch.randn(value.shape, generator=generator)
        if spoil == "prune":
            return value * (value.abs() > value.abs().quantile(0.8))
        return torch.zeros_like(value) if spoil == "zero" else value.sign() * value.abs().mean()

    gradients = {name: spoilt(value) for name, value in observation.gradients.items()}
    restored = restore_labels(small_model, dataclasses.replace(observation, gradients=gradients), method)
    assert restored.labels.shape == (3,)
    assert 0 <= restored.confidence < 0.5


def test_batch_sizes_that_cannot_be_are_refused(observation):
    for batch_size in (0, 5):
        with pytest.raises(GradinvError, match="between 1 and the 4 classes"):
            column_minimum(torch.zeros(4, 2), batch_size)
    for method, name in ((llg, "fc.weight"), (bias_corrected, "fc.bias")):
        with pytest.raises(GradinvError, match="at least 1, not 0"):
            method(observation.gradients[name], 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["fc_weight", "fc_bias"])
def test_gradient_that_is_not_finite_is_refused(small_model, small_batch, method, where):
    observation = observe(small_model, *small_batch)
    broken = observation.gradients[where.replace("_", ".")] * float("nan")
    with pytest.raises(GradinvError, match="not finite"):
        restore_labels(small_model, changed(observation, **{where: broken}), method)


def test_an_unknown_method_and_a_missing_gradient_are_named(small_model, small_batch):
    observation = observe(small_model, *small_batch)
    with pytest.raises(GradinvError, match="no label restoration 'guess'; take one of auto, column-minimum"):
        restore_labels(small_model, observation, "guess")
    with pytest.raises(GradinvError, match=r"no gradient of fc\.weight"):
        restore_labels(small_model, changed(observation, fc_weight=None))


def test_a_wrong_reading_of_a_large_batch_is_corrected(small_model, monkeypatch):
    """Of more than 32 images the search is short, since every test is slow, but one wrong label it still finds."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Identity())
    network.fc = torch.nn.Linear(64, 80)
    labels = torch.randperm(80)[:33]
    features = torch.randn(33, 64).clamp(min=0)
    with torch.no_grad():
        errors = network.fc(features).softmax(1) - F.one_hot(labels, 80)
    gradients = {"fc.weight": errors.T @ features / 33, "fc.bias": errors.mean(0)}
    model = dataclasses.replace(small_model, network=network)
    observation = Observation(gradients, 33, model.preprocessing, model.name, model.sha256)
    absent = next(label for label in range(80) if label not in labels)
    misread = torch.cat([labels[:-1], torch.tensor([absent])])
    monkeypatch.setattr("gradinv.recovery.labels.column_minimum", lambda gradient, count: misread)
    restored = restore_labels(model, observation)
    assert sorted(restored.labels.tolist()) == sorted(labels.tolist())
    assert restored.confidence > 0.99
    assert restored.fit is not None
