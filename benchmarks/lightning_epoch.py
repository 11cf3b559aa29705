"""An epoch with Lightning's Trainer: strategy "sharded_adadelta" against stock "ddp".

    python -m benchmarks.lightning_epoch --data folder/of/mnist

Two gloo ranks of one thread train a perceptron of 25 M parameters on MNIST, one epoch with each
peer in turn, several times. An epoch is what the Trainer does from `on_train_epoch_start` to
`on_train_epoch_end`, of the slower rank, its dataloader and progress included. It prints medians,
and the median of the ratios within a round.
"""

import argparse
import gzip
import logging
import os
import statistics
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

RANKS, WIDTHS, BATCH = 2, (784, 3350, 3350, 3350, 10), 64
PEERS = {
    "ddp, torch.optim.Adadelta": ("ddp", "torch"),
    "ddp, adadelta_dist.Adadelta": ("ddp", "fused"),
    "sharded_adadelta, torch.optim.Adadelta": ("sharded_adadelta", "torch"),
}
BASELINE = next(iter(PEERS))


def mnist(folder: Path | None) -> TensorDataset:
    """MNIST's training set, or random numbers of its shape: the time is the same."""
    if folder is None:
        return TensorDataset(torch.randn(60_000, 784), torch.randint(10, (60_000,)))
    images, labels = (
        _bytes(folder, f"train-{part}-ubyte") for part in ("images-idx3", "labels-idx1")
    )
    pixels = torch.from_numpy(images[16:].reshape(-1, 784)).float().div_(255)
    return TensorDataset(pixels, torch.from_numpy(labels[8:]).long())


def _bytes(folder: Path, name: str) -> np.ndarray:
    packed = folder / f"{name}.gz"
    content = gzip.decompress(packed.read_bytes()) if packed.exists() else None
    return np.frombuffer(bytearray(content or (folder / name).read_bytes()), np.uint8)


def fit(peer: str, data: TensorDataset, batches: int | None) -> float:
    """Train for one epoch, from new. Returns the seconds of the slower rank. Collective."""
    import lightning.pytorch as pl

    import adadelta_dist
    import adadelta_dist.strategies.lightning

    strategy, kind = PEERS[peer]

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            layers: list[torch.nn.Module] = []
            for fan_in, fan_out in pairwise(WIDTHS):
                layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.ReLU()]
            self.network = torch.nn.Sequential(*layers[:-1])
            self.seconds = 0.0

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            make = adadelta_dist.Adadelta if kind == "fused" else torch.optim.Adadelta
            return make(self.parameters(), lr=1.0, rho=0.95)

        def on_train_epoch_start(self) -> None:
            dist.barrier()
            self.seconds = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            dist.barrier()
            self.seconds = time.perf_counter() - self.seconds

    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        max_epochs=1,
        limit_train_batches=batches,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    sampler = DistributedSampler(data, RANKS, dist.get_rank())
    net = Net()
    trainer.fit(net, DataLoader(data, BATCH, sampler=sampler))
    return net.seconds


def work(rank: int, folder: str, chosen: argparse.Namespace) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": RANKS}
    ranks |= {"LOCAL_WORLD_SIZE": RANKS, "TORCHELASTIC_RUN_ID": "benchmark"}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # the group is there already
    warnings.simplefilter("ignore")  # on the number of dataloader workers
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    data = mnist(chosen.data)
    for peer in PEERS:
        fit(peer, data, 3)  # compile, allocate
    found: dict[str, list[float]] = {peer: [] for peer in PEERS}
    order = list(PEERS)
    for _ in range(chosen.repetitions):
        for peer in order:
            found[peer].append(fit(peer, data, chosen.batches))
        order.append(order.pop(0))
    if rank == 0:
        _print(found, chosen.batches)
    dist.destroy_process_group()


def _print(found: dict[str, list[float]], batches: int | None) -> None:
    numel = sum((a + 1) * b for a, b in pairwise(WIDTHS))
    epoch = "an epoch" if batches is None else f"{batches} batches"
    print(f"{numel / 1e6:.1f} M parameters, {RANKS} ranks, {epoch} of {BATCH} images a rank")
    print(f"{'':<42}{'seconds':>9}{'best':>9}{'ratio':>8}")
    for peer, seconds in found.items():
        ratio = statistics.median(t / b for t, b in zip(seconds, found[BASELINE], strict=True))
        print(f"{peer:<42}{statistics.median(seconds):>9.2f}{min(seconds):>9.2f}{ratio:>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of MNIST's IDX files; default: noise")
    parser.add_argument("--batches", type=int, help="of an epoch; default: all 469")
    parser.add_argument("--repetitions", type=int, default=3, help="epochs of each peer")
    with tempfile.TemporaryDirectory() as folder:
        arguments: Any = (folder, parser.parse_args())
        mp.spawn(work, arguments, nprocs=RANKS)


if __name__ == "__main__":
    main()
