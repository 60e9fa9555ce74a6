"""Record a run and play it back: JSON, CSV and pictures in a folder or in memory, never a pickle.

A run is readable at any moment, also after the process was killed: run.json and pictures are replaced whole, the
curves grow line by line and a torn last line is ignored. Layout of format 1:

    run.json            what was run, where, and how it went
    curves.csv          one row a record and seed: step, seed, seconds, distance, psnr (mean over the seed's images),
                        consensus_psnr (the same for the consensus, in every row), <term>.raw and <term>.weighted
    frames/000120.webp  mosaic at that step, in the order of the restored labels; rows: each seed, then the consensus
    images/             original_00.png, seed0_00.png, …, consensus_00.png, lossless: the originals from the start, the
                        reconstructions at the end, with prior_00.png, … what a learned prior painted, where there is
                        one. Where originals are known, number n is paired with original n.
    observation.safetensors, state.safetensors
                        while a run that can be resumed is not done: what it inverts, and where it last stood

A live run and its replay are the same thing to everything that draws: snapshots.
"""
