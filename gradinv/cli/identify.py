"""`gradinv identify`: which of many pictures were in the batch, from the gradient alone."""

from __future__ import annotations

import argparse
import os

from gradinv.checks import check_observation
from gradinv.cli.progress import counted
from gradinv.cli.say import answer, listed, percent, say, table
from gradinv.cli.task import observed
from gradinv.gallery import LIKE_ITSELF, Gallery, Identified, query
from gradinv.models import Model
from gradinv.recovery.examination import examine
from gradinv.sources import SAMPLES
from gradinv.types import GradinvError


def run(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise GradinvError(f"--top takes a number of pictures of at least 1, not {args.top}.")
    folder = args.imagenet or os.environ.get("GRADINV_IMAGENET")
    if not folder:
        say("The bundled pictures are searched; --imagenet DIR searches those of a folder.")
        folder = SAMPLES
    observation, model = observed(args)
    check_observation(model, observation)
    mode = examine(model, observation).observation.mode
    wanted = query(model, observation)  # what cannot be solved is said before 50,000 pictures are looked at
    with counted(unit="picture", desc="Looking at the pictures") as progress:
        gallery = Gallery.of(model, folder, progress=progress)
    for note in (*wanted.notes, *gallery.notes):
        say(note)
    if mode == "train":
        say(
            "The client's network was in train mode, where what it sees in a picture depends on the whole batch: "
            "similarities are lower, and some pictures are missed."
        )
    found = wanted.among(gallery, args.top)
    if answer(args, {**_facts(model, gallery, found), "notes": list(wanted.notes)}):
        return 0
    say(_table(model, gallery, found))
    say(
        f"{len(gallery.paths):,} pictures in {gallery.folder}, by the cosine similarity of their features on "
        f"{model.name}. Labels by {found.labels.method}, confidence {found.labels.confidence:.2f}."
    )
    if found.explained:
        trust = "they are the client's own"
        if mode == "eval":
            trust += ", so a picture that was in the batch has a similarity of almost 1"
    else:
        trust = "they are not the client's own, so what is most similar may be another picture"
    say(f"The features leave {percent(found.residual)} of the final layer's gradient unexplained: {trust}.")
    if found.explained and mode == "eval" and (told := _lacking(found)):
        say(told)
    return 0


def _facts(model: Model, gallery: Gallery, found: Identified) -> dict[str, object]:
    """What `--json` prints; `residual` is that of the batch, since its images are solved for together."""
    images = []
    for label, similarities, places in _rows(found):
        matches = [
            {"path": str(gallery.paths[place]), "similarity": similarity}
            for similarity, place in zip(similarities, places, strict=True)
        ]
        images.append({"label": label, "residual": found.residual, "matches": matches})
    return {
        "format": 1,
        "model": {"name": model.name, "sha256": model.sha256, "accuracy": model.accuracy},
        "labels": {"method": found.labels.method, "confidence": found.labels.confidence},
        "gallery": {"path": str(gallery.folder), "images": len(gallery.paths)},
        "images": images,
    }


def _table(model: Model, gallery: Gallery, found: Identified) -> str:
    rows: list[tuple[object, ...]] = []
    for number, (label, similarities, places) in enumerate(_rows(found)):
        for rank, (similarity, place) in enumerate(zip(similarities, places, strict=True), 1):
            head = (number, model.class_name(label)) if rank == 1 else ("", "")
            path = gallery.paths[place].relative_to(gallery.folder)
            rows.append((*head, rank, f"{similarity:.4f}", path))
    return table(("#", "class", "rank", "similarity", "picture"), rows, right=(0, 2, 3))


def _lacking(found: Identified) -> str:
    """Which images of the batch are like no picture that was searched, if any."""
    far = [number for number, (_, similarities, _) in enumerate(_rows(found)) if similarities[0] < LIKE_ITSELF]
    if not far:
        return ""
    if len(far) == len(found.similarity):
        return f"All similarities are below {LIKE_ITSELF:g}: none of these pictures seems to be of the batch."
    whose = listed([f"#{number}" for number in far], "and")
    seems = "seems" if len(far) == 1 else "seem"
    return f"Nothing is as similar as {LIKE_ITSELF:g} to {whose}, which {seems} not to be among these pictures."


def _rows(found: Identified) -> list[tuple[int, list[float], list[int]]]:
    """Of each image its restored label, and the similarities and places of its matches."""
    labels = found.labels.labels.tolist()
    return list(zip(labels, found.similarity.tolist(), found.places.tolist(), strict=True))
