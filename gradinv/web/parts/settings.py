"""The attack's settings, built from the fields of AttackConfig."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import streamlit as st

from gradinv.config import AttackConfig
from gradinv.models import MODELS, fitted_file
from gradinv.prior import DECODERS
from gradinv.types import GradinvError
from gradinv.web.parts import shared
from gradinv.web.parts.markup import TERMS

MODEL, PRESET = "resnet18-tiny", "demo"
SIZE = 64  # px of the bundled networks' pictures; others have one size only
SIZES = (64, 128)
# Each seed takes memory of its own on a server that others use as well; the command line knows no such bound.
MOST_SEEDS, MOST_ITERATIONS = 32, 1_000_000
MORE_SIZES = (64, 96, 128, 160, 224)
PRESETS = {
    "demo": "Demo: layers are solved exactly as far as the gradient determines them, then pixels are searched for. "
    "Where no layer can be solved, Matching takes its place.",
    "matching": "Matching: pixels are searched for until their gradient matches, with what worked best for the bundled "
    "networks on a CPU.",
    "paper": "Paper: the constants of the CVPR 2021 paper, for large images and a GPU; on a CPU take fewer iterations.",
}
BN = {
    "approx": "Approx: those of the training data, stored in the weights and always available.",
    "exact": "Exact: those of the client’s own batch. They leak with synchronised BN only, and tell a lot alone.",
    "inferred": "Inferred: those of the client’s batch, worked out from the running statistics that it shares.",
    "none": "None: the attack does without.",
}
START = {
    "random": "Without the learned prior: each seed starts from noise, as in the paper.",
    "decoder": "With the learned prior: each seed starts from a picture that a network painted from the lowest solved "
    "layer, or else from the recovered features. It learned that from public pictures, which the paper’s attacker does "
    "not have. What it painted is shown beside what the search makes of it.",
}
# By the first field of each, in their order.
_GROUPS = {
    "seed": "Seed and labels",
    "match": "What is compared",
    "bn_weight": "What natural pictures are like",
    "group": "The seeds together",
    "optimiser": "The search",
    "prior": "Where it starts",
    "stepping": "How it is executed, with the same result",
}
_SHORT = ("bn", "tv")
# Have widgets of their own, with these keys ("start" is the button).
_PLAIN = {"seeds": "seeds", "iterations": "iterations", "bn": "bn", "start": "start_from"}


def models() -> list[str]:
    """The networks that can be chosen: those without a final layer once one was fitted."""
    return [name for name, info in MODELS.items() if not info.headless or fitted_file(name).is_file()]


def choose_model(given: str | None = None) -> str:
    """The model's name: the visitor's choice, unless a `given` gradient has one."""
    if given is not None and st.session_state.get("model", st.query_params.get("model", MODEL)) != given:
        st.session_state.model = given
        _restore_defaults()
    more: dict[str, Any] = {"on_change": _restore_defaults, "disabled": given is not None}
    name = shared.choose("Network whose gradient is shared", models(), MODEL, "model", **more)
    st.caption(f"{MODELS[name].description}. Top-1 accuracy {MODELS[name].accuracy:g} %. {_origin(name)}")
    return name


def size_of(name: str) -> int:
    """The size, in pixels, of a network's pictures where nobody has chosen another."""
    return SIZE if MODELS[name].bundled else MODELS[name].size


def choose_size(name: str, given: int | None = None) -> int:
    """The pictures' side in pixels: the visitor's choice where the network is bundled, unless a `given` gradient has
    one."""
    trained, usual = MODELS[name].size, size_of(name)
    if given is not None:
        return given
    if not MODELS[name].bundled:
        return usual
    asked = str(st.session_state.get("size", st.query_params.get("size", usual)))
    with st.container(horizontal=True, vertical_alignment="bottom", key="sizes"):
        sizes = MORE_SIZES if st.session_state.get("all_sizes") or asked not in map(str, SIZES) else SIZES
        chosen = shared.choose("Side of the pictures, in pixels", map(str, sizes), str(usual), "size")
        if sizes == SIZES:
            st.button("More sizes", type="tertiary", key="more-sizes", on_click=_show_all_sizes)
    told = f"The network was trained at {trained} px; it takes larger pictures, too."
    st.caption(told if int(chosen) == trained else f"{told} They take longer, and fewer layers can be solved.")
    return int(chosen)


def _show_all_sizes() -> None:
    st.session_state.all_sizes = True


def _origin(name: str) -> str:
    origin = MODELS[name].origin
    return origin[0].upper() + origin[1:] + "."


def panel(model: str) -> AttackConfig:
    """Seeds, iterations, preset and BN assumption, the rest in an expander. Raises GradinvError for what cannot be."""
    preset = _told("Preset", PRESETS, PRESET, "preset", on_change=_restore_defaults)
    base = AttackConfig.preset(preset, model)
    left, middle, right = st.columns([1, 1, 2])
    seeds = left.number_input(
        "Seeds",
        1,
        MOST_SEEDS,
        base.seeds,
        key="seeds",
        bind="query-params",
        help="Independent reconstructions from different random starts. Their mean is the consensus.",
    )
    iterations = middle.number_input(
        "Iterations",
        1,
        MOST_ITERATIONS,
        base.iterations,
        step=50,
        key="iterations",
        bind="query-params",
        help="Optimisation steps of each seed.",
    )
    with right:
        bn = _told("BN statistics that the attacker uses", BN, base.bn, "bn", help=TERMS["BN"])
    start = "random"
    if model in DECODERS:
        start = _told("What the attack starts from", START, base.start, "start_from")
    with st.expander("Advanced settings"):
        advanced = _advanced(base)
    plain = {"seeds": int(seeds), "iterations": int(iterations), "bn": bn, "start": start}
    return AttackConfig.from_dict({**advanced, **plain})


def _told(
    label: str,
    options: Mapping[str, str],
    default: str,
    key: str,
    on_change: Callable[[], None] | None = None,
    help: str | None = None,
) -> str:
    """A choice between options, with what the chosen one means below it."""
    chosen = shared.choose(label, options, default, key, on_change=on_change, help=help)
    st.caption(options[chosen])
    return chosen


def _advanced(base: AttackConfig) -> dict[str, Any]:
    values = {}
    grouped: dict[str, list[dataclasses.Field[Any]]] = {}
    for item in dataclasses.fields(AttackConfig):
        if item.name in _GROUPS:
            grouped[_GROUPS[item.name]] = []
        if item.name not in _PLAIN:
            grouped[list(grouped)[-1]].append(item)
    with st.container(key="advanced"):
        for title, fields in grouped.items():
            st.markdown(f"**{title}**")
            for start in range(0, len(fields), 3):
                for column, item in zip(st.columns(3), fields[start : start + 3], strict=False):
                    with column:
                        values[item.name] = _widget(item, getattr(base, item.name))
    return values


def _widget(item: dataclasses.Field[Any], default: Any) -> Any:
    """One field's widget; → a value of the field's type."""
    name, told = _label(item.name), item.metadata
    text = told["help"][0].upper() + told["help"][1:]
    common: dict[str, Any] = {"key": f"set_{item.name}", "help": text, "bind": "query-params"}
    if told["choices"]:
        return st.selectbox(name, told["choices"], told["choices"].index(default), **common)
    if isinstance(default, bool):
        return st.toggle(name, default, **common)
    if isinstance(default, tuple):
        return _shares(st.text_input(name, ", ".join(f"{share:g}" for share in default), **common))
    if isinstance(default, str):
        return st.text_input(name, default, **common)
    least = told["least"]
    if isinstance(default, int):
        return int(st.number_input(name, int(least), None, default, **common))
    return float(st.number_input(name, float(least), None, float(default), step=_step(default), format="%g", **common))


def _label(name: str) -> str:
    """A field's name as a reader has it: bn_weight → BN weight."""
    words = [word.upper() if word in _SHORT else word for word in name.split("_")]
    return " ".join([words[0][0].upper() + words[0][1:], *words[1:]])


def _step(value: float) -> float:
    """A step that suits the value's size."""
    return float(f"{value / 10:.0e}") if value > 0 else 0.1


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.replace(";", ",").split(",") if part.strip())
    except ValueError as error:
        raise GradinvError(
            f"Numbers separated by commas are expected, such as 0.25, 0.3, 0.45, not {text!r}."
        ) from error


def _restore_defaults() -> None:
    """A preset, and a preset for another model, brings its own values."""
    _fill(AttackConfig.preset(st.session_state.get("preset", PRESET), st.session_state.model))


def restore(model: str, size: int, preset: str, config: AttackConfig) -> dict[str, str]:
    """Set every widget as it was for a run; → what the address has to say of that. Before they are drawn."""
    st.session_state.model, st.session_state.size, st.session_state.preset = model, str(size), preset
    _fill(config)
    # What a widget is set to, and not by hand, it does not write into the address.
    given = {"model": model, "size": str(size), "preset": preset, **_values(config)}
    defaults = _values(AttackConfig.preset(preset, model))
    usual = {"model": MODEL, "size": str(size_of(model)), "preset": PRESET, **defaults}
    changed = {key: value for key, value in given.items() if value != usual[key]}
    return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in changed.items()}


def _fill(config: AttackConfig) -> None:
    for key, value in _values(config).items():
        st.session_state[key] = value


def _values(config: AttackConfig) -> dict[str, Any]:
    """By its widget's key what each field's widget shows."""
    shown = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        text = ", ".join(f"{share:g}" for share in value) if isinstance(value, tuple) else value
        shown[_PLAIN.get(item.name, f"set_{item.name}")] = text
    return shown
