"""Choosing the client's pictures: gallery, ImageNet folder, sample set, upload, random draw."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import streamlit as st
from torch import Tensor

from gradinv.images import to_pixels
from gradinv.models import Model
from gradinv.sources import Credit, Picture, draw, find, gallery, known, search
from gradinv.types import GradinvError
from gradinv.web.parts import gradient, markup, shared, uploads
from gradinv.web.parts.elements import html
from gradinv.web.parts.gradient import OwnGradient

Source = Literal["gallery", "folder", "samples", "upload", "gradient"]
SOURCES: dict[Source, str] = {
    "gallery": "Gallery",
    "folder": "ImageNet folder",
    "samples": "Public sample set",
    "upload": "Upload",
    "gradient": "A gradient of your own",
}
FIRST = ("goldfish", "tabby", "lion", "coffee")
LARGEST = gradient.LARGEST  # pictures in a batch
SHOWN = 24  # thumbnails of a folder at a time


@dataclass(frozen=True)
class Chosen:
    """A picture of the batch; `id` is unlike every other's."""

    source: Source
    id: str
    picture: Picture


@dataclass(frozen=True)
class Member:
    """A chosen picture as the model sees it: pixels (3, S, S) in [0, 1], its label and its class's name; `predicted` if
    nobody said the class, so that the model did."""

    chosen: Chosen
    pixels: Tensor
    label: int
    name: str
    predicted: bool

    @property
    def credit(self) -> Credit | None:
        """Who made it; None for uploads."""
        return self.chosen.picture.credit


@dataclass(frozen=True)
class Batch:
    """The members, and one sentence for each picture that cannot be one."""

    members: tuple[Member, ...]
    problems: tuple[str, ...]

    @property
    def batch_size(self) -> int:
        return len(self.members)


def chosen() -> list[Chosen]:
    """This visitor's choice, at first the pictures that the address names, else four that show well."""
    if "batch" not in st.session_state:
        keys = st.query_params.get("pictures", ".".join(FIRST)).split(".")
        pictures = {picture.key: picture for picture in gallery()}
        known = [pictures[key] for key in dict.fromkeys(keys) if key in pictures]
        st.session_state.batch = [Chosen("gallery", picture.key, picture) for picture in known]
    batch: list[Chosen] = st.session_state.batch
    return batch


def begun() -> bool:
    """Whether this visitor has chosen before."""
    return "batch" in st.session_state


def choose(batch: Sequence[Chosen]) -> None:
    """Make this the batch, and name its gallery pictures in the address."""
    if len(batch) > LARGEST:
        st.session_state.notice = [f"A batch takes at most {LARGEST} pictures here; the others were left out."]
    st.session_state.batch = list(batch[:LARGEST])
    st.query_params["pictures"] = ".".join(item.id for item in st.session_state.batch if item.source == "gallery")


def batch(network: Model) -> Batch:
    """What is chosen, as the model takes it."""
    members, problems = [], []
    for item in chosen():
        try:
            members.append(_member(item, network))
        except GradinvError as error:
            problems.append(str(error))
    return Batch(tuple(members), tuple(problems))


def _member(item: Chosen, network: Model) -> Member:
    # A picture of the gallery may be of another class for another model.
    picture = find(gallery(network), item.id) if item.source == "gallery" else item.picture
    pixels = to_pixels(picture.open(), network.preprocessing)
    said = network.class_index(picture.wnid) if picture.wnid else st.session_state.get(_class_key(item, network))
    predicted = picture.wnid is None and said is None
    label = shared.prediction(network.name, network.preprocessing.size, item.id, pixels) if predicted else said
    if label is None:
        raise GradinvError(
            f"{network.name} does not know the class {picture.name} of {picture.title}; remove it or change the model."
        )
    return Member(replace(item, picture=picture), pixels, label, network.class_name(label), predicted)


def _class_key(item: Chosen, network: Model) -> str:
    return f"class_{network.name}_{item.id}"


def shares() -> bool:
    """Whether this visitor wants a gradient of their own to be inverted instead of pictures."""
    return st.session_state.get("source", st.query_params.get("source")) == "gradient"


def _name_source() -> None:
    """The address leads others to a gradient of their own."""
    if shares():
        st.query_params["source"] = "gradient"
    else:
        st.query_params.pop("source", None)


def panel(network: Model, visitor: str) -> Batch | OwnGradient | None:
    """Everything for choosing; → the batch as it stands, or the visitor's own gradient, None as long as it lacks."""
    # First, though it belongs to what is chosen below: what came later would push the rest down.
    with st.container(key="chosen"):
        if shares():
            gradient.card(visitor)
            found = None
        else:
            found = _strip(network)
    with st.container(key="sources"):
        source = st.segmented_control(
            "Take the batch from",
            # What may be wrong with a folder in ImageNet layout is said where it is chosen.
            [source for source in SOURCES if source != "folder" or os.environ.get("GRADINV_IMAGENET")],
            format_func=SOURCES.__getitem__,
            default="gradient" if shares() else "gallery",
            required=True,
            key="source",
            persist_state="session",
            on_change=_name_source,
        )
        if source == "gradient":
            gradient.panel(network, FIRST, visitor)
            return gradient.held()
        try:
            {"gallery": _gallery, "folder": _folder, "samples": _samples, "upload": _upload}[source](network)
        except GradinvError as error:
            st.warning(str(error))
    return found


def _strip(network: Model) -> Batch:
    found = batch(network)
    for problem in found.problems:
        st.warning(markup.plain(problem))
    items = chosen()
    if not items:
        st.info("The batch is empty. Choose pictures below, or draw some at random.")
    with st.container(horizontal=True, key="batch-strip", gap="small"):
        for member in found.members:
            _card(member, network)

    def keep(label: str, kept: list[Chosen], **more: Any) -> None:
        st.button(label, on_click=choose, args=(kept,), **more)

    with st.container(horizontal=True, key="strip-tools"):
        if len(items) > 1:
            keep("Remove all", [], key="remove-all", type="tertiary", icon=":material/delete:")
        own = [item for item in items if item.source == "upload"]
        if own and len(own) < len(items):
            keep("Only my uploads", own, key="only-uploads", type="tertiary", icon=":material/filter_alt:")
    if found.problems:
        usable = {member.chosen.id for member in found.members}
        keep("Remove what cannot be used", [item for item in items if item.id in usable])
    return found


def _card(member: Member, network: Model) -> None:
    item = member.chosen
    with st.container(width=148, gap="xxsmall", key=f"card-{item.id}"):
        uri = shared.thumbnail(item.source, item.id, item.picture)
        html(
            markup.card(
                uri,
                f"Picture of the batch: {item.picture.title}",
                f"predicted: {member.name}" if member.predicted else member.name,
                member.credit,
                "your upload" if item.source == "upload" else SOURCES[item.source],
            )
        )
        if item.picture.wnid is None:
            st.selectbox(
                f"Class of {markup.plain(item.picture.title)}",
                range(len(network.classes)),
                index=None,
                placeholder="as predicted",
                format_func=network.class_name,
                key=_class_key(item, network),
                label_visibility="collapsed",
                persist_state="session",
            )
        st.button(
            "Remove",
            key=f"remove-{item.id}",
            type="tertiary",
            icon=":material/close:",
            on_click=_remove,
            args=(item.id,),
        )


def _remove(identity: str) -> None:
    choose([item for item in chosen() if item.id != identity])


def _notice() -> None:
    """What came of the last choice, where it was made: the batch above may be out of sight."""
    uploads.tell(st.session_state.pop("notice", []))


def _draw_row(label: str, drawing: Callable[[int, int], tuple[list[Picture], str | None]], source: Source) -> None:
    """The random draw: how many, and the button."""
    with st.container(horizontal=True, vertical_alignment="bottom", key="draw-row"):
        st.number_input(
            "Batch size of a random draw", 1, LARGEST, 4, key="draw_size", width=220, persist_state="session"
        )
        st.button(label, key=f"draw-{source}", icon=":material/casino:", on_click=_draw, args=(drawing, source))


def _draw(drawing: Callable[[int, int], tuple[list[Picture], str | None]], source: Source) -> None:
    try:
        pictures, warning = drawing(st.session_state.draw_size, secrets.randbits(32))
    except GradinvError as error:
        st.session_state.notice = [str(error)]
        return
    if warning:
        st.session_state.notice = [warning]
    choose([Chosen(source, picture.key, picture) for picture in pictures])


def _grid(pictures: Sequence[Picture], source: Source, label: str, key: str) -> None:
    """Thumbnails to pick from; a picked one is in the batch, wherever else it is shown."""
    thumbnails = {}
    for picture in pictures:
        try:
            thumbnails[picture.key] = shared.thumbnail(source, picture.key, picture)
        except GradinvError as error:
            st.warning(markup.plain(str(error)))
    by_key = {picture.key: picture for picture in pictures if picture.key in thumbnails}
    st.session_state[key] = [item.id for item in chosen() if item.source == source and item.id in by_key]

    named = Counter(picture.name for picture in by_key.values())

    def describe(name: str) -> str:
        picture = by_key[name]
        told = picture.name
        if named[told] > 1 and picture.title != told:
            told += f" ({picture.title})"
        return f"![{markup.plain(told)}]({thumbnails[name]}) {told}"

    def sync() -> None:
        picked = st.session_state[key]
        kept = [item for item in chosen() if item.source != source or item.id not in by_key or item.id in picked]
        have = {item.id for item in kept if item.source == source}
        choose(kept + [Chosen(source, name, by_key[name]) for name in picked if name not in have])

    with st.container(key=f"thumbnails-{source}"):
        st.pills(
            label,
            list(by_key),
            selection_mode="multi",
            format_func=describe,
            key=key,
            on_change=sync,
            label_visibility="collapsed",
            width="stretch",
        )


def _gallery(network: Model) -> None:
    pictures = gallery(network)
    with st.container(horizontal=True, vertical_alignment="bottom", key="gallery-tools"):
        text = st.text_input(
            "Search",
            key="gallery_search",
            placeholder="tabby, cat, food …",
            icon=":material/search:",
            width=300,
            live=True,
        )
        _draw_row("Draw at random", lambda count, seed: draw(pictures, count, seed), "gallery")
    _notice()
    if found := search(pictures, text or ""):
        _grid(found, "gallery", "Pictures of the gallery", "gallery_grid")
    else:
        st.info(
            f"No picture of the gallery that {network.name} knows is called so; search for something else, "
            "or take it from another source: the ImageNet folder, the public sample set or an upload."
        )
    with st.expander(f"Authors and licences of the {len(pictures)} pictures"):
        st.html(markup.credits((picture.title, picture.credit) for picture in pictures if picture.credit))


def _folder(network: Model) -> None:
    images = shared.folder()
    with st.container(horizontal=True, vertical_alignment="bottom", key="folder-tools"):
        text = st.text_input("Search by class", key="folder_search", icon=":material/search:", width=300, live=True)
        known_ids = [item.wnid for item in network.classes]
        _draw_row("Draw at random", lambda count, seed: images.draw(count, seed, known_ids), "folder")
    _notice()
    classes = [item for item in images.search(text or "") if network.class_index(item.wnid) is not None]
    if not classes:
        st.info(f"The folder has no class of that name that {network.name} knows; search for something else.")
        return
    chosen_class = st.selectbox(
        f"Class ({len(classes)} of them)",
        classes,
        format_func=lambda item: f"{item.name} ({item.wnid})",
        key="folder_class",
    )
    pictures = images.pictures(chosen_class.wnid)
    pages = -(-len(pictures) // SHOWN)
    page = st.pagination(pages, key=f"folder_page_{chosen_class.wnid}") if pages > 1 else 1
    shown = pictures[(page - 1) * SHOWN : page * SHOWN]
    _grid(shown, "folder", f"Pictures of {chosen_class.name}", f"folder_grid_{chosen_class.wnid}_{page}")


def _samples(network: Model) -> None:
    images = shared.sample_set()
    pictures = known(images.pictures, network)
    st.caption(
        "A public set of 1,000 ImageNet photographs, one a class. Each is fetched from its public repository when you "
        "choose it and kept in a cache folder. Their authors are unknown and no licence is stated: for study only."
    )
    with st.container(horizontal=True, vertical_alignment="bottom", key="sample-tools"):
        picture = st.selectbox(
            "Class", pictures, format_func=lambda item: item.name, key="sample_class", index=None, width=300,
            placeholder="Type to search",
        )  # fmt: skip
        st.button(
            "Add", key="sample-add", icon=":material/add:", disabled=picture is None, on_click=_add, args=(picture,)
        )
        _draw_row("Draw and fetch", lambda count, seed: draw(pictures, count, seed), "samples")
    _notice()


def _add(picture: Picture) -> None:
    try:
        with st.spinner("Fetching the picture"):
            picture.open()
    except GradinvError as error:
        st.session_state.notice = [str(error)]
        return
    if all(item.id != picture.key for item in chosen()):
        choose([*chosen(), Chosen("samples", picture.key, picture)])


def _upload(network: Model) -> None:
    st.caption(f"{uploads.PRIVACY} Choose a class for each, or leave it to the model.")
    sent = uploads.pictures("upload")
    _notice()
    if sent is not None:
        added, notices = sent
        choose([*chosen(), *(Chosen("upload", upload.id, upload.picture) for upload in added)])
        if notices:
            st.session_state.notice = notices
        st.rerun()
