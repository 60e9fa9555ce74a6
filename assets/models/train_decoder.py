"""The recipe of the preview decoders: learn to paint a picture from a network's pooled features of it.

    python assets/models/train_decoder.py --model resnet18-tiny --train DIR --val DIR --out FILE

Run it where gradinv is installed. --train and --val are folders in ImageNet layout, as for train.py. All pictures are
held in memory, and the features of each and of its mirror image, which are computed once.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from train import check_out, read_all, recipe, replace, run

from gradinv.metrics import SSIM_WINDOW, constant_colour, psnr
from gradinv.models import Model, load_model
from gradinv.prior import SIZE, Decoder
from gradinv.sources import ImageFolder
from gradinv.types import GradinvError

# The loss: MSE_WEIGHT · MSE + L1 + SSIM_WEIGHT · (1 − SSIM). Features recovered from a gradient are not exact: NOISE.
MSE_WEIGHT, SSIM_WEIGHT, NOISE = 5, 0.1, 0.02


def main(arguments: list[str] | None = None) -> None:
    run(train, parse(arguments))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = recipe(__doc__, "decoder")
    add = parser.add_argument
    add("--model", required=True, help="the network whose features are painted: a name or a weights file")
    add("--epochs", type=int, default=3, metavar="N", help="passes over pictures and mirror images (%(default)s)")
    add("--batch-size", type=int, default=128, metavar="N", help="pictures a step (%(default)s)")
    add("--learning-rate", type=float, default=1e-3, metavar="X", help="AdamW's at the start (%(default)s)")
    options = parser.parse_args(arguments)
    check_out(parser, options.out)
    if options.epochs < 1 or options.batch_size < 1 or options.learning_rate <= 0:
        parser.error("--epochs and --batch-size must be at least 1, --learning-rate more than 0")
    return options


def train(options: argparse.Namespace) -> None:
    model = load_model(options.model, device=options.device, image_size=SIZE)
    classes = sorted(item.wnid for item in ImageFolder(options.train).classes)
    pictures, _ = read_all(options.train, classes, SIZE, options.workers)
    held_out, _ = read_all(options.val, classes, SIZE, options.workers)
    # [n, 0] is picture n, [n, 1] its mirror image.
    features = torch.stack([features_of(model, pictures), features_of(model, pictures.flip(3))], 1)

    torch.manual_seed(options.seed)
    decoder = Decoder(features.shape[-1]).to(model.device)
    decoder.scale.fill_(features.float().square().mean().sqrt())
    decoder.train()
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=options.learning_rate)
    steps = options.epochs * math.ceil(2 * len(pictures) / options.batch_size)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    random = np.random.default_rng(options.seed)
    with tqdm(total=steps, unit="step") as bar:
        for _ in range(options.epochs):
            for chosen in torch.from_numpy(random.permutation(2 * len(pictures))).split(options.batch_size):
                number, mirrored = chosen // 2, (chosen % 2).bool()
                wanted = pictures[number]
                wanted = torch.where(mirrored[:, None, None, None], wanted.flip(3), wanted).to(model.device) / 255
                given = features[number, mirrored.long()].to(model.device, torch.float32)
                loss = distance(decoder(given * (1 + NOISE * torch.randn_like(given))), wanted)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                decay.step()
                if not math.isfinite(loss.item()):
                    raise GradinvError("The loss is not finite; take a smaller --learning-rate.")
                bar.set_postfix_str(f"loss {loss.item():.4f}")
                bar.update()

    decoder.eval().half().float()  # what the file holds is what is measured
    report(model, decoder, held_out)
    state = {name: value.half() if name != "scale" else value for name, value in decoder.state_dict().items()}
    metadata = {"model": model.name, "model_sha256": model.sha256}
    packed = {name: value.cpu().contiguous() for name, value in state.items()}
    replace(options.out, partial(safetensors.torch.save_file, packed, metadata=metadata))


@torch.no_grad()
def features_of(model: Model, pictures: Tensor) -> Tensor:
    """Pictures (N, 3, S, S) uint8 → their pooled features (N, D) in half precision, on the CPU."""
    found: list[Tensor] = []
    handle = model.final_layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].half().cpu()))
    try:
        for batch in tqdm(pictures.split(256), desc="features", unit="batch"):
            model.network(model.preprocessing.normalise(batch.to(model.device) / 255))
    finally:
        handle.remove()
    return torch.cat(found)


def similarity(images: Tensor, originals: Tensor) -> Tensor:
    """SSIM as in gradinv.metrics, but differentiable: pixels (B, 3, S, S) in [0, 1] → one number an image (B,)."""
    window = SSIM_WINDOW

    def mean(x: Tensor) -> Tensor:  # over rows and then columns takes a fraction of the time
        return F.avg_pool2d(F.avg_pool2d(x, (1, window), 1), (window, 1), 1)

    images, originals = images.contiguous(), originals.contiguous()
    a, b = mean(images), mean(originals)
    unbiased = window**2 / (window**2 - 1)
    variances = unbiased * (mean(images**2) - a**2), unbiased * (mean(originals**2) - b**2)
    covariance = unbiased * (mean(images * originals) - a * b)
    one, two = 0.01**2, 0.03**2
    shown = (2 * a * b + one) * (2 * covariance + two) / ((a**2 + b**2 + one) * (sum(variances) + two))
    return shown.mean((1, 2, 3))


def distance(images: Tensor, originals: Tensor) -> Tensor:
    """What is minimised; a scalar."""
    loss = MSE_WEIGHT * F.mse_loss(images, originals) + F.l1_loss(images, originals)
    return loss + SSIM_WEIGHT * (1 - similarity(images, originals).mean())


@torch.no_grad()
def report(model: Model, decoder: Decoder, pictures: Tensor) -> None:
    features = features_of(model, pictures).float()
    painted = torch.cat([decoder(part.to(model.device)).cpu() for part in features.split(256)])
    originals = pictures / 255
    print(
        f"{len(pictures)} validation pictures: {psnr(painted, originals).mean():.2f} dB, "
        f"SSIM {similarity(painted, originals).mean():.4f}; "
        f"a constant colour: {psnr(constant_colour(originals), originals).mean():.2f} dB"
    )


if __name__ == "__main__":
    main()
