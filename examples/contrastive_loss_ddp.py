"""The contrastive loss over two processes (gloo, DistributedDataParallel), equal to one process.

    python examples/contrastive_loss_ddp.py

Every process holds its own clips and compares them with the clips of all. DDP averages the
gradients, and ``global_mean`` is scaled so that the average is the gradient of the whole batch.
On GPUs use torchrun and the nccl backend; the loss stays as it is.
"""

import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vatt_fast import contrastive_terms
from vatt_fast.collectives import process_group
from vatt_fast.losses import global_mean

WORLD, CLIPS, DIM = 2, 6, 32  # processes, clips of each, width of an embedding


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.video, self.audio = nn.Linear(48, DIM), nn.Linear(24, DIM)

    def forward(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        return self.video(video), self.audio(audio)


def gradients(model: nn.Module, rows: slice) -> list[Tensor]:
    """One backward pass on these rows of the batch."""
    generator = torch.Generator().manual_seed(1)
    video, audio = (torch.randn(WORLD * CLIPS, n, generator=generator) for n in (48, 24))
    x, y = model(video[rows], audio[rows])
    loss = global_mean(*contrastive_terms(x, y, scale=1 / 0.07, form="paper"))
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def process(rank: int, folder: str) -> None:
    where = dict(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    mine = slice(rank * CLIPS, (rank + 1) * CLIPS)
    with process_group("gloo", **where):
        # no variable holds the DDP module: one that outlives the process group may hang at the exit
        found = gradients(DistributedDataParallel(TwoTowers()), mine)
        if rank == 0:
            torch.save(found, Path(folder) / "gradients.pt")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (folder,), nprocs=WORLD)
        several = torch.load(Path(folder) / "gradients.pt")
    one = gradients(TwoTowers(), slice(None))
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(several, one, strict=True))
    print(f"gradients of {WORLD} processes against one: relative difference {error:.1e}")
    assert error < 1e-5
