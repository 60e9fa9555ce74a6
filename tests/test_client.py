from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradinv.client import observe
from gradinv.types import GradinvError


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


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_running_statistics_are_never_touched(small_model, small_batch, mode):
    before = {name: value.clone() for name, value in small_model.network.state_dict().items()}
    observe(small_model, *small_batch, share_bn=True, mode=mode)
    assert not any(module.training for module in small_model.network.modules())
    for name, value in small_model.network.state_dict().items():
        assert torch.equal(value, before[name]), name


def own_step(model, pixels, labels):
    """What a client's plain training step in train mode leaves: its network, with gradients and new statistics."""
    network = copy.deepcopy(model.network).train()
    F.cross_entropy(network(model.preprocessing.normalise(pixels)), labels).backward()
    return network


def test_train_mode_is_a_plain_training_step(small_model, small_batch):
    network = own_step(small_model, *small_batch)
    observation = observe(small_model, *small_batch, mode="train")
    assert observation.mode == "train" and observation.bn is None
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(observation.gradients[name], parameter.grad, rtol=1e-5, atol=1e-7)
    for name in ("bn1", "bn2"):
        torch.testing.assert_close(observation.running.mean[name], network.get_submodule(name).running_mean)
        torch.testing.assert_close(observation.running.var[name], network.get_submodule(name).running_var)
    assert not torch.equal(observation.running.mean["bn1"], small_model.network.bn1.running_mean)


def test_exact_statistics_are_those_of_the_mode(small_model, small_batch):
    """The second layer's input depends on how the first one normalised."""
    by_mode = {mode: observe(small_model, *small_batch, share_bn=True, mode=mode).bn for mode in ("eval", "train")}
    assert torch.equal(by_mode["eval"].mean["bn1"], by_mode["train"].mean["bn1"])
    assert not torch.allclose(by_mode["eval"].mean["bn2"], by_mode["train"].mean["bn2"])
    network = small_model.network
    with torch.no_grad():
        first = network.conv1(small_model.preprocessing.normalise(small_batch[0]))
        mean, var = first.mean((0, 2, 3), keepdim=True), first.var((0, 2, 3), correction=0, keepdim=True)
        normal = (first - mean) / (var + network.bn1.eps).sqrt()
        second = network.layer4((normal * network.bn1.weight.view(-1, 1, 1) + network.bn1.bias.view(-1, 1, 1)).relu())
    torch.testing.assert_close(by_mode["train"].mean["bn2"], second.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_a_mode_or_a_label_that_is_none_and_a_batch_too_small_for_train_mode(small_model, small_batch):
    with pytest.raises(GradinvError, match="between 0 and 5"):
        observe(small_model, torch.zeros(1, 3, 8, 8), torch.tensor([6]))
    with pytest.raises(GradinvError, match="is one of eval or train, not 'training'"):
        observe(small_model, *small_batch, mode="training")
    small_model.network.bn2 = OnOnePixel(small_model.network.bn2)
    with pytest.raises(GradinvError, match=r"leaves the BN layer bn2.bn one value a channel, .* or eval mode"):
        observe(small_model, small_batch[0][:1], small_batch[1][:1], mode="train")
    assert observe(small_model, *small_batch, mode="train").mode == "train"


class OnOnePixel(nn.Module):
    """BN of a map's mean: as deep in a network as maps have shrunk to one pixel."""

    def __init__(self, bn):
        super().__init__()
        self.bn = bn

    def forward(self, x):
        return self.bn(x.mean((2, 3), keepdim=True))


def test_bn_statistics_are_shared_only_when_asked(small_model, small_batch):
    pixels, labels = small_batch
    plain = observe(small_model, pixels, labels)
    assert plain.bn is None and plain.running is None
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


def test_a_clients_products_are_in_float32_whatever_the_environment_allows(small_model, small_batch):
    """In TF32 the final layer's gradient would not tell the labels and features exactly."""
    found = []
    small_model.final_layer.register_forward_hook(lambda *_: found.append(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        observe(small_model, *small_batch)
        assert found == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
