"""The configuration: checked, frozen, and the same after a round trip."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from gradinv.cli import main
from gradinv.cli.arguments import parser
from gradinv.cli.settings import config_from, settings_given
from gradinv.config import PRESETS, PRESETS_BY_MODEL, AttackConfig, recorded
from gradinv.models import MODELS
from gradinv.types import GradinvError

FIELDS = {item.name: item for item in dataclasses.fields(AttackConfig)}


def other_value(item: dataclasses.Field[Any]) -> Any:
    """A valid value that is not the default, with floats that decimal notation cannot hold exactly."""
    if isinstance(item.default, tuple):
        return (1 / 3, 2 / 3)
    if item.name in ("boundary", "layers"):
        return "layer3.0.conv1"
    if choices := item.metadata["choices"]:
        return next(choice for choice in reversed(choices) if choice != item.default)
    if isinstance(item.default, bool):
        return not item.default
    return item.default + 3 if isinstance(item.default, int) else item.default + 1 / 3


def test_defaults_are_the_constants_of_the_paper() -> None:
    paper = AttackConfig.preset("paper")
    assert paper == AttackConfig()
    assert (paper.gradient, paper.tv, paper.l2, paper.bn_weight, paper.group) == (1e-3, 1e-4, 1e-6, 0.1, 0.01)
    assert (paper.noise, paper.seeds, paper.iterations) == (0.2, 8, 20_000)
    assert (paper.learning_rate, paper.warmup, paper.start_scale) == (0.1, 50, 1.0)
    named = (paper.match, paper.bn, paper.bn_form, paper.tv_form, paper.labels)
    assert named == ("l2", "approx", "raw", "paper", "column-minimum")
    # What the paper does not have is off.
    assert (paper.features, paper.layers, paper.boundary, paper.optimiser_step) == (0, "all", "loss", "gradient")
    assert paper.projection is False and paper.stages == () and paper.activations == 0
    assert paper.optimiser == "adam" and paper.pooling == paper.tv_schedule == ()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", [None, *MODELS, "weights.safetensors"])
def test_presets_are_valid_and_take_changes(name: str, model: str | None) -> None:
    config = AttackConfig.preset(name, model)
    changed = AttackConfig.preset(name, model, seeds=config.seeds + 1)
    assert changed == dataclasses.replace(config, seeds=config.seeds + 1)


def test_presets_have_names_and_those_of_models_belong_to_both() -> None:
    assert all(preset in PRESETS and model in MODELS for preset, model in PRESETS_BY_MODEL)
    with pytest.raises(GradinvError, match="There is no preset 'best'; take one of paper, matching, demo"):
        AttackConfig.preset("best")


@pytest.mark.parametrize("name", FIELDS)
def test_round_trip_of_each_field(name: str) -> None:
    """As JSON, and as an option of the command."""
    value = other_value(FIELDS[name])
    config = AttackConfig(**{name: value})
    only_choice = FIELDS[name].metadata["choices"] == (FIELDS[name].default,)
    assert only_choice or config != AttackConfig()
    assert AttackConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == set(FIELDS)
    flag = f"--{name.replace('_', '-')}"
    text = ",".join(map(repr, value)) if isinstance(value, tuple) else str(value)
    option = {True: [flag], False: [flag.replace("--", "--no-", 1)]}[value] if isinstance(value, bool) else [flag, text]
    settings = settings_given(parser().parse_args(["invert", "lion", *option]))
    assert settings == {name: value} and config_from("paper", "resnet18-tiny", settings) == config


def test_missing_fields_take_their_defaults_and_unknown_ones_are_refused() -> None:
    assert AttackConfig.from_dict({"seeds": 3}) == AttackConfig(seeds=3)
    with pytest.raises(GradinvError, match=r"There is no setting 'steps'; known are .*iterations"):
        AttackConfig.from_dict({"steps": 3})


@pytest.mark.parametrize("name", [name for name, item in FIELDS.items() if item.metadata["least"] is not None])
def test_numbers_below_their_least_or_not_finite(name: str) -> None:
    item = FIELDS[name]
    least = item.metadata["least"]
    kind = type(item.default)
    assert getattr(AttackConfig(**{name: kind(least)}), name) == least
    with pytest.raises(GradinvError, match=f"{name} must be a finite number of at least {least:g}, not"):
        AttackConfig(**{name: kind(least - 1)})
    if kind is float:
        for value in (math.nan, math.inf):
            with pytest.raises(GradinvError, match=f"{name} must be a finite number"):
                AttackConfig(**{name: value})


@pytest.mark.parametrize("name", [name for name, item in FIELDS.items() if item.metadata["choices"]])
def test_words_that_are_no_choice(name: str) -> None:
    with pytest.raises(GradinvError, match=f"{name} takes one of .*{FIELDS[name].metadata['choices'][0]}.*, not 'x'"):
        AttackConfig(**{name: "x"})


WRONG = [("seeds", 2.0), ("seeds", "2"), ("seeds", True), ("tv", "0.1"), ("tv", None), ("tv", False)]


@pytest.mark.parametrize(("name", "value"), [*WRONG, ("projection", 1), ("match", 3)])
def test_values_of_the_wrong_type(name: str, value: object) -> None:
    with pytest.raises(GradinvError, match=f"{name} takes a value of type"):
        AttackConfig.from_dict({name: value})


def test_what_a_field_takes_besides_its_type() -> None:
    assert AttackConfig(tv=1) == AttackConfig(tv=1.0)
    assert AttackConfig.from_dict({"stages": [0.25, 0.75]}).stages == (0.25, 0.75)
    assert AttackConfig(stages=(1.0,)).stages == (1.0,)


@pytest.mark.parametrize("stages", [(0.5, 0.6), (0.5,), (1.5, -0.5), (0.0, 1.0), ("a",), (math.nan, 1.0), (True,)])
def test_stages_that_are_not_shares(stages: tuple[Any, ...]) -> None:
    with pytest.raises(GradinvError, match="stages are positive shares of the steps that sum to 1"):
        AttackConfig(stages=stages)
    for no_list in (3, None):
        with pytest.raises(GradinvError, match="stages"):
            AttackConfig(stages=no_list)  # type: ignore[arg-type]


@pytest.mark.parametrize("errors", ["predicted", "recovered"])
def test_what_older_versions_called_errors_is_read(errors: str, tmp_path: Path) -> None:
    """In a recorded config, and from a file over any preset: with nothing on that those versions did not have."""
    old = {"errors": errors, "gradient": 0.5, "seeds": 3}
    boundary = {"predicted": "loss", "recovered": "logits"}[errors]
    assert AttackConfig.from_dict(old) == AttackConfig(boundary=boundary, gradient=0.5, seeds=3)
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "config": old}))
    settings = settings_given(argparse.Namespace(config=str(tmp_path / "run.json")))
    found = config_from("demo", "resnet18-tiny", settings)
    assert (found.boundary, found.optimiser, found.activations, found.pooling) == (boundary, "adam", 0.0, ())
    with pytest.raises(GradinvError, match=r"^errors, which is called boundary now, took one of predicted, recovered"):
        AttackConfig.from_dict({"errors": "x"})


def test_settings_of_older_versions_mean_what_they_meant() -> None:
    assert AttackConfig.from_dict({"box": True}) == AttackConfig(projection=True)
    old = {"tv": 0.2, "tv_form": "smooth", "tv_luma": 0.5, "tv_chroma": 2.0}
    assert AttackConfig.from_dict(old) == AttackConfig(tv=0.1, tv_form="smooth", tv_chroma=4.0)
    assert AttackConfig.from_dict(old | {"tv_form": "rgb"}) == AttackConfig(tv=0.2, tv_form="rgb", tv_chroma=2.0)
    with pytest.raises(GradinvError, match=r"^tv_luma=0.0 is gone; "):
        AttackConfig.from_dict({"tv_luma": 0.0})
    assert recorded({"tv_luma": 0.0}) == AttackConfig().to_dict() | {"tv_luma": 0.0}


@pytest.mark.parametrize(
    ("name", "gone", "now"),
    [("registration", "shift", "affine"), ("registration", "flow", "affine"), ("stepping", "packed", "traced")],
)
def test_a_choice_that_is_gone_says_what_replaced_it(
    name: str, gone: str, now: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GradinvError, match=rf"^{name}={gone} is gone; take {now}.*\.$"):
        AttackConfig.from_dict({name: gone})
    with pytest.raises(SystemExit):
        main(["invert", "tabby", f"--{name}", gone])
    assert f"{name}={gone} is gone; take {now}" in capsys.readouterr().err
    # What a recording says of a run that was is left as it is.
    assert recorded({name: gone, "seeds": 3}) == AttackConfig(seeds=3).to_dict() | {name: gone}
    with pytest.raises(GradinvError, match="There is no setting 'steps'"):
        recorded({name: gone, "steps": 3})


@pytest.mark.parametrize("boundary", ["loss", "logits", "auto", "maxpool", "layer2", "layer2.1", "layer3.0.conv1"])
def test_boundaries(boundary: str) -> None:
    config = AttackConfig(boundary=boundary)
    assert config.needs_layers == (boundary not in ("loss", "logits"))
    assert config.needs_features == (boundary != "loss")
    control = AttackConfig(boundary=boundary, gradient=0.0)
    assert not control.needs_layers and not control.needs_features
    assert AttackConfig(boundary=boundary, gradient=0.0, activations=1.0).needs_layers == config.needs_layers


@pytest.mark.parametrize("boundary", ["", "layer5", "layer1.conv1", "layer1.0.bn1", "conv1", "Loss", "layer1.0.conv4"])
def test_boundaries_that_are_none(boundary: str) -> None:
    with pytest.raises(GradinvError, match=r"^boundary takes loss, logits, auto, or a node's name such as maxpool"):
        AttackConfig(boundary=boundary)


def test_annealing_stages() -> None:
    config = AttackConfig.from_dict({"pooling": [0.3, 0], "tv_schedule": [1, 0.5]})
    assert (config.pooling, config.tv_schedule) == ((0.3, 0), (1, 0.5))
    with pytest.raises(GradinvError, match=r"^pooling has 2 annealing stages and tv_schedule 1; give as many"):
        AttackConfig(pooling=(0.3, 0.0), tv_schedule=(1.0,))
    for wrong in ((-1.0,), (math.inf,), ("a",), (True,)):
        for name in ("pooling", "tv_schedule"):
            with pytest.raises(GradinvError, match=f"^{name} takes finite numbers of at least 0"):
                AttackConfig.from_dict({name: wrong})


def test_frozen_and_comparable() -> None:
    config = AttackConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seeds = 3  # type: ignore[misc]
    assert hash(config) == hash(AttackConfig())


def test_a_bn_term_without_weight_is_none():
    """Older demonstrations had approx with weight 0."""
    assert AttackConfig.from_dict({"bn": "approx", "bn_weight": 0.0}) == AttackConfig(bn="none")
    demo = AttackConfig.preset("demo", "resnet18-tiny")
    assert demo.bn == "none" and AttackConfig.from_dict({**demo.to_dict(), "bn": "exact"}).bn_weight > 0
