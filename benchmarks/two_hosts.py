"""An iteration across two hosts: network namespaces with a link of 1, 2 and 10 Gbit/s.

Each namespace runs `torchrun --nnodes 2`. All peers stay in the same processes while the rate
changes, and bytes are counted where they leave a host. Needs root and iproute2.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from . import iteration, namespaces, ranks
from .iteration import Found
from .peers import BF16_WIRE, HYBRID, OURS, PEERS, Peer
from .report import Table
from .tasks import Perceptron, Task, numel

PORT = 29400
SECONDS = 900
"""Within which all must be over: something hangs otherwise."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        task: what is trained.
        peers: by whom.
        rates: of the link, in Gbit/s.
        per_host: ranks.
        turns: of each peer at each rate.
        iterations: of a turn; what overlaps with the next forward needs one.
    """

    task: Task
    peers: Sequence[Peer]
    rates: Sequence[int]
    per_host: int = 1
    turns: int = 4
    iterations: int = 2


ALL = [*PEERS, *BF16_WIRE]
SHARDED = [OURS, HYBRID]
PLANS = [
    Plan(Perceptron((1024, 3072, 3072, 3072, 1000)), ALL, (1, 2, 10)),
    Plan(Perceptron((1024, 1152, 1152, 1152, 1000)), SHARDED, (1,), per_host=2, turns=7),
]
QUICK = [
    Plan(Perceptron((16, 32, 8), batch=4), [*ALL, HYBRID], (1,), per_host=2, turns=2, iterations=2)
]


def measure(quick: bool) -> list[Table]:
    """A table for each plan and rate; one that says why where there are none."""
    try:
        with namespaces.two_hosts() as hosts:
            return [table for plan in (QUICK if quick else PLANS) for table in _tables(plan, hosts)]
    except namespaces.MissingError as reason:
        return [Table("two hosts", "", "", [], skipped={"all": str(reason)})]


def _tables(plan: Plan, hosts: Sequence[str]) -> list[Table]:
    ranks_ = f"2 hosts x {plan.per_host} rank{'s' * (plan.per_host > 1)}"
    note = (
        f"{str(plan.task).capitalize()}, {numel(plan.task) / 1e6:.3g} M parameters in fp32, "
        f"{ranks_} of 1 thread, {plan.turns} turns of {plan.iterations} iterations. Two network "
        "namespaces on one machine, their link limited in both directions. Bytes are those that "
        "left a host."
    )
    tables = []
    for rate, found in _launch(plan, hosts).items():
        short = f"{rate} Gbit/s, {ranks_}"
        title = f"two hosts: {short}"
        tables.append(
            iteration.table(title, short, note, plan.peers, found, plan.iterations, "host")
        )
    return tables


def _launch(plan: Plan, hosts: Sequence[str]) -> Mapping[int, Found]:
    """`torchrun` on each host; what global rank 0 found."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plan").write_bytes(pickle.dumps(plan))
        processes = [
            subprocess.Popen(
                namespaces.inside(host, _torchrun(plan, number, folder)),
                env=os.environ | _environment(),
                cwd=Path(__file__).parents[1],
            )
            for number, host in enumerate(hosts)
        ]
        try:
            codes = [process.wait(SECONDS) for process in processes]
        finally:
            for process in processes:
                process.kill()  # its workers go with the namespace
                process.wait()
        if any(codes):
            raise RuntimeError(f"torchrun ended with {codes}; its output says why")
        return pickle.loads((Path(folder) / "answer").read_bytes())  # type: ignore[no-any-return]


def _torchrun(plan: Plan, number: int, folder: str) -> list[str]:
    nodes = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", str(plan.per_host)]
    master = ["--master-addr", namespaces.ADDRESSES[0], "--master-port", str(PORT)]
    launcher = [sys.executable, "-m", "torch.distributed.run", *nodes, *master]
    return [*launcher, "-m", "benchmarks.two_hosts", folder]


def _environment() -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": namespaces.INTERFACE,
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def _work(folder: Path) -> None:
    """What each rank does."""
    plan: Plan = pickle.loads((folder / "plan").read_bytes())
    dist.init_process_group("gloo", timeout=ranks.TIMEOUT)
    try:
        found = ranks.prepared(_at_all_rates, (plan,))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        (folder / "answer").write_bytes(pickle.dumps(found))


def _at_all_rates(plan: Plan) -> dict[int, Found]:
    found = {}
    for rate in plan.rates:
        if int(os.environ["LOCAL_RANK"]) == 0:
            namespaces.limit(rate)
        dist.barrier()
        title = f"two hosts, {rate} Gbit/s"
        found[rate] = iteration.take_turns(
            plan.task, plan.peers, plan.turns, plan.iterations, title, namespaces.INTERFACE
        )
    return found


if __name__ == "__main__":
    from benchmarks import two_hosts  # what is pickled is this module's by its own name

    two_hosts._work(Path(sys.argv[1]))
