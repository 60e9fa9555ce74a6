"""What a visitor can do with runs: begin one, find back to it, start it once more."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from gradinv.defenses import parse
from gradinv.jobs import manager
from gradinv.prior import PAINTERS
from gradinv.web.parts import lessons, shared
from gradinv.web.parts.inversion import Inversion
from gradinv.web.run.facts import Run

FOLLOWING = "following"  # in the session: by a run's id the work that begins as soon as it has ended


def begin(work: Inversion) -> None:
    """Start a run and go to it. Raises GradinvError where it is not accepted."""
    st.session_state.pop("revealed", None)
    st.query_params["job"] = manager().submit(work, shared.owner())
    st.rerun()


def way_back() -> bool:
    """Where a run of this visitor has not ended, say so and offer the way to it; → whether that is so."""
    job = manager().unfinished(shared.owner())
    if job is not None:
        st.markdown(":material/hourglass: Your last run has not ended yet; there is one for each visitor at a time.")
        st.button(
            "Back to it", type="primary", icon=":material/arrow_forward:", key="back", on_click=go_to, args=(job,)
        )
    return job is not None


def go_to(job: str) -> None:
    """Show a run."""
    st.query_params["job"] = job


def again(run: Run) -> None:
    """The same batch, behind a defence or without one."""
    state, work, client = run.state, run.work, run.work.originals
    if client is None or not run.own:
        return
    with st.popover("The same batch, with a defence", icon=":material/shield:", width="stretch"):
        st.caption(
            "The client changes its gradient before it shares it, and the attack starts anew."
            + ("" if state.finished else " The present run is stopped for it.")
        )
        texts = lessons.other_defences(client.defences)
        notes = [parse(text).note for text in texts] or ["No defence is on."]
        st.markdown("\n".join(f"- {note}" for note in notes))
        st.button(
            "Start this run",
            key="again",
            type="primary",
            icon=":material/play_arrow:",
            disabled=texts == client.defences,
            on_click=_follow,
            args=(state.id, replace(work, client=replace(client, defences=texts), before=None)),
        )


def with_prior(run: Run) -> None:
    """The same batch once more, with a learned prior, where there is one for it and it was left out."""
    config = run.work.config
    if run.own and config.needs_layers and config.start == "random" and run.facts.model in PAINTERS:
        st.button(
            "The same, with a learned prior",
            key="with-prior",
            icon=":material/brush:",
            width="stretch",
            help="A network that learned from public pictures paints a first guess of what was solved, and the search "
            "goes on from there. It adds what the gradient leaves open, so what it paints is no evidence.",
            on_click=_follow,
            args=(run.state.id, replace(run.work, config=replace(config, start="decoder"), before=None)),
        )


def _follow(job: str, work: Inversion) -> None:
    """Let the work begin once the job has ended, which it is told to."""
    st.session_state.setdefault(FOLLOWING, {})[job] = work
    manager().cancel(job)
