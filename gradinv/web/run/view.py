"""A run: waiting, live, and finished. The address names it, so that a refresh or another tab sees the same."""

from __future__ import annotations

from typing import Any

import streamlit as st

from gradinv import figures
from gradinv.defenses import parse
from gradinv.jobs import JobState, manager
from gradinv.web.parts import lessons, markup, pick, presenting, settings, showcase
from gradinv.web.parts.elements import guarded, html, lead
from gradinv.web.parts.inversion import Inversion, Progress, Shared, Solving
from gradinv.web.parts.solved import MISFIT
from gradinv.web.run import board, ended
from gradinv.web.run.control import FOLLOWING, again, begin, own
from gradinv.web.run.facts import column_of, lowest, progress_of, quality, size_of, solving_of, work_of

TICK = 0.75  # seconds; with the worker's interval of the same length a change shows within two
CHART = 225  # pixels that a live chart is high


def view(job: str) -> None:
    """The page of one job."""
    state = manager().state(job)
    if state is None:
        st.info("This run is not kept here any more: the server keeps the latest ones only, and none over a restart.")
        st.button("Start a new run", type="primary", on_click=_leave, args=(None,))
        return
    if state.finished and (following := st.session_state.get(FOLLOWING, {}).pop(job, None)) is not None:
        begin(following)
    _head(state)
    if state.finished:
        ended.view(state)
    else:
        _live(job)


def _leave(state: JobState | None) -> None:
    """Back to the choice, with this run's pictures and settings."""
    for name in ("revealed", "recording"):
        st.session_state.pop(name, None)
    restored: dict[str, str] = {}
    if state is not None:
        work, facts = work_of(state)
        if not pick.begun() and work.originals is not None:
            pick.choose(facts.chosen)
        restored = settings.restore(facts.model, facts.size, facts.preset, work.config)
        if work.originals is not None:
            chosen = dict(text.split(":", 1) for text in work.originals.defences)
            restored |= chosen
            st.session_state.update({name: chosen.get(name, lessons.OFF) for name in lessons.STRENGTHS})
    kept = {
        name: value
        for name, value in st.query_params.to_dict().items()
        if name not in ("job", "present", "hide", *lessons.STRENGTHS)
    }
    # At once: each change of the address is a step for the browser's Back, which is to lead to the run.
    st.query_params.from_dict({**kept, **restored})


def _head(state: JobState) -> None:
    work, facts = work_of(state)
    config = work.config
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
        own = work.originals
        origin = " The gradient was brought here; nobody here has its pictures." if own is None else ""
        if own is not None and own.defences:
            origin = f" The client’s defence: {' '.join(parse(text).note for text in own.defences)}"
        lead(
            "From the gradient back to the pictures",
            f"{facts.model}, {markup.count(size_of(work), 'picture')} of {facts.size} px, {what}.{origin}",
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
            st.button("New run", icon=":material/arrow_back:", key="new-run", on_click=_leave, args=(state,))


@st.fragment(run_every=TICK)
@guarded()
def _live(job: str) -> None:
    _tick(job)


def _tick(job: str) -> None:
    state = manager().state(job)
    if state is None or state.finished:
        st.rerun()
    progress = progress_of(state)
    work, _ = work_of(state)
    if state.status == "queued" and isinstance(work.client, Shared):
        work.client.find()  # somebody still waits for it
    if presenting.on():
        hidden = board.hide(work)
        _timeline(state, progress)
        board.draw(state, progress.pictures if progress is not None else None, hidden)
        return

    def made() -> None:
        hidden = board.hide(work)
        with st.container(key="timeline"):
            _timeline(state, progress)
        board.ladder(work, solving_of(state))
        board.draw(state, progress.pictures if progress is not None else None, hidden, lowest(solving_of(state)))

    def side() -> None:
        _status(state, progress)
        if state.status == "queued":
            showcase.link("Watch a recorded run meanwhile", showcase.FIRST)
        _live_charts(state, progress)

    board.laid_out(size_of(work), made, side)


def _timeline(state: JobState, progress: Progress | None) -> None:
    """How far it is: in the queue, or in the two acts, the layers and the pixels."""
    work, _ = work_of(state)
    solving = solving_of(state)
    if state.status == "queued":
        when = "starts by itself" if state.wait is None else f"starts in {markup.about(state.wait)}"
        shown = markup.progress(0, f"Place {state.place} in the queue", when)
    else:
        if progress is None:
            pixels = markup.progress(0, "Pixels" if solving is not None else "Preparing the run", "")
        else:
            left = "" if progress.remaining is None else f"{markup.about(progress.remaining)} left"
            pixels = markup.progress(
                progress.step / progress.steps, f"Pixels: step {progress.step:,} of {progress.steps:,}", left
            )
        shown = markup.acts([*_solved_so_far(work, solving), pixels])
    html(shown)


def _solved_so_far(work: Inversion, solving: Solving | None) -> list[str]:
    """The first act, where there is one."""
    if not work.config.needs_layers:
        return []
    if solving is None or not solving.nodes:
        return [markup.progress(0, "Layers", "")]
    count, of = len(solving.layers), len(solving.nodes)
    over = solving.boundary is not None
    when = markup.duration(solving.seconds) if over else ""
    return [markup.progress(count / of, f"Layers: {count} of {of} solved", when)]


def _status(state: JobState, progress: Progress | None) -> None:
    if own(state):
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
    again(state)
    speed = progress.speed if progress is not None else None
    board.numbers(
        [
            ("one iteration", "–" if speed is None else f"{speed:.2f} s"),
            ("so far", markup.duration(_seconds(progress, solving_of(state)))),
            *quality(state, progress),
        ]
    )


def _seconds(progress: Progress | None, solving: Solving | None) -> float | None:
    """What it has taken so far."""
    if progress is not None:
        return progress.total
    return solving.seconds if solving is not None else None


def _live_charts(state: JobState, progress: Progress | None) -> None:
    work, facts = work_of(state)
    curves, meetings = (progress.curves, progress.meetings) if progress is not None else ((), ())
    # Another preset may have taken over, with other iterations.
    steps = progress.steps if progress is not None else work.config.iterations
    charts = st.columns(2) if size_of(work) > board.BESIDE else (st.container(), st.container())
    with charts[0]:
        if work.originals is None:
            column = column_of(work, solving_of(state))
            name, alt = MISFIT[column]
            st.markdown(f"**{name}**")
            _chart(progress, "live-distance", figures.live_distance(curves, steps, column), alt)
        else:
            st.markdown("**PSNR in dB**", help=board.met(progress))
            options = figures.live_psnr(curves, steps, facts.mean_baseline, meetings)
            _chart(progress, "live-psnr", options, board.PSNR_ALT[work.config.seeds > 1])
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
