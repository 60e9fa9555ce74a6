"""The guided tour: seven steps, one a page, in a banner above the page that the visitor is on.

The page says which step it is. So the tour goes along wherever the navigation or a link leads, no step ever speaks of
what is not on the screen, and it lasts until End. That it is on stands in the address, which a reload or another person
can follow; the session remembers it too, since the navigation empties the address.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import streamlit as st

from gradinv.web.parts import markup, presenting
from gradinv.web.parts.elements import html
from gradinv.web.parts.lessons import OFF

PARAMETER, ON = "tour", "touring"  # in the address, and in the session
CARRIED = ("job", "present")  # from step to step: the run that the visitor has begun, and the large type


@dataclass(frozen=True)
class Step:
    """A step on the page of that title: what to know, one thing to do there, and the address that sets the page up;
    of that `undone` says what the page's widgets have instead after the tour."""

    page: str
    title: str
    words: str
    task: str
    address: Mapping[str, str] = field(default_factory=dict)
    undone: Mapping[str, str] = field(default_factory=dict)


STEPS = (
    Step(
        "Live",
        "What leaks",
        "A client shares only the gradient that its pictures cause. The first strip below shows what a server "
        "that knows the network makes of that gradient, starting from noise; the second one shows the pictures, which "
        "it never sees.",
        "Watch the pictures appear. Whenever you like, start a run of your own with “Rebuild the pictures”; the tour "
        "keeps it for you.",
    ),
    Step(
        "Labels",
        "The last layer names the classes",
        "Before any picture is rebuilt, the gradient of the network’s last layer tells which classes are in the batch. "
        "A picture pushes only its own class’s row below zero.",
        "Move “Pictures of one class” to 3 and see in the table below which methods can still count.",
    ),
    Step(
        "Who was in the batch?",
        "Found without rebuilding anything",
        "The same layer also gives what the network saw in each picture. Whoever has a pile of pictures looks up which "
        "of them look like that to the network: no step of optimisation, no pixel.",
        "The large pictures are what the server takes for the batch. Switch on Reveal to see whether it is right.",
    ),
    Step(
        "Layer by layer",
        "What needs no guessing",
        "Below the last layer it goes on in the same way. The gradient of each layer is a set of equations for what "
        "the layer saw in each picture. While there are enough of them, the attacker knows it exactly.",
        "Move the batch size up and see where the two lines cross. Then look at the layers, from the output down.",
    ),
    Step(
        "Replay",
        "Pixels, from noise",
        "Below the last layer that can be solved, the attack starts from noise and changes pixels until they explain "
        "that layer. Several seeds start from different noise; their mean, the consensus, keeps what they agree on. "
        "Late in the run they meet there, and each goes on from it.",
        "Guess the four pictures before you reveal them, and show the seeds. Then choose “One picture or eight”: one "
        "gradient now has to serve eight.",
        {"run": "four"},
    ),
    Step(
        "Defences",
        "What helps, and what does not",
        "Clipping alone does not help: it is on, and the attacker still reads the same. Noise helps once it is strong "
        "enough, and then the server’s gradient is hardly the client’s any more.",
        "Move Gaussian noise to the right until no picture is found, and see below how large the error of the gradient "
        "is by then.",
        {"clip": "1"},
        {"clip": OFF},
    ),
    Step(
        "How it works",
        "What to take home",
        "Keeping pictures and sharing gradients is not privacy by itself. But larger batches, larger pictures and "
        "several local steps make the attack harder, and what comes back is no evidence: details can be invented.",
        "Go to [what makes it harder](#harder) and to [limits and ethics](#ethics). The steps above them explain the "
        "method.",
    ),
)


OWN = Step(
    "Live",
    "A run of your own",
    "This is the attack on the pictures that you chose. Each seed starts from other noise, and the consensus is the "
    "mean of what they come to.",
    "P presents the run with the originals hidden, and R reveals them. You can go on meanwhile: Back leads here again.",
)
"""In place of the first step, whose strips are not there, while the page shows a run."""


def entrance() -> None:
    """The way in, small; nothing while the tour is on."""
    if not on():
        st.button("A tour in seven steps", icon=":material/tour:", type="tertiary", key="tour-begin", on_click=_begin)


def on() -> bool:
    """Whether the tour is on."""
    return ON in st.session_state or PARAMETER in st.query_params


def banner(pages: Sequence[st.Page], page: st.Page) -> None:
    """Above a page, its step, while the tour is on. `pages` are those of the navigation."""
    number = next((number for number, step in enumerate(STEPS, 1) if step.page == page.title), None)
    if number is None or not on():
        return
    _begin()
    # Whatever number the address has: the page's own, so that the link leads to what is on the screen.
    if st.query_params.get(PARAMETER) != str(number):
        st.query_params[PARAMETER] = str(number)
    step, last = STEPS[number - 1], number == len(STEPS)
    if page.title == OWN.page and "job" in st.query_params:
        step = OWN
    with st.container(horizontal=True, vertical_alignment="center", key="tour-bar"):
        html(_place(number, step.title))
        if step is not OWN:  # whose page has a button for it
            st.button(
                "Leave the presentation" if presenting.on() else "Present",
                icon=":material/present_to_all:",
                type="tertiary",
                shortcut="P",
                key="present",
                on_click=presenting.switch,
                args=(not presenting.on(),),
            )
        if st.button("End", icon=":material/close:", type="tertiary", key="tour-end"):
            _end(page)
        if st.button("Back", icon=":material/arrow_back:", shortcut="B", key="tour-back", disabled=number == 1):
            _go(pages, number - 1)
        if st.button(
            "Try it yourself" if last else "Next",
            icon=":material/arrow_forward:",
            type="primary",
            shortcut="N",
            key="tour-next",
        ):
            _go(pages, number + 1)
    if not (presenting.on() and step is OWN):  # a run that is presented shows nothing but its pictures
        with st.container(key="tour-words"):
            st.markdown(f"**{step.title}.** {step.words}\n\n:material/visibility: {step.task}")
    with st.container(key="tour-scripts"):
        st.html(markup.TO_TOP.format(number), unsafe_allow_javascript=True)
        presenting.mark()


def _place(number: int, title: str) -> str:
    """HTML: how far the tour is; the title is for those who hear it."""
    dots = "".join(f'<i class="{"gi-been" if place <= number else ""}"></i>' for place in range(1, len(STEPS) + 1))
    return (
        f'<div class="gi-tour" role="status"><b>Tour</b> {number} of {len(STEPS)}<small>: {escape(title)}</small>'
        f'<span aria-hidden="true">{dots}</span></div>'
    )


def _go(pages: Sequence[st.Page], number: int) -> None:
    """To a step; beyond the last one to the first page, without the tour."""
    if number > len(STEPS):
        st.session_state.pop(ON, None)
        _undo({})
        st.switch_page(_page(pages, STEPS[0]))
    step = STEPS[number - 1]
    carried = {name: st.query_params[name] for name in CARRIED if name in st.query_params}
    st.switch_page(_page(pages, step), query_params={**step.address, **carried, PARAMETER: str(number)})


def _page(pages: Sequence[st.Page], step: Step) -> st.Page:
    return next(page for page in pages if page.title == step.page)


def _begin() -> None:
    st.session_state[ON] = True


def _undo(address: dict[str, str]) -> None:
    """Take out of an address, and of what its pages remember, what the steps had set up and nobody has changed."""
    for step in STEPS:
        for name, value in step.undone.items():
            given = step.address[name]
            if address.get(name, st.session_state.get(name, given)) == given:
                address.pop(name, None)
                st.session_state[name] = value


def _end(page: st.Page) -> None:
    """On the page where it ends, what was carried for others has no use, nor what the step itself had set up."""
    st.session_state.pop(ON, None)
    for name in (PARAMETER, *(CARRIED if page.title != OWN.page else ())):
        st.query_params.pop(name, None)
    address = st.query_params.to_dict()
    _undo(address)
    if len(address) == len(st.query_params):
        st.rerun()
    # A widget's own name cannot be taken out of the address, nor put there, but for by going to the page anew.
    st.switch_page(page, query_params={name: value for name, value in address.items() if name not in st.session_state})
