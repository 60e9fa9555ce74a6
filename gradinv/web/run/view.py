"""A run: waiting, live, and finished. The address names it, so that a refresh or another tab sees the same."""

from __future__ import annotations

from typing import Any

import streamlit as st

from gradinv import figures
from gradinv.defenses import parse
from gradinv.jobs import manager
from gradinv.types import GradinvError
from gradinv.web.parts import lessons, markup, pick, presenting, settings, showcase
from gradinv.web.parts.elements import guarded, html, lead
from gradinv.web.parts.inversion import Progress, Shared
from gradinv.web.parts.solved import MISFIT
from gradinv.web.run import board, ended
from gradinv.web.run.control import FOLLOWING, again, begin
from gradinv.web.run.facts import Run

TICK = 0.75  # seconds; with the worker's interval of the same length a change shows within two
CHART = 225  # pixels that a live chart is high


def view(job: str) -> None:
    """The page of one job."""
    state = manager().state(job)
    if state is None:
        st.info("This run is not kept here any more: the server keeps the latest ones only, and none over a restart.")
        st.button("Start a new run", type="primary", on_click=_leave)
        return
    if state.finished and (following := st.session_state.get(FOLLOWING, {}).pop(job, None)) is not None:
        try:
            begin(following)
        except GradinvError as error:  # as of a full queue; what has finished is shown below
            st.error(str(error))
    run = Run.of(state)
    _head(run)
    if state.finished:
        ended.view(run)
    else:
        _live(job)


def _leave(run: Run | None = None) -> None:
    """Back to the choice, with this run's pictures and settings."""
    for name in ("revealed", "recording"):
        st.session_state.pop(name, None)
    restored: dict[str, str] = {}
    if run is not None:
        facts, client = run.facts, run.work.originals
        if not pick.begun() and client is not None:
            pick.choose(facts.chosen)
        restored = settings.restore(facts.model, facts.size, facts.preset, run.work.config)
        if client is not None:
            chosen = dict(text.split(":", 1) for text in client.defences)
            restored |= chosen
            st.session_state.update({name: chosen.get(name, lessons.OFF) for name in lessons.STRENGTHS})
    gone = ("job", "present", "hide", *lessons.STRENGTHS)
    kept = {name: value for name, value in st.query_params.to_dict().items() if name not in gone}
    # At once: each change of the address is a step for the browser's Back, which is to lead to the run.
    st.query_params.from_dict({**kept, **restored})


def _head(run: Run) -> None:
    state, facts, config, client = run.state, run.facts, run.work.config, run.work.originals
    with st.container(key="scripts"):
        presenting.scripts()
        # The button that began the run is far down on the page before.
        st.html(markup.TO_TOP.format(state.id), unsafe_allow_javascript=True)
        following = {"done": "new-run", "stopped": "go-on"}.get(state.status, "stop")
        st.html(markup.FOCUS.format(f"{state.id} {state.status}", following), unsafe_allow_javascript=True)
    if presenting.on():
        presenting.way_out()
        return
    with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute", key="run-head"):
        what = markup.count(config.seeds, "seed")
        if config.start == "decoder":
            what += ", started from the guess of a learned prior"
        origin = ""
        if client is None:
            origin = " The gradient was brought here; nobody here has its pictures."
        elif client.defences:
            origin = f" The client’s defence: {' '.join(parse(text).note for text in client.defences)}"
        lead(
            "From the gradient back to the pictures",
            f"{facts.model}, {markup.count(run.count, 'picture')} of {facts.size} px, {what}.{origin}",
        )
        with st.container(horizontal=True, width="content"):
            st.button(
                "Copy link",
                icon=":material/link:",
                key="copy-link",
                help="The page’s address is the link to this run, for as long as the server keeps it. Whoever has it "
                "can watch the run, and see its pictures; only you can stop it.",
            )
            presenting.way_in()
            st.button("New run", icon=":material/arrow_back:", key="new-run", on_click=_leave, args=(run,))


@st.fragment(run_every=TICK)
@guarded()
def _live(job: str) -> None:
    state = manager().state(job)
    if state is None or state.finished:
        st.rerun()
    run = Run.of(state)
    queued = state.status == "queued"
    if queued and isinstance(run.work.client, Shared):
        run.work.client.find()  # somebody still waits for it
    pictures = run.progress.pictures if run.progress is not None else None
    if presenting.on():
        hidden = board.hide(run)
        _timeline(run)
        board.draw(run, pictures, hidden)
        return

    def made() -> None:
        hidden = board.hide(run)
        with st.container(key="timeline"):
            _timeline(run)
        board.ladder(run)
        board.draw(run, pictures, hidden, run.lowest)

    def side() -> None:
        _status(run)
        if queued:
            showcase.link("Watch a recorded run meanwhile", showcase.FIRST)
        _live_charts(run)

    board.laid_out(run, made, side)


def _timeline(run: Run) -> None:
    """How far it is: in the queue, or in the two acts, the layers and the pixels."""
    state, progress, solving = run.state, run.progress, run.solving
    if state.status == "queued":
        when = "starts by itself" if state.wait is None else f"starts in {markup.about(state.wait)}"
        html(markup.progress(0, f"Place {state.place} in the queue", when))
        return
    acts = []
    if run.work.config.needs_layers:
        if solving is None or not solving.nodes:
            acts.append(markup.progress(0, "Layers", ""))
        else:
            count, of = len(solving.layers), len(solving.nodes)
            when = "" if solving.boundary is None else markup.duration(solving.seconds)
            acts.append(markup.progress(count / of, f"Layers: {count} of {of} solved", when))
    if progress is None:
        acts.append(markup.progress(0, "Pixels" if solving is not None else "Preparing the run", ""))
    else:
        left = "" if progress.remaining is None else f"{markup.about(progress.remaining)} left"
        step, steps = progress.step, progress.steps
        acts.append(markup.progress(step / steps, f"Pixels: step {step:,} of {steps:,}", left))
    html(markup.acts(acts))


def _status(run: Run) -> None:
    state, progress, solving = run.state, run.progress, run.solving
    if run.own:
        label = "Leave the queue" if state.status == "queued" else "Stop and keep the result"
        st.button(
            "Stopping…" if state.stopping else label,
            icon=":material/stop:",
            key="stop",
            width="stretch",
            disabled=state.stopping,
            on_click=manager().cancel,
            args=(state.id,),
        )
    else:
        st.caption("You watch a run that somebody else has started.")
    again(run)
    speed = progress.speed if progress is not None else None
    seconds = progress.total if progress is not None else solving.seconds if solving is not None else None
    told = [
        ("one iteration", "–" if speed is None else f"{speed:.2f} s"),
        ("so far", markup.duration(seconds)),
        *run.quality,
    ]
    board.numbers(told)


def _live_charts(run: Run) -> None:
    progress, config = run.progress, run.work.config
    curves, meetings = (progress.curves, progress.meetings) if progress is not None else ((), ())
    # Another preset may have taken over, with other iterations.
    steps = progress.steps if progress is not None else config.iterations
    charts = st.columns(2) if run.count > board.BESIDE else (st.container(), st.container())
    with charts[0]:
        if run.work.originals is None:
            name, alt = MISFIT[run.misfit]
            st.markdown(f"**{name}**")
            _chart(progress, "live-distance", figures.live_distance(curves, steps, run.misfit), alt)
        else:
            st.markdown("**PSNR in dB**", help=board.met(run))
            options = figures.live_psnr(curves, steps, run.facts.mean_baseline, meetings)
            _chart(progress, "live-psnr", options, board.PSNR_ALT[config.seeds > 1])
    with charts[1]:
        st.markdown("**Terms of the loss**", help=board.TERMS_OF_LOSS)
        _chart(progress, "live-loss", figures.live_losses(curves, steps), "Terms of the loss by step")


def _chart(progress: Progress | None, key: str, options: dict[str, Any], alt: str) -> None:
    """A chart, and its place as long as there is no picture: what draws it is fetched and started after that, since
    until then the layers need the processor."""
    if progress is None:
        st.html(f'<div style="height: {CHART}px"></div>')
    else:
        st.echarts_chart(options, key=key, height=CHART, alt=alt)
