"""A run: waiting, live, and finished. The address names it, so that a refresh or another tab sees the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import streamlit as st

from gradinv import animation, figures, metrics
from gradinv.defenses import parse
from gradinv.jobs import Inversion, JobState, Layer, Pictures, Progress, Shared, Solving, manager
from gradinv.recording import MemoryStore, Recording
from gradinv.sources import Credit
from gradinv.types import GradinvError
from gradinv.web import head, lessons, markup, pick, replay, settings, shared, solved, summary
from gradinv.web.guard import guarded
from gradinv.web.markup import Row, Tile
from gradinv.web.pick import Chosen
from gradinv.web.solved import MISFIT

T = TypeVar("T")

TICK = 0.75  # seconds; with the worker's interval of the same length a change shows within two
NAMED = 4  # pictures in a download's name
BESIDE = 5  # pictures beside which the charts still fit

# Keys that press what the page shows at that moment: its own, since Streamlit keeps R for itself.
# And what copies the address, which only the browser knows as it is.
KEYS = """<script>
if (!window.gradinvKeys) {
  window.gradinvKeys = true;
  document.addEventListener('keydown', event => {
    const leave = document.querySelector('.gi-presenting') && '.st-key-present button';
    const what = {
      r: '.st-key-reveal button, .st-key-hide input', p: '.st-key-present button', Escape: leave,
    }[event.key];
    if (!what || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest('input:not([type=checkbox]), textarea, select, [contenteditable]')) return;
    const found = document.querySelector(what);
    if (found) { event.preventDefault(); event.stopImmediatePropagation(); found.click(); }
  }, true);
  document.addEventListener('click', async event => {
    if (!event.target.closest('.st-key-copy-link button')) return;
    const address = location.href;
    try {
      await navigator.clipboard.writeText(address);
    } catch {  // no secure connection, or not allowed in a frame
      const field = document.createElement('textarea');
      field.value = address;
      document.body.append(field);
      field.select();
      document.execCommand('copy');
      field.remove();
    }
    const told = document.createElement('div');
    told.className = 'gi-told';
    told.setAttribute('role', 'status');
    told.textContent = 'The link is copied';
    document.body.append(told);
    setTimeout(() => told.remove(), 2500);
  }, true);
}
</script>"""

PAINTED = "a guess that a network learned from public pictures; below it what explains the gradient"
MEETING = "Where all lines fall at once, the seeds met: each goes on from the mean of all, with some noise."
PSNR_ALT = {
    True: "PSNR of each seed and of the consensus by step, beside that of the best constant colour",
    False: "PSNR by step, beside that of the best constant colour",
}
FOLLOWING = "following"  # in the session: by a run's id the work that begins as soon as it has ended
ENDINGS = {"done": "Finished", "stopped": "Stopped", "failed": "Failed"}


@dataclass(frozen=True)
class Facts:
    """What the page knows of a run. `size` is the pictures' side in pixels, `originals` are tiles, `baseline` the
    constant colours' PSNR in dB, `chosen` what the pictures were chosen as, but for uploads, which only their own
    session keeps. Of a gradient that a visitor brought nobody has the pictures: then these are empty."""

    model: str
    size: int
    preset: str
    chosen: tuple[Chosen, ...]
    classes: tuple[str, ...]
    originals: tuple[str, ...]
    titles: tuple[str, ...]
    credits: tuple[Credit | None, ...]
    baseline: Sequence[float | None]

    @property
    def mean_baseline(self) -> float | None:
        """The mean of the baseline where every image has one."""
        return metrics.mean(self.baseline)


def view(job: str) -> None:
    """The page of one job."""
    state = manager().state(job)
    if state is None:
        st.info("This run is not kept here any more: the server keeps the latest ones only, and none over a restart.")
        st.button("Start a new run", type="primary", on_click=_leave, args=(None,))
        return
    if state.finished and (following := st.session_state.get(FOLLOWING, {}).pop(job, None)) is not None:
        _begin(following)
    _head(state)
    if state.finished:
        _finished(state)
    else:
        _live(job)


def _begin(work: Inversion) -> None:
    """Start a run and go to it. Raises GradinvError where it is not accepted."""
    st.session_state.pop("revealed", None)
    st.query_params["job"] = manager().submit(work, shared.owner())
    st.rerun()


def _own(state: JobState) -> bool:
    """Whether this visitor started the run: others who have its link watch, and neither stop it nor start it again."""
    return state.owner == shared.owner()


def way_back() -> bool:
    """Where a run of this visitor has not ended, say so and offer the way to it; → whether that is so."""
    job = manager().unfinished(shared.owner())
    if job is not None:
        st.markdown(":material/hourglass: Your last run has not ended yet; there is one for each visitor at a time.")
        st.button(
            "Back to it", type="primary", icon=":material/arrow_forward:", key="back", on_click=_open, args=(job,)
        )
    return job is not None


def _open(job: str) -> None:
    st.query_params["job"] = job


def presenting() -> bool:
    """Whether the address asks for the presenter's view: large, without controls, originals hidden until the reveal."""
    return st.query_params.get("present") == "1"


def _present(begin: bool) -> None:
    st.session_state.pop("revealed", None)
    if begin:
        st.query_params["present"] = "1"
    else:
        st.query_params.pop("present", None)


def _leave(state: JobState | None) -> None:
    """Back to the choice, with this run's pictures and settings."""
    for name in ("revealed", "recording"):
        st.session_state.pop(name, None)
    restored: dict[str, str] = {}
    if state is not None:
        work, facts = _work(state)
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


def _work(state: JobState) -> tuple[Inversion, Facts]:
    work = state.work
    if not isinstance(work, Inversion) or not isinstance(work.facts, Facts):
        raise GradinvError("This run was not started from this page.")
    return work, work.facts


def _size(work: Inversion) -> int:
    """How many pictures the batch has."""
    return work.client.batch_size


def _head(state: JobState) -> None:
    work, facts = _work(state)
    config = work.config
    with st.container(key="scripts"):
        st.html(KEYS, unsafe_allow_javascript=True)
        # The button that began the run is far down on the page before.
        st.html(markup.TO_TOP.format(state.id), unsafe_allow_javascript=True)
        if presenting():
            st.html('<div class="gi-presenting"></div>')
    if presenting():
        st.button("Leave the presentation (Esc)", type="tertiary", key="present", on_click=_present, args=(False,))
        return
    with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute", key="run-head"):
        what = markup.count(config.seeds, "seed")
        if config.start == "decoder":
            what += ", started from the guess of a learned prior"
        own = work.originals
        origin = " The gradient was brought here; nobody here has its pictures." if own is None else ""
        if own is not None and own.defences:
            origin = f" The client’s defence: {' '.join(parse(text).note for text in own.defences)}"
        head.lead(
            "From the gradient back to the pictures",
            f"{facts.model}, {markup.count(_size(work), 'picture')} of {facts.size} px, {what}.{origin}",
        )
        with st.container(horizontal=True, width="content"):
            st.button(
                "Copy link",
                icon=":material/link:",
                key="copy-link",
                help="The page’s address is the link to this run, for as long as the server keeps it. Whoever has it "
                "can watch the run, and see its pictures; only you can stop it.",
            )
            st.button("Present (P)", icon=":material/present_to_all:", key="present", on_click=_present, args=(True,))
            st.button("New run", icon=":material/arrow_back:", on_click=_leave, args=(state,))


@st.fragment(run_every=TICK)
def _live(job: str) -> None:
    with guarded():
        _tick(job)


def _tick(job: str) -> None:
    state = manager().state(job)
    if state is None or state.finished:
        st.rerun()
    progress = _progress(state)
    work, _ = _work(state)
    if state.status == "queued" and isinstance(work.client, Shared):
        work.client.find()  # somebody still waits for it
    if presenting():
        hidden = _hide(work)
        _timeline(state, progress)
        _board(state, progress.pictures if progress is not None else None, hidden)
        return

    def board() -> None:
        hidden = _hide(work)
        with st.container(key="timeline"):
            _timeline(state, progress)
        _ladder(work, _solving(state))
        _board(state, progress.pictures if progress is not None else None, hidden, _lowest(_solving(state)))

    def side() -> None:
        _status(state, progress)
        if state.status == "queued":
            replay.link("Watch a recorded run meanwhile", replay.FIRST)
        _live_charts(state, progress)

    _laid_out(_size(work), board, side)


def _progress(state: JobState) -> Progress | None:
    """How far the search is, None as long as there is no picture."""
    return state.update if isinstance(state.update, Progress) else None


def _solving(state: JobState) -> Solving | None:
    """How far the layers are solved, None as long as that has not begun."""
    return state.update.solving if isinstance(state.update, Progress) else state.update


def _lowest(solving: Solving | None) -> Layer | None:
    """The layer to look at: what was solved last, and what the pixels are searched below."""
    if solving is None:
        return None
    below = [layer for layer in solving.layers if layer.name == solving.boundary]
    return next(iter(below or solving.layers[-1:]), None)


def _ladder(work: Inversion, solving: Solving | None) -> None:
    """What is solved before the pixels, where that is asked for. Its place is kept before it is there."""
    if work.config.needs_layers:
        with st.container(key="solved"):
            st.markdown(solved.ladder(solving) if solving is not None else "", unsafe_allow_html=True)


def _laid_out(batch: int, board: Callable[[], T], side: Callable[[], None]) -> T:
    """Draw the pictures and the numbers: side by side while the batch is small, else the numbers above; → what the
    former gives. On a phone the pictures come first. From the top down, so that nothing moves what is there already."""
    if batch <= BESIDE:
        left, right = st.columns([5, 3], gap="large")
        with left:
            drawn = board()
        with right:
            side()
        return drawn
    side()
    return board()


def _timeline(state: JobState, progress: Progress | None) -> None:
    """How far it is: in the queue, or in the two acts, the layers and the pixels."""
    work, _ = _work(state)
    solving = _solving(state)
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
    st.markdown(shown, unsafe_allow_html=True)


def _solved_so_far(work: Inversion, solving: Solving | None) -> list[str]:
    """The first act, where there is one."""
    if not work.config.needs_layers:
        return []
    if solving is None or not solving.nodes:
        return [markup.progress(0, "Layers", "")]
    count, of = len(solving.layers), len(solving.nodes)
    over = solving.boundary is not None
    when = markup.duration(solving.seconds) if over else ""
    return [markup.progress(1 if over else count / of, f"Layers: {count} of {of} solved", when)]


def _status(state: JobState, progress: Progress | None) -> None:
    if _own(state):
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
    _again(state)
    speed = progress.speed if progress is not None else None
    _facts(
        [
            ("one iteration", "–" if speed is None else f"{speed:.2f} s"),
            ("so far", markup.duration(_seconds(progress, _solving(state)))),
            *_quality(state, progress),
        ]
    )


def _again(state: JobState) -> None:
    """The same batch, behind a defence or without one."""
    work, _ = _work(state)
    if work.originals is None or not _own(state):
        return
    with st.popover("The same batch, with a defence", icon=":material/shield:", width="stretch"):
        st.caption(
            "The client changes its gradient before it shares it, and the attack starts anew."
            + ("" if state.finished else " The present run is stopped for it.")
        )
        texts = lessons.other_defences(work.originals.defences)
        notes = [parse(text).note for text in texts] or ["No defence is on."]
        st.markdown("\n".join(f"- {note}" for note in notes))
        st.button(
            "Start this run",
            key="again",
            type="primary",
            icon=":material/play_arrow:",
            on_click=_follow,
            args=(state.id, replace(work, client=replace(work.originals, defences=texts), before=None)),
        )


def _follow(job: str, work: Inversion) -> None:
    """Let the work begin once the job has ended, which it is told to."""
    st.session_state.setdefault(FOLLOWING, {})[job] = work
    manager().cancel(job)


def _seconds(progress: Progress | None, solving: Solving | None) -> float | None:
    """What it has taken so far."""
    if progress is not None:
        return progress.total
    return solving.seconds if solving is not None else None


def _facts(numbers: Sequence[tuple[str, str]]) -> None:
    with st.container(key="facts"):  # for which the style keeps the place
        st.markdown(markup.facts(numbers), unsafe_allow_html=True)


def _quality(state: JobState, progress: Progress | None) -> list[tuple[str, str]]:
    """How good it is: against the originals, or else all that the attacker has to go by."""
    work, facts = _work(state)
    pictures = progress.pictures if progress is not None else None
    if work.originals is None:
        column = _column(work, _solving(state))
        name, value = MISFIT[column][0], None
        if pictures is not None:
            value = pictures.distance if column == "distance" else pictures.activations
        return [(name[0].lower() + name[1:], "–" if value is None else markup.number(value))]
    psnr = metrics.mean(pictures.psnr) if pictures is not None else None
    return [
        ("PSNR of the consensus" if work.config.seeds > 1 else "PSNR", markup.decibel(psnr)),
        ("of a constant colour", markup.decibel(facts.mean_baseline)),
    ]


def _column(work: Inversion, solving: Solving | None) -> str:
    """The column of `MISFIT` that this run has."""
    held = work.config.needs_layers and work.config.activations > 0
    instead = solving is not None and solved.matching_instead(solving)
    return "activations.raw" if held and not instead else "distance"


def _live_charts(state: JobState, progress: Progress | None) -> None:
    work, facts = _work(state)
    curves = progress.curves if progress is not None else ()
    # Another preset may have taken over, with other iterations.
    steps = progress.steps if progress is not None else work.config.iterations
    charts = st.columns(2) if _size(work) > BESIDE else (st.container(), st.container())
    with charts[0]:
        if work.originals is None:
            column = _column(work, _solving(state))
            name, alt = MISFIT[column]
            st.markdown(f"**{name}**")
            st.echarts_chart(figures.live_distance(curves, steps, column), key="live-distance", height=225, alt=alt)
        else:
            st.markdown("**PSNR in dB**", help=_met(work))
            st.echarts_chart(
                figures.live_psnr(curves, steps, facts.mean_baseline),
                key="live-psnr",
                height=225,
                alt=PSNR_ALT[work.config.seeds > 1],
            )
    with charts[1]:
        st.markdown("**Terms of the loss**")
        st.echarts_chart(
            figures.live_losses(curves, steps), key="live-loss", height=225, alt="Terms of the loss by step"
        )


def _met(work: Inversion) -> str | None:
    """What to know of the curves of seeds that meet."""
    return MEETING if work.config.seeds > 1 and work.config.meetings else None


def _hide(work: Inversion) -> bool:
    """The control that hides the originals or, in a presentation, reveals them; → whether they are hidden."""
    if work.originals is None:
        if presenting():
            st.markdown("Rebuilt from the gradient alone: nobody here has its pictures.")
        return False
    if presenting():
        revealed = st.session_state.get("revealed", False)
        st.button("Hide (R)" if revealed else "Reveal (R)", key="reveal", type="primary", on_click=_reveal)
        return not revealed
    return st.toggle("Hide the originals (let the class guess)", key="hide", bind="query-params")


def _reveal() -> None:
    st.session_state.revealed = not st.session_state.get("revealed", False)


def _board(state: JobState, pictures: Pictures | None, hidden: bool, layer: Layer | None = None) -> None:
    work, facts = _work(state)
    rows = _rows(work, facts, pictures, hidden, layer)
    drawn = len(rows)
    if _size(work) == 1 and work.config.seeds > 1:
        # One picture: its seeds stand side by side instead of in a long column.
        drawn = len(rows) - work.config.seeds
        seeds = [replace(row.tiles[0], caption=row.name) for row in rows[drawn:]]
        shown = markup.board(rows[:drawn]) + markup.board([Row("Seeds", seeds)])
    else:
        shown = markup.board(rows)
    # Named after what it will hold, for which the style keeps the place.
    with st.container(key=f"board-{_size(work)}x{min(drawn, 4)}rows"):
        st.markdown(shown, unsafe_allow_html=True)


def _rows(
    work: Inversion, facts: Facts, pictures: Pictures | None, hidden: bool, layer: Layer | None = None
) -> list[Row]:
    own = work.originals
    rows = []
    if own is not None:
        true = [facts.classes[label] for label in own.labels]
        originals = [
            Tile(None if hidden else uri, "Hidden original" if hidden else f"Original: {name}", "" if hidden else name)
            for uri, name in zip(facts.originals, true, strict=True)
        ]
        rows.append(Row("Originals", originals, "what the client kept"))
    if layer is not None:
        held = [Tile(uri, f"What {layer.name} holds of picture {place}") for place, uri in enumerate(layer.tiles, 1)]
        # It may break behind its dots.
        name = layer.name.replace(".", ".\u200b")
        note = f"{layer.numbers:,} numbers of each picture, {solved.known(layer)}; nine of {layer.shape[0]} channels"
        rows.append(Row(name, held, note))
    seeds = work.config.seeds
    whole, note = markup.result(seeds, work.config.registration != "lazy", work.config.start == "decoder")
    if own is not None:
        note += f"; {markup.BASELINE}"
    if pictures is None:
        # What will stand below the pictures has its place.
        notes = [""] * _size(work) if own is None else [markup.beside(None, value) for value in facts.baseline]
        first = [Tile(None, "Not there yet", "\u00a0", text) for text in notes]
        waiting = [Tile(None, "Not there yet")] * _size(work)
        each = [Row(f"Seed {seed + 1}", waiting) for seed in range(seeds)] if seeds > 1 else []
        return [*rows, Row(whole, first, note), *each]
    names = [facts.classes[label] for label in pictures.restored]
    right: Sequence[bool | None] = [None] * len(names)
    if own is not None:
        right = [a == b for a, b in zip(pictures.restored, own.labels, strict=True)]
    if hidden:  # a restored label would end the guessing
        names = [f"picture {place + 1}" for place in range(len(names))]
    notes = [""] * len(names)
    if own is not None:
        notes = [markup.beside(value, constant) for value, constant in zip(pictures.psnr, facts.baseline, strict=True)]
    consensus = [
        Tile(uri, f"Reconstruction of {name}", name, text, None if hidden else mark)
        for uri, name, text, mark in zip(pictures.consensus, names, notes, right, strict=True)
    ]
    if pictures.prior:
        painted = [
            Tile(uri, f"Painted by the learned prior: {name}") for uri, name in zip(pictures.prior, names, strict=True)
        ]
        rows.append(Row("Learned prior", painted, PAINTED))
    rows.append(Row(whole, consensus, note))
    for seed, uris in enumerate(pictures.seeds if seeds > 1 else ()):
        tiles = [Tile(uri, f"Seed {seed + 1}: {name}") for uri, name in zip(uris, names, strict=True)]
        rows.append(Row(f"Seed {seed + 1}", tiles))
    return rows


def _finished(state: JobState) -> None:
    work, facts = _work(state)
    progress = _progress(state)
    if state.reason:
        (st.error if state.status == "failed" else st.warning)(state.reason)
    if progress is None:
        if not state.reason:
            began = state.update is not None
            st.info(f"This run was {'stopped before its first picture' if began else 'cancelled before it began'}.")
        return
    recorded = _recording(state.id, progress)
    _go_on(state, progress)
    if presenting():
        _replay(state, _hide(work))
        return

    def board() -> bool:
        hidden = _hide(work)
        _replay(state, hidden)
        return hidden

    hidden = _laid_out(_size(work), board, lambda: _outcome(state, progress, recorded))
    st.header("Curves" if work.originals is None else "Numbers", anchor=False)
    _table(work, facts, recorded, progress.pictures.restored, hidden)
    left, right = st.columns(2, gap="large")
    curves = recorded.curves
    with left:
        if work.originals is None:
            column = _column(work, progress.solving)
            name, alt = MISFIT[column]
            st.markdown(f"**{name} by step**")
            st.plotly_chart(figures.distance_curves(curves, column), key="distance", alt=alt)
        else:
            st.markdown("**PSNR by step**", help=_met(work))
            st.plotly_chart(
                figures.psnr_curves(curves, facts.mean_baseline),
                key="psnr",
                alt=PSNR_ALT[work.config.seeds > 1],
            )
    with right:
        st.markdown("**Terms of the loss by step**")
        st.plotly_chart(figures.loss_curves(curves), key="loss", alt="Each weighted term of the loss by step")
    credits = _credits(work, facts)
    if credits and not hidden:
        st.html(f"<p>Pictures:</p>{markup.credits(credits)}")


def _go_on(state: JobState, progress: Progress) -> None:
    """Of a run that was stopped, the way on."""
    if progress.kept is None or presenting() or not _own(state):
        return
    work, _ = _work(state)
    left = progress.steps - progress.step
    if st.button(f"Go on: {left:,} more iterations", key="go-on", type="primary", icon=":material/play_arrow:"):
        if (job := manager().unfinished(shared.owner())) is not None:
            _open(job)
            st.rerun()
        _begin(replace(work, before=progress.kept))


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
        *_quality(state, progress),
    ]
    _facts(numbers)
    _again(state)
    store, name = progress.store, _file_name(_work(state)[1], recorded, progress)
    with st.container(horizontal=len(progress.pictures.psnr) > BESIDE):
        st.download_button(
            "Everything: pictures, curves, settings (zip)",
            lambda: _archive(store, _work(state)[1]),
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
    work, facts = _work(state)
    measured, restored = recorded.run["metrics"], progress.pictures.restored
    title = f"gradinv: {markup.count(_size(work), 'picture')} rebuilt from one gradient"
    done = (ENDINGS[state.status].lower(), f"{progress.step:,} of {progress.steps:,} iterations")
    return summary.document(
        title,
        [done, *numbers],
        _rows(work, facts, progress.pictures, False),
        _numbers(work, facts, measured, restored, False) if measured is not None else "",
        recorded.run,
        _credits(work, facts),
    )


def _archive(store: MemoryStore, facts: Facts) -> bytes:
    """The recording as a zip, with the credits that the originals' licences ask for."""
    lines = [
        f"original_{place:02d}.png: {title}, {credit.author}, {credit.licence}, {credit.changes} "
        f"{credit.licence_url or ''} {credit.source or ''}"
        for place, (title, credit) in enumerate(zip(facts.titles, facts.credits, strict=True))
        if credit is not None
    ]
    files = {name: store.read(name) for name in store.names()}
    if lines:
        files["images/CREDITS.txt"] = "\n".join([*lines, ""]).encode()
    return MemoryStore(files).zip()


@st.fragment
def _replay(state: JobState, hidden: bool) -> None:
    with guarded():
        _scrub(state, hidden)


def _scrub(state: JobState, hidden: bool) -> None:
    work, _ = _work(state)
    last: Progress = state.update
    recorded = _recording(state.id, last)
    step = last.step
    with st.container(key="timeline"):
        if len(recorded.steps) > 1:
            step = st.select_slider("Replay: step", recorded.steps, recorded.steps[-1], key=f"replay-{state.id}")
    layer = None
    if not presenting():
        _ladder(work, last.solving)
        layer = _chosen_layer(state, last.solving)
    shown = last.pictures
    if step != last.step:
        shown = replace(work.pictures(recorded.snapshot(step)), prior=last.pictures.prior)
    _board(state, shown, hidden, layer)


def _chosen_layer(state: JobState, solving: Solving) -> Layer | None:
    """A solved layer to look at, from the output down; at first the lowest."""
    layers = {layer.name: layer for layer in solving.layers if layer.tiles}
    lowest = _lowest(solving)
    if lowest is None or len(layers) < 2:
        return lowest
    name = st.select_slider("Look at a layer", list(layers), lowest.name, key=f"layer-{state.id}")
    return layers[name]


def _table(work: Inversion, facts: Facts, recorded: Recording, restored: Sequence[int], hidden: bool) -> None:
    numbers = recorded.run["metrics"]
    if numbers is not None:
        st.markdown(_numbers(work, facts, numbers, restored, hidden), unsafe_allow_html=True)
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
