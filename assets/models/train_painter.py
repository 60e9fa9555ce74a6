"""The recipe of the painters: learn to paint a picture from the activations of one node of a network.

    python assets/models/train_painter.py --model resnet18-tiny --node layer2 --train DIR --val DIR --out FILE

Run it where gradinv is installed. --train and --val are folders in ImageNet layout, as for train.py. All pictures are
held in memory; the activations are computed on the fly. A run that was stopped goes on from its last checkpoint when
the same command is given again; with other --steps it is shortened or prolonged.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from train import check_out, checkpoint_of, read_all, recipe, replace, resume, run
from train_decoder import similarity

from gradinv.metrics import psnr
from gradinv.models import Model, load_model
from gradinv.network import STEM, Segment, node_shapes, parts_of
from gradinv.prior import SIZE, Painter
from gradinv.sources import ImageFolder
from gradinv.types import GradinvError

# The loss: L1 + SSIM_WEIGHT · (1 − SSIM) + FEATURES_WEIGHT · the mean of the relative squared distances of the
# network's own activations at the nodes LOOKED_AT: what is painted should look to its early layers like the original.
SSIM_WEIGHT, FEATURES_WEIGHT, LOOKED_AT = 0.2, 0.1, (STEM, "layer1")
# Solved activations have an error: those of this share of the pictures none, else one from the first to the second.
EXACT, NOISE = 0.3, (0.003, 0.2)
WEIGHT_DECAY = 1e-4
# What must be the same in a command that goes on with a checkpoint. With other --steps the learning rate falls as in a
# run of so many.
SETTINGS = ("model", "node", "batch_size", "learning_rate", "per_class", "seed")


def main(arguments: list[str] | None = None) -> None:
    run(train, parse(arguments))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = recipe(__doc__, "painter")
    add = parser.add_argument
    add("--model", required=True, help="the network whose activations are painted: a name or a weights file")
    add("--node", required=True, help="the node that they are of, such as layer2")
    add("--steps", type=int, default=6000, metavar="N", help="optimisation steps (%(default)s)")
    add("--batch-size", type=int, default=16, metavar="N", help="pictures a step (%(default)s)")
    add("--learning-rate", type=float, default=1e-3, metavar="X", help="AdamW's peak, after warm-up (%(default)s)")
    add("--per-class", type=int, default=500, metavar="N", help="training pictures of each class (%(default)s)")
    add("--checkpoint-every", type=int, default=250, metavar="N", help="steps from one to the next (%(default)s)")
    options = parser.parse_args(arguments)
    check_out(parser, options.out)
    if min(options.steps, options.batch_size, options.per_class) < 1 or options.learning_rate <= 0:
        parser.error("--steps, --batch-size and --per-class must be at least 1, --learning-rate more than 0")
    return options


def train(options: argparse.Namespace) -> None:
    model = load_model(options.model, device=options.device, image_size=SIZE)
    model.network.requires_grad_(False).to(memory_format=torch.channels_last)
    node = parts_of(model.network).node(options.node)
    segment = Segment(model.network, node, [*LOOKED_AT, node])
    looking = Segment(model.network, parts_of(model.network).node(LOOKED_AT[-1]), LOOKED_AT)
    classes = sorted(item.wnid for item in ImageFolder(options.train).classes)
    pictures, _ = read_all(options.train, classes, SIZE, options.workers, options.per_class)
    held_out, _ = read_all(options.val, classes, SIZE, options.workers, min(options.per_class, 5))

    torch.manual_seed(options.seed)
    channels, side, _ = node_shapes(model.network, SIZE)[node]
    painter = Painter(channels, SIZE // side)
    painter.scale.copy_(scale_of(model, segment, pictures[:: max(1, len(pictures) // 512)]))
    painter.to(model.device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(painter.parameters(), lr=options.learning_rate, weight_decay=WEIGHT_DECAY)
    facts = {name: getattr(options, name) for name in SETTINGS}
    begun, losses = resume(checkpoint_of(options), painter, optimiser, facts, model.device)
    for step in tqdm(range(begun, options.steps), initial=begun, total=options.steps, unit="step", mininterval=10):
        # Everything random is a function of the seed and of where the run is, so that it can start anywhere.
        random = np.random.default_rng([options.seed, step])
        wanted = chosen(pictures, options.batch_size, random).to(model.device)
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * schedule(step, options.steps)
        losses.append(take_step(model, (segment, looking), painter, optimiser, wanted, random))
        if not math.isfinite(losses[-1]):
            raise GradinvError(f"The loss is not finite at step {step}; take a smaller --learning-rate.")
        if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
            print(f"step {step + 1}: loss {np.mean(losses):.4f}", flush=True)
            losses.clear()
            state = {"settings": facts, "step": step + 1, "losses": losses}
            state |= {"network": painter.state_dict(), "optimiser": optimiser.state_dict()}
            replace(checkpoint_of(options), partial(torch.save, state))

    painter.eval().half().float()  # what the file holds is what is measured
    report(model, segment, painter, held_out)
    state = {name: value.half().cpu().contiguous() for name, value in painter.state_dict().items()}
    metadata = {"model": model.name, "model_sha256": model.sha256, "node": node}
    replace(options.out, partial(safetensors.torch.save_file, state, metadata=metadata))
    checkpoint_of(options).unlink(missing_ok=True)


def chosen(pictures: Tensor, count: int, random: np.random.Generator) -> Tensor:
    """So many of the pictures at random, each flipped or not: uint8 → pixels (B, 3, S, S) in [0, 1]."""
    batch = pictures[torch.from_numpy(random.integers(0, len(pictures), count))]
    flipped = torch.from_numpy(random.random(count) < 0.5)
    batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
    return (batch / 255).contiguous(memory_format=torch.channels_last)


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate: a short linear warm-up, then a cosine to 0."""
    warmup = max(1, min(200, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1))) / 2


def noisy(activations: Tensor, random: np.random.Generator) -> Tensor:
    """As the layers' equations give them: each picture's with an error of its own, see NOISE, and none negative."""
    count = len(activations)
    low, high = (math.log(bound) for bound in NOISE)
    error = np.exp(random.uniform(low, high, count)) * (random.random(count) >= EXACT)
    noise = torch.from_numpy(random.standard_normal(activations.shape, dtype=np.float32)).to(activations)
    size = activations.square().mean((1, 2, 3), keepdim=True).sqrt()
    return (activations + torch.from_numpy(error).to(activations).view(-1, 1, 1, 1) * size * noise).clamp(min=0)


def take_step(
    model: Model,
    segments: tuple[Segment, Segment],
    painter: nn.Module,
    optimiser: torch.optim.Optimizer,
    wanted: Tensor,
    random: np.random.Generator,
) -> float:
    """segments: up to the node, and up to what the loss looks at."""
    segment, looking = segments
    with torch.no_grad():
        known = {name: F.relu(value) for name, value in segment(model.preprocessing.normalise(wanted)).items()}
    given = noisy(known[segment.upper], random).contiguous(memory_format=torch.channels_last)
    with torch.autocast(wanted.device.type, dtype=torch.bfloat16):
        painted = painter(given).float()
        found = looking(model.preprocessing.normalise(painted))
    loss = F.l1_loss(painted, wanted) + SSIM_WEIGHT * (1 - similarity(painted, wanted).mean())
    distances = [
        (F.relu(value.float()) - known[n]).square().sum() / known[n].square().sum() for n, value in found.items()
    ]
    loss = loss + FEATURES_WEIGHT * torch.stack(distances).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


@torch.no_grad()
def scale_of(model: Model, segment: Segment, pictures: Tensor) -> Tensor:
    """The root mean square of each of the node's channels over pictures, uint8: (C,)."""
    squares = [
        F.relu(segment(model.preprocessing.normalise(part.to(model.device) / 255))[segment.upper]).square()
        for part in pictures.split(64)
    ]
    mean = torch.cat(squares).mean((0, 2, 3))
    return (mean + 0.01 * mean.mean()).sqrt().half().float()


@torch.no_grad()
def report(model: Model, segment: Segment, painter: nn.Module, pictures: Tensor) -> None:
    """From exact activations, and from ones with an error of 0.03 and 0.1."""
    originals = pictures / 255
    inputs = torch.cat(
        [
            F.relu(segment(model.preprocessing.normalise(part.to(model.device)))[segment.upper])
            for part in originals.split(64)
        ]
    )
    for error in (0.0, 0.03, 0.1):
        generator = torch.Generator(inputs.device).manual_seed(0)
        noise = torch.randn(inputs.shape, generator=generator, device=inputs.device)
        given = (inputs + error * inputs.square().mean((1, 2, 3), keepdim=True).sqrt() * noise).clamp(min=0)
        painted = torch.cat([painter(part).clamp(0, 1).cpu() for part in given.split(64)])
        print(
            f"{len(pictures)} validation pictures, error {error:g}: {psnr(painted, originals).mean():.2f} dB, "
            f"SSIM {similarity(painted, originals).mean():.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
