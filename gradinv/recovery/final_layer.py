"""Each image's pooled features, solved from the final layer's gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv.models import Model
from gradinv.types import GradinvError, Observation

EXPLAINED = 1e-4  # a smaller residual was only ever met by the true features; wrong minima were seen from 8e-4 up
_ROUNDED = 1.5  # of a rounded gradient, times its rounding: with the true features 0.5 to 0.9 were seen
COMPUTED = 1e-5  # a larger relative error is not that of sums in float32
_UNKNOWNS = 4096  # of a Gauss-Newton step; more (above 64 images) are left to the alternation


@dataclass(frozen=True, eq=False)
class Fit:
    """What the final layer's gradient says of each image: `features` F (B, D), `output_errors` A = p − y (B, N).

    `residual` is ‖s AᵀF/K − ∇W‖ / ‖∇W‖ with the best `scale` s, which is 1 unless the client rescaled its gradient.
    `explained` says that it is no more than rounding: the features are the client's own, also of images that share a
    label (then in any order among these). Else the gradient was changed otherwise, the labels are wrong, or a wrong
    minimum was met.
    `drift` (N,) says of which classes the labels are too few (above 0) or too many (below 0). `smoothing` is that of
    the client's labels, ε in (1 − ε) y + ε/N.
    """

    features: Tensor
    output_errors: Tensor
    residual: float
    drift: Tensor
    scale: float
    explained: bool
    smoothing: float


@torch.no_grad()
def recover_features(model: Model, observation: Observation, labels: Tensor, known: Fit | None = None) -> Fit:
    """Solve ∇W = (s/K) Aᵀ F, ∇b = (s/K) Aᵀ 1 for the pooled features F ≥ 0, A = softmax(F Wᵀ + b) − y.

    labels: (B,), of which some may repeat. `known` is a solution with these labels that there is already. → float32 on
    the model's device. Needs K < N. Not in the paper. Raises GradinvError where the layer has no bias, K ≥ N, or its
    gradient is not finite.
    """
    best = known or FinalLayer(model, observation).fit(labels.cpu())
    device = model.device
    features, output_errors = best.features.float().to(device), best.output_errors.float().to(device)
    return replace(best, features=features, output_errors=output_errors)


class FinalLayer:
    """The equations of the final layer, in the coordinates in which they are small.

    X = [F, c] (the features with a column for the bias) obeys AᵀX = K [∇W, c ∇b], a matrix of rank K: its K leading
    right singular vectors V span the rows of X, so X = R V with K × K unknowns instead of K × D. V is turned so that
    the bias column fixes R's first column, which leaves Z (K, K − 1); c balances the two gradients. From Z the logits
    are R M, M = V [W, b/c]ᵀ, so that the residual E = s AᵀR/K − T, T = [∇W, c ∇b] Vᵀ, is N × K. Clipping and averages
    of more than one client rescale the gradient; c and V do not change with that, and s is the best one for every Z.

    Solved by alternation (A from Z, Z by least squares from A, clamped to F ≥ 0), then by Levenberg-Marquardt with
    a penalty on negative features; the true F is its minimum with value 0. Everything is float64 on the CPU: the
    matrices are small, and the smallest singular values matter.

    Labels are the client's smoothed ones, (1 − ε) y + ε/N, with the observation's ε, or with ε as one more unknown of
    Levenberg-Marquardt.
    """

    def __init__(self, model: Model, observation: Observation) -> None:
        layer = model.final_layer
        if f"{model.final}.weight" not in observation.gradients:
            raise GradinvError("Features are recovered from the final layer's gradient, which is absent.")
        if f"{model.final}.bias" not in observation.gradients or layer.bias is None:
            raise GradinvError("Features can only be recovered where the final layer has a bias and its gradient.")
        self._gradient = observation.gradients[f"{model.final}.weight"].cpu().double()
        self._bias_gradient = observation.gradients[f"{model.final}.bias"].cpu().double()
        self._weight, self._bias = layer.weight.detach().cpu().double(), layer.bias.detach().cpu().double()
        self._count = count = observation.batch_size
        classes = len(self._gradient)
        if count >= classes:
            raise GradinvError(
                f"Features can be recovered for fewer images than the {classes} classes, not for {count}."
            )
        if not (torch.isfinite(self._gradient).all() and torch.isfinite(self._bias_gradient).all()):
            raise GradinvError("The final layer's gradient is not finite, so no features can be recovered.")
        tiny = torch.finfo(torch.float64).tiny
        self._constant = float(self._gradient.norm().clamp(min=tiny) / self._bias_gradient.norm().clamp(min=tiny))
        joint = torch.cat([self._gradient, self._constant * self._bias_gradient[:, None]], 1)
        _, vectors = torch.linalg.eigh(joint @ joint.T)
        rank = min(count, joint.shape[1])
        rows = torch.linalg.qr((vectors[:, -rank:].T @ joint).T)[0]
        turn = torch.linalg.qr(torch.cat([rows[-1:].T, torch.eye(rank, dtype=torch.float64)], 1))[0][:, :rank]
        turn[:, 0] *= torch.where(rows[-1] @ turn[:, 0] < 0, -1.0, 1.0)
        basis = (rows @ turn).T
        self._basis = basis[:, :-1]
        self._first = self._constant / max(float(basis[0, -1]), 1e-12)
        self._target = joint @ basis.T
        self._to_logits = basis @ torch.cat([self._weight, self._bias[:, None] / self._constant], 1).T
        self._scale = float(joint.norm().clamp(min=tiny))
        self._penalty = self._scale**2 / (count * self._constant**2)
        self._kept = torch.ones(classes, dtype=torch.float64)
        self.smoothing, self._solved_for = observation.label_smoothing, False
        shares = (rounding(observation.gradients[f"{model.final}.{name}"]) for name in ("weight", "bias"))
        self.rounding = max(shares)
        """What the gradient's number format alone leaves unexplained."""
        self._explained = max(EXPLAINED, _ROUNDED * self.rounding)
        # K images span the rows, and each image's errors p − y sum to 0, whatever the labels are.
        strange = [joint.sum(0).norm(), (joint - self._target @ basis).norm()]
        self.sound = float(max(strange)) <= 3 * max(self.rounding, COMPUTED) * self._scale
        """Whether the gradient has the form AᵀX of K images, with errors that sum to 0, up to rounding."""
        few = max(10 * self.rounding, COMPUTED) * float(self._bias_gradient.abs().max())
        self.negative, self.positive = (int((sign * self._bias_gradient > few).sum()) for sign in (-1, 1))
        """How many classes have a negative and a positive bias gradient: negative, without label smoothing, no more
        than there are images."""

    def fit(self, labels: Tensor, *, starts: int = 6, exact: bool = True) -> Fit:
        """The best of some starts: labels (B,) on the CPU → `Fit`.

        The first start is F_k = ∇W[y_k] / ∇b[y_k]. Where labels repeat, and at every further attempt, the logits are
        moved at random first (the same each time), or images of one label would stay one image. Ends at the first
        residual below `EXPLAINED`. Without `exact` it is the alternation alone, a rough answer in milliseconds.
        """
        soft_labels = self._smoothed(F.one_hot(labels, len(self._bias)).double())
        ratio = self._ratio(labels)
        generator = torch.Generator().manual_seed(0)
        repeats = len(labels.unique()) < len(labels)
        unknowns = ratio.numel()
        exact = exact and int(not self._solved_for) <= unknowns <= _UNKNOWNS
        left = max(20, min(400, int(2e12 / max(1, unknowns) ** 3)))  # steps, by what one costs
        best, smallest = (ratio, soft_labels), self._cost(ratio, soft_labels)
        for start in range(starts if exact else 1):
            z, found = self._shaken(ratio, soft_labels, generator) if repeats or start > 0 else ratio, soft_labels
            z = self._alternate(z, soft_labels, rounds=5 if exact else 20)
            if exact:
                z, found, steps = self._descend(z, soft_labels, left)
                left -= steps
            cost = self._cost(z, found)
            if cost < smallest:
                best, smallest = (z, found), cost
            if smallest < (self._explained * self._scale) ** 2 or left <= 0:
                break
        return self._finish(*best)

    def refined(self, fit: Fit, labels: Tensor) -> Fit:
        """The same fit to the last digit that float32 gradients hold: the layers below need it. labels: (B,)."""
        soft_labels = _smoothed(F.one_hot(labels, len(self._bias)).double(), fit.smoothing)
        z = self._inside(fit.features)
        if not 0 < z.numel() <= _UNKNOWNS or not fit.explained:
            return fit
        z, soft_labels, _ = self._descend(z, soft_labels, 4, enough=1e-9)
        refined = self._finish(z, soft_labels)
        return refined if refined.residual < fit.residual else fit

    def readings(self, labels: Tensor, present: Tensor, starts: int = 3) -> Iterator[Tensor]:
        """The labels (B,), nearly or entirely right, that follow from the classes that no image has.

        Of a class that is surely absent the equations hold no label: s pᵀR/K = T. Where enough are, they alone
        determine R, and with it the labels P − A of every image, A from AᵀR = K T/s. labels: (B,), a guess to start
        from; present: (N,) bool, every class that may be in the batch. Nothing where too few are absent. A descent that
        ends in a wrong minimum often still has every label right, which `fit` then tells.
        """
        if int((~present).sum()) < self._count:
            return
        absent = self._without(present)
        soft_labels = self._smoothed(F.one_hot(labels, len(self._bias)).double())
        nothing = self._smoothed(torch.zeros_like(soft_labels))  # no label is in the absent classes' equations
        ratio = self._ratio(labels)
        generator = torch.Generator().manual_seed(0)
        for _ in range(starts):
            z = self._alternate(self._shaken(ratio, soft_labels, generator), soft_labels, rounds=5)
            z, found, _ = absent._descend(z, nothing, 60)
            yield self._labels_of(z, absent._scale_at(z, found)).argmax(1)

    def _without(self, classes: Tensor) -> FinalLayer:
        """The equations of all other classes; classes: (N,) bool."""
        other = copy.copy(self)
        other._kept = (~classes).double()
        other._target = self._target * other._kept[:, None]
        other._scale = float(other._target.norm().clamp(min=torch.finfo(torch.float64).tiny))
        other._penalty = self._penalty * (other._scale / self._scale) ** 2
        return other

    def with_unknown_smoothing(self, about: float) -> FinalLayer:
        """The same equations with the smoothing of the labels as one more unknown, which may be `about` so much."""
        other = copy.copy(self)
        other.smoothing, other._solved_for = about, True
        return other

    @property
    def solves_smoothing(self) -> bool:
        """Whether the smoothing of the labels is an unknown."""
        return self._solved_for

    def _smoothed(self, one_hot: Tensor) -> Tensor:
        """The client's labels from one-hot ones (B, N), or from none."""
        return _smoothed(one_hot, self.smoothing)

    def _ratio(self, labels: Tensor) -> Tensor:
        scale = self._bias_gradient[labels]
        scale = torch.where(scale.abs() < 1e-12, torch.full_like(scale, -1e-12), scale)
        return self._inside((self._gradient[labels] / scale[:, None]).clamp(min=0))

    def _inside(self, features: Tensor) -> Tensor:
        """Features (B, D) → the unknowns Z (B, rank − 1) of the nearest ones in the span."""
        return features @ self._basis[1:].T

    def _mixture(self, z: Tensor) -> Tensor:
        return torch.cat([z.new_full((len(z), 1), self._first), z], 1)

    def _probabilities(self, z: Tensor) -> Tensor:
        return (self._mixture(z) @ self._to_logits).softmax(1)

    def _output_errors(self, z: Tensor, soft_labels: Tensor) -> Tensor:
        return (self._probabilities(z) - soft_labels) * self._kept

    def _scale_at(self, z: Tensor, soft_labels: Tensor) -> Tensor:
        return _scale(self._output_errors(z, soft_labels).T @ self._mixture(z) / self._count, self._target)

    def _cost(self, z: Tensor, soft_labels: Tensor) -> float:
        """‖E‖² + μ ‖min(F, 0)‖², in the units of ‖[∇W, c ∇b]‖²."""
        mixture = self._mixture(z)
        predicted = self._output_errors(z, soft_labels).T @ mixture / self._count
        misfit = _scale(predicted, self._target) * predicted - self._target
        negative = (mixture @ self._basis).clamp(max=0)
        return float(misfit.square().sum() + self._penalty * negative.square().sum())

    def _solved(self, z: Tensor, errors: Tensor) -> Tensor:
        """Least squares of s AᵀR = K T for R, with the s of the present R, then F = R V clamped at 0: errors A (B, N)
        → Z."""
        gram = errors @ errors.T
        gram = gram + (1e-9 * gram.diagonal().mean() + 1e-30) * torch.eye(len(gram), dtype=gram.dtype)
        scale = _scale(errors.T @ self._mixture(z) / self._count, self._target)
        mixture = torch.linalg.solve(gram, self._count / scale * errors @ self._target)
        return self._inside((mixture @ self._basis).clamp(min=0))

    def _shaken(self, z: Tensor, soft_labels: Tensor, generator: torch.Generator) -> Tensor:
        logits = self._mixture(z) @ self._to_logits
        noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
        return self._solved(z, (logits + noise).softmax(1) - soft_labels)

    def _alternate(self, z: Tensor, soft_labels: Tensor, rounds: int) -> Tensor:
        best, smallest = z, self._cost(z, soft_labels)
        for _ in range(rounds):
            z = self._solved(z, self._probabilities(z) - soft_labels)
            cost = self._cost(z, soft_labels)
            if cost < smallest:
                best, smallest = z, cost
        return best

    def _descend(self, z: Tensor, soft_labels: Tensor, limit: int, enough: float = 1e-6) -> tuple[Tensor, Tensor, int]:
        """Levenberg-Marquardt until the residual is rounding error or three steps gain little: → Z, the labels, which
        change where ε is unknown, steps taken."""
        cost, damping, slow = self._cost(z, soft_labels), 1e-2, 0
        for step in range(limit):
            hessian, gradient = self._normal_equations(z, soft_labels)
            scale = hessian.diagonal().clone()
            for _ in range(12):
                damped = hessian + torch.diag(damping * scale + 1e-14 * scale.max())
                factor, failed = torch.linalg.cholesky_ex(damped)
                if not failed:
                    # The last is s's, which follows; before it comes that of ε, where it is unknown.
                    change = torch.cholesky_solve(gradient[:, None], factor)[:-1, 0]
                    trial = z - change[: z.numel()].view_as(z)
                    labels = soft_labels
                    if self._solved_for:
                        labels = _smoothed(soft_labels, -float(change[-1]))
                    value = self._cost(trial, labels)
                    if value < cost:
                        break
                damping = 6 * max(damping, 1e-9)
            else:
                return z, soft_labels, step + 1
            slow = slow + 1 if value > 0.98 * cost else 0
            z, soft_labels, cost, damping = trial, labels, value, damping / 8
            if slow == 3 or cost < (enough * self._scale) ** 2:
                return z, soft_labels, step + 1
        return z, soft_labels, limit

    def _normal_equations(self, z: Tensor, soft_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Gauss-Newton's JᵀJ and Jᵀ(residuals) for the n = B · (rank − 1) unknowns, for a further smoothing of the
        labels where ε is unknown, and for s.

        With Q[k, i, z] = ∂p_k[i]/∂Z[k, z] = p_k[i] (M[z, i] − Σ_j p_k[j] M[z, j]) the Jacobian of K E[i, j] / s is
        A[k, i] δ_jz + R[k, j] Q[k, i, z]; JᵀJ is put together from products over i, so J is never formed.
        """
        count, width = z.shape
        mixture, probabilities = self._mixture(z), self._probabilities(z)
        errors = self._output_errors(z, soft_labels)
        predicted = errors.T @ mixture / self._count
        scale = _scale(predicted, self._target)
        misfit = scale * predicted - self._target
        slopes = self._to_logits[1:].T[None] - (probabilities @ self._to_logits[1:].T)[:, None]
        change = (probabilities * self._kept)[:, :, None] * slopes  # (B, N, z)
        flat = change.transpose(0, 1).reshape(probabilities.shape[1], count * width)  # (N, B · z)
        hessian = (flat.T @ flat).view(count, width, count, width) * (mixture @ mixture.T)[:, None, :, None]
        cross = torch.einsum("wz,kwy->kzwy", z, (errors @ flat).view(count, count, width))
        hessian = hessian + cross + cross.permute(2, 3, 0, 1)
        same = torch.arange(width)
        hessian[:, same, :, same] += errors @ errors.T
        hessian *= (scale / self._count) ** 2
        features = mixture @ self._basis
        inner = self._basis[1:]
        for image, row in enumerate(features < 0):
            part = inner[:, row]
            hessian[image, :, image, :] += self._penalty * (part @ part.T)

        def pulled(cotangent: Tensor) -> Tensor:
            """(∂ s AᵀR/K ∂Z)ᵀ of a cotangent (N, rank) → (n,)."""
            through = (errors @ cotangent)[:, 1:] + torch.einsum("ki,kiz->kz", mixture @ cotangent.T, change)
            return (scale / self._count * through).reshape(-1)

        gradient = pulled(misfit) + (self._penalty * features.clamp(max=0) @ inner.T).reshape(-1)
        slopes_of = [predicted]
        if self._solved_for:
            smoother = (soft_labels - 1 / soft_labels.shape[1]) * self._kept  # ∂A/∂ε
            slopes_of.insert(0, scale / self._count * smoother.T @ mixture)
        last = torch.stack([slope.reshape(-1) for slope in slopes_of])
        size = len(gradient)
        joint = torch.empty(size + len(last), size + len(last), dtype=hessian.dtype)
        joint[:size, :size] = hessian.view(size, size)
        joint[size:, :size] = torch.stack([pulled(slope) for slope in slopes_of])
        joint[:size, size:] = joint[size:, :size].T
        joint[size:, size:] = last @ last.T
        of_last = last @ misfit.reshape(-1)
        of_last[-1] = 0  # s is the best already
        return joint, torch.cat([gradient, of_last])

    def _finish(self, z: Tensor, soft_labels: Tensor) -> Fit:
        features = (self._mixture(z) @ self._basis).clamp(min=0)
        errors = F.linear(features, self._weight, self._bias).softmax(1) - soft_labels
        predicted = errors.T @ features / self._count
        scale = float(_scale(predicted, self._gradient))
        norm = float(self._gradient.norm())
        # A gradient of zeros is explained by anything, and so by nothing.
        residual = float((scale * predicted - self._gradient).norm()) / norm if norm > 0 else 1.0
        smoothing = float(soft_labels.min()) * soft_labels.shape[1]  # what a class without the label has
        explained = residual < self._explained and 0 <= smoothing < 1
        return Fit(features, errors, residual, self._drift(z, soft_labels), scale, explained, smoothing)

    def _labels_of(self, z: Tensor, scale: Tensor) -> Tensor:
        """Y = P − A (B, N) with the A that meets s AᵀR = K T exactly: each image's labels, given R."""
        exact = torch.linalg.lstsq(self._mixture(z).T, self._count / scale * self._target.T, driver="gelsd").solution
        return self._probabilities(z) - exact

    def _drift(self, z: Tensor, soft_labels: Tensor) -> Tensor:
        """Two signs of a wrong count: how often a class is the largest of an image's labels, given R, against how often
        it was given, which weighs most, and what the bias equation lacks."""
        scale = self._scale_at(z, soft_labels)
        voted, counts = (
            rows.argmax(1).bincount(minlength=soft_labels.shape[1]) for rows in (self._labels_of(z, scale), soft_labels)
        )
        lacking = self._count * (self._probabilities(z).mean(0) - self._bias_gradient / scale) - soft_labels.sum(0)
        return voted - counts + (5 * lacking).clamp(-1, 1)


def _scale(predicted: Tensor, target: Tensor) -> Tensor:
    """The s > 0 for which s · predicted comes closest to the target of the same shape."""
    energy = predicted.square().sum().clamp(min=torch.finfo(predicted.dtype).tiny)
    return ((predicted * target).sum() / energy).clamp(min=1e-9)


def _smoothed(one_hot: Tensor, share: float) -> Tensor:
    """Labels (B, N) → (1 − ε) y + ε/N with this ε, further smoothed where they are smoothed already."""
    return one_hot + share * (1 / one_hot.shape[1] - one_hot)


def rounding(gradient: Tensor) -> float:
    """‖δ‖ / ‖g‖ of the error δ that rounding a gradient to its number format makes: 2e-4 for float16, 2e-3 for
    bfloat16. What was rounded before it was widened is known by its digits."""
    values = gradient.detach().cpu().double().abs()
    values = values[values > 0]
    if not len(values):
        return 0.0
    fractions, exponents = torch.frexp(values)
    digits = next((digits for digits in (8, 11, 24) if _whole(torch.ldexp(fractions, torch.tensor(digits)))), 53)
    spacing = torch.ldexp(torch.ones_like(values), exponents - digits)
    if digits <= 11 and _whole(values * 2.0**24):  # below its normal numbers float16 has no finer steps
        spacing = spacing.clamp(min=2.0**-24)
    return float(spacing.norm() / values.norm()) / 12**0.5


def _whole(values: Tensor) -> bool:
    return bool((values == values.round()).all())
