"""A run that has ended: its pictures step by step, its numbers and curves, and what of it can be taken along."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import streamlit as st

from gradinv import animation, figures, metrics
from gradinv.jobs import manager
from gradinv.recording.replay import Recording
from gradinv.recording.stores import MemoryStore
from gradinv.sources import Credit
from gradinv.web.parts import markup, presenting, shared, solved, summary
from gradinv.web.parts.elements import guarded, html
from gradinv.web.parts.inversion import Layer, Progress
from gradinv.web.parts.solved import MISFIT
from gradinv.web.run import board
from gradinv.web.run.control import again, begin, go_to, with_prior
from gradinv.web.run.facts import ENDINGS, Facts, Run

NAMED = 4  # pictures in a download's name
CONTENTS = """\
images/     lossless: the originals, each seed's pictures, their consensus; those of one number belong together
frames/     what was found by step: a row for each seed, then the consensus; in the order of labels.restored
curves.csv  the terms of the loss and the PSNR, a line for each step and seed
run.json    the settings, what was solved of each layer, the labels, and the final numbers in the order of images/
"""


def view(run: Run) -> None:
    """Everything of a run that has ended, below its head."""
    state, progress = run.state, run.progress
    if state.reason:
        (st.error if state.status == "failed" else st.warning)(state.reason)
    if progress is None:
        if not state.reason:
            began = state.update is not None
            st.info(f"This run was {'stopped before its first picture' if began else 'cancelled before it began'}.")
        return
    recorded = _recording(state.id, progress)
    _go_on(run, progress)
    if presenting.on():
        _replay(run, progress, board.hide(run))
        return

    def made() -> bool:
        hidden = board.hide(run)
        _replay(run, progress, hidden)
        return hidden

    hidden = board.laid_out(run, made, lambda: _outcome(run, progress, recorded))
    st.header("Curves" if run.work.originals is None else "Numbers", anchor=False)
    if table := _numbers(run, progress, recorded, hidden):
        html(table)
        st.caption(
            "PSNR rewards blur, so the best constant colour stands beside it: a reconstruction below it can still be "
            "recognised, and SSIM or the eye judges better."
        )
    left, right = st.columns(2, gap="large")
    curves = recorded.curves
    with left:
        if run.work.originals is None:
            name, alt = MISFIT[run.misfit]
            st.markdown(f"**{name} by step**")
            st.plotly_chart(figures.distance_curves(curves, run.misfit), key="distance", alt=alt)
        else:
            st.markdown("**PSNR by step**", help=board.met(run))
            figure = figures.psnr_curves(curves, run.facts.mean_baseline, progress.meetings)
            st.plotly_chart(figure, key="psnr", alt=board.PSNR_ALT[run.work.config.seeds > 1])
    with right:
        st.markdown("**Terms of the loss by step**", help=board.TERMS_OF_LOSS)
        st.plotly_chart(figures.loss_curves(curves), key="loss", alt="Each weighted term of the loss by step")
    if (credits := _credits(run)) and not hidden:
        st.html(f"<p>Pictures:</p>{markup.credits(credits)}")


def _go_on(run: Run, progress: Progress) -> None:
    """Of a run that was stopped, the way on."""
    if progress.kept is None or presenting.on() or not run.own:
        return
    left = progress.steps - progress.step
    if st.button(f"Go on: {left:,} more iterations", key="go-on", type="primary", icon=":material/play_arrow:"):
        if (job := manager().unfinished(shared.owner())) is not None:
            go_to(job)
            st.rerun()
        begin(replace(run.work, before=progress.kept))


def _credits(run: Run) -> list[tuple[str, Credit]]:
    """The originals' classes, as the page calls them, and whose pictures they are."""
    labels = () if run.work.originals is None else run.work.originals.labels
    pairs = zip(labels, run.facts.credits, strict=True)
    return [(run.facts.classes[label], credit) for label, credit in pairs if credit is not None]


def _recording(job: str, progress: Progress) -> Recording:
    """The finished run, opened once a session."""
    kept = st.session_state.get("recording")
    if kept is None or kept[0] != job:
        st.session_state.recording = kept = (job, Recording.open(progress.store))
    opened: Recording = kept[1]
    return opened


def _outcome(run: Run, progress: Progress, recorded: Recording) -> None:
    speed = recorded.run["seconds_per_iteration"]
    st.markdown(f"**{ENDINGS[run.state.status]}** after {progress.step:,} of {progress.steps:,} iterations")
    numbers = [
        ("one iteration", "–" if speed is None else f"{speed:.2f} s"),
        ("in all", markup.duration(progress.total)),
        *run.quality,
    ]
    board.numbers(numbers)
    again(run)
    with_prior(run)
    store, name = progress.store, _file_name(run.facts, recorded, progress)
    downloads: list[tuple[str, str, str, str, Callable[[], bytes]]] = [
        ("Everything: pictures, curves, settings (zip)", "folder_zip", "zip", "application/zip",
         lambda: _archive(store, run.facts)),
        ("Numbers and settings (JSON)", "data_object", "json", "application/json", lambda: store.read("run.json")),
        ("Summary to print (HTML)", "print", "html", "text/html", lambda: _summary(run, progress, recorded, numbers)),
        ("Animation (GIF)", "animation", "gif", "image/gif", lambda: animation.gif(recorded)),
    ]  # fmt: skip
    with st.container(horizontal=run.count > board.BESIDE):
        for label, icon, suffix, kind, made in downloads:
            st.download_button(
                label,
                made,
                f"{name}.{suffix}",
                kind,
                icon=f":material/{icon}:",
                width="stretch",
                type="primary" if suffix == "zip" else "secondary",
                on_click="ignore",
            )


def _file_name(facts: Facts, recorded: Recording, progress: Progress) -> str:
    """What downloads are called, but for their kind: the network, the batch by its first pictures, the step."""
    names = ["-".join(re.findall(r"\w+", title)) for title in facts.titles[:NAMED]]
    if (more := recorded.run["client"]["batch_size"] - len(names)) > 0:
        names.append(f"and-{more}-more" if names else markup.count(more, "picture").replace(" ", "-"))
    return "-".join(["gradinv", facts.model, f"{facts.size}px", *names, f"step-{progress.step}"])


def _summary(run: Run, progress: Progress, recorded: Recording, numbers: Sequence[tuple[str, str]]) -> bytes:
    title = f"gradinv: {markup.count(run.count, 'picture')} rebuilt from one gradient"
    done = (ENDINGS[run.state.status].lower(), f"{progress.step:,} of {progress.steps:,} iterations")
    return summary.document(
        title,
        [done, ("pictures", f"{run.facts.size} × {run.facts.size} pixels"), *numbers],
        solved.words(progress.solving) if run.work.config.needs_layers else "",
        board.rows_of(run, progress.pictures, False),
        _numbers(run, progress, recorded, False),
        recorded.run,
        _credits(run),
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
def _replay(run: Run, last: Progress, hidden: bool) -> None:
    recorded = _recording(run.state.id, last)
    step = last.step
    with st.container(key="timeline"):
        if len(recorded.steps) > 1:
            step = st.select_slider("Replay: step", recorded.steps, recorded.steps[-1], key=f"replay-{run.state.id}")
    layer = None
    if not presenting.on():
        board.ladder(run)
        layer = _chosen_layer(run, last)
    shown = last.pictures
    if step != last.step:
        shown = replace(run.work.pictures(recorded.snapshot(step)), prior=last.pictures.prior)
    board.draw(run, shown, hidden, layer)


def _chosen_layer(run: Run, last: Progress) -> Layer | None:
    """A solved layer to look at, from the output down; at first the lowest."""
    layers = {layer.name: layer for layer in last.solving.layers if layer.tiles}
    if run.lowest is None or len(layers) < 2:
        return run.lowest
    return layers[st.select_slider("Look at a layer", list(layers), run.lowest.name, key=f"layer-{run.state.id}")]


def _numbers(run: Run, progress: Progress, recorded: Recording, hidden: bool) -> str:
    """The final table as HTML; nothing where there is nothing to compare with."""
    measured, own = recorded.run["metrics"], run.work.originals
    if measured is None or own is None:
        return ""
    restored, classes = progress.pictures.restored, run.facts.classes
    several = run.work.config.seeds > 1
    columns, digits = metrics.columns(measured), [1, 1, 1, 3, 3, 3]
    if not several:  # the mean of the seeds is the consensus
        columns, digits = [columns[place] for place in (1, 2, 4, 5)], [1, 1, 3, 3]
    rows = [
        [f"picture {place}", "hidden"] if hidden else [classes[true], classes[found]]
        for place, (true, found) in enumerate(zip(own.labels, restored, strict=True), 1)
    ]
    right = sum(a == b for a, b in zip(own.labels, restored, strict=True))
    mean = ["Mean", f"{right} of {len(rows)} right"]
    for column, digit in zip(columns, digits, strict=True):
        for row, value in zip((*rows, mean), (*column, metrics.mean(column)), strict=True):
            row.append("–" if value is None else f"{value:.{digit}f}")
    return markup.results(rows, mean, ("seeds, on average", "consensus") if several else ("rebuilt",))
