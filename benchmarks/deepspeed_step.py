"""DeepSpeed's own step with our optimizer and with torch's "Adadelta", stage by stage.

    python -m benchmarks.deepspeed_step
    python -m benchmarks.deepspeed_step --settings 3 3-offload

Two gloo ranks of one thread hold both engines of a stage and let them step in turns, so that
whatever else the machine does meets both. It prints medians over the repetitions, the slower rank
counting, and the median of the ratios of neighbouring steps.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS, LAYERS, WIDTH = 2, 6, 2048
SETTINGS = ["0", "1", "2", "3", "1-offload", "2-offload", "3-offload"]


def build(setting: str, kind: str) -> Any:
    from adadelta_dist.strategies.deepspeed import initialize

    zero: dict[str, Any] = {"stage": int(setting[0])}
    if "offload" in setting:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_batch_size": RANKS,
        "gradient_clipping": 0.0,
        "optimizer": {"type": kind, "params": {"lr": 1.0, "rho": 0.95}},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    return initialize(model=torch.nn.Sequential(*layers), config=config)[0]


def step_seconds(engine: Any) -> float:
    """The slower rank's time for `engine.step()` after one backward."""
    engine.backward(engine(torch.ones(1, WIDTH)).square().mean())
    dist.barrier()
    start = time.perf_counter()
    engine.step()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def work(rank: int, folder: str, settings: list[str], repetitions: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("ignore")  # DeepSpeed's own
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    if rank == 0:
        print(f"{LAYERS * WIDTH**2 / 1e6:.1f} M parameters, {RANKS} ranks, DeepSpeed's step in ms")
        print(f"{'stage':<18}{'ours':>20}{'ms':>8}{'Adadelta':>10}{'ratio':>8}")
    for setting in settings:
        kind = "ShardedAdadelta" if setting == "0" else "FusedAdadelta"
        ours, theirs = build(setting, kind), build(setting, "Adadelta")
        for engine in (ours, theirs):  # compile, allocate
            step_seconds(engine)
        pairs = [(step_seconds(ours), step_seconds(theirs)) for _ in range(repetitions)]
        a, b = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(y / x for x, y in pairs)
        if rank == 0:
            print(f"{setting:<18}{kind:>20}{a:>8.0f}{b:>10.0f}{ratio:>8.2f}", flush=True)
        del ours, theirs
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, args.settings, args.repetitions), nprocs=RANKS)


if __name__ == "__main__":
    main()
