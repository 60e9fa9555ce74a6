"""One run on several processes: torchrun starts the ranks, each works on its share of the seeds.

Without torchrun there is one rank, `ALONE`, for which nothing here does anything.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gradinv.types import GradinvError, memory_exhausted

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others: longer than one evaluation of a large batch takes on a CPU. One that ends is
noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: which one this is, and how many there are.

    What talks is called on all ranks, in the same order, and raises GradinvError on those that are left where one is
    lost. CPU tensors go by gloo, CUDA tensors by NCCL.
    """

    rank: int = 0
    count: int = 1

    def share(self, seeds: int, rank: int | None = None) -> range:
        """The seeds of this rank, or of another: ranges in the order of the ranks, their lengths at most 1 apart.

        Raises GradinvError where there are fewer seeds than ranks.
        """
        if seeds < self.count:
            raise GradinvError(
                f"{self.count} ranks cannot share {seeds} {'seed' if seeds == 1 else 'seeds'}; take more seeds, or "
                f"start torchrun with --nproc-per-node={seeds}."
            )
        rank = self.rank if rank is None else rank
        return range(seeds * rank // self.count, seeds * (rank + 1) // self.count)

    def check(self, device: torch.device) -> None:
        """Raises GradinvError where the ranks of this machine cannot compute on such devices."""
        if self.count == 1 or device.type == "cpu":
            return
        if device.type != "cuda":
            raise GradinvError(f"Several ranks compute on CPUs or on CUDA devices, not on {device}; take --device cpu.")
        here, present = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > present:
            raise GradinvError(
                f"torchrun starts {here} ranks on a machine with {present} CUDA devices; start one for each with "
                f"--nproc-per-node={present}, or take --device cpu."
            )
        if device.index != torch.cuda.current_device():
            raise GradinvError(
                f"Each rank takes a CUDA device of its own, so {device} is not for all; take --device cuda."
            )

    def any(self, *flags: bool) -> list[bool]:
        """For each of the flags whether it is set on any rank."""
        if self.count == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int32)
        with _connected():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return [bool(flag) for flag in found]

    def sum(self, mine: Tensor) -> Tensor:
        """Over all seeds: this rank's (g, …) → (…), the same on each rank."""
        total = mine.sum(0)
        if self.count > 1:
            with _connected():
                dist.all_reduce(total)
        return total

    def gather(self, mine: Tensor, seeds: int) -> Tensor:
        """What each rank holds of its seeds (g, …), on the CPU, → (G, …) of all `seeds`, on each rank."""
        if self.count == 1:
            return mine
        # Shares differ in length, so each rank in turn tells the others its own.
        parts = [mine.new_empty(len(self.share(seeds, rank)), *mine.shape[1:]) for rank in range(self.count)]
        parts[self.rank] = mine.contiguous()
        with _connected():
            for rank, part in enumerate(parts):
                dist.broadcast(part, rank)
        return torch.cat(parts)

    def tell(self, what: T | None) -> T | None:
        """What the first rank says, whatever the others say; on these its tensors are on the CPU."""
        if self.count == 1:
            return what
        packed = io.BytesIO()
        if self.rank == 0:
            torch.save(what, packed)
        box = [packed.getvalue()]
        with _connected():
            dist.broadcast_object_list(box, 0)
        # Not from outside: these bytes were packed by the same program on another rank.
        return what if self.rank == 0 else torch.load(io.BytesIO(box[0]), map_location="cpu", weights_only=False)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank raises within is raised on every rank at the end of it: none goes on alone. Nothing within may
        talk."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        reasons: list[str | None] = [None] * self.count
        if self.count > 1:
            with _connected():
                dist.all_gather_object(reasons, None if error is None else f"{error}")
        if error is not None and self.rank == 0:
            raise error
        if reason := next((f"On rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason), None):
            raise GradinvError(reason) from error


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """While open, this process and the others that torchrun started with it are connected; without it, `ALONE`.

    On a machine with CUDA devices each rank's current one is its own. Raises GradinvError where they do not meet.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    with _connected():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda and dist.is_nccl_available() else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's own; NCCL's is one, too
        if memory_exhausted(error) is not None:  # this rank's own
            raise
        raise GradinvError(
            f"A rank was lost, or did not answer within {TIMEOUT.seconds // 60} minutes; see what torchrun says of it, "
            "and resume the run."
        ) from error
