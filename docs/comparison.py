"""Put recorded runs of one batch one below the other: `python docs/comparison.py OUT.webp RUN [RUN …]`.

The first row shows the originals, each further one what a run rebuilt, in the originals' order. A run is what
`gradinv invert --out RUN` writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from gradinv.images import to_grid
from gradinv.recording.replay import Recording

SIDE = 192  # pixels of a picture


def main() -> None:
    """Write the picture, and say of each run how good it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", type=Path)
    asked = parser.parse_args()
    rows = []
    for path in asked.runs:
        recording = Recording.open(path)
        originals = recording.originals()
        if originals is None:
            parser.error(f"{path} has no originals")
        if not rows:
            rows.append(originals)
        elif not torch.equal(rows[0], originals):
            parser.error(f"{path} is of other pictures than {asked.runs[0]}")
        rows.append(recording.snapshot(recording.steps[-1]).consensus[recording.order()])
        measured = recording.run["metrics"]
        mean = {name: torch.tensor(measured["consensus"][name]).mean() for name in ("psnr", "ssim")}
        print(f"{path}: {mean['psnr']:.2f} dB, SSIM {mean['ssim']:.3f}")
    grid = to_grid(torch.stack(rows))
    size = (SIDE * len(rows[0]), SIDE * len(rows))
    grid.resize(size, Image.Resampling.BICUBIC).save(asked.out, quality=88, method=6)


if __name__ == "__main__":
    main()
