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

from gradinv.types import Gradients, GradinvError, Observation

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
    _apply: Callable[[Observation], Observation] = field(repr=False, compare=False)

    def __call__(self, observation: Observation) -> Observation:
        return self._apply(observation)


# --- what is done to the gradient


def clip(observation: Observation, norm: float) -> Observation:
    """Scale all gradients together to an ℓ2 norm of at most `norm`: g ← g · min(1, C / ‖g‖₂).

    Raises GradinvError where `norm` is not positive.
    """
    _check_positive("The norm to clip to", norm)
    total = _norm(observation.gradients)
    scale = min(1.0, norm / total) if total > 0 else 1.0
    return _mapped(observation, lambda value: value * scale)


def add_noise(observation: Observation, std: float, seed: int = 0) -> Observation:
    """Add N(0, std²) to every number of every gradient: g ← g + std · η. The same seed gives the same noise.

    On its own it promises nothing, since nothing bounds how much one batch changes the gradient: clip before. Raises
    GradinvError where `std` is negative or not finite.
    """
    if not 0 <= std < math.inf:
        raise GradinvError(f"The noise's standard deviation must be a finite number of at least 0, not {std!r}.")
    generator = torch.Generator().manual_seed(seed)
    noise: dict[str, Tensor] = {}
    for name in sorted(observation.gradients):  # a file gives the gradients back in another order
        noise[name] = torch.randn(observation.gradients[name].shape, generator=generator)
    return replace(
        observation,
        gradients={
            name: value + std * noise[name].to(value.device, value.dtype)
            for name, value in observation.gradients.items()
        },
    )


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
    if not 0 <= share < 1:
        raise GradinvError(f"The share that is pruned must be at least 0 and less than 1, not {share!r}.")
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
    return replace(
        observation,
        gradients={name: value * masks[name].view(value.shape) for name, value in observation.gradients.items()},
    )


def quantise(observation: Observation, bits: int) -> Observation:
    """Round every tensor to the nearest of 2^bits evenly spaced values between −max|g| and max|g| of that tensor.

    Deterministic. Zero lies between two of them. With 1 bit the two values are the sign times the mean magnitude, the
    nearest in the least squares (zeros stay). Raises GradinvError where `bits` is not a whole number from 1 to 8.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
        raise GradinvError(f"Gradients are quantised to a whole number of 1 to 8 bits, not {bits!r}.")

    def quantised(value: Tensor) -> Tensor:
        if bits == 1:
            return value.sign() * value.abs().mean()
        largest, steps = value.abs().max(), 2**bits - 1
        if largest == 0:
            return value.clone()
        level = ((value / largest + 1) / 2 * steps).round()
        return (level / steps * 2 - 1) * largest

    return _mapped(observation, quantised)


# --- the analytic Gaussian mechanism


def gaussian_sigma(sensitivity: float, epsilon: float, delta: float) -> float:
    """The least standard deviation σ with which Gaussian noise is (ε, δ)-private at that ℓ2 sensitivity Δ.

    Balle & Wang 2018, Theorem 8: exactly where Φ(Δ/2σ − εσ/Δ) − e^ε Φ(−Δ/2σ − εσ/Δ) ≤ δ. The left side falls with σ,
    so it is solved by bisection (their Algorithm 1). Raises GradinvError unless Δ > 0, ε > 0 and 0 < δ < 1.
    """
    _check_positive("The sensitivity", sensitivity)
    _check_positive("Epsilon", epsilon)
    _check_delta(delta)
    low, high = 1e-6, 1.0
    while _loss(high, epsilon) > delta:
        low, high = high, 2 * high
    return sensitivity * _falling(lambda scale: _loss(scale, epsilon) > delta, low, high)


def gaussian_epsilon(sensitivity: float, sigma: float, delta: float) -> float:
    """The least ε for which Gaussian noise of standard deviation σ is (ε, δ)-private: the inverse of `gaussian_sigma`.

    Raises GradinvError unless Δ > 0, σ > 0 and 0 < δ < 1.
    """
    _check_positive("The sensitivity", sensitivity)
    _check_positive("The standard deviation", sigma)
    _check_delta(delta)
    scale = sigma / sensitivity
    if _loss(scale, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while _loss(scale, high) > delta:
        low, high = high, 2 * high
    return _falling(lambda epsilon: _loss(scale, epsilon) > delta, low, high)


def _loss(scale: float, epsilon: float) -> float:
    """The smallest δ at σ = scale · Δ."""
    shift, spread = epsilon * scale, 1 / (2 * scale)
    # e^ε alone overflows where its product with Φ is small.
    return math.exp(_log_cdf(spread - shift)) - math.exp(epsilon + _log_cdf(-spread - shift))


def _log_cdf(x: float) -> float:
    return float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))


def _falling(too_small: Callable[[float], bool], low: float, high: float) -> float:
    """The least x of [low, high] that is not too small, from above, to the last digits."""
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if too_small(middle) else (low, middle)
    return high


# --- by name


def parse(text: str, seed: int = 0) -> Defence:
    """A defence as a user writes it: one of `DESCRIPTION`'s, such as "clip:1", "noise:1e-3", "dp:1,8,1e-5" or "none".

    `seed` is where noise comes from. Raises GradinvError for an unknown name or numbers that do not fit.
    """
    name, _, numbers = text.strip().partition(":")
    forms = {form.partition(":")[0]: form for form in DESCRIPTION}
    if name not in forms:
        raise GradinvError(f"There is no defence {name!r}; take one of {', '.join(DESCRIPTION)}.")
    given = numbers.split(",") if numbers else []
    if len(given) != len([letter for letter in forms[name].partition(":")[2].split(",") if letter]):
        raise GradinvError(f"The defence {text!r} cannot be read; write {forms[name]}.")
    try:
        values = [int(number) if name == "quantise" else float(number) for number in given]
    except ValueError as error:
        raise GradinvError(f"The defence {text!r} cannot be read; write {forms[name]}.") from error
    return _DEFENCES[name](text.strip(), values, seed)


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


def _none(text: str, _: Sequence[float], __: int) -> Defence:
    return Defence(text, "The gradient is shared as it is.", lambda observation: observation)


def _clip(text: str, values: Sequence[float], _: int) -> Defence:
    (norm,) = values
    _check_positive("The norm to clip to", norm)
    return Defence(text, f"The gradient is clipped to a norm of {norm:g}.", lambda o: clip(o, norm))


def _noise(text: str, values: Sequence[float], seed: int) -> Defence:
    (std,) = values
    if not 0 <= std < math.inf:
        raise GradinvError(f"The noise's standard deviation must be a finite number of at least 0, not {std!r}.")
    note = f"Gaussian noise of standard deviation {std:g} is added to every number."
    return Defence(text, note, lambda o: add_noise(o, std, seed))


def _private(text: str, values: Sequence[float], seed: int) -> Defence:
    norm, epsilon, delta = values
    _check_positive("The norm to clip to", norm)
    sigma = gaussian_sigma(2 * norm, epsilon, delta)
    note = (
        f"The gradient is clipped to a norm of {norm:g} and Gaussian noise of standard deviation {sigma:.4g} is added "
        f"to every number: {_guarantee(epsilon, delta)}"
    )
    return Defence(text, note, lambda o: gaussian_mechanism(o, norm, epsilon, delta, seed))


def _prune(text: str, values: Sequence[float], _: int) -> Defence:
    (share,) = values
    if not 0 <= share < 1:
        raise GradinvError(f"The share that is pruned must be at least 0 and less than 1, not {share!r}.")
    note = f"The smallest {100 * share:g} % of the gradient's numbers are set to 0."
    return Defence(text, note, lambda o: prune(o, share))


def _quantise(text: str, values: Sequence[float], _: int) -> Defence:
    bits = int(values[0])
    if not 1 <= bits <= 8:
        raise GradinvError(f"Gradients are quantised to a whole number of 1 to 8 bits, not {bits!r}.")
    note = f"Every tensor of the gradient is rounded to {bits} bit{'s' if bits > 1 else ''} a number."
    return Defence(text, note, lambda o: quantise(o, bits))


_DEFENCES: dict[str, Callable[[str, Sequence[float], int], Defence]] = {
    "none": _none,
    "clip": _clip,
    "noise": _noise,
    "dp": _private,
    "prune": _prune,
    "quantise": _quantise,
}


def _guarantee(epsilon: float, delta: float) -> str:
    return (
        f"({epsilon:.4g}, {delta:g})-differential privacy of the client's whole batch for one round; for a single "
        "picture an averaged gradient gives no guarantee."
    )


def _norm(gradients: Gradients) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in gradients.values()))


def _mapped(observation: Observation, change: Callable[[Tensor], Tensor]) -> Observation:
    return replace(observation, gradients={name: change(value) for name, value in observation.gradients.items()})


def _check_positive(what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise GradinvError(f"{what} must be a finite number greater than 0, not {value!r}.")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise GradinvError(f"Delta must be greater than 0 and less than 1, not {delta!r}.")
