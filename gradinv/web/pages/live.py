"""The page Live: choose the pictures, see what the server receives, and watch it rebuild them."""

from __future__ import annotations

from functools import partial

import streamlit as st
import torch

from gradinv import figures, pace
from gradinv.attack.memory import check_memory
from gradinv.attack.objective import bn_targets
from gradinv.config import AttackConfig
from gradinv.defenses import parse
from gradinv.metrics import constant_colour, measure
from gradinv.models import MODELS, Model
from gradinv.types import GradinvError
from gradinv.web.parts import command, gradient, lessons, markup, pick, settings, shared, showcase, tour
from gradinv.web.parts.elements import chart, guarded, html, lead
from gradinv.web.parts.gradient import OwnGradient
from gradinv.web.parts.inversion import Inversion, Originals
from gradinv.web.parts.pick import Batch
from gradinv.web.run import view
from gradinv.web.run.control import begin, way_back
from gradinv.web.run.facts import Facts

BN_KNOWN = {
    "approx": "the BN statistics of the training data, stored in the weights",
    "exact": "the BN statistics of this very batch, which you let leak",
    "inferred": "the running BN statistics after the client’s step, from which those of this very batch follow",
    "none": "",
}
LEARNED = "public pictures of the same kind, from which it learned a prior"


@guarded()
def page() -> None:
    """Everything on the page: a run, or what there is to choose for one.

    Each has a place of its own, and the other's is emptied: else parts of the one would stand among those of the other
    as these come, and would be pushed about.
    """
    if job := st.query_params.get("job"):
        st.empty()
        with st.container():
            view.view(job)
    else:
        choice = st.container()
        st.empty()
        with choice:
            _set_up()


def _set_up() -> None:
    lead(
        "What does a shared gradient give away?",
        "In federated learning, a client keeps its pictures and shares only the gradient that they cause. Choose "
        "the pictures, see what the server receives, and watch it turn the gradient back into pictures.",
    )
    _lead()
    brought = gradient.held() if pick.shares() else None
    name = settings.choose_model(brought.model if brought is not None else None)
    size = settings.choose_size(name, brought.side if brought is not None else None)
    network = _network(name, size)
    if network is None:
        return
    st.header("1. The client’s gradient" if pick.shares() else "1. The client’s pictures", anchor=False)
    batch = pick.panel(network, shared.visitor())
    st.header("2. What the server receives", anchor=False)
    texts = _defences() if not pick.shares() else ()
    received = st.container(key="received")
    st.header("3. The attack", anchor=False)
    config, problem = None, None
    try:
        config = settings.panel(name)
        _check(network, batch, config)
    except GradinvError as error:
        problem = str(error)
    if config is not None and batch is not None and problem is None:
        with st.expander("The same on the command line"):
            st.code(command.line(network, batch, texts, st.session_state.preset, config), "sh", wrap_lines=True)
    _start_bar(network, batch, config, texts, problem)
    # Last, since it computes: everything else is on the page by then.
    with received:
        _received(network, batch, texts, config)
    shared.warm(name)


def _defences() -> tuple[str, ...]:
    """What the client does to its gradient before it shares it, in the notation of `defenses.parse`; at first
    nothing."""
    with st.expander("A defence of the client", icon=":material/shield:", expanded=lessons.defended_by_address()):
        st.caption("What the client does to its gradient before it shares it. The attack below gets what is left.")
        return lessons.defences()


def _lead() -> None:
    """What leaks, at a glance: a recorded run that moves before anyone has done anything."""
    if showcase.moving():
        with st.container(horizontal=True, vertical_alignment="center", key="lead-ways"):
            tour.entrance()
            label = "Play this run yourself, beside others: more pictures, a defence, no gradient"
            showcase.link(label, showcase.FIRST)


def _network(name: str, size: int) -> Model | None:
    """The page's own copy of the model, at that size, or None as long as its download has not been agreed to."""
    if not shared.at_hand(name) and not st.button(
        f"Load {name}", type="primary", icon=":material/download:", help=MODELS[name].origin
    ):
        st.info(
            f"{name} is not bundled: its weights are from {MODELS[name].origin}. The bundled networks work offline."
        )
        return None
    with st.spinner(f"Loading {name}", show_time=True):
        return shared.model(name, size=size)


def _check(network: Model, batch: Batch | OwnGradient | None, config: AttackConfig) -> None:
    """Raises GradinvError for what would only fail later."""
    if batch is None:
        raise GradinvError("Bring a gradient first.")
    if isinstance(batch, OwnGradient):
        observation = batch.find(shared.visitor())
        with shared.using:
            bn_targets(network, observation, config)
    elif not batch.members:
        raise GradinvError("Choose at least one picture.")
    elif batch.problems:
        raise GradinvError("Some pictures of the batch cannot be used; remove them first.")
    elif len(batch.members) > len(network.classes):
        raise GradinvError(
            f"A batch of {len(batch.members)} pictures has more labels than the {len(network.classes)} classes that "
            "can be restored; choose fewer."
        )
    check_memory(network, batch.batch_size, config)


def _received(
    network: Model, batch: Batch | OwnGradient | None, texts: tuple[str, ...], config: AttackConfig | None
) -> None:
    if batch is None or (isinstance(batch, Batch) and not batch.members):
        st.info("Nothing yet: there is no gradient." if batch is None else "Nothing yet: the batch is empty.")
        return
    method = config.labels if config is not None else "auto"
    true = None if isinstance(batch, OwnGradient) else [member.name for member in batch.members]
    preview = _preview(network, batch, texts, method)
    left, right = st.columns([3, 2], gap="medium")
    with left:
        count = sum(parameter.numel() for parameter in network.network.parameters())
        st.markdown(f"**The gradient: {count / 1e6:.1f} million numbers**, here the size of each layer’s part")
        for text in texts:
            st.markdown(f":material/shield: {parse(text).note}")
        chart(
            figures.gradient_norms(preview.norms),
            "norms",
            f"Bar chart of the gradient norm of each of the {len(preview.norms)} layers of {network.name}",
        )
    with right:
        read = [network.class_name(label) for label in preview.restored]
        told = preview.method, preview.confidence
        st.markdown("**The labels, read from the last layer**")
        predicted = isinstance(batch, Batch) and any(member.predicted for member in batch.members)
        html(markup.labels(true, read, *told, predicted=predicted))
        if true is not None and len(set(true)) < len(true) and method == "column-minimum":
            st.warning(
                "Some pictures share a class. Column-minimum restores distinct labels, so at least one will be wrong; "
                "the setting “labels: auto” counts repeated ones."
            )
    bn = BN_KNOWN[config.bn if config is not None else "approx"]
    learned = LEARNED if config is not None and config.start == "decoder" else ""
    st.html(markup.knowledge(filter(None, (bn, learned))))


def _preview(network: Model, batch: Batch | OwnGradient, texts: tuple[str, ...], method: str) -> shared.Preview:
    if isinstance(batch, OwnGradient):
        return gradient.preview(network.name, batch.key, method, batch.find(shared.visitor()))
    pixels = torch.stack([member.pixels for member in batch.members])
    public = all(member.chosen.source != "upload" for member in batch.members)
    return shared.preview(*_key(network, batch), texts, method, pixels, public)


def _key(network: Model, batch: Batch) -> shared.Key:
    members = tuple((member.chosen.id, member.label) for member in batch.members)
    return network.name, network.preprocessing.size, members


def _start_bar(
    network: Model,
    batch: Batch | OwnGradient | None,
    config: AttackConfig | None,
    texts: tuple[str, ...],
    problem: str | None,
) -> None:
    """Always in sight: what is about to run, or why it cannot, and the button."""
    bar = st.bottom.container(
        horizontal=True, vertical_alignment="center", horizontal_alignment="distribute", key="start-bar"
    )
    with bar:
        if way_back():
            return
        if problem is None and config is not None and batch is not None:
            whose = "a gradient of " if isinstance(batch, OwnGradient) else ""
            with shared.using:
                told = markup.about(pace.estimate(network, config, batch.batch_size))
            pictures = markup.count(batch.batch_size, "picture")
            st.markdown(
                f"**{whose}{pictures}** of {network.preprocessing.size} px · {network.name} · "
                f"{markup.count(config.seeds, 'seed')} × {markup.count(config.iterations, 'iteration')} · {told}",
                help="A rough estimate: from the size of the work and how fast this machine is, and from earlier runs. "
                "More visitors at once take longer.",
            )
        else:
            st.markdown(f":material/error: {markup.plain(problem or '')}")
        pressed = st.button(
            "Rebuild the pictures",
            type="primary",
            icon=":material/play_arrow:",
            disabled=problem is not None,
            key="start",
            shortcut="Mod+Enter",
        )
        if pressed and config is not None and batch is not None:
            try:
                begin(_work(network, batch, config, texts))
            except GradinvError as error:
                st.error(markup.plain(str(error)))


def _work(network: Model, batch: Batch | OwnGradient, config: AttackConfig, texts: tuple[str, ...]) -> Inversion:
    size = network.preprocessing.size
    load = partial(shared.model, network.name, "worker", size)
    classes = tuple(known.name for known in network.classes)
    preset: str = st.session_state.preset
    if isinstance(batch, OwnGradient):
        facts = Facts(network.name, size, preset, (), classes, (), (), (), ())
        return Inversion(load, batch.shared(shared.visitor()), config, facts)
    pixels = torch.stack([member.pixels for member in batch.members])
    facts = Facts(
        model=network.name,
        size=size,
        preset=preset,
        chosen=tuple(member.chosen for member in batch.members if member.chosen.source != "upload"),
        classes=classes,
        originals=figures.tiles(pixels),
        titles=tuple(member.chosen.picture.title for member in batch.members),
        credits=tuple(member.credit for member in batch.members),
        baseline=measure(constant_colour(pixels), pixels, ("psnr",))["psnr"],
    )
    labels = tuple(member.label for member in batch.members)
    known = partial(shared.observed, _key(network, batch))
    return Inversion(load, Originals(pixels, labels, texts, known), config, facts)
