"""What a client can do to its gradient: each defence by what it promises, the private one against other formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy import integrate, stats

from gradinv import defenses
from gradinv.client import observe
from gradinv.defenses import (
    DESCRIPTION,
    add_noise,
    clip,
    gaussian_epsilon,
    gaussian_mechanism,
    gaussian_sigma,
    parse,
    parse_all,
    prune,
    quantise,
)
from gradinv.types import GradinvError, Observation


@pytest.fixture
def observation(small_model, small_batch) -> Observation:
    return observe(small_model, *small_batch, share_bn=True, mode="train")


def flat(observation: Observation) -> torch.Tensor:
    return torch.cat([observation.gradients[name].reshape(-1) for name in sorted(observation.gradients)])


# --- every one of them


TEXTS = ("none", "clip:0.1", "noise:1e-3", "dp:1,8,1e-5", "prune:0.9", "quantise:4")


@pytest.mark.parametrize("text", TEXTS)
def test_only_the_gradients_change_and_the_argument_never_does(observation, text):
    before = flat(observation)
    after = parse(text)(observation)
    assert torch.equal(flat(observation), before)
    assert torch.equal(flat(after), before) == (text == "none")
    for item in dataclasses.fields(Observation):
        if item.name != "gradients":
            assert getattr(after, item.name) is getattr(observation, item.name), item.name
    assert {n: (v.shape, v.dtype) for n, v in after.gradients.items()} == {
        n: (v.shape, v.dtype) for n, v in observation.gradients.items()
    }
    assert torch.equal(flat(after), flat(parse(text)(observation)))
    noisy = text.startswith(("noise", "dp"))
    assert torch.equal(flat(after), flat(parse(text, seed=1)(observation))) != noisy


def test_every_description_is_of_a_defence_that_exists():
    assert [text.partition(":")[0] for text in TEXTS] == [form.partition(":")[0] for form in DESCRIPTION]


# --- each one


def test_clipping_bounds_the_norm_of_all_gradients_together_and_keeps_their_direction(observation):
    before = flat(observation)
    after = flat(clip(observation, 0.1))
    assert before.norm() > 0.1 and after.norm().item() == pytest.approx(0.1, rel=1e-5)
    torch.testing.assert_close(after / after.norm(), before / before.norm())
    assert torch.equal(flat(clip(observation, 1e6)), before), "a gradient within the bound stays"
    zero = dataclasses.replace(observation, gradients={"a": torch.zeros(3)})
    assert torch.equal(clip(zero, 1.0).gradients["a"], torch.zeros(3))


def test_noise_has_its_standard_deviation_and_no_seed_in_common(observation):
    large = dataclasses.replace(observation, gradients={"b": torch.ones(100_000), "a": torch.zeros(100_000)})
    noise = {seed: flat(add_noise(large, 0.5, seed)) - flat(large) for seed in (0, 1)}
    assert noise[0].std().item() == pytest.approx(0.5, rel=0.01) and abs(noise[0].mean().item()) < 0.005
    assert abs(torch.corrcoef(torch.stack([noise[0], noise[1]]))[0, 1].item()) < 0.01
    first, second = parse_all(["noise:1", "noise:1"], seed=5)
    assert not torch.equal(flat(first(observation)), flat(second(observation)))
    # Also the order in which a file gives the gradients back does not matter.
    other = dataclasses.replace(large, gradients=dict(reversed(list(large.gradients.items()))))
    assert torch.equal(flat(add_noise(other, 0.5, 0)), flat(add_noise(large, 0.5, 0)))


def test_private_noise_is_that_of_the_clipped_gradient(observation):
    expected = add_noise(clip(observation, 0.3), gaussian_sigma(0.6, 8.0, 1e-5), 3)
    assert torch.equal(flat(gaussian_mechanism(observation, 0.3, 8.0, 1e-5, 3)), flat(expected))
    assert torch.equal(flat(parse("dp:0.3,8,1e-5", seed=3)(observation)), flat(expected))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.7, 0.99])
def test_exactly_the_smallest_share_is_pruned(observation, share):
    before, after = flat(observation), flat(prune(observation, share))
    # ReLUs that are never active leave exact zeros, which are the smallest.
    count = math.floor(share * len(before) + 1e-9)
    gone = after != before
    assert (after == 0).sum() == max(count, (before == 0).sum())
    assert torch.equal(after[~gone], before[~gone])
    if gone.any():
        assert before[gone].abs().max() <= before[~gone & (before != 0)].abs().min()


def test_ties_do_not_prune_more_than_the_share(observation):
    equal = dataclasses.replace(observation, gradients={"a": torch.ones(4), "b": -torch.ones(6)})
    assert flat(prune(equal, 0.7)).tolist() == [0.0] * 7 + [-1.0] * 3


@pytest.mark.parametrize("bits", range(1, 9))
def test_quantised_tensors_have_few_values_and_small_errors(observation, bits):
    after = quantise(observation, bits)
    for name, value in observation.gradients.items():
        found = after.gradients[name]
        assert len(found.unique()) <= 2**bits, name
        if bits == 1:
            assert torch.equal(found.sign(), value.sign())
            torch.testing.assert_close(found.abs().max(), value.abs().mean())
        else:
            largest = value.abs().max()
            assert (found - value).abs().max() <= largest / (2**bits - 1) * 1.001
            torch.testing.assert_close(found.abs().max(), largest)
    zero = dataclasses.replace(observation, gradients={"a": torch.zeros(3)})
    assert torch.equal(quantise(zero, bits).gradients["a"], torch.zeros(3))


# --- the analytic Gaussian mechanism


def hockey_stick(sensitivity: float, sigma: float, epsilon: float) -> float:
    """δ as ∫ max(0, p(x) − e^ε q(x)) dx of the two shifted normal densities: the definition, without Φ."""
    first, second = stats.norm(0, sigma), stats.norm(sensitivity, sigma)
    # p exceeds e^ε q left of this point.
    edge = sensitivity / 2 - epsilon * sigma**2 / sensitivity
    value, _ = integrate.quad(
        lambda x: first.pdf(x) - math.exp(epsilon) * second.pdf(x), edge - 40 * sigma, edge, epsabs=1e-16, limit=500
    )
    return value


@pytest.mark.parametrize("sensitivity", [0.5, 2.0])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 50.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_sigma_agrees_with_the_definition_of_privacy(sensitivity, epsilon, delta):
    sigma = gaussian_sigma(sensitivity, epsilon, delta)
    assert hockey_stick(sensitivity, sigma, epsilon) == pytest.approx(delta, rel=1e-4)
    assert hockey_stick(sensitivity, 0.99 * sigma, epsilon) > delta, "no less noise suffices"
    assert gaussian_epsilon(sensitivity, sigma, delta) == pytest.approx(epsilon, rel=1e-6)


def test_extremes_are_finite_and_monotonic():
    sigmas = [gaussian_sigma(1.0, epsilon, 1e-5) for epsilon in (1e-3, 1.0, 1e3, 1e6)]
    assert all(math.isfinite(sigma) and sigma > 0 for sigma in sigmas)
    assert sigmas == sorted(sigmas, reverse=True)
    assert gaussian_epsilon(1.0, 1e6, 1e-3) == 0.0, "so much noise that δ alone suffices"
    assert gaussian_epsilon(1.0, 1e-4, 1e-5) > 1e6


# --- by name


def test_notes_tell_the_guarantee_and_its_limit():
    sigma = gaussian_sigma(2.0, 8.0, 1e-5)
    note = parse("dp:1,8,1e-5").note
    assert f"{sigma:.4g}" in note and "(8, 1e-05)-differential privacy of the client's whole batch" in note
    assert "for a single picture an averaged gradient gives no guarantee" in note
    clipped, noisy = parse_all(["clip:1", f"noise:{sigma!r}"])
    assert "(8, 1e-05)-differential privacy" in noisy.note and "privacy" not in clipped.note
    # Without the clipping directly before it, noise promises nothing.
    assert all("privacy" not in d.note for d in parse_all(["noise:0.1", "clip:1"]))
    assert all("privacy" not in d.note for d in parse_all(["clip:1", "quantise:4", "noise:0.1"]))
    assert all("privacy" not in d.note for d in parse_all(["clip:1", "noise:0"]))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("blur:3", r"There is no defence 'blur'; take one of none, clip:C, noise:S, dp:C,E,D, prune:P, quantise:B\."),
        ("", "There is no defence ''"),
        ("clip", "'clip' cannot be read; write clip:C"),
        ("clip:1,2", "cannot be read; write clip:C"),
        ("clip:one", "cannot be read; write clip:C"),
        ("none:1", "cannot be read; write none"),
        ("dp:1,8", "cannot be read; write dp:C,E,D"),
        ("quantise:2.5", "cannot be read; write quantise:B"),
        ("clip:0", "norm to clip to must be a finite number greater than 0, not 0.0"),
        ("clip:nan", "norm to clip to must be a finite number greater than 0, not nan"),
        ("noise:-1", "at least 0, not -1.0"),
        ("noise:inf", "at least 0, not inf"),
        ("dp:0,8,1e-5", "norm to clip to must be"),
        ("dp:1,0,1e-5", "Epsilon must be a finite number greater than 0"),
        ("dp:1,8,0", "Delta must be greater than 0 and less than 1"),
        ("dp:1,8,1", "Delta must be greater than 0 and less than 1"),
        ("prune:1", "at least 0 and less than 1, not 1.0"),
        ("prune:-0.1", "at least 0 and less than 1, not -0.1"),
        ("quantise:0", "1 to 8 bits, not 0"),
        ("quantise:9", "1 to 8 bits, not 9"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(text, sentence):
    with pytest.raises(GradinvError, match=sentence) as refused:
        parse(text)
    assert str(refused.value).endswith(".") and str(refused.value).count(". ") == 0


def test_the_functions_refuse_the_same(observation):
    for wrong in (
        lambda: clip(observation, -1.0),
        lambda: add_noise(observation, math.nan),
        lambda: gaussian_mechanism(observation, math.inf, 8.0, 1e-5),
        lambda: prune(observation, 1.5),
        lambda: quantise(observation, 3.0),
        lambda: defenses.gaussian_sigma(0.0, 8.0, 1e-5),
        lambda: defenses.gaussian_epsilon(1.0, 0.0, 1e-5),
    ):
        with pytest.raises(GradinvError):
            wrong()
