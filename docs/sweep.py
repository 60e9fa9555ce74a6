"""Measure settings of the `demo` preset on validation pictures that no table reports; one CSV row a setting and batch.

    python docs/sweep.py --images DIR --out docs/sweep.csv --model resnet18-tiny --batches 2 \
        --base '{"iterations": 300}' '{}' '{"tv": 0.3}' '{"bn": "none"}'

DIR is an image folder in ImageNet layout. A batch takes one picture of each of K classes, both drawn from the later
half of each class's sorted files; what is reported, by `gradinv evaluate`, comes from the earlier half. Settings that
the CSV already holds for a batch are not run again. Without settings it only prints the table of what the CSV holds.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import random
from pathlib import Path

FIELDS = ["model", "batch_size", "batch", "setting", "iterations", "seeds", "psnr", "ssim", "seed_psnr", "seed_ssim",
          "constant_psnr", "constant_ssim", "distance", "seconds"]  # fmt: skip


def draw(model, folder: Path, size: int, batch: int):
    """Pixels (K, 3, S, S) and labels (K,) of one batch."""
    import torch
    from PIL import Image

    from gradinv.images import to_pixels

    rng = random.Random(f"{batch}")
    labels = rng.sample([i for i, c in enumerate(model.classes) if (folder / c.wnid).is_dir()], size)
    pixels = []
    for label in labels:
        files = sorted((folder / model.classes[label].wnid).iterdir())
        path = rng.choice(files[len(files) // 2 :])
        pixels.append(to_pixels(Image.open(path).convert("RGB"), model.preprocessing))
    return torch.stack(pixels), torch.tensor(labels)


def measure(task: tuple[str, str, int, int, str, dict]) -> dict:
    """Run one setting on one batch; → one row of the CSV."""
    import torch

    from gradinv.attack.inversion import invert
    from gradinv.client import observe
    from gradinv.config import AttackConfig
    from gradinv.metrics import constant_colour, pair, psnr, ssim
    from gradinv.models import load_model

    name, folder, size, batch, setting, changes = task
    torch.set_num_threads(1)
    model = load_model(name, device="cpu")
    pixels, labels = draw(model, Path(folder), size, batch)
    config = AttackConfig.preset("demo", name, **changes)
    observation = observe(model, pixels, labels, share_bn=config.bn == "exact")
    *_, last = invert(model, observation, config)
    restored = torch.tensor(last.labels)

    def score(images):
        paired = images[pair(images, restored, pixels, labels)]
        return psnr(paired, pixels).mean().item(), ssim(paired, pixels).mean().item()

    seeds = [score(images) for images in last.seeds]
    flat = constant_colour(pixels)
    together = score(last.consensus)
    return {
        "model": name, "batch_size": size, "batch": batch, "setting": setting,
        "iterations": config.iterations, "seeds": config.seeds,
        "psnr": round(together[0], 3), "ssim": round(together[1], 4),
        "seed_psnr": round(sum(s[0] for s in seeds) / len(seeds), 3),
        "seed_ssim": round(sum(s[1] for s in seeds) / len(seeds), 4),
        "constant_psnr": round(psnr(flat, pixels).mean().item(), 3),
        "constant_ssim": round(ssim(flat, pixels).mean().item(), 4),
        "distance": round(sum(last.distance) / len(last.distance), 4), "seconds": round(last.seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="JSON objects of config fields, each a setting")
    parser.add_argument("--images", type=Path, help="image folder, needed for settings to run")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--model", default="resnet18-tiny")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="number of the first batch")
    parser.add_argument("--base", default="{}", help="JSON object that every setting starts from")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    options = parser.parse_args()
    if options.settings:
        run(options)
    table(options.out)


def run(options: argparse.Namespace) -> None:
    """Measure what the CSV does not hold yet, and append it row by row."""
    done = set()
    if options.out.exists():
        with options.out.open(newline="") as file:
            done = {(r["model"], r["batch_size"], r["batch"], r["setting"]) for r in csv.DictReader(file)}
    base = json.loads(options.base)
    tasks = []
    for text in options.settings:
        changes = {**base, **json.loads(text)}
        setting = json.dumps(changes, sort_keys=True)
        for batch in range(options.first, options.first + options.batches):
            if (options.model, str(options.batch_size), str(batch), setting) not in done:
                tasks.append((options.model, str(options.images), options.batch_size, batch, setting, changes))
    with options.out.open("a", newline="") as file, multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        writer = csv.DictWriter(file, FIELDS)
        if not done:
            writer.writeheader()
        for row in pool.imap(measure, tasks, chunksize=1):
            writer.writerow(row)
            file.flush()


def table(path: Path) -> None:
    """Print the mean over the batches of each setting as a Markdown table."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault((row["model"], row["setting"]), []).append(row)
    shown = ["psnr", "ssim", "constant_psnr", "constant_ssim", "distance"]
    print("| model | setting | pictures |", " | ".join(shown), "|")
    print("|---" * (3 + len(shown)) + "|")
    for (model, setting), rows in groups.items():
        pictures = sum(int(row["batch_size"]) for row in rows)
        means = [sum(float(row[name]) for row in rows) / len(rows) for name in shown]
        print(f"| {model} | {setting} | {pictures} |", " | ".join(f"{mean:.3f}" for mean in means), "|")


if __name__ == "__main__":
    main()
