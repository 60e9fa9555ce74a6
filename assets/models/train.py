"""The recipe of the bundled models: train a ResNet on folders of pictures, and write it as `load_model` reads it.

    python assets/models/train.py --arch resnet18 --sizes 32 48 48 64 64 64 64 64 64 --train DIR --val DIR --out FILE

Run it where gradinv is installed. --train and --val are folders in ImageNet layout (<wnid>/*.JPEG or
<wnid>/images/*.JPEG). All pictures are decoded once and held in memory, 12 kB each at 64 px. A run that was stopped
goes on from its last checkpoint when the same command is given again, and ends with the same weights as one that was
not stopped (on a GPU: but for what its kernels leave to chance).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from gradinv.images import to_pixels
from gradinv.models import choose_device
from gradinv.paths import replace_whole
from gradinv.sources import ImageFolder, Picture
from gradinv.types import GradinvError, Preprocessing

# Below 32 px the last stage's input is a single pixel. On CPUs torch (2.15 at least) then leaves those parts of its
# bfloat16 weight gradient that meet nothing but padding uninitialised: some weights become whatever lay in the memory.
LEAST_SIZE = 32
MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING, PADDING = 0.9, 1e-4, 0.1, 6
# What must be the same in a command that goes on with a checkpoint; the rest says where things are and how they run.
SETTINGS = ("arch", "sizes", "batch_size", "learning_rate", "seed")


def recipe(doc: str | None, product: str) -> argparse.ArgumentParser:
    """The parser of a script that trains, with what all of them take: its first paragraph describes it, and the rest
    says how it is called."""
    description, command = (doc or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=description, epilog=command, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train", type=Path, required=True, metavar="DIR", help="the training pictures, a folder for each class")
    add("--val", type=Path, required=True, metavar="DIR", help="the validation pictures, of the same classes")
    add("--out", type=Path, required=True, metavar="FILE", help=f"the {product} to write, FILE.safetensors")
    add("--seed", type=int, default=0, metavar="N", help="where all randomness comes from (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (%(default)s)")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that decode (%(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    run(train, parse(arguments))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = recipe(__doc__, "weights")
    add = parser.add_argument
    add("--arch", choices=("resnet18", "resnet50"), default="resnet18", help="the network (%(default)s)")
    add(
        "--sizes",
        type=int,
        nargs="+",
        default=[32, 48, 48, 64, 64, 64, 64, 64, 64],
        metavar="PX",
        help="the input's side in each epoch; the last is the size at which the network will be used (%(default)s)",
    )
    add("--batch-size", type=int, default=256, metavar="N", help="pictures a step (%(default)s)")
    add("--learning-rate", type=float, default=0.5, metavar="X", help="its peak, after the warm-up (%(default)s)")
    add("--checkpoint-every", type=int, default=100, metavar="N", help="steps from one to the next (%(default)s)")
    options = parser.parse_args(arguments)
    check_out(parser, options.out)
    if min(options.sizes) < LEAST_SIZE or max(options.sizes) > options.sizes[-1]:
        parser.error(f"--sizes must be at least {LEAST_SIZE}, and none larger than the last")
    if options.batch_size < 2 or options.checkpoint_every < 1 or options.learning_rate <= 0:
        parser.error("--batch-size must be at least 2, --checkpoint-every at least 1, --learning-rate more than 0")
    return options


def check_out(parser: argparse.ArgumentParser, out: Path) -> None:
    """End with a sentence where no weights can be written, before hours of training."""
    if out.suffix != ".safetensors":
        parser.error("--out must end in .safetensors")
    if out.exists():
        parser.error(f"{out} is there already; remove it or name another file")
    if not out.absolute().parent.is_dir():
        parser.error(f"there is no folder {out.absolute().parent}")


def run(script: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    """Run a script that trains; it ends with a sentence where it cannot go on, or is stopped."""
    try:
        script(options)
    except GradinvError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        checkpoint = checkpoint_of(options)
        hint = f" The same command goes on from {checkpoint}." if checkpoint.is_file() else ""
        print(f"\nStopped.{hint}", file=sys.stderr)
        sys.exit(130)


def checkpoint_of(options: argparse.Namespace) -> Path:
    return options.out.with_suffix(".checkpoint.pt")


def train(options: argparse.Namespace) -> None:
    device = choose_device(options.device)
    size = options.sizes[-1]
    classes = sorted(item.wnid for item in ImageFolder(options.train).classes)
    pictures, labels = read_all(options.train, classes, size, options.workers)
    val_pictures, val_labels = read_all(options.val, classes, size, options.workers)
    batch_size = min(options.batch_size, len(pictures))
    steps_per_epoch = len(pictures) // batch_size  # the incomplete batch of each epoch is left out
    steps = steps_per_epoch * len(options.sizes)

    torch.manual_seed(options.seed)
    network = build(options.arch, len(classes)).to(device).to(memory_format=torch.channels_last)
    optimiser = optimiser_of(network, options.learning_rate)
    facts = {name: getattr(options, name) for name in SETTINGS} | {"classes": classes, "pictures": len(pictures)}
    step, losses = resume(checkpoint_of(options), network, optimiser, facts, device)

    # In pixels, not steps: a step at 32 px takes a quarter of the time of one at 64 px.
    cost = [steps_per_epoch * side**2 for side in options.sizes]
    first, done = divmod(step, steps_per_epoch)
    bar = tqdm(
        total=sum(cost),
        initial=sum(cost[:first]) + done * cost[min(first, len(cost) - 1)] // steps_per_epoch,
        bar_format="{percentage:3.0f}% |{bar}| {elapsed} so far, {remaining} to go{postfix}",
    )
    with bar:
        while step < steps:
            epoch, place = divmod(step, steps_per_epoch)
            # Everything random is a function of the seed and of where the run is, so that it can start anywhere.
            order = np.random.default_rng([options.seed, 0, epoch]).permutation(len(pictures))
            chosen = torch.from_numpy(order[place * batch_size : (place + 1) * batch_size])
            inputs = augment(pictures[chosen].to(device), np.random.default_rng([options.seed, 1, step]))
            if options.sizes[epoch] != size:
                inputs = F.interpolate(inputs, options.sizes[epoch], mode="bilinear", antialias=True)
            for group in optimiser.param_groups:
                group["lr"] = options.learning_rate * schedule(step, steps)
            losses.append(take_step(network, optimiser, normalise(inputs), labels[chosen].to(device)))
            if not math.isfinite(losses[-1]):
                raise GradinvError(f"The loss is not finite at step {step}; take a smaller --learning-rate.")
            step += 1
            bar.update(options.sizes[epoch] ** 2)
            bar.set_postfix_str(f"step {step} of {steps}, loss {losses[-1]:.3f}")
            if step % steps_per_epoch == 0:
                accuracy = evaluate(network, val_pictures, val_labels, batch_size)
                where = f"epoch {epoch + 1} of {len(options.sizes)}, {options.sizes[epoch]} px"
                bar.write(f"{where}: loss {np.mean(losses):.4f}, top-1 {accuracy:.1f} %", file=sys.stdout)
                losses.clear()
            if step % options.checkpoint_every == 0 or step == steps:
                state = {"settings": facts, "step": step, "losses": losses}
                state |= {"network": network.state_dict(), "optimiser": optimiser.state_dict()}
                replace(checkpoint_of(options), partial(torch.save, state))

    network.half().float()  # what the file holds is what is measured
    accuracy = evaluate(network, val_pictures, val_labels, batch_size)
    write(options.out, network, options.arch, classes, size, accuracy)
    checkpoint_of(options).unlink(missing_ok=True)
    print(f"{options.out}: {options.arch}, {len(classes)} classes, {size} px, top-1 {accuracy:.1f} %")


# --- pictures


def read_all(
    root: Path, classes: list[str], size: int, workers: int, per_class: int | None = None
) -> tuple[Tensor, Tensor]:
    """All pictures of a folder, or so many of each class, as (N, 3, size, size) uint8, and their labels (N,) int64."""
    folder = ImageFolder(root)
    if unknown := sorted({item.wnid for item in folder.classes} - set(classes)):
        raise GradinvError(f"{root} has the class {unknown[0]}, which the training pictures lack; remove its folder.")
    found = [
        (picture, classes.index(item.wnid))
        for item in folder.classes
        for picture in folder.pictures(item.wnid)[:per_class]
    ]
    if len(found) < 2:
        raise GradinvError(f"{root} holds fewer than two pictures; put them into its class folders.")
    pictures = torch.empty(len(found), 3, size, size, dtype=torch.uint8)
    with tqdm(total=len(found), desc=f"reading {root.name}", unit=" pictures") as bar:
        for index, pixels in enumerate(decode_all([picture for picture, _ in found], size, workers)):
            pictures[index] = torch.from_numpy(pixels)
            bar.update()
    return pictures, torch.tensor([label for _, label in found])


def decode_all(pictures: list[Picture], size: int, workers: int) -> Iterable[np.ndarray]:
    if workers < 2:
        yield from map(partial(decode_one, size=size), pictures)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(partial(decode_one, size=size), pictures, chunksize=64)


def decode_one(picture: Picture, size: int) -> np.ndarray:
    pixels = to_pixels(picture.open(), Preprocessing(size=size, resize=size))
    return (pixels * 255).round().to(torch.uint8).numpy()


def augment(batch: Tensor, random: np.random.Generator) -> Tensor:
    """uint8 (B, 3, S, S) → pixels in [0, 1]: each picture flipped or not, all shifted alike by up to PADDING."""
    flipped = torch.from_numpy(random.random(len(batch)) < 0.5).to(batch.device)
    batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
    top, left = random.integers(0, 2 * PADDING + 1, 2)
    size = batch.shape[-1]
    return F.pad(batch.float() / 255, [PADDING] * 4, mode="reflect")[:, :, top : top + size, left : left + size]


def normalise(pixels: Tensor) -> Tensor:
    side = pixels.shape[-1]
    normalised = Preprocessing(size=side, resize=side).normalise(pixels)
    return normalised.contiguous(memory_format=torch.channels_last)


# --- training


def build(arch: str, classes: int) -> nn.Module:
    # Zero weights in the last BN of each block make every block the identity at first.
    return torchvision.models.get_model(arch, weights=None, num_classes=classes, zero_init_residual=True)


def optimiser_of(network: nn.Module, learning_rate: float) -> torch.optim.SGD:
    """Neither biases nor BN decay."""
    decayed = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=MOMENTUM, nesterov=True)


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate: linear warm-up over a fifth of the steps, then a cosine to 0."""
    warmup = max(1, steps // 5)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1))) / 2


def take_step(network: nn.Module, optimiser: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> float:
    network.train()
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
        logits = network(inputs)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


@torch.no_grad()
def evaluate(network: nn.Module, pictures: Tensor, labels: Tensor, batch_size: int) -> float:
    """Top-1 in percent, in float32."""
    network.eval()
    device = next(network.parameters()).device
    right = 0
    for batch, truth in zip(pictures.split(batch_size), labels.split(batch_size), strict=True):
        right += int((network(normalise(batch.to(device).float() / 255)).argmax(1).cpu() == truth).sum())
    return 100 * right / len(pictures)


# --- files


def resume(
    path: Path, network: nn.Module, optimiser: torch.optim.Optimizer, facts: dict[str, Any], device: torch.device
) -> tuple[int, list[float]]:
    """Load the checkpoint, if there is one: → how many steps have been done, and the losses of the epoch so far."""
    if not path.exists():
        return 0, []
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        changed = [name for name, value in facts.items() if state["settings"][name] != value]
        if not changed:
            network.load_state_dict(state["network"])
            optimiser.load_state_dict(state["optimiser"])
    except Exception as error:  # torch raises a dozen types for files that it did not write
        raise GradinvError(f"{path} is not a checkpoint of this program; remove it.") from error
    if changed:
        raise GradinvError(f"{path} was made with other {changed[0]}; give the same command as then, or remove it.")
    print(f"Going on after step {state['step']} from {path}.", flush=True)
    return state["step"], state["losses"]


def write(path: Path, network: nn.Module, arch: str, classes: list[str], size: int, accuracy: float) -> None:
    """Half precision, torchvision's names, without BN's step counter; what `load_model` needs to know as metadata."""
    state = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    tensors = {name: value.half().cpu().contiguous() for name, value in state.items()}
    metadata = {
        "arch": arch,
        "classes": json.dumps(classes),
        "image_size": str(size),
        "accuracy": f"{accuracy:.1f}",
    }
    replace(path, partial(safetensors.torch.save_file, tensors, metadata=metadata))


def replace(path: Path, save: Callable[[Path], None]) -> None:
    """Save a file as a whole. Raises GradinvError where it cannot be written."""
    try:
        replace_whole(path, save)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise GradinvError(f"{path} cannot be written ({error}); make room or choose another folder.") from error


if __name__ == "__main__":
    main()
