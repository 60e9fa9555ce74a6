"""A run that has ended: its pictures step by step, its numbers and curves, and what of it can be taken along."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from gradinv import animation, figures, metrics
from gradinv.jobs import JobState, manager
from gradinv.recording.replay import Recording
from gradinv.recording.stores import MemoryStore
from gradinv.sources import Credit
from gradinv.web.parts import markup, presenting, shared, solved, summary
from gradinv.web.parts.elements import guarded, html
from gradinv.web.parts.inversion import Inversion, Layer, Progress, Solving
from gradinv.web.parts.solved import MISFIT
from gradinv.web.run import board
from gradinv.web.run.control import again, begin, go_to, own, with_prior
from gradinv.web.run.facts import ENDINGS, Facts, column_of, lowest, progress_of, quality, size_of, work_of

NAMED = 4  # pictures in a download's name
CONTENTS = """\
images/     lossless: the originals, each seed's pictures, their consensus; those of one number belong together
frames/     what was found by step: a row for each seed, then the consensus; in the order of labels.restored
curves.csv  the terms of the loss and the PSNR, a line for each step and seed
run.json    the settings, what was solved of each layer, the labels, and the final numbers in the order of images/
"""


def view(state: JobState) -> None:
    """Everything of a run that has ended, below its head."""
    work, facts = work_of(state)
    progress = progress_of(state)
    if state.reason:
        (st.error if state.status == "failed" else st.warning)(state.reason)
    if progress is None:
        if not state.reason:
            began = state.update is not None
            st.info(f"This run was {'stopped before its first picture' if began else 'cancelled before it began'}.")
        return
    recorded = _recording(state.id, progress)
    _go_on(state, progress)
    if presenting.on():
        _replay(state, board.hide(work))
        return

    def made() -> bool:
        hidden = board.hide(work)
        _replay(state, hidden)
        return hidden

    hidden = board.laid_out(size_of(work), made, lambda: _outcome(state, progress, recorded))
    st.header("Curves" if work.originals is None else "Numbers", anchor=False)
    _table(work, facts, recorded, progress.pictures.restored, hidden)
    left, right = st.columns(2, gap="large")
    curves = recorded.curves
    with left:
        if work.originals is None:
            column = column_of(work, progress.solving)
            name, alt = MISFIT[column]
            st.markdown(f"**{name} by step**")
            st.plotly_chart(figures.distance_curves(curves, column), key="distance", alt=alt)
        else:
            st.markdown("**PSNR by step**", help=board.met(progress))
            st.plotly_chart(
                figures.psnr_curves(curves, facts.mean_baseline, progress.meetings),
                key="psnr",
                alt=board.PSNR_ALT[work.config.seeds > 1],
            )
    with right:
        st.markdown("**Terms of the loss by step**", help=board.TERMS_OF_LOSS)
        st.plotly_chart(figures.loss_curves(curves), key="loss", alt="Each weighted term of the loss by step")
    credits = _credits(work, facts)
    if credits and not hidden:
        st.html(f"<p>Pictures:</p>{markup.credits(credits)}")


def _go_on(state: JobState, progress: Progress) -> None:
    """Of a run that was stopped, the way on."""
    if progress.kept is None or presenting.on() or not own(state):
        return
    work, _ = work_of(state)
    left = progress.steps - progress.step
    if st.button(f"Go on: {left:,} more iterations", key="go-on", type="primary", icon=":material/play_arrow:"):
        if (job := manager().unfinished(shared.owner())) is not None:
            go_to(job)
            st.rerun()
        begin(replace(work, before=progress.kept))


def _credits(work: Inversion, facts: Facts) -> list[tuple[str, Credit]]:
    """The originals' classes, as the page calls them, and whose pictures they are."""
    labels = () if work.originals is None else work.originals.labels
    pairs = zip(labels, facts.credits, strict=True)
    return [(facts.classes[label], credit) for label, credit in pairs if credit is not None]


def _recording(job: str, progress: Progress) -> Recording:
    """The finished run, opened once a session."""
    kept = st.session_state.get("recording")
    if kept is None or kept[0] != job:
        st.session_state.recording = kept = (job, Recording.open(progress.store))
    opened: Recording = kept[1]
    return opened


def _outcome(state: JobState, progress: Progress, recorded: Recording) -> None:
    speed = recorded.run["seconds_per_iteration"]
    st.markdown(f"**{ENDINGS[state.status]}** after {progress.step:,} of {progress.steps:,} iterations")
    numbers = [
        ("one iteration", "–" if speed is None else f"{speed:.2f} s"),
        ("in all", markup.duration(progress.total)),
        *quality(state, progress),
    ]
    board.numbers(numbers)
    again(state)
    with_prior(state)
    store, name = progress.store, _file_name(work_of(state)[1], recorded, progress)
    with st.container(horizontal=len(progress.pictures.psnr) > board.BESIDE):
        st.download_button(
            "Everything: pictures, curves, settings (zip)",
            lambda: _archive(store, work_of(state)[1]),
            f"{name}.zip",
            "application/zip",
            icon=":material/folder_zip:",
            width="stretch",
            type="primary",
            on_click="ignore",
        )
        st.download_button(
            "Numbers and settings (JSON)",
            lambda: store.read("run.json"),
            f"{name}.json",
            "application/json",
            icon=":material/data_object:",
            width="stretch",
            on_click="ignore",
        )
        st.download_button(
            "Summary to print (HTML)",
            lambda: _summary(state, progress, recorded, numbers),
            f"{name}.html",
            "text/html",
            icon=":material/print:",
            width="stretch",
            on_click="ignore",
        )
        st.download_button(
            "Animation (GIF)",
            lambda: animation.gif(recorded),
            f"{name}.gif",
            "image/gif",
            icon=":material/animation:",
            width="stretch",
            on_click="ignore",
        )


def _file_name(facts: Facts, recorded: Recording, progress: Progress) -> str:
    """What downloads are called, but for their kind: the network, the batch by its first pictures, the step."""
    names = ["-".join(re.findall(r"\w+", title)) for title in facts.titles[:NAMED]]
    if (more := recorded.run["client"]["batch_size"] - len(names)) > 0:
        names.append(f"and-{more}-more" if names else markup.count(more, "picture").replace(" ", "-"))
    return "-".join(["gradinv", facts.model, f"{facts.size}px", *names, f"step-{progress.step}"])


def _summary(state: JobState, progress: Progress, recorded: Recording, numbers: Sequence[tuple[str, str]]) -> bytes:
    work, facts = work_of(state)
    measured, restored = recorded.run["metrics"], progress.pictures.restored
    title = f"gradinv: {markup.count(size_of(work), 'picture')} rebuilt from one gradient"
    done = (ENDINGS[state.status].lower(), f"{progress.step:,} of {progress.steps:,} iterations")
    return summary.document(
        title,
        [done, ("pictures", f"{facts.size} × {facts.size} pixels"), *numbers],
        solved.words(progress.solving) if work.config.needs_layers else "",
        board.rows_of(work, facts, progress.pictures, False),
        _numbers(work, facts, measured, restored, False) if measured is not None else "",
        recorded.run,
        _credits(work, facts),
    )


def _archive(store: MemoryStore, facts: Facts) -> bytes:
    """The recording as a zip, with what is in it and the credits that the originals' licences ask for."""
    lines = [
        f"original_{place:02d}.png: {title}, {credit.author}, {credit.licence}, {credit.changes} "
        f"{credit.licence_url or ''} {credit.source or ''}"
        for place, (title, credit) in enumerate(zip(facts.titles, facts.credits, strict=True))
        if credit is not None
    ]
    files = {name: store.read(name) for name in store.names()}
    files["README.txt"] = CONTENTS.encode()
    if lines:
        files["images/CREDITS.txt"] = "\n".join([*lines, ""]).encode()
    return MemoryStore(files).zip()


@st.fragment
@guarded()
def _replay(state: JobState, hidden: bool) -> None:
    _scrub(state, hidden)


def _scrub(state: JobState, hidden: bool) -> None:
    work, _ = work_of(state)
    last: Progress = state.update
    recorded = _recording(state.id, last)
    step = last.step
    with st.container(key="timeline"):
        if len(recorded.steps) > 1:
            step = st.select_slider("Replay: step", recorded.steps, recorded.steps[-1], key=f"replay-{state.id}")
    layer = None
    if not presenting.on():
        board.ladder(work, last.solving)
        layer = _chosen_layer(state, last.solving)
    shown = last.pictures
    if step != last.step:
        shown = replace(work.pictures(recorded.snapshot(step)), prior=last.pictures.prior)
    board.draw(state, shown, hidden, layer)


def _chosen_layer(state: JobState, solving: Solving) -> Layer | None:
    """A solved layer to look at, from the output down; at first the lowest."""
    layers = {layer.name: layer for layer in solving.layers if layer.tiles}
    last = lowest(solving)
    if last is None or len(layers) < 2:
        return last
    name = st.select_slider("Look at a layer", list(layers), last.name, key=f"layer-{state.id}")
    return layers[name]


def _table(work: Inversion, facts: Facts, recorded: Recording, restored: Sequence[int], hidden: bool) -> None:
    numbers = recorded.run["metrics"]
    if numbers is not None:
        html(_numbers(work, facts, numbers, restored, hidden))
        st.caption(
            "PSNR rewards blur, so the best constant colour stands beside it: a reconstruction below it can still be "
            "recognised, and SSIM or the eye judges better."
        )


def _numbers(work: Inversion, facts: Facts, measured: Any, restored: Sequence[int], hidden: bool) -> str:
    """The final table as HTML; `measured` is what run.json has under metrics of a run with originals."""
    labels = work.originals.labels if work.originals is not None else ()
    several = work.config.seeds > 1
    columns, digits = metrics.columns(measured), [1, 1, 1, 3, 3, 3]
    if not several:  # the mean of the seeds is the consensus
        columns, digits = [columns[place] for place in (1, 2, 4, 5)], [1, 1, 3, 3]
    names = [
        (f"picture {place + 1}", "hidden") if hidden else (facts.classes[true], facts.classes[found])
        for place, (true, found) in enumerate(zip(labels, restored, strict=True))
    ]
    rows = [
        [*own, *(_number(column[place], digit) for column, digit in zip(columns, digits, strict=True))]
        for place, own in enumerate(names)
    ]
    right = sum(a == b for a, b in zip(labels, restored, strict=True))
    mean = ["Mean", f"{right} of {len(rows)} right"]
    mean += [_number(metrics.mean(c), d) for c, d in zip(columns, digits, strict=True)]
    return markup.results(rows, mean, ("seeds, on average", "consensus") if several else ("rebuilt",))


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
