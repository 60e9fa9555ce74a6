"""`gradinv identify`: which of many pictures were in the batch, from the gradient alone."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradinv.cli.say import complain, listed, percent, speaker, table
from gradinv.cli.task import add_corrections, add_normalisation, corrected

if TYPE_CHECKING:
    from gradinv.gallery import Gallery, Identified
    from gradinv.models import Model
    from gradinv.types import Observation


HELP = "find the pictures of a batch among many, from its gradient alone"
EXAMPLES = """\
examples:
  gradinv identify --observation client.safetensors                 among the bundled pictures, offline
  gradinv identify --observation client.safetensors --imagenet val
  gradinv identify --observation client.safetensors --imagenet photos --top 1 --json

No picture is reconstructed: the final layer's gradient is solved for what the network sees in each picture of the batch
(its pooled features), and all pictures of the folder are ranked by how similar the network finds them. The first call
looks at every picture once and keeps what the network sees, in the folder of GRADINV_CACHE or else in this platform's
cache folder; the next one takes seconds. "gradinv invert IMAGE … --save-observation FILE" makes an observation.

exit codes: 0; 2 bad use; 130 stopped by Ctrl-C, with the index so far kept
"""


def add_arguments(parser: argparse.ArgumentParser, chosen: bool) -> None:
    """Whose gradient, and which pictures."""
    parser.add_argument(
        "--observation", metavar="FILE", required=True, help="what the client shared, as Observation.save writes it"
    )
    add_corrections(parser)
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="how many pictures the observation is of, where it has that wrong"
    )
    parser.add_argument(
        "--imagenet",
        metavar="DIR",
        help="the pictures to search: a folder in ImageNet layout or any other, with the folders in it "
        "(else: GRADINV_IMAGENET, else the bundled pictures)",
    )
    parser.add_argument(
        "--model", help="a name that `gradinv models` lists, or a weights file (default: the one of the observation)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, … (default: %(default)s)")
    add_normalisation(parser)
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="how many pictures to name for each (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from gradinv.checks import check_observation
    from gradinv.gallery import query
    from gradinv.recovery.examination import examine
    from gradinv.sources import SAMPLES
    from gradinv.types import GradinvError

    say = speaker(args)
    if args.top < 1:
        raise GradinvError(f"--top takes a number of pictures of at least 1, not {args.top}.")
    folder = args.imagenet or os.environ.get("GRADINV_IMAGENET")
    if not folder:
        say("The bundled pictures are searched; --imagenet DIR searches those of a folder.")
        folder = str(SAMPLES)
    observation = corrected(args)
    model = _load_model(args, observation)
    check_observation(model, observation)
    mode = examine(model, observation).observation.mode
    wanted = query(model, observation)  # what cannot be solved is said before 50,000 pictures are looked at
    try:
        gallery = _open_gallery(model, folder)
    except KeyboardInterrupt as stopped:
        # Without a sentence it came before the first picture was looked at.
        return complain(str(stopped) or "Interrupted; nothing was kept.", 130)
    for note in (*wanted.notes, *gallery.notes):
        say(note)
    if mode == "train":
        say(
            "The client's network was in train mode, where what it sees in a picture depends on the whole batch: "
            "similarities are lower, and some pictures are missed."
        )
    found = wanted.among(gallery, args.top)
    if args.json:
        print(json.dumps({**_facts(model, gallery, found), "notes": list(wanted.notes)}, indent=2))
        return 0
    print(_table(model, gallery, found))
    print(
        f"{len(gallery.paths):,} pictures in {gallery.folder}, by the cosine similarity of their features on "
        f"{model.name}. Labels by {found.labels.method}, confidence {found.labels.confidence:.2f}."
    )
    if found.explained:
        trust = "they are the client's own"
        if mode == "eval":
            trust += ", so a picture that was in the batch has a similarity of almost 1"
    else:
        trust = "they are not the client's own, so what is most similar may be another picture"
    print(f"The features leave {percent(found.residual)} of the final layer's gradient unexplained: {trust}.")
    if found.explained and mode == "eval" and (told := _lacking(found)):
        print(told)
    return 0


def _load_model(args: argparse.Namespace, observation: Observation) -> Model:
    """The network that the observation names, at the size of its images."""
    from gradinv.models import MODELS, load_model
    from gradinv.types import GradinvError

    if args.model is None and observation.model_name not in MODELS:
        raise GradinvError(
            f"The observation is of the weights {observation.model_name}; say where that file is with --model FILE."
        )
    name = args.model or observation.model_name
    theirs = observation.preprocessing
    return load_model(name, device=args.device, image_size=theirs.size, mean=args.mean, std=args.std, like=theirs)


def _open_gallery(model: Model, folder: str) -> Gallery:
    """The folder's pictures; how far it is goes to the standard error, and only where that is a terminal."""
    from tqdm import tqdm

    from gradinv.gallery import Gallery

    with tqdm(unit="picture", desc="Looking at the pictures", dynamic_ncols=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return Gallery.of(model, folder, progress=progress)


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
    return table(("#", "class", "rank", "similarity", "picture"), rows, numbers=(0, 2, 3))


def _lacking(found: Identified) -> str:
    """Which images of the batch are like no picture that was searched, if any."""
    from gradinv.gallery import LIKE_ITSELF

    far = [number for number, (_, similarities, _) in enumerate(_rows(found)) if similarities[0] < LIKE_ITSELF]
    if not far:
        return ""
    if len(far) == len(found.similarity):
        return f"All similarities are below {LIKE_ITSELF:g}: none of these pictures seems to be of the batch."
    whose = listed([f"#{number}" for number in far], "and")
    seems = "seems" if len(far) == 1 else "seem"
    return f"Nothing is as similar as {LIKE_ITSELF:g} to {whose}, which {seems} not to be among these pictures."


def _rows(found: Identified) -> Sequence[tuple[int, list[float], list[int]]]:
    """Of each image its restored label, and the similarities and places of its matches."""
    labels = found.labels.labels.tolist()
    return list(zip(labels, found.similarity.tolist(), found.places.tolist(), strict=True))
