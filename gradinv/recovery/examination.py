"""What a gradient is where it is not what its file says: seen from the weights, before anything is solved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradinv.batchnorm import check_train_mode
from gradinv.models import Model
from gradinv.names import matched
from gradinv.recovery.final_layer import COMPUTED, rounding
from gradinv.types import GradinvError, Observation

# Without weight decay, what K images leave of a gradient had a correlation with the weights of at most 0.05, also
# behind noise, pruning and quantisation; with a decay of 1e-4 at least 0.4, in bfloat16, and else 0.97.
_DECAYED = 0.3
_CHANCE = 5.0  # of a correlation of n numbers, times 1/√n
# Of √d ⟨w, ∇w⟩ / (‖w‖ ‖∇w‖) over the filters w of d numbers, the root mean square was 1e-4 in train mode, up to 0.09
# with noise of 1e-4, and 1 by chance; in eval mode 1 to 6.
_ORTHOGONAL = 0.2


@dataclass(frozen=True, eq=False)
class Examined:
    """The `observation` as it is to be inverted, and in sentences what was found and changed."""

    observation: Observation
    notes: tuple[str, ...] = ()


@torch.no_grad()
def examine(model: Model, observation: Observation) -> Examined:
    """Recognise layers without a gradient, weight decay, a wrong batch size and the other forward mode, in well under a
    second.

    Names become the model's own, weight decay λ W is taken off, and the forward mode is set right. Whether it is an
    update, or of smoothed labels, is seen where labels are read (`restore_labels`). Raises GradinvError where the
    gradient is of more images than the observation says.
    """
    observation, absent = _without_zeros(model, named_for(model, observation))
    notes = list(absent)
    observation, decay = _without_decay(model, observation)
    if decay:
        notes.append(f"The gradient holds weight decay, {decay:.3g} times the weights, which was taken off.")
    images = _images(model, observation)
    if images is not None and images < observation.batch_size <= _rank_at_most(model):
        notes.append(
            f"The final layer's gradient has rank {images}: unless pictures repeat, it is of {images} images and not "
            f"of {observation.batch_size}."
        )
    observation, mode = _in_its_mode(model, observation, images is not None)
    return Examined(observation, (*notes, *mode))


def named_for(model: Model, observation: Observation) -> Observation:
    """The observation with the names of the model's own parameters; where some have no counterpart, as it is."""
    names = list(observation.gradients)
    found = matched(names, [name for name, _ in model.network.named_parameters()])
    if found is None or all(old == new for old, new in found.items()):
        return observation
    prefix = next((old.removesuffix(new) for old, new in found.items() if old.endswith(new)), "")
    bn, running = (own and own.without(prefix) for own in (observation.bn, observation.running))
    gradients = {new: observation.gradients[old] for old, new in found.items()}
    return replace(observation, gradients=gradients, bn=bn, running=running)


def _without_zeros(model: Model, observation: Observation) -> tuple[Observation, tuple[str, ...]]:
    """The observation without gradients that are zero throughout, as of layers that do not train, and what is said of
    those and of what lacks. Behind pruning, zeros say that the numbers were small."""
    gradients = {name: value for name, value in observation.gradients.items() if value.any()}
    if not gradients or (len(gradients) < len(observation.gradients) and _pruned(gradients.values())):
        gradients = dict(observation.gradients)
    zeros = len(observation.gradients) - len(gradients)
    absent = [name for name, _ in model.network.named_parameters() if name not in gradients]
    if not absent:
        return observation, ()
    also = f" ({zeros} zero throughout)" if zeros else ""
    note = (
        f"The gradients of {len(absent)} of {len(absent) + len(gradients)} parameters are absent{also}, as of layers "
        f"that do not train, from {absent[0]} to {absent[-1]}; they are matched nowhere."
    )
    return replace(observation, gradients=gradients), (note,)


def _pruned(gradients: Iterable[Tensor]) -> bool:
    """Whether no number is small beside the others: these were set to 0."""
    sizes = torch.cat([gradient.detach().cpu().float().abs().flatten() for gradient in gradients])
    sizes = sizes[sizes > 0]
    return float(sizes.min()) > 0.05 * float(sizes.median())


def _without_decay(model: Model, observation: Observation) -> tuple[Observation, float]:
    """The gradient less λ W, and λ, 0 where there is none.

    ∇W of K images has rank K. So outside the spaces of its largest singular vectors, half of all, nothing is left of
    it but λ W, of which λ is solved by least squares, then both once more.
    """
    gradient = observation.gradients.get(f"{model.final}.weight")
    weight = model.final_layer.weight.cpu().double()
    rank = max(observation.batch_size, min(weight.shape) // 2)
    numbers = max(0, weight.shape[0] - rank) * max(0, weight.shape[1] - rank)
    if gradient is None or numbers == 0:
        return observation, 0.0
    given, decay = gradient.cpu().double(), 0.0
    for _ in range(8):
        left = _largest(given - decay * weight, rank)
        right = torch.linalg.qr((given - decay * weight).T @ left)[0]
        rest, own = ((m := whole - left @ (left.T @ whole)) - m @ right @ right.T for whole in (given, weight))
        if _correlation(rest, own) < max(_DECAYED, _CHANCE / numbers**0.5):
            return observation, 0.0
        before, decay = decay, float((rest * own).sum() / own.square().sum())
        if abs(decay - before) <= 1e-9 * abs(decay):
            break
    changed = dict(observation.gradients)
    vectors = _decays_vectors(model, observation, left, decay)
    for name, parameter in model.network.named_parameters():
        if name in changed and (parameter.ndim > 1 or vectors):
            value = changed[name].double() - decay * parameter.to(changed[name].device).double()
            changed[name] = value.to(changed[name].dtype)
    return replace(observation, gradients=changed), decay


def _decays_vectors(model: Model, observation: Observation, left: Tensor, decay: float) -> bool:
    """Whether biases, and the vectors of batch normalisation with them, decay too, as many clients leave them out: the
    final layer's bias tells, whose gradient lies in the space of its weight's."""
    gradient, bias = observation.gradients.get(f"{model.final}.bias"), model.final_layer.bias
    if gradient is None or bias is None:
        return True
    rest, own = (given - left @ (left.T @ given) for given in (gradient.cpu().double(), bias.cpu().double()))
    return float((rest - decay * own).norm()) < float(rest.norm())


def _images(model: Model, observation: Observation) -> int | None:
    """Of how many different images the final layer's gradient is: that is its rank, where each one's errors p − y sum
    to 0, which noise and pruning undo; then None. Raises GradinvError where there are more than the observation says.
    """
    gradient = observation.gradients.get(f"{model.final}.weight")
    if gradient is None:
        return None
    given = gradient.cpu().double()
    precise = 3 * max(rounding(gradient), COMPUTED) * float(given.norm())
    values = torch.linalg.eigvalsh(given @ given.T).clamp(min=0).sqrt()
    count, rank = observation.batch_size, int((values > precise).sum())
    if float(given.sum(0).norm()) > precise or not rank:
        return None
    if rank > count:
        raise GradinvError(
            f"The final layer's gradient has rank {rank}, so it is of at least {rank} images and not of {count}, or of "
            "several steps; say of how many (--batch-size, or the observation's batch_size)."
        )
    return rank


def _in_its_mode(model: Model, observation: Observation, exact: bool) -> tuple[Observation, tuple[str, ...]]:
    """The observation with the forward mode that its gradient was taken in. In train mode batch normalisation makes the
    loss independent of each filter's length, so ⟨w, ∇w⟩ = 0; in eval mode it is not. Only where the gradient is
    `exact` is that certain, for noise hides the former."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.network.modules()):
        return observation, ()
    found = []
    for name, parameter in model.network.named_parameters():
        if parameter.ndim == 4 and name in observation.gradients:
            weight, gradient = (m.cpu().float().flatten(1) for m in (parameter, observation.gradients[name]))
            lengths = weight.norm(dim=1) * gradient.norm(dim=1)
            if (lengths > 0).any():
                cosine = ((weight * gradient).sum(1) / lengths)[lengths > 0]
                found.append(float(cosine.square().mean() * weight.shape[1]) ** 0.5)
    middle = float(torch.tensor(found).median()) if found else None
    if observation.mode == "eval" and middle is not None and middle < _ORTHOGONAL and _allows_train(model, observation):
        return replace(observation, mode="train"), (
            "The gradient was taken in train mode, though the observation says eval: filters are orthogonal to it. So "
            "no layer below the final one is solved, and pixels are searched for by gradient matching in train mode; "
            "more can be had in eval mode, or with the running statistics after the step (bn inferred).",
        )
    if observation.mode == "train" and middle is not None and middle > 0.5 and exact:
        return replace(observation, mode="eval", running=None), (
            "The gradient was taken in eval mode, though the observation says train: filters are not orthogonal to it. "
            "It is inverted as one in eval mode.",
        )
    return observation, ()


def _rank_at_most(model: Model) -> int:
    """Of so many images the final layer's gradient has that rank: its errors sum to 0, which costs one."""
    layer = model.final_layer
    return min(layer.out_features - 1, layer.in_features)


def _allows_train(model: Model, observation: Observation) -> bool:
    try:
        check_train_mode(model, observation.batch_size)
    except GradinvError:
        return False
    return True


def _largest(matrix: Tensor, rank: int) -> Tensor:
    """The left singular vectors (N, rank) of the largest singular values of (N, D)."""
    return torch.linalg.eigh(matrix @ matrix.T)[1][:, -rank:]


def _correlation(first: Tensor, second: Tensor) -> float:
    norms = (first.norm() * second.norm()).clamp(min=torch.finfo(torch.float64).tiny)
    return float((first * second).sum().abs() / norms)
