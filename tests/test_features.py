from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gradinv.features import recover_features
from gradinv.types import GradinvError
from gradinv.victim import observe


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
    assert F.cosine_similarity(recovered.features, truth).min() > 0.999
    assert recovered.residual < 1e-2
    errors = small_model.final_layer(truth).softmax(1) - F.one_hot(labels, 6)
    assert (recovered.errors - errors).abs().max() < 0.05


def test_one_image_is_solved_exactly(small_model, small_batch):
    """For K = 1 the ratio ∇W[y] / ∇b[y] is the feature itself."""
    pixels, labels = small_batch[0][:1], small_batch[1][:1]
    recovered = recover_features(small_model, observe(small_model, pixels, labels), labels)
    torch.testing.assert_close(recovered.features, true_features(small_model, pixels), rtol=1e-4, atol=1e-5)


def test_residual_tells_wrong_labels(small_model, small_batch):
    pixels, labels = small_batch
    observation = observe(small_model, pixels, labels)
    right = recover_features(small_model, observation, labels).residual
    wrong = recover_features(small_model, observation, torch.tensor([0, 3, 5])).residual
    assert wrong > 10 * right


def test_as_many_images_as_classes_are_refused(small_model):
    labels = torch.arange(6)
    observation = observe(small_model, torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), labels)
    with pytest.raises(GradinvError, match="fewer than 6 images"):
        recover_features(small_model, observation, labels)
