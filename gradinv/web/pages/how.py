"""How it works: the method in six pictures that the code itself makes, each equation beside what it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
import streamlit as st
import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv import figures
from gradinv.attack.consensus import consensus
from gradinv.attack.terms import bn_distance, l2_distance, paper_variation
from gradinv.batchnorm import batch_statistics, running_statistics
from gradinv.client import observe
from gradinv.gallery import pooled
from gradinv.metrics import ssim
from gradinv.models import Model, load_model
from gradinv.prior import preview
from gradinv.recovery.final_layer import recover_features
from gradinv.recovery.labels import restore_labels
from gradinv.sources import Credit, find, gallery, pixels_of
from gradinv.web.parts import markup, pick, settings
from gradinv.web.parts.elements import chart, guarded, html, lead
from gradinv.web.parts.markup import Row, Tile

MODEL = "resnet18-tiny"
STOPS = 5  # between noise and the originals, both included
SHIFTS = ((-4, 0), (4, -2), (0, 4))  # px down and right, of the stand-ins for three seeds
JITTER = 0.08  # standard deviation of their noise, of pixels in [0, 1]

HARDER = (
    ("Larger batches", "one gradient averages more pictures, and each one’s share of it shrinks."),
    ("Repeated classes", "pictures of one class are harder to tell apart, and their features harder to unmix."),
    ("Larger pictures", "there are more pixels to find and no more numbers in the gradient."),
    (
        "Train mode",
        "BN then normalises by the batch itself, so that the attacker needs the batch’s own statistics, and has to "
        "evaluate in the same mode.",
    ),
    ("Trained networks", "their gradients are smaller than those of a network that has just been initialised."),
    ("Faces and fine detail", "faces come back misaligned, text and digits blurred: the paper’s own failure cases."),
    ("More than one step", "a client that sends the sum of many local steps shares no single gradient."),
)
DEFENDED = (
    "Noise with clipping, pruning and coarse quantisation all change the gradient before it leaves the client. "
    "[Defences](defences) shows what each one costs and what it hides; only noise that is calibrated to clipping "
    "carries a guarantee, and for the whole batch of one round rather than for a single picture. Secure aggregation "
    "lets the server see the sum over many clients only: that is a larger batch, not an empty one."
)
ETHICS = (
    "This is defensive research: whoever decides about federated learning should see what a shared gradient gives away "
    "before relying on it. The method has been public since 2021.",
    "The photographs of the gallery are openly licensed, with author and licence at each. Uploads stay in this "
    "server’s memory and are never written to its disk. Use pictures that are yours to use.",
    "A reconstruction is not evidence. The attack paints what explains the gradient, with priors that make it look "
    "natural, and details can be invented.",
)
REFERENCES = (
    (
        "H. Yin, A. Mallya, A. Vahdat, J. M. Alvarez, J. Kautz, P. Molchanov: See through Gradients: Image Batch "
        "Recovery via GradInversion, CVPR 2021. The paper; the equations above carry its numbers.",
        "https://arxiv.org/abs/2104.07586",
    ),
    ("L. Zhu, Z. Liu, S. Han: Deep Leakage from Gradients, NeurIPS 2019.", "https://arxiv.org/abs/1906.08935"),
    ("B. Zhao, K. R. Mopuri, H. Bilen: iDLG, 2020.", "https://arxiv.org/abs/2001.02610"),
    (
        "J. Geiping, H. Bauermeister, H. Dröge, M. Moeller: Inverting Gradients, NeurIPS 2020.",
        "https://arxiv.org/abs/2003.14053",
    ),
    ("A. Wainakh et al.: User-Level Label Leakage from Gradients (LLG), 2021.", "https://arxiv.org/abs/2105.09369"),
    (
        "Y. Huang et al.: Evaluating Gradient Inversion Attacks and Defenses, NeurIPS 2021.",
        "https://arxiv.org/abs/2112.00059",
    ),
    (
        "K. Ma et al.: Instance-wise Batch Label Restoration via Gradients (iLRG), ICLR 2023.",
        "https://openreview.net/forum?id=FIrQfNSOoTr",
    ),
    (
        "P. Guo et al.: Exploring the Vulnerabilities of Federated Learning, 2025. A survey.",
        "https://arxiv.org/abs/2503.11514",
    ),
    (
        "B. Balle, Y.-X. Wang: Improving the Gaussian Mechanism for Differential Privacy, ICML 2018.",
        "https://arxiv.org/abs/1805.06530",
    ),
)


@dataclass(frozen=True)
class Priors:
    """One batch as the fidelity priors see it: its first picture as a tile, R_TV and R_BN of all of it."""

    name: str
    tile: str
    variation: float
    bn: float


@dataclass(frozen=True)
class Example:
    """Everything that the six pictures show of one batch of the gallery's pictures.

    `minima` are min_m ∇W_{m,n} for each class n; `path` the first picture between noise and itself with the distance
    of the whole batch's gradient (Eqn 3) there; `seeds` the stand-ins for three seeds, `lazy` and `registered` their
    means, each with its SSIM; `guesses` what the learned prior paints, `cosines` how near the recovered features are.
    """

    titles: tuple[str, ...]
    credits: tuple[Credit | None, ...]
    originals: tuple[str, ...]
    classes: tuple[str, ...]
    norms: dict[str, float]
    minima: tuple[float, ...]
    restored: tuple[int, ...]
    path: tuple[tuple[float, str, float], ...]
    priors: tuple[Priors, ...]
    seeds: tuple[str, ...]
    lazy: tuple[str, float]
    registered: tuple[str, float]
    guesses: tuple[str, ...]
    cosines: tuple[float, ...]
    residual: float


@st.cache_data(show_spinner="The pictures below are being computed", max_entries=1)
def example() -> Example:
    """Compute the six pictures. Once a process; a second or two."""
    # A model of its own: hooks on a network hear every thread that runs it.
    model = load_model(MODEL, device="cpu")
    pictures = [find(gallery(model), name) for name in pick.FIRST]
    pixels = pixels_of(pictures, model.preprocessing)
    labels = torch.tensor([model.class_index(picture.wnid or "") for picture in pictures])
    observation = observe(model, pixels, labels)
    generator = torch.Generator().manual_seed(0)
    noise = model.preprocessing.denormalise(torch.randn(pixels.shape, generator=generator))
    restored = restore_labels(model, observation, "column-minimum").labels
    recovered = recover_features(model, observation, labels)
    seeds = _stand_ins(pixels[:1], generator)
    lazy, registered = consensus(seeds), consensus(seeds, "affine")
    path = []
    for share in torch.linspace(0, 1, STOPS).tolist():
        mixed = torch.lerp(noise, pixels, share)
        # Each picture keeps its label here, which the attacker has read by then.
        distance = l2_distance(observe(model, mixed, labels).gradients, observation.gradients)
        path.append((share, figures.tiles(mixed[:1])[0], float(distance)))
    shuffled = pixels.flatten(2)[:, :, torch.randperm(pixels[0, 0].numel(), generator=generator)].view_as(pixels)
    candidates = {"Noise": noise, "Its pixels, shuffled": shuffled, "The picture": pixels}
    return Example(
        titles=tuple(picture.title for picture in pictures),
        credits=tuple(picture.credit for picture in pictures),
        originals=figures.tiles(pixels),
        classes=tuple(known.name for known in model.classes),
        norms=figures.layer_norms(observation),
        minima=tuple(observation.gradients[f"{model.final}.weight"].min(dim=1).values.tolist()),
        restored=tuple(restored.tolist()),
        path=tuple(path),
        priors=tuple(_priors(model, name, batch) for name, batch in candidates.items()),
        seeds=tuple(figures.tiles(seed)[0] for seed in seeds),
        lazy=(figures.tiles(lazy)[0], float(ssim(lazy, pixels[:1]))),
        registered=(figures.tiles(registered)[0], float(ssim(registered, pixels[:1]))),
        guesses=figures.tiles(preview(model, recovered.features)),
        cosines=tuple(F.cosine_similarity(recovered.features.cpu(), pooled(model, pixels)).tolist()),
        residual=recovered.residual,
    )


def _stand_ins(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels (1, 3, S, S) → what seeds make of it, roughly: moved by some pixels and noisy, (G, 1, 3, S, S)."""
    moved = []
    for down, right in SHIFTS:
        pad = max(abs(down), abs(right))
        wide = F.pad(picture, (pad,) * 4, mode="replicate").roll((down, right), (2, 3))
        moved.append(wide[..., pad:-pad, pad:-pad])
    seeds = torch.stack(moved)
    return (seeds + JITTER * torch.randn(seeds.shape, generator=generator)).clamp(0, 1)


@torch.no_grad()
def _priors(model: Model, name: str, pixels: Tensor) -> Priors:
    images = model.preprocessing.normalise(pixels)
    with batch_statistics(model.network) as (means, variances):
        model.network(images)
    return Priors(
        name,
        figures.tiles(pixels[:1])[0],
        float(paper_variation(images)),
        float(bn_distance(means, variances, running_statistics(model.network))),
    )


@guarded()
def page() -> None:
    """The whole page."""
    lead(
        "How it works",
        "From a gradient back to the pictures behind it, in six steps. Every picture below was computed on "
        "this server by the code that runs the attack, from four photographs of the gallery and a small "
        "trained network. The equations carry the paper’s numbers.",
    )
    shown = example()
    with st.container(key="how-steps"):
        for number, step in enumerate(STEPS, 1):
            st.header(f"{number}. {step.title}", anchor=f"step-{number}")
            picture, words = st.columns([3, 2], gap="large")
            with picture:
                step.draw(shown)
            with words:
                for equation in step.equations:
                    st.latex(equation)
                st.markdown(step.words)
    _closing(shown)


def _draw_gradient(shown: Example) -> None:
    _board([Row("Originals", _originals(shown), "what the client keeps")])
    alt = f"Bar chart of the gradient norm of each of the {len(shown.norms)} layers of {MODEL}"
    _chart(figures.gradient_norms(shown.norms), "how-norms", alt)


def _draw_labels(shown: Example) -> None:
    names = ", ".join(shown.classes[label] for label in shown.restored)
    places = range(len(shown.minima))
    colours = [figures.COLOURS[place in shown.restored] for place in places]
    bars = go.Bar(x=list(places), y=shown.minima, customdata=shown.classes, marker_color=colours, marker_line_width=0)
    figure = go.Figure(bars.update(hovertemplate="%{customdata}: %{y:.3g}<extra></extra>"))
    for label in shown.restored:
        figure.add_annotation(x=label, y=shown.minima[label], text=shown.classes[label], showarrow=False, yshift=-10)
    figure.update_xaxes(title_text="classes", showticklabels=False, showgrid=False)
    figure.update_yaxes(title_text="smallest entry of the class’s row")
    figure.update_layout(height=330, bargap=0.1, showlegend=False)
    _chart(figure, "how-minima", f"Bar chart of each class’s smallest gradient entry; the most negative: {names}")
    st.markdown(f"The {len(shown.restored)} most negative ones: **{names}**.")


def _draw_matching(shown: Example) -> None:
    tiles = [
        Tile(tile, f"The first picture at {share:.0%} of the way from noise", f"{share:.0%}", f"{distance:.3g}")
        for share, tile, distance in shown.path
    ]
    _board([Row("On the way", tiles, "and the distance there")])
    shares, distances = [share for share, _, _ in shown.path], [distance for _, _, distance in shown.path]
    line = go.Scatter(x=shares, y=distances, mode="lines+markers", line={"color": figures.COLOURS[0], "width": 3})
    figure = go.Figure(line.update(hovertemplate="%{x:.0%} of the way: %{y:.3g}<extra></extra>"))
    figure.update_xaxes(title_text="way from noise to the originals", tickformat=".0%")
    figure.update_yaxes(title_text="gradient distance", rangemode="tozero")
    figure.update_layout(height=250)
    _chart(figure, "how-path", "Line: the gradient distance on the way from noise to the originals, where it is zero")


def _draw_fidelity(shown: Example) -> None:
    tiles = [
        Tile(
            state.tile, f"{state.name}: one of the batch", state.name, f"TV {state.variation:,.0f}, BN {state.bn:,.0f}"
        )
        for state in shown.priors
    ]
    _board([Row("Candidates", tiles, "one of the batch each, and what the priors say of all of it")])


def _draw_group(shown: Example) -> None:
    tiles = [Tile(uri, f"Stand-in for seed {place}", f"seed {place}") for place, uri in enumerate(shown.seeds, 1)]
    for name, (uri, value) in (("plain mean", shown.lazy), ("registered mean", shown.registered)):
        tiles.append(Tile(uri, f"{name} of the seeds", name, f"SSIM {value:.2f}"))
    _board([Row("Seeds", tiles, "and their means")])


def _draw_features(shown: Example) -> None:
    guesses = [
        Tile(uri, f"The learned prior’s guess of {title}", note=f"cosine {cosine:.4f}")
        for uri, title, cosine in zip(shown.guesses, shown.titles, shown.cosines, strict=True)
    ]
    _board(
        [
            Row("Originals", _originals(shown), "what the client keeps"),
            Row("A first guess", guesses, "painted from the recovered features"),
        ]
    )
    st.caption(
        "Cosine: between the features that were recovered and the picture’s own. Solved for in closed form, they leave "
        f"a share of {markup.number(shown.residual)} of the last layer’s gradient unexplained."
    )


def _board(rows: Sequence[Row]) -> None:
    html(markup.board(rows))


def _chart(figure: go.Figure, name: str, alt: str) -> None:
    chart(figure.update_layout(margin=figures.LAYOUT["margin"]), name, alt)


def _originals(shown: Example) -> list[Tile]:
    return [Tile(uri, f"Original: {title}") for uri, title in zip(shown.originals, shown.titles, strict=True)]


def _closing(shown: Example) -> None:
    st.header("What the attacker knows", anchor="attacker")
    st.html(markup.knowledge())
    st.markdown("Of the **BN statistics** it depends on the deployment, and every run says which it assumed:")
    st.markdown("\n".join(f"- {text}" for text in settings.BN.values()))
    st.header("What makes it harder", anchor="harder")
    st.markdown("\n".join(f"- **{what}**: {why}" for what, why in HARDER))
    st.markdown(DEFENDED)
    st.header("Limits and ethics", anchor="ethics")
    st.markdown("\n".join(f"- {text}" for text in ETHICS))
    st.header("References", anchor="references")
    st.markdown("\n".join(f"- [{text}]({address})" for text, address in REFERENCES))
    with st.expander("Authors and licences of the pictures on this page"):
        st.html(markup.credits((t, c) for t, c in zip(shown.titles, shown.credits, strict=True) if c is not None))


@dataclass(frozen=True)
class Step:
    """One of the six: what draws its picture, its equations as TeX, and what they do in words (Markdown)."""

    title: str
    draw: Callable[[Example], None]
    equations: tuple[str, ...]
    words: str


STEPS = (
    Step(
        "A client’s gradient",
        _draw_gradient,
        (
            r"\Delta W = \frac{1}{K} \sum_{k=1}^{K} \nabla_W\, \mathcal{L}(x^*_k, y^*_k)",
            r"\begin{aligned} \hat{x}^* = \underset{\hat{x}}{\arg\min}\;"
            r" & \mathcal{L}_{\text{grad}}(\hat{x}; W, \Delta W)"
            r" \\ & + \mathcal{R}_{\text{fidelity}}(\hat{x}) + \mathcal{R}_{\text{group}}(\hat{x})"
            r"\quad \text{(1, 2)} \end{aligned}",
        ),
        "The client runs its K pictures x\\* through the network with the weights W that the server sent, compares the "
        "outputs with the labels y\\*, and asks of every weight which way it should move. It shares the mean over the "
        "batch, ΔW, and keeps the pictures. ΔW has as many numbers as the network has weights, and the chart shows how "
        "large each layer’s part is. That is far more than the pictures have pixels: **this is the leak**.\n\n"
        "The attack looks for pictures x̂ that explain ΔW. The steps below show what it reads directly, and "
        "what it searches for.",
    ),
    Step(
        "The labels, from the last layer",
        _draw_labels,
        (
            r"\hat{y} = \operatorname{arg\,sort}\left(\min_m\, \nabla_{W^{(FC)}_{m,n}} \mathcal{L}\right)[:K]"
            r"\quad \text{(8)}",
        ),
        "The last layer has one row of weights a class n. A picture of that class pulls its row up, so the row’s "
        "gradient is negative; of a class that is not in the batch it is slightly positive, because the features m "
        "follow a ReLU and are never negative. So the K rows with the most negative entry name the classes, before any "
        "picture is rebuilt.\n\n"
        "Repeated classes need a count rather than a minimum: [Labels](labels) shows the methods that count.",
    ),
    Step(
        "Gradient matching",
        _draw_matching,
        (
            r"\mathcal{L}_{\text{grad}} = \alpha_G \sum_l \left\| \nabla_{W^{(l)}} \mathcal{L}(\hat{x}, \hat{y})"
            r" - \Delta W^{(l)} \right\|_2 \quad \text{(3)}",
        ),
        "The attacker does with its own pictures x̂ what the client did, and compares the two gradients layer by layer. "
        "The distance is zero at the client’s pictures. All of it can be differentiated, so its slope says how each "
        "pixel should change; Adam follows that slope, from noise, for hundreds or thousands of steps.\n\n"
        "The straight way in this picture was laid **with the originals at hand**, to show where the distance leads: "
        "far from them it may even rise. The attack never has them, it has the slope only.\n\n"
        "The presets Paper and Matching do this. The preset Demo searches less: it first solves the layers, as step 6 "
        "says, and the pixels only have to explain the lowest solved one. [Replay](replay) shows the way that an "
        "attack really takes.",
    ),
    Step(
        "What natural pictures look like",
        _draw_fidelity,
        (
            r"\mathcal{R}_{\text{fidelity}} = \alpha_{tv} \mathcal{R}_{TV} + \alpha_{\ell_2} \mathcal{R}_{\ell_2}"
            r" + \alpha_{BN} \mathcal{R}_{BN} \quad \text{(9)}",
            r"\begin{aligned} \mathcal{R}_{BN} = & \sum_l \left\| \mu_l(\hat{x}) - BN_l(\text{mean}) \right\|_2 \\"
            r" + & \sum_l \left\| \sigma^2_l(\hat{x}) - BN_l(\text{var}) \right\|_2 \quad \text{(10)} \end{aligned}",
        ),
        "Many pictures have nearly the same gradient, and most of them look like noise. Three priors say which are "
        "natural: the **total variation** is small where neighbouring pixels agree, the **ℓ2 norm** keeps values in "
        "bounds, and the **BN statistics** of every layer should be those that the network saw in training. All three "
        "are public knowledge. The numbers show how two of them judge a whole batch: TV and BN, small is natural.",
    ),
    Step(
        "Several seeds, one consensus",
        _draw_group,
        (
            r"\mathcal{R}_{\text{group}} = \alpha_{\text{group}} \left\| \hat{x} - \mathbb{E}(\hat{x}_{g \in G})"
            r" \right\|_2 \quad \text{(11)}",
            r"\mathbb{E}(\hat{x}_{g \in G}) = \frac{1}{|G|} \sum_g F_{\to \bar{x}}(\hat{x}_g) \quad \text{(12)}",
        ),
        "Several seeds start from different noise. Each finds the object, but not at the same place: a convolution "
        "hardly minds where it is. Their mean keeps what they agree on, and pulls each one towards it. If they are "
        "first **registered**, moved by F onto their mean x̄ until they lie over one another, it stays sharp. Where the "
        "layers are solved, the objects lie at their place. There the seeds **meet**, late in the run: each goes on "
        "from their mean, with a little noise of its own.\n\n"
        "In this picture the seeds are stand-ins, the first original moved by a few pixels and with noise, so that the "
        "effect is plain. A recorded run on [Replay](replay) has real ones.",
    ),
    Step(
        "Each picture’s features, and a learned prior",
        _draw_features,
        (
            r"\nabla W^{(FC)} = \frac{1}{K} A^\top F",
            r"\begin{aligned} A_{k,c} & = p_k[c] - \mathbb{1}[c = y_k] \\ p & = \operatorname{softmax}(F W^\top + b)"
            r" \end{aligned}",
        ),
        "**Ours, not the paper’s.** The last layer’s gradient is a product of two unknown matrices: the pictures’ "
        "features F and their output errors A. But A follows from F, so with the labels known the equation can be "
        "solved without a single step of optimisation. It undoes the batch’s average, picture by picture. The features "
        "then guide the pixels, and find the pictures among thousands of candidates: "
        "[Who was in the batch?](batch)\n\n"
        "**The layers below** are solved in the same way. The gradient of each layer’s weights is a set of equations "
        "for what the layer saw in each picture. As long as there are as many equations as unknowns, that is known "
        "exactly, down to where the pixels are searched for: [Layer by layer](layers).\n\n"
        "The **learned prior** goes further: a small network that learned from public pictures paints a first guess, "
        "here from the features alone; from a solved layer it paints nearly the picture. What it paints is partly "
        "what it has learned, not what the client has, so it is marked wherever it is used and can be switched off.",
    ),
)
