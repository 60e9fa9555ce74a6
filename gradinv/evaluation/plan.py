"""What is measured: evaluations, their rows, and the columns of their tables."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gradinv import breaching
from gradinv.config import AttackConfig
from gradinv.defenses import Defence, parse_all
from gradinv.models import Model, Moments, load_model
from gradinv.recovery.labels import METHODS as LABEL_METHODS
from gradinv.types import GradinvError

GROUP_WEIGHT = 0.01
"""α_group of the ablation's group rows where the settings leave the group out (the paper's)."""

REPEATED_CLASSES = 10 / 32
"""Where labels repeat, K images come from about so many times K classes: 32 from 10."""

Values = Mapping[str, float | None]
"""What one task measured, by metric; None where a number is missing or not finite."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    `config` is the attack; None where nothing is optimised. `judged` says which images stand for the row when gains
    are stated: the seeds (mean over them) or the group's consensus. The gain is over the best of the rows `over`.
    `series` groups rows of several sizes in the figure. With `weigh_like` the weight of gradient matching belongs to
    that way to compare and is scaled to the row's own.
    """

    name: str
    batch_size: int
    config: AttackConfig | None = None
    repeats: bool = False
    defence: str = "none"
    peer: str | None = None
    judged: str = "seeds"
    over: tuple[str, ...] = ()
    series: str = ""
    weigh_like: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**vars(self), "config": self.config and self.config.to_dict(), "over": list(self.over)}


@dataclass(frozen=True)
class Plan:
    """An evaluation: which rows, on which network, from which pictures.

    `half` limits each class to the earlier half of its sorted files ("report"), to the later ("tune"), or to neither.
    The settings of the presets were tuned on later halves only, so what is reported comes from the earlier.
    """

    command: str
    model: str
    imagenet: str
    rows: tuple[Row, ...]
    batches: int
    seed: int = 0
    half: str = "report"
    image_size: int | None = None
    mean: Moments = None
    std: Moments = None
    device: str = "auto"
    lpips: bool = False

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise GradinvError(f"At least one batch has to be measured, not {self.batches}.")
        if not self.rows:
            raise GradinvError("An evaluation needs at least one row; name a size or a defence.")
        for row in self.rows:
            if row.batch_size < 1:
                raise GradinvError(f"A batch holds at least one image, not {row.batch_size}.")
            defences_of(row.defence)
        if len({row.name for row in self.rows}) < len(self.rows):
            raise GradinvError("Each size and each defence is measured once; name none of them twice.")

    def load(self) -> Model:
        """The network that is measured. Raises GradinvError as `load_model` does."""
        return load_model(self.model, device=self.device, image_size=self.image_size, mean=self.mean, std=self.std)

    @property
    def tasks(self) -> list[tuple[Row, int]]:
        """Every row of the first batch, then of the second …: whatever has been measured can be compared."""
        return [(row, batch) for batch in range(self.batches) for row in self.rows]

    def identity(self, model: Model) -> dict[str, Any]:
        """What may not differ where an evaluation goes on. Batches and rows may be added, so their numbers may."""
        return {
            **{name: value for name, value in vars(self).items() if name != "batches"},
            "model": {"name": model.name, "sha256": model.sha256},
            "imagenet": str(Path(self.imagenet).expanduser().resolve()),
            "device": model.device.type,
            "rows": [row.to_dict() for row in self.rows],
        }


@dataclass(frozen=True)
class Column:
    """A metric in the table: its heading and how many digits are shown."""

    title: str
    digits: int


COLUMNS = {
    "psnr": Column("PSNR seeds", 2),
    "consensus_psnr": Column("PSNR consensus", 2),
    "constant_psnr": Column("PSNR constant", 2),
    "ssim": Column("SSIM seeds", 3),
    "consensus_ssim": Column("SSIM consensus", 3),
    "constant_ssim": Column("SSIM constant", 3),
    "fft2d": Column("FFT2D seeds", 3),
    "consensus_fft2d": Column("FFT2D consensus", 3),
    "lpips": Column("LPIPS seeds", 3),
    "consensus_lpips": Column("LPIPS consensus", 3),
    "l2_distance": Column("‖∇−ΔW‖", 3),
    "sign_match": Column("signs %", 2),
    "distance": Column("cosine distance", 4),
    "labels": Column("labels %", 2),
    "found": Column("found %", 2),
    "residual": Column("residual", 4),
    "iip": Column("IIP %", 1),
    "known": Column("known numbers", 0),
    "known_error": Column("their error %", 2),
    "prior_psnr": Column("PSNR painted", 2),
    "control_psnr": Column("PSNR control", 2),
    "prior_ssim": Column("SSIM painted", 3),
    "control_ssim": Column("SSIM control", 3),
    "agreement_psnr": Column("PSNR between painted and found", 2),
    "prior_misfit": Column("misfit painted", 4),
    "misfit": Column("misfit", 4),
    "seconds_solving": Column("s solving", 1),
    "seconds": Column("s", 1),
    "seconds_per_iteration": Column("s/iteration", 3),
    **{f"labels {method}": Column(f"{method} %", 2) for method in LABEL_METHODS},
}
"""Every metric of every evaluation, in the table's order."""


@dataclass(frozen=True)
class Experiment:
    """One of the evaluations: its usual number of batches, and what is shown of what its tasks measure.

    `metrics` are the table's columns, `panels` the figure's: a title and the metrics drawn in it. Where batches have
    several `sizes` these are the usual ones; `defences` says whether it takes any.
    """

    batches: int
    metrics: tuple[str, ...]
    panels: tuple[tuple[str, tuple[str, ...]], ...]
    sizes: tuple[int, ...] = ()
    defences: bool = False


def defences_of(text: str, seed: int = 0) -> list[Defence]:
    """The defences of one row, several joined by +, such as "clip:1+noise:1e-3". Raises GradinvError."""
    return parse_all(re.split(r"\+(?=[a-z])", text), seed)


def classes_of(row: Row) -> int:
    """How many classes the images of a batch come from."""
    return math.ceil(REPEATED_CLASSES * row.batch_size) if row.repeats else row.batch_size


def label_rows(sizes: Sequence[int]) -> tuple[Row, ...]:
    """Table 1, and the same with labels that repeat."""
    return tuple(
        Row(f"K={size} {series}", size, repeats=repeats, series=series)
        for repeats, series in ((False, "distinct"), (True, "repeated"))
        for size in sizes
    )


def identification_rows(sizes: Sequence[int], defences: Sequence[str]) -> tuple[Row, ...]:
    """Distinct labels, repeated labels, and distinct labels behind each defence."""
    return label_rows(sizes) + tuple(
        Row(f"K={size} {defence}", size, defence=defence, series=defence)
        for defence in defences
        if defence != "none"
        for size in sizes
    )


def ablation_rows(config: AttackConfig, batch_size: int) -> tuple[Row, ...]:
    """Table 2: each row adds to the one above. Then two controls that never see the gradients of the layers.

    The features come out of the final layer's gradient, so the first control still knows that layer; the second knows
    only BN statistics, labels and TV. What all rows share are the choices that are no terms, as the optimiser.
    Settings without a group or a registration get GROUP_WEIGHT and the registration of the `paper` preset.
    Raises GradinvError for a single seed, which has no group, and for settings that do not match gradients.
    """
    _check_matching("ablation", config)
    if config.seeds < 2:
        raise GradinvError("The ablation's group rows need at least two seeds; set seeds to 2 or more.")
    change = dataclasses.replace
    fidelity = change(config, group=0.0, registration="lazy")
    bare = {"tv": 0.0, "l2": 0.0, "bn": "none", "features": 0.0, "boundary": "loss", "layers": "all"}
    registration = AttackConfig().registration if config.registration == "lazy" else config.registration
    lazy = change(config, group=config.group or GROUP_WEIGHT, registration="lazy")
    blind = change(fidelity, gradient=0.0, features=0.0, boundary="loss", start="random")
    rows = (
        ("gradient only", change(fidelity, **bare, start="random"), "seeds", ""),
        ("+ fidelity", fidelity, "seeds", "gradient only"),
        ("+ lazy group", lazy, "consensus", "+ fidelity"),
        ("+ registered group", change(lazy, registration=registration), "consensus", "+ lazy group"),
        ("gradient off", change(fidelity, gradient=0.0), "seeds", "+ fidelity"),
        ("gradient and features off", blind, "seeds", "+ fidelity"),
    )
    return tuple(
        Row(name, batch_size, config=row, judged=judged, over=(over,) if over else ())
        for name, row, judged, over in rows
    )


def matching_rows(config: AttackConfig, batch_size: int) -> tuple[Row, ...]:
    """Table 5: the same attack with either way to compare gradients.

    The weight that the settings name belongs to their own way; the other one's is scaled on each batch so that both
    pull the same start with a pixel gradient of the same norm. Raises GradinvError for settings that do not match them.
    """
    _check_matching("matching", config)
    return tuple(
        Row(
            name,
            batch_size,
            config=dataclasses.replace(config, match=name),
            over=over,
            weigh_like="" if name == config.match else config.match,
        )
        for name, over in (("l2", ()), ("cosine", ("l2",)))
    )


def ingredient_rows(config: AttackConfig, batch_size: int) -> tuple[Row, ...]:
    """The attack below the solved layers, and what becomes of it without each of its ingredients.

    Raises GradinvError for settings that solve no layers.
    """
    if not config.needs_layers:
        raise GradinvError("The evaluation ingredients is about solved layers; take the preset demo.")
    change, first = dataclasses.replace, config.pooling[:1]
    rows = {
        "demo": config,
        "one seed": change(config, seeds=1),
        "seeds that never meet": change(config, meetings=()),
        "the maximum throughout": change(config, pooling=(0.0,) * len(config.pooling)),
        "the softest maximum throughout": change(config, pooling=first * len(config.pooling)),
        "Adam": change(config, optimiser="adam", learning_rate=0.1, optimiser_step="gradient"),
        "a tenth of the TV": change(config, tv=config.tv / 10),
        "gradient matching alone": AttackConfig.preset("matching", seeds=config.seeds, iterations=config.iterations),
        "no gradient": change(
            config,
            activations=0.0,
            gradient=0.0,
            features=0.0,
            boundary="loss",
            pooling=(),
            tv_schedule=(),
            bn_weight=0.02,
            bn_form="relative",
        ),
    }
    return tuple(
        Row(
            name,
            batch_size,
            config=row,
            judged=_judged(row),
            over=() if name == "demo" else ("demo",),
        )
        for name, row in rows.items()
    )


ABOUT_MATCHING = ("ablation", "matching")
"""The evaluations of settings that match gradients, with no layer solved."""


def _check_matching(what: str, config: AttackConfig) -> None:
    if config.gradient == 0 or config.needs_layers:
        raise GradinvError(f"The evaluation {what} is about gradient matching; take the preset matching or paper.")


def _judged(config: AttackConfig) -> str:
    return "consensus" if config.seeds > 1 else "seeds"


def size_rows(config: AttackConfig, sizes: Sequence[int]) -> tuple[Row, ...]:
    """Quality and IIP against the batch size; a smaller batch holds the first pictures of a larger one."""
    return tuple(Row(f"K={size}", size, config=config, judged=_judged(config)) for size in sizes)


def defence_rows(config: AttackConfig, batch_size: int, defences: Sequence[str]) -> tuple[Row, ...]:
    """The same attack behind each defence."""
    over = ("none",) if "none" in defences else ()
    return tuple(
        Row(text, batch_size, config=config, defence=text, judged=_judged(config), over=over if text != "none" else ())
        for text in defences
    )


def comparison_rows(config: AttackConfig, batch_size: int, *, several: bool) -> tuple[Row, ...]:
    """Both attacks of `breaching`, then ours with one seed, and with all seeds where `several` are asked for; with a
    learned prior, which `breaching` lacks, only where the settings ask for it, and called so. Gains are over the better
    peer by each metric.

    Raises GradinvError for a client in train mode, which `breaching` would attack in eval mode.
    """
    if config.bn == "inferred":
        raise GradinvError("The comparison is made with a client in eval mode; take approx, exact or none for bn.")
    single = dataclasses.replace(config, seeds=1)
    peer_rows = tuple(Row(f"breaching {name}", batch_size, config=single, peer=name) for name in breaching.BREACHING)
    over = tuple(row.name for row in peer_rows)
    ours = [Row("ours", batch_size, config=dataclasses.replace(single, start="random"), over=over)]
    if config.needs_layers:
        matching = AttackConfig.preset("matching", seeds=1, iterations=config.iterations)
        ours.append(Row("ours, gradient matching alone", batch_size, config=matching, over=over))
    if config.start == "decoder":
        ours.append(Row("ours, decoder's start", batch_size, config=single, over=over))
    if several:
        name = f"ours, {config.seeds} seeds" + (", decoder's start" if config.start == "decoder" else "")
        ours.append(Row(name, batch_size, config=config, judged="consensus", over=over))
    return (*peer_rows, *ours, Row(TIMING, batch_size, config=config))


TIMING = "timing"
"""The row of the comparison that times all others in turn; it is no row of the table."""


def chosen_rows(rows: Sequence[Row], patterns: Sequence[str]) -> tuple[Row, ...]:
    """Those whose name fits one of the patterns, in which * stands for anything. Raises GradinvError for none."""
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            raise GradinvError(f"There is no row {pattern!r}; take some of {', '.join(row.name for row in rows)}.")
    return tuple(row for row in rows if any(fnmatchcase(row.name, pattern) for pattern in patterns))


QUALITY = ("psnr", "consensus_psnr", "constant_psnr", "ssim", "consensus_ssim", "constant_ssim")
LEARNED = (
    *("prior_psnr", "control_psnr", "prior_ssim", "control_ssim"),
    *("agreement_psnr", "prior_misfit", "misfit"),
)
PSNR_PANEL = ("PSNR in dB", ("psnr", "consensus_psnr", "constant_psnr"))
SSIM_PANEL = ("SSIM", ("ssim", "consensus_ssim", "constant_ssim"))
METHODS = tuple(f"labels {method}" for method in LABEL_METHODS)

EXPERIMENTS: dict[str, Experiment] = {
    "labels": Experiment(
        batches=1000,
        metrics=METHODS,
        panels=(("labels restored in %", METHODS),),
        sizes=(1, 2, 4, 8, 16, 32, 64),
    ),
    "ablation": Experiment(
        batches=8,
        metrics=(*QUALITY, "fft2d", "lpips", "distance", "labels", "seconds_per_iteration"),
        panels=(PSNR_PANEL, SSIM_PANEL),
    ),
    "matching": Experiment(
        batches=8,
        metrics=("l2_distance", "sign_match", "distance", *QUALITY),
        panels=(("cosine distance", ("distance",)), PSNR_PANEL, SSIM_PANEL),
    ),
    "identify": Experiment(
        batches=20,
        metrics=("found", "labels", "residual"),
        panels=(("found at rank 1 in %", ("found",)), ("labels restored in %", ("labels",))),
        sizes=(8, 16, 32),
        defences=True,
    ),
    "ingredients": Experiment(
        batches=8,
        metrics=(*QUALITY, "known", "known_error", "labels", "seconds"),
        panels=(PSNR_PANEL, SSIM_PANEL),
    ),
    "batch-size": Experiment(
        batches=8,
        metrics=(*QUALITY, "iip", "known", "known_error", *LEARNED, "labels", "seconds_solving", "seconds"),
        panels=(PSNR_PANEL, SSIM_PANEL, ("IIP in %", ("iip",))),
        sizes=(1, 2, 4, 8, 16, 32, 48),
    ),
    "defences": Experiment(
        batches=8,
        metrics=(*QUALITY, "labels", "found", "known", "known_error", "distance"),
        panels=(PSNR_PANEL, SSIM_PANEL, ("found and labels in %", ("found", "labels"))),
        defences=True,
    ),
    "compare": Experiment(
        batches=8,
        metrics=(*QUALITY, "distance", "labels", "seconds", "seconds_per_iteration"),
        panels=(PSNR_PANEL, SSIM_PANEL, ("seconds an iteration", ("seconds_per_iteration",))),
    ),
}
