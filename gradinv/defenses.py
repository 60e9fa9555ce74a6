"""What a client can do to its gradient before it shares it: each a pure function Observation → Observation.

Only the gradients change. BN statistics, where they are shared, go out as they are: a guarantee for the gradients does
not cover them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gradinv.types import GradinvError, Observation

DESCRIPTION: dict[str, str] = {
    "none": "the gradient as it is",
    "clip:C": "scaled down to an ℓ2 norm of at most C over all parameters together",
    "noise:S": "Gaussian noise of standard deviation S added to every number",
    "dp:C,E,D": "clipped to C, then Gaussian noise for (E, D)-differential privacy of the client's whole batch",
    "prune:P": "the share P of all numbers that are smallest in magnitude set to 0",
    "quantise:B": "every tensor rounded to 2^B evenly spaced values (1 bit: the sign times the mean magnitude)",
}
"""Each defence as `parse` reads it, with what it does."""

DELTA = 1e-5
"""The δ for which the ε of noise after clipping is stated."""


@dataclass(frozen=True)
class Defence:
    """A defence that can be applied: `text` as it was given, `note` is a sentence on what it does and promises."""

    text: str
    note: str
    apply: Callable[[Observation], Observation] = field(repr=False, compare=False)

    def __call__(self, observation: Observation) -> Observation:
        return self.apply(observation)


# --- what is done to the gradient


def clip(observation: Observation, norm: float) -> Observation:
    """Scale all gradients together to an ℓ2 norm of at most `norm`: g ← g · min(1, C / ‖g‖₂).

    Raises GradinvError where `norm` is not positive.
    """
    _check_positive("The norm to clip to", norm)
    total = math.sqrt(sum(float(value.double().square().sum()) for value in observation.gradients.values()))
    scale = min(1.0, norm / total) if total > 0 else 1.0
    return _changed(observation, lambda _, value: value * scale)


def add_noise(observation: Observation, std: float, seed: int = 0) -> Observation:
    """Add N(0, std²) to every number of every gradient: g ← g + std · η. The same seed gives the same noise.

    On its own it promises nothing, since nothing bounds how much one batch changes the gradient: clip before. Raises
    GradinvError where `std` is negative or not finite.
    """
    _check_std(std)
    generator, given = torch.Generator().manual_seed(seed), observation.gradients
    # By name, since a file gives the gradients back in another order.
    noise = {name: torch.randn(given[name].shape, generator=generator) for name in sorted(given)}
    return _changed(observation, lambda name, value: value + std * noise[name].to(value))


def gaussian_mechanism(
    observation: Observation, norm: float, epsilon: float, delta: float, seed: int = 0
) -> Observation:
    """Clip to `norm`, then add the Gaussian noise that makes the shared gradient (ε, δ)-differentially private.

    The guarantee is at the level of the client, for one round: its whole batch may be replaced by any other, which
    moves the clipped gradient by at most 2C (replacement sensitivity), hence σ = `gaussian_sigma(2C, ε, δ)` (analytic
    Gaussian mechanism, Balle & Wang 2018). There is no guarantee at the level of an example: what is clipped is the
    average over the batch, not each example's own gradient. Raises GradinvError for a norm, ε or δ out of range.
    """
    _check_positive("The norm to clip to", norm)
    return add_noise(clip(observation, norm), gaussian_sigma(2 * norm, epsilon, delta), seed)


def prune(observation: Observation, share: float) -> Observation:
    """Set the `share` of all numbers that are smallest in magnitude, over all parameters together, to 0.

    Exactly ⌊share · n⌋ numbers, ties in the parameters' order. Raises GradinvError where the share is not in [0, 1).
    """
    _check_share(share)
    names = sorted(observation.gradients)
    values = torch.cat([observation.gradients[name].reshape(-1) for name in names])
    # As decimals: 0.7 · 10 is 6.999… in binary.
    count = math.floor(round(share * len(values), 6))
    kept = torch.ones(len(values), dtype=torch.bool, device=values.device)
    if count > 0:
        magnitudes = values.abs()
        threshold = magnitudes.kthvalue(count).values
        kept = magnitudes >= threshold
        ties = (magnitudes == threshold).nonzero()[:, 0]
        kept[ties[: count - int((~kept).sum())]] = False
    sizes = [observation.gradients[name].numel() for name in names]
    masks = dict(zip(names, kept.split(sizes), strict=True))
    return _changed(observation, lambda name, value: value * masks[name].view(value.shape))


def quantise(observation: Observation, bits: int) -> Observation:
    """Round every tensor to the nearest of 2^bits evenly spaced values between −max|g| and max|g| of that tensor.

    Deterministic. Zero lies between two of them. With 1 bit the two values are the sign times the mean magnitude, the
    nearest in the least squares (zeros stay). Raises GradinvError where `bits` is not a whole number from 1 to 8.
    """
    _check_bits(bits)

    def quantised(_: str, value: Tensor) -> Tensor:
        if bits == 1:
            return value.sign() * value.abs().mean()
        largest, steps = value.abs().max(), 2**bits - 1
        if largest == 0:
            return value.clone()
        level = ((value / largest + 1) / 2 * steps).round()
        return (level / steps * 2 - 1) * largest

    return _changed(observation, quantised)


# --- the analytic Gaussian mechanism


def gaussian_sigma(sensitivity: float, epsilon: float, delta: float) -> float:
    """The least standard deviation σ with which Gaussian noise is (ε, δ)-private at that ℓ2 sensitivity Δ.

    Balle & Wang 2018, Theorem 8: exactly where Φ(Δ/2σ − εσ/Δ) − e^ε Φ(−Δ/2σ − εσ/Δ) ≤ δ. The left side falls with σ,
    so it is solved by bisection (their Algorithm 1). Raises GradinvError unless Δ > 0, ε > 0 and 0 < δ < 1.
    """
    _check_positive("The sensitivity", sensitivity)
    _check_positive("Epsilon", epsilon)
    _check_delta(delta)
    return sensitivity * _least(lambda scale: _loss(scale, epsilon) > delta, 1e-6)


def gaussian_epsilon(sensitivity: float, sigma: float, delta: float) -> float:
    """The least ε for which Gaussian noise of standard deviation σ is (ε, δ)-private: the inverse of `gaussian_sigma`.

    Raises GradinvError unless Δ > 0, σ > 0 and 0 < δ < 1.
    """
    _check_positive("The sensitivity", sensitivity)
    _check_positive("The standard deviation", sigma)
    _check_delta(delta)
    scale = sigma / sensitivity
    return _least(lambda epsilon: _loss(scale, epsilon) > delta, 0.0) if _loss(scale, 0.0) > delta else 0.0


def _loss(scale: float, epsilon: float) -> float:
    """The smallest δ at σ = scale · Δ."""
    shift, spread = epsilon * scale, 1 / (2 * scale)
    # e^ε alone overflows where its product with Φ is small.
    return math.exp(_log_cdf(spread - shift)) - math.exp(epsilon + _log_cdf(-spread - shift))


def _log_cdf(x: float) -> float:
    return float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))


def _least(too_small: Callable[[float], bool], low: float) -> float:
    """The least number above `low` that is not too small, from above, to the last digits."""
    high = 1.0
    while too_small(high):
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if too_small(middle) else (low, middle)
    return high


# --- by name


def parse(text: str, seed: int = 0) -> Defence:
    """A defence as a user writes it: one of `DESCRIPTION`'s, such as "clip:1", "noise:1e-3", "dp:1,8,1e-5" or "none".

    `seed` is where noise comes from. Raises GradinvError for an unknown name or numbers that do not fit.
    """
    text = text.strip()
    name, _, numbers = text.partition(":")
    form = next((form for form in DESCRIPTION if form.partition(":")[0] == name), None)
    if form is None:
        raise GradinvError(f"There is no defence {name!r}; take one of {', '.join(DESCRIPTION)}.")
    unreadable = GradinvError(f"The defence {text!r} cannot be read; write {form}.")
    try:
        values = [int(number) if name == "quantise" else float(number) for number in numbers.split(",") if numbers]
    except ValueError as error:
        raise unreadable from error
    match name, values:
        case "none", []:
            return Defence(text, "The gradient is shared as it is.", lambda o: o)
        case "clip", [norm]:
            _check_positive("The norm to clip to", norm)
            return Defence(text, f"The gradient is clipped to a norm of {norm:g}.", lambda o: clip(o, norm))
        case "noise", [std]:
            _check_std(std)
            note = f"Gaussian noise of standard deviation {std:g} is added to every number."
            return Defence(text, note, lambda o: add_noise(o, std, seed))
        case "dp", [norm, epsilon, delta]:
            _check_positive("The norm to clip to", norm)
            std = gaussian_sigma(2 * norm, epsilon, delta)
            note = (
                f"The gradient is clipped to a norm of {norm:g} and Gaussian noise of standard deviation {std:.4g} is "
                f"added to every number: {_guarantee(epsilon, delta)}"
            )
            return Defence(text, note, lambda o: gaussian_mechanism(o, norm, epsilon, delta, seed))
        case "prune", [share]:
            _check_share(share)
            note = f"The smallest {100 * share:g} % of the gradient's numbers are set to 0."
            return Defence(text, note, lambda o: prune(o, share))
        case "quantise", [int(bits)]:
            _check_bits(bits)
            note = f"Every tensor of the gradient is rounded to {bits} bit{'s' if bits > 1 else ''} a number."
            return Defence(text, note, lambda o: quantise(o, bits))
    raise unreadable


def parse_all(texts: Sequence[str], seed: int = 0) -> list[Defence]:
    """Several, to be applied in that order. Noise that follows a clipping says for which ε it suffices."""
    defences: list[Defence] = []
    norm: float | None = None
    for index, text in enumerate(texts):
        defence = parse(text, seed + index)
        name, _, number = defence.text.partition(":")
        if name == "noise" and norm is not None and float(number) > 0:
            epsilon = gaussian_epsilon(2 * norm, float(number), DELTA)
            note = f"{defence.note} After clipping to {norm:g} that is {_guarantee(epsilon, DELTA)}"
            defence = replace(defence, note=note)
        norm = float(number) if name == "clip" else None
        defences.append(defence)
    return defences


def _guarantee(epsilon: float, delta: float) -> str:
    return (
        f"({epsilon:.4g}, {delta:g})-differential privacy of the client's whole batch for one round; for a single "
        "picture an averaged gradient gives no guarantee."
    )


def _changed(observation: Observation, change: Callable[[str, Tensor], Tensor]) -> Observation:
    return replace(observation, gradients={name: change(name, value) for name, value in observation.gradients.items()})


def _check_positive(what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise GradinvError(f"{what} must be a finite number greater than 0, not {value!r}.")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise GradinvError(f"Delta must be greater than 0 and less than 1, not {delta!r}.")


def _check_std(std: float) -> None:
    if not 0 <= std < math.inf:
        raise GradinvError(f"The noise's standard deviation must be a finite number of at least 0, not {std!r}.")


def _check_share(share: float) -> None:
    if not 0 <= share < 1:
        raise GradinvError(f"The share that is pruned must be at least 0 and less than 1, not {share!r}.")


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise GradinvError(f"Gradients are quantised to a whole number of 1 to 8 bits, not {bits!r}.")
