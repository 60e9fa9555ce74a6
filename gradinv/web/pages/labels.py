"""The page Labels: which class each minimum of the final layer's gradient gives away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go
import streamlit as st
from plotly.subplots import make_subplots
from torch import Tensor

from gradinv import metrics
from gradinv.figures import COLOURS, NEUTRAL
from gradinv.recovery.labels import METHODS, restore_labels
from gradinv.types import GradinvError
from gradinv.web.parts import lessons, markup, shared
from gradinv.web.parts.elements import chart, guarded, html, lead

EXPLAINED = {
    "column-minimum": "the classes whose rows go furthest below zero, each once; the rule of the CVPR 2021 paper",
    "llg": "takes every class whose row sums to less than zero, takes off what one picture weighs, and goes on with "
    "the lowest: this counts repeated classes (Wainakh et al., 2022)",
    "bias-corrected": "the same with the bias’s gradient, in which a picture weighs −1",
    "ilrg": "works out the network’s belief from the gradient, and with it solves an equation for each class: counts "
    "them, too (Ma et al., ICLR 2023)",
}
SURE = 0.99  # a plain method's confidence from which `auto` ends at its reading, at once
_BESIDE, _FEATURES = 12, 48  # classes in the picture beside those that the minima name, and its features

_NEGATIVE, _POSITIVE = COLOURS[1], COLOURS[3]
_SCALE = [[0, _NEGATIVE], [0.5, "rgba(123,133,140,0.10)"], [1, _POSITIVE]]


@dataclass(frozen=True)
class Reading:
    """What one method reads: how many images each class has, and how sure it is; or why it reads nothing."""

    counts: Mapping[int, int]
    confidence: float
    problem: str = ""
    method: str = ""


@guarded()
def page() -> None:
    """Everything on the page."""
    lead(
        "Which labels does a gradient give away?",
        "Before any picture is rebuilt, the gradient of the last layer says which classes are in the batch, "
        "and how often. Move the sliders: everything here is computed at once, from that one layer.",
    )
    choice = lessons.controls()
    pool = lessons.samples(choice.network)
    if (brought := lessons.brought()) is not None:
        st.markdown(
            f"**{markup.count(brought.batch_size, 'picture')}** in the batch; nobody here knows of which classes."
        )
        _shown(lessons.of_visitor(brought, shared.model(brought.model)), None)
        return
    pool, places = lessons.drawn(pool, choice)
    true = Counter(pool.labels(places).tolist())
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.markdown(f"**{markup.count(len(places), 'picture')} of {_classes(len(true))}** in the batch")
        shown = st.toggle("Show the truth", True, key="truth", bind="query-params")
    with st.container(key="strip"):
        html(lessons.strip(pool, places, shown))
    _shown(lessons.of_batch(shared.model(choice.network), pool, places), true if shown else None)
    lessons.credits(pool)


def _shown(given: lessons.Given, told: Mapping[int, int] | None) -> None:
    """A gradient as this page looks at it. `told`: how often each class is in the batch, None where that is not to be
    seen or not known."""
    network, observation = given.network, given.final()
    gradient, bias = (observation.gradients[f"{network.final}.{part}"].cpu() for part in ("weight", "bias"))
    names, count = [network.class_name(label) for label in range(len(network.classes))], observation.batch_size
    order = by_minimum(gradient)
    st.header("1. Each class’s minimum", anchor=False)
    left, side = st.columns([5, 3], gap="large")
    with left:
        chart(
            picture(gradient, names, count, told),
            "minima",
            "Heatmap of the final layer’s gradient, classes by features: the rows with the most negative minimum "
            "come first, and the minimum of each is marked",
        )
        html(
            f'<i class="gi-swatch" style="background:{_NEGATIVE}"></i> below zero, '
            f'<i class="gi-swatch" style="background:{_POSITIVE}"></i> above zero; stronger colours are further off.'
        )
    with side:
        st.markdown(
            "The last layer weighs what the network sees in a picture, its **features** $f$, which are never "
            "negative, for each class. Its gradient is"
        )
        st.latex(r"\nabla W_i=\frac1K\sum_k (p_{k,i}-y_{k,i})\,f_k")
        st.markdown(
            "The network’s belief $p$ lies between 0 and 1, and $y$ is 1 for the picture’s own class, else 0. "
            "So a picture pushes **only its own class’s row below zero**. It pushes the rows of the classes that the "
            "network took it for above zero. *Column-minimum*, the rule of the CVPR 2021 paper, takes the "
            f"{count} rows whose minimum is most negative. It cannot see a class twice."
        )
        if told is not None:
            right = sum(label in told for label in order[:count])
            st.markdown(
                f"Here **{right} of {count}** of these rows are classes of the batch"
                + ("." if len(told) == count else f", which holds {_classes(len(told))}.")
            )
    st.header("2. All classes in that order, and the bias, which counts", anchor=False)
    chart(
        bars(gradient, bias, names, count, told),
        "bars",
        "Bars for all classes: above the minimum of each row of the gradient, below the bias’s gradient times the "
        "batch size",
    )
    st.caption(
        "The bias’s gradient is the mean of p − y alone: times the batch size, each picture adds −1 to its class, less "
        "what the network believed already. That is how repeated classes are counted."
    )
    st.header("3. What each method reads", anchor=False)
    _methods(given, names, told, count)


def _classes(number: int) -> str:
    return "1 class" if number == 1 else f"{number} classes"


def _methods(given: lessons.Given, names: Sequence[str], true: Mapping[int, int] | None, count: int) -> None:
    found = {method: _reading(given, method) for method in METHODS[1:]}
    if max(reading.confidence for reading in found.values()) >= SURE or st.session_state.get("auto") == given.key:
        with st.spinner("Auto tests readings"):
            found = {"auto": _reading(given, "auto"), **found}
    elif st.button("Let auto correct the readings (up to a minute)", icon=":material/search:", key="auto-ask"):
        st.session_state.auto = given.key
        st.rerun()
    html(table(found, names, true, count))
    st.markdown("\n".join(f"- **{method}**: {told}." for method, told in EXPLAINED.items()))
    if auto := found.get("auto"):
        st.markdown(
            f"**auto** took the reading of {auto.method} and is **{100 * auto.confidence:.0f} % sure**: it solves for "
            "the features that would cause this gradient under these labels, and the less of the gradient they leave "
            "unexplained, the surer it is."
        )
    else:
        st.markdown(
            "No plain method’s reading explains the gradient. **auto** goes on: it moves single labels until "
            "features are found that do, which takes longer."
        )


@lessons.kept(st.cache_data, max_entries=512, show_spinner=False)
def _reading(given: lessons.Given, method: str) -> Reading:
    try:
        restored = restore_labels(given.network, given.final(), method)
    except GradinvError as error:
        return Reading({}, 0.0, str(error))
    return Reading(Counter(restored.labels.tolist()), restored.confidence, method=restored.method)


def by_minimum(gradient: Tensor) -> list[int]:
    """Gradient of the final weight (N, D) → all classes, the most negative minimum first."""
    return gradient.min(dim=1).values.argsort(stable=True).tolist()


def picture(gradient: Tensor, names: Sequence[str], count: int, true: Mapping[int, int] | None) -> go.Figure:
    """The gradient of the final weight (N, D) as a picture: the `count` classes that column-minimum takes and, of the
    others, those of most energy, by the features in which their minima lie, then by those of most energy. `true`: how
    often each class is in the batch; None: not to be told."""
    order = by_minimum(gradient)
    strongest = sorted(order[count:], key=lambda label: -float(gradient[label].norm()))[:_BESIDE]
    rows = order[:count] + [label for label in order[count:] if label in strongest]
    lowest = gradient[rows].min(dim=1)
    energy = gradient[rows].square().sum(0).argsort(descending=True, stable=True).tolist()
    columns = list(dict.fromkeys([*lowest.indices.tolist(), *energy]))[: max(_FEATURES, len(rows))]
    values = gradient[rows][:, columns]
    largest = float(values.abs().quantile(0.99))
    labels = [_named(names[row], true.get(row, 0) if true is not None else None) for row in rows]
    places = list(range(len(rows)))
    figure = go.Figure(
        go.Heatmap(
            z=values.tolist(),
            y=places,
            customdata=[[[names[row], column] for column in columns] for row in rows],
            zmin=-largest,
            zmax=largest,
            colorscale=_SCALE,
            xgap=1,
            ygap=1,
            showscale=False,
            hovertemplate="%{customdata[0]}<br>feature %{customdata[1]}: %{z:.2g}<extra></extra>",
        )
    )
    for name, chosen, symbol in (
        (f"minimum of the {count} most negative", places[:count], "circle-open"),
        ("of the others", places[count:], "x-thin-open"),
    ):
        figure.add_scatter(
            x=[columns.index(int(lowest.indices[place])) for place in chosen],
            y=chosen,
            name=name,
            mode="markers",
            marker={"symbol": symbol, "size": 11, "color": NEUTRAL, "line": {"width": 2, "color": NEUTRAL}},
            hoverinfo="skip",
            cliponaxis=False,
        )
    figure.add_hline(y=count - 0.5, line={"color": NEUTRAL, "dash": "dash", "width": 1.5})
    plain = {"ticks": "", "showgrid": False, "zeroline": False}
    title = f"{len(columns)} of {gradient.shape[1]} features"
    figure.update_xaxes(**plain, title_text=title, showticklabels=False, range=[-0.5, len(columns) - 0.5])
    figure.update_yaxes(**plain, tickvals=places, ticktext=labels, range=[len(rows) - 0.5, -0.5])
    return figure.update_layout(**lessons.LAYOUT, height=90 + 21 * len(rows))


def _named(name: str, count: int | None) -> str:
    """A class on the axis: in bold, and how often, where it is in the batch."""
    short = escape(name if len(name) <= 18 else f"{name[:17]}…")
    return f"<b>{short}{f' ×{count}' if count > 1 else ''} ●</b>" if count else short


def bars(
    gradient: Tensor, bias_gradient: Tensor, names: Sequence[str], count: int, true: Mapping[int, int] | None
) -> go.Figure:
    """All classes by their minimum: the minima of the rows of (N, D) above, the bias's gradient (N,) times the batch
    size `count` below. Coloured: the classes of the batch, or where they are not to be told the first `count`."""
    order = by_minimum(gradient)
    marked = set(order[:count] if true is None else true)
    groups = {
        "in the batch" if true is not None else f"the first {count}": [p for p, c in enumerate(order) if c in marked],
        "the others": [p for p, c in enumerate(order) if c not in marked],
    }
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for part, (values, title) in enumerate(
        ((gradient.min(dim=1).values, "minimum of ∇W"), (count * bias_gradient, "K · ∇b")), 1
    ):
        for (group, places), colour in zip(groups.items(), (COLOURS[0], NEUTRAL), strict=True):
            figure.add_bar(
                x=places,
                y=[float(values[order[place]]) for place in places],
                customdata=[names[order[place]] for place in places],
                name=group,
                legendgroup=group,
                showlegend=part == 1,
                marker={"color": colour, "line": {"width": 0}},
                hovertemplate="%{customdata}: %{y:.3g}<extra></extra>",
                row=part,
                col=1,
            )
        figure.update_yaxes(title_text=title, row=part, col=1)
        figure.add_vline(x=count - 0.5, line={"color": NEUTRAL, "dash": "dash", "width": 1.5}, row=part, col=1)
    figure.update_xaxes(showticklabels=False, showgrid=False)
    figure.update_xaxes(title_text=f"{len(order)} classes, the most negative minimum first", row=2, col=1)
    return figure.update_layout(**lessons.LAYOUT, height=380, bargap=0.2, barmode="overlay")


def table(found: Mapping[str, Reading], names: Sequence[str], true: Mapping[int, int] | None, size: int) -> str:
    """Every class that is in the batch or was read: how often it is there, and how often each method reads it.

    `true`: how often each class is in the batch; None: not to be told. `size`: the pictures of the batch.
    """
    there = true or {}
    read = Counter[int]()
    for one in found.values():
        read |= Counter(one.counts)
    labels = sorted({*read, *there}, key=lambda label: (-there.get(label, 0), -read[label], names[label]))
    head, foot = ["Class"], []
    if true is not None:
        head.append("Truth")
        foot = ["Right", str(size), *(f"{metrics.labels_right(one.counts, true)} of {size}" for one in found.values())]
    rows = []
    for label in labels:
        own = [] if true is None else [str(true.get(label, 0) or "–")]
        rows.append([escape(names[label]), *own, *(_cell(one, label, true) for one in found.values())])
    problems = "".join(f"<p>{escape(one.problem)}</p>" for one in found.values() if one.problem)
    return markup.table([*head, *found], rows, "gi-readings", foot, "What each method reads") + problems


def _cell(reading: Reading, label: int, true: Mapping[int, int] | None) -> str:
    own = str(reading.counts.get(label, 0) or "–")
    if true is None or reading.counts.get(label, 0) == true.get(label, 0):
        return own
    return f'<span class="gi-wrong">{own} <span role="img" aria-label="wrong">✗</span></span>'
