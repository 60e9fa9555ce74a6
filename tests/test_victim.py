from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gradinv.types import GradinvError
from gradinv.victim import observe


def test_gradient_is_that_of_the_mean_cross_entropy(small_model, small_batch):
    """The final layer's gradient by hand: ∇W = (1/K) Aᵀ F and ∇b = mean of A, with A = softmax − one-hot."""
    pixels, labels = small_batch
    observation = observe(small_model, pixels, labels)
    seen = []
    handle = small_model.network.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        logits = small_model.network(small_model.preprocessing.normalise(pixels))
    handle.remove()
    errors = logits.softmax(1) - F.one_hot(labels, 6)
    torch.testing.assert_close(observation.gradients["fc.weight"], errors.T @ seen[0] / 3)
    torch.testing.assert_close(observation.gradients["fc.bias"], errors.mean(0))
    assert set(observation.gradients) == {name for name, _ in small_model.network.named_parameters()}


def test_running_statistics_are_never_touched(small_model, small_batch):
    before = {name: value.clone() for name, value in small_model.network.state_dict().items()}
    observe(small_model, *small_batch, share_bn=True)
    for name, value in small_model.network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bn_statistics_are_shared_only_when_asked(small_model, small_batch):
    pixels, labels = small_batch
    assert observe(small_model, pixels, labels).bn is None
    shared = observe(small_model, pixels, labels, share_bn=True).bn
    assert shared is not None
    with torch.no_grad():
        first = small_model.network.conv1(small_model.preprocessing.normalise(pixels))
    torch.testing.assert_close(shared.mean["bn1"], first.mean((0, 2, 3)))
    torch.testing.assert_close(shared.var["bn1"], first.var((0, 2, 3), correction=0))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 3, 9, 8), (1, 1, 8, 8), (3, 8, 8)])
def test_batches_of_a_wrong_shape_are_refused(small_model, shape):
    with pytest.raises(GradinvError, match="3×8×8"):
        observe(small_model, torch.zeros(shape), torch.zeros(shape[0], dtype=torch.long))


def test_labels_that_the_model_lacks_are_refused(small_model):
    with pytest.raises(GradinvError, match="between 0 and 5"):
        observe(small_model, torch.zeros(1, 3, 8, 8), torch.tensor([6]))
