"""Labels read from the final layer's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional as F

from gradinv.models import Model
from gradinv.recovery.final_layer import FinalLayer, Fit
from gradinv.types import GradinvError, Observation

CORRECTED = ", corrected"
EQUATIONS = "final layer's equations"
METHODS = ("auto", "column-minimum", "llg", "bias-corrected", "ilrg")

_TESTABLE = 48  # images up to which `auto` tests by exact features; one test of 48 takes about 5 s
_SEARCHED = 32  # images up to which that is quick enough to search for labels; one test of 32 takes half a second
_QUICK = 16  # images up to which a reading that was asked for by name is tested so; 20 ms
_MOVES = 30  # single labels that are moved from one reading, the likeliest first
_TOO_MANY = -0.3  # the drift of a class that has too many images: seen from -0.4 down, of others above -0.2
_CHANGED = 0.05  # a best residual above this means a gradient that was changed: moves then fit its noise
_ROUGH = 0.01  # below this a residual is that of a coarse number format, and the reading that has it is compared only
_SMOOTHED = 1e-4  # a smaller label smoothing, solved for, is rounding
_DOUBT = 1e-3  # the residual beyond rounding at which labels are taken to be as likely wrong as right

UPDATE = (
    "This is an update, not a gradient: its negative is what explains the final layer; invert that (--update, or "
    "Observation.negated)."
)
UNEXPLAINED = (
    "The final layer's gradient is not explained: it was changed (by noise, pruning, rounding or several steps), is "
    "not of the cross-entropy, or is of another batch size or other weights; labels and all that follows from them are "
    "a guess."
)
MISREAD = (
    "These labels do not explain the final layer's gradient: some are wrong, or it was changed; auto (--labels auto) "
    "tests more of them."
)


@dataclass(frozen=True, eq=False)
class RestoredLabels:
    """The batch's `labels` (B,), int64, most certain first, the `method` that read them, and how far to trust them.

    `confidence` in [0, 1] tells, where it can be tested, whether all labels are right: 1 / (1 + (r / 0.001)²), r being
    the share of the final layer's gradient that the features recovered with these labels leave unexplained, beyond the
    rounding of its number format: with the right labels about 0, with a wrong one 0.002 to 0.4; noise raises it.
    Elsewhere (`auto` of more than 48 images, a named method of more than 16, no bias, K ≥ N) it is a rough guess at the
    share of labels that are right and says nothing of the batch as a whole: 0.9 times the share on which the other
    methods agree, on average, and no more than a half where K ≥ N, since there they agree on wrong labels, too.

    `fit` is the solution of the final layer with these labels, where the test found one that explains its gradient.
    `notes` are sentences on what the gradient was found to be.
    """

    labels: Tensor
    method: str
    confidence: float
    fit: Fit | None = None
    notes: tuple[str, ...] = ()


@torch.no_grad()
def restore_labels(model: Model, observation: Observation, method: str = "auto") -> RestoredLabels:
    """Read the batch's labels from the final layer's gradient.

    `auto` takes, of all methods' readings, the one whose recovered features explain that gradient. Where none does,
    labels are solved from the equations of the classes that no image has (`FinalLayer.readings`), then single ones are
    moved to where the features lack one, and the method is that reading's, "corrected". Where nothing comes near, as
    behind noise, it is column minimum if the classes look distinct, else iLRG.

    Labels that the client smoothed, by an unknown ε, are tried where nothing else explains a gradient that has the form
    of one (`FinalLayer.sound`); `fit.smoothing` is that ε.

    Raises GradinvError for an unknown method, where it needs a bias that the layer lacks or distinct labels that the
    classes do not suffice for, for a batch size below 1, where the gradient is not finite, and where it is the negative
    of one, which is what a client's step makes of it.
    """
    if method not in METHODS:
        raise GradinvError(f"There is no label restoration {method!r}; take one of {', '.join(METHODS)}.")
    readings = _readings(model, observation)
    layer = _final_layer(model, observation)
    if layer is None or not layer.sound:
        return _restored(model, observation, method, readings, layer)
    # What has the signs of an update is not searched for as a gradient first, which takes long and finds nothing.
    signs = layer.positive <= observation.batch_size < layer.negative
    if signs and _is_update(model, observation, layer):
        raise GradinvError(UPDATE)
    restored = _restored(model, observation, method, readings, layer)
    tested = observation.batch_size <= (_TESTABLE if method == "auto" else _QUICK)
    # Of a gradient that other labels explain it is not asked, since that takes long.
    unread = restored.fit is None and tested and not _read_by_any(layer, readings)
    if unread and not signs and _is_update(model, observation, layer):
        raise GradinvError(UPDATE)
    return restored


def _read_by_any(layer: FinalLayer, readings: Mapping[str, Callable[[], Tensor]]) -> bool:
    """Whether the labels of some method explain the gradient."""
    return any(layer.fit(labels.cpu()).explained for labels in _attempted(readings).values())


def _restored(
    model: Model,
    observation: Observation,
    method: str,
    readings: Mapping[str, Callable[[], Tensor]],
    layer: FinalLayer | None,
) -> RestoredLabels:
    count = observation.batch_size
    if method != "auto":
        labels = readings[method]()
        others = _attempted({name: reading for name, reading in readings.items() if name != method})
        found = _judged(model, observation, labels, method, layer if count <= _QUICK else None, others.values())
        notes = (MISREAD if note == UNEXPLAINED else note for note in found.notes)
        return replace(found, notes=tuple(notes))
    tried = _attempted(readings) or {"llg": readings["llg"]()}
    layer = layer if count <= _TESTABLE else None
    likeliest = _likeliest(model, observation, tried)
    if layer is not None:
        name, labels, fit = _explained(model, observation, layer, tried)
        # A search that found no explanation is trusted only where not much is missing, and labels repeat or hardly
        # anything is.
        if fit.explained or fit.residual < (_ROUGH if likeliest == "column-minimum" else _CHANGED):
            labels = labels.to(next(iter(tried.values())).device)
            return _tested(labels, name, fit, layer)
    others = {key: tried[key] for key in tried if key != likeliest}
    return _judged(model, observation, tried[likeliest], likeliest, layer, others.values())


def _is_update(model: Model, observation: Observation, layer: FinalLayer) -> bool:
    """Whether the negative of a sound gradient that nothing explains is explained."""
    turned = observation.negated()
    if observation.batch_size <= _TESTABLE:
        return _restored(model, turned, "auto", _readings(model, turned), FinalLayer(model, turned)).fit is not None
    # A rough answer in milliseconds, where the signs of the bias gradient allow it.
    if layer.negative <= observation.batch_size:
        return False

    def rough(layer: FinalLayer, own: Observation) -> float:
        tried = _attempted(_readings(model, own)).values()
        return min(layer.fit(labels.cpu(), exact=False).residual for labels in tried)

    return rough(FinalLayer(model, turned), turned) < 0.5 * rough(layer, observation)


def column_minimum(gradient: Tensor, batch_size: int) -> Tensor:
    """Gradient of the final weight (N, D) → the K classes (K,) whose smallest entry is most negative (Eqn 8).

    Assumes features after a ReLU and labels that do not repeat.
    """
    if not 1 <= batch_size <= len(gradient):
        raise GradinvError(
            f"Column-minimum restores distinct labels, so the batch size must be between 1 and the "
            f"{len(gradient)} classes, not {batch_size}."
        )
    _check(gradient, batch_size)
    return gradient.min(dim=1).values.argsort(stable=True)[:batch_size]


def llg(gradient: Tensor, batch_size: int) -> Tensor:
    """Gradient of the final weight (N, D) → labels (K,), repeated ones too, by the rows' sums g (Wainakh et al.).

    A label's image adds about m = (1/K) (1 + 1/N) Σ_{g_i<0} g_i to its class.
    """
    _check(gradient, batch_size)
    sums = gradient.double().sum(dim=1)
    return _counted(sums, float(sums.clamp(max=0).sum()) / batch_size * (1 + 1 / len(gradient)), batch_size)


def bias_corrected(bias_gradient: Tensor, batch_size: int) -> Tensor:
    """Gradient of the final bias (N,) → labels (K,), repeated ones too: as `llg`, with m = Σ_{∇b_i<0} ∇b_i / K."""
    _check(bias_gradient, batch_size)
    gradient = bias_gradient.double()
    return _counted(gradient, float(gradient.clamp(max=0).sum()) / batch_size, batch_size)


def ilrg(gradient: Tensor, bias_gradient: Tensor, weight: Tensor, bias: Tensor, batch_size: int) -> Tensor:
    """Labels (K,), repeated ones too, from counts that solve a linear system (Ma et al., ICLR 2023).

    gradient, weight: (N, D); bias_gradient, bias: (N,). A class's mean feature is about e_i = ∇W_i / ∇b_i, its mean
    probabilities p_i = softmax(FC(e_i)); the counts k meet Σ_j k_j = K and Σ_j k_j p_j[i] − k_i = K ∇b_i. Solved for
    k ≥ 0 over the classes with ∇b_i < 0: of absent ones, numerator and denominator are tiny and e_i says nothing.
    Features follow a ReLU, so e_i is clamped at 0.
    """
    _check(gradient, batch_size)
    _check(bias_gradient, batch_size)
    found = bias_gradient.double()
    classes = (found < 0).nonzero()[:, 0] if (found < 0).any() else torch.arange(len(found), device=found.device)
    scale = torch.where(found[classes].abs() < 1e-12, torch.full_like(found[classes], -1e-12), found[classes])
    features = (gradient.double()[classes] / scale[:, None]).clamp(min=0)
    system = F.linear(features, weight.double(), bias.double()).softmax(1).T
    system[classes, torch.arange(len(classes), device=system.device)] -= 1
    system = torch.cat([system, torch.ones_like(system[:1])])
    wanted = torch.cat([batch_size * found, found.new_tensor([batch_size])])
    counts = torch.zeros_like(found)
    counts[classes] = torch.from_numpy(nnls(system.cpu().numpy(), wanted.cpu().numpy())[0]).to(counts)
    return _apportioned(counts, batch_size)


def _readings(model: Model, observation: Observation) -> dict[str, Callable[[], Tensor]]:
    """Every method but auto, ready to be called. Raises GradinvError where there is nothing to read from."""
    name = f"{model.final}.weight"
    if name not in observation.gradients:
        raise GradinvError(
            f"The observation has no gradient of {name}, from which labels are read; without it they have to be given "
            "(--class of gradinv invert, or labels)."
        )
    gradient, count = observation.gradients[name], observation.batch_size
    _check(gradient, count)
    if (bias_gradient := observation.gradients.get(f"{model.final}.bias")) is not None:
        _check(bias_gradient, count)

    def with_bias(read: Callable[[Tensor, Tensor], Tensor], method: str) -> Callable[[], Tensor]:
        def reading() -> Tensor:
            bias = model.final_layer.bias
            if bias is None or bias_gradient is None:
                raise GradinvError(
                    f"{method} reads the gradient of the final layer's bias, which is not there; "
                    "take column-minimum or llg."
                )
            return read(bias_gradient, bias.detach().to(bias_gradient.device))

        return reading

    weight = model.final_layer.weight.detach().to(gradient.device)
    return {
        "column-minimum": lambda: column_minimum(gradient, count),
        "ilrg": with_bias(lambda found, bias: ilrg(gradient, found, weight, bias, count), "ilrg"),
        "bias-corrected": with_bias(lambda found, _: bias_corrected(found, count), "bias-corrected"),
        "llg": lambda: llg(gradient, count),
    }


def _attempted(readings: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
    """What the methods that apply here read; the gradient itself has been found sound before."""
    found = {}
    for name, reading in readings.items():
        try:
            found[name] = reading()
        except GradinvError:
            continue
    return found


def _check(gradient: Tensor, batch_size: int) -> None:
    if batch_size < 1:
        raise GradinvError(f"Labels are read for a batch size of at least 1, not {batch_size}.")
    if not torch.isfinite(gradient).all():
        raise GradinvError("The final layer's gradient holds values that are not finite, so no label can be read.")


def _counted(signal: Tensor, impact: float, batch_size: int) -> Tensor:
    """Each class with signal < 0 once, then, the impact of one image taken off, the most negative until there are K."""
    left = signal.clone()
    labels = [label for label in left.argsort(stable=True).tolist() if left[label] < 0][:batch_size]
    left[labels] -= impact
    while len(labels) < batch_size:
        labels.append(int(left.argmin()))
        left[labels[-1]] -= impact
    return torch.tensor(labels, device=signal.device)


def _apportioned(shares: Tensor, batch_size: int) -> Tensor:
    """Real counts (N,) → labels (K,), whose counts are the nearest whole ones that sum to K; largest rest first."""
    left, labels = shares.clone(), []
    for _ in range(batch_size):
        labels.append(int(left.argmax()))
        left[labels[-1]] -= 1
    return torch.tensor(labels, device=shares.device)


def _final_layer(model: Model, observation: Observation) -> FinalLayer | None:
    """The equations that a reading is tested by, or None where they cannot be had."""
    try:
        return FinalLayer(model, observation)
    except GradinvError:
        return None


def _explained(
    model: Model, observation: Observation, layer: FinalLayer, tried: Mapping[str, Tensor]
) -> tuple[str, Tensor, Fit]:
    """As `_search`, with labels that the client smoothed where plain ones do not explain a sound gradient."""
    found = []
    smoothed = layer.sound and observation.label_smoothing == 0
    if not smoothed or layer.negative <= observation.batch_size:
        found.append(_search(layer, tried, *_evidence(model, observation)))
    if smoothed and not (found and found[0][2].explained):
        plain, smoothing = _unsmoothed(model, observation)
        tried = _attempted(_readings(model, plain))
        found.append(_search(layer.with_unknown_smoothing(smoothing), tried, *_evidence(model, plain)))
    return min(found, key=lambda one: one[2].residual)


def _unsmoothed(model: Model, observation: Observation) -> tuple[Observation, float]:
    """About the gradient without its label smoothing, and about how much that is.

    Of every label each class has the share ε/N, so the final layer's row of a class that no image has and no image
    looks like is that of the smoothing alone, the same for each class.
    """
    names = [f"{model.final}.{name}" for name in ("weight", "bias")]
    gradients = [observation.gradients[name].double() for name in names]
    order = gradients[1].argsort()
    count, classes = observation.batch_size, len(order)
    floor = float(gradients[1][order[count]])  # those below it may be of the batch
    present = float((floor - gradients[1][order[:count]]).sum())
    smoothing = min(max(classes * -floor / max(present - classes * floor, 1e-30), 0.01), 0.5)
    rows = {name: (rows - rows[order[count]]) / (1 - smoothing) for name, rows in zip(names, gradients, strict=True)}
    return replace(observation, gradients={**observation.gradients, **rows}), smoothing


def _evidence(model: Model, observation: Observation) -> tuple[Tensor, Tensor]:
    """(N,), about how many images each class has, and (N,), the classes by their smallest gradient."""
    evidence = -observation.gradients[f"{model.final}.bias"].cpu().double()
    # Whole images, whatever the gradient's scale: true labels sum to K, and little of them is lost to p.
    evidence *= observation.batch_size / evidence.clamp(min=0).sum().clamp(min=torch.finfo(evidence.dtype).tiny)
    return evidence, observation.gradients[f"{model.final}.weight"].min(dim=1).values.cpu().argsort(stable=True)


def _search(layer: FinalLayer, tried: Mapping[str, Tensor], evidence: Tensor, order: Tensor) -> tuple[str, Tensor, Fit]:
    """The labels with the smallest residual: the readings, then those that follow from the absent classes, then single
    moves from the best. Of a large batch, where each test takes seconds, few of these. → method, labels, their fit

    evidence, order: as `_evidence` has them.
    """
    # Tests of small batches are cheap: there a reading gets several starts, as a right one may fail at the first.
    count = len(next(iter(tried.values())))
    most, thorough, starts = (80, 6, 2) if count <= _QUICK else (24, 1, 1) if count <= _SEARCHED else (8, 1, 1)
    tested: dict[tuple[int, ...], tuple[float, str, Tensor, Iterator[Tensor], Fit]] = {}

    def test(name: str, labels: Tensor, starts: int) -> bool:
        """Whether the labels, in any order, explain the gradient."""
        key = tuple(sorted(labels.tolist()))
        if key in tested:
            return False
        fit = layer.fit(labels, starts=starts)
        tested[key] = (fit.residual, name, labels, _moves(labels, fit.drift, evidence), fit)
        return fit.explained

    def search() -> None:
        for name in sorted(tried, key=lambda name: _implausible(tried[name], evidence)):
            # What coarse rounding leaves may be more than what a wrong label does: there all readings are compared.
            if test(name, tried[name].cpu(), thorough) and layer.rounding < _DOUBT:
                return
            if count > _SEARCHED:
                break
        if any(known[-1].explained for known in tested.values()):
            return
        first = min(tested.values(), key=lambda known: known[0])[2]
        for wider in (0, count // 2, count) if count <= _SEARCHED else (0,):
            present = evidence > 0
            present[first] = True
            present[order[:wider]] = True
            for labels in layer.readings(first, present):
                if test(EQUATIONS, labels, starts):
                    return
        # Of a few images a single wrong label leaves as much unexplained as noise does, and moves take no time.
        # Where ε is solved for the gradient has the form of one that nothing changed.
        changed = min(known[0] for known in tested.values()) > _CHANGED
        if count > 4 and changed and not (layer.solves_smoothing and count <= _QUICK):
            return
        while len(tested) < most:
            open_moves = (
                (name, moved)
                for _, name, _, moves, _ in sorted(tested.values(), key=lambda known: known[0])
                for moved in moves
                if tuple(sorted(moved.tolist())) not in tested
            )
            found = next(open_moves, None)
            if found is None or test(f"{found[0].removesuffix(CORRECTED)}{CORRECTED}", found[1], starts):
                return

    search()
    _, name, labels, _, fit = min(tested.values(), key=lambda known: known[0])
    return name, labels, fit


def _moves(labels: Tensor, drift: Tensor, evidence: Tensor) -> Iterator[Tensor]:
    """The labels with one image moved from a class with too many to one with too few, the likeliest first.

    A class that was given too many stands out in the drift, one with too few does not always: there the evidence adds.
    """
    counts = labels.bincount(minlength=len(drift))
    lacks = drift + (evidence.clamp(min=0) - counts).clamp(-1, 1)
    many = [label for label in drift.argsort(stable=True).tolist() if counts[label] > 0]
    many = [label for label in many if drift[label] < _TOO_MANY] or many[:2]
    few = [label for label in lacks.argsort(descending=True, stable=True).tolist() if label not in many[:1]]
    pairs = sorted((float(drift[b] / 2 - lacks[a]), a, b) for a in few[:12] for b in many[:3] if a != b)
    for _, gains, loses in pairs[:_MOVES]:
        moved = counts.clone()
        moved[gains] += 1
        moved[loses] -= 1
        yield _in_order(moved, evidence)


def _in_order(counts: Tensor, evidence: Tensor) -> Tensor:
    """Labels (K,) with these whole counts (N,), those with most evidence left first."""
    present = counts.nonzero()[:, 0].tolist()
    images = [(float(evidence[label]) - place, label) for label in present for place in range(int(counts[label]))]
    return torch.tensor([label for _, label in sorted(images, key=lambda image: -image[0])])


def _implausible(labels: Tensor, evidence: Tensor) -> bool:
    """Whether many of the labels' classes have no evidence, as where distinct ones are read of a batch in which many
    repeat: more than a quarter none at all, or more than 0.4 less than the median class has, which tells noise too. (Of
    64 distinct labels up to 0.2 and 0.34 were seen, of 64 drawn from 200 classes 0.1 to 0.33 and 0.19 to 0.44, of 64
    from 70 classes 0.31 and 0.36 and more. At a quarter column minimum and iLRG are about equally right.)
    """
    signals = evidence[labels.cpu().unique()]
    return bool(
        (signals <= 0).sum() > 0.25 * len(labels) or (signals <= evidence.abs().median()).sum() > 0.4 * len(labels)
    )


def _likeliest(model: Model, observation: Observation, tried: Mapping[str, Tensor]) -> str:
    """The method to take where no features can be recovered."""
    evidence = -observation.gradients.get(
        f"{model.final}.bias", observation.gradients[f"{model.final}.weight"].sum(dim=1)
    ).cpu()
    distinct = "column-minimum" in tried and not _implausible(tried["column-minimum"], evidence)
    return "column-minimum" if distinct else "ilrg" if "ilrg" in tried else "llg"


def _judged(
    model: Model,
    observation: Observation,
    labels: Tensor,
    method: str,
    layer: FinalLayer | None,
    others: Iterable[Tensor],
) -> RestoredLabels:
    """A reading, trusted as far as features explain the gradient with it, or untested as far as others agree."""
    if layer is None:
        most = 0.5 if len(labels) >= model.final_layer.out_features else 1.0
        return RestoredLabels(labels, method, min(most, _agreement(labels, others)))
    fit = layer.fit(labels.cpu(), starts=1)
    if not fit.explained and layer.sound and layer.smoothing == 0:
        smoothed = layer.with_unknown_smoothing(_unsmoothed(model, observation)[1])
        fit = min(fit, smoothed.fit(labels.cpu(), starts=1), key=lambda fit: fit.residual)
    return _tested(labels, method, fit, layer)


def _tested(labels: Tensor, method: str, fit: Fit, layer: FinalLayer) -> RestoredLabels:
    beyond = max(0.0, fit.residual**2 - layer.rounding**2)
    trust = 1 / (1 + beyond / _DOUBT**2)
    notes = []
    if fit.explained and layer.smoothing == 0 and fit.smoothing > _SMOOTHED:
        notes.append(f"The client's labels are smoothed, by ε = {fit.smoothing:.3g}; that was solved for.")
    if not fit.explained and trust < 0.5:
        notes.append(UNEXPLAINED)
    return RestoredLabels(labels, method, trust, fit if fit.explained else None, tuple(notes))


def _agreement(labels: Tensor, others: Iterable[Tensor]) -> float:
    shares = [_shared(labels, other) / len(labels) for other in others]
    return 0.9 * sum(shares) / len(shares) if shares else 0.0


def _shared(labels: Tensor, other: Tensor) -> int:
    classes = int(torch.cat([labels, other]).max()) + 1
    return int(torch.minimum(labels.bincount(minlength=classes), other.bincount(minlength=classes)).sum())
