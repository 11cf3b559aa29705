"""The command `adadelta-dist plan`: what training will cost a rank, beside its peers."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.filesize import decimal
from torch import nn

from ..checkpoints.folder import plain
from ..checkpoints.sources import read
from ..policy import ShardPolicy
from ..terminal import errors, show_table
from . import model_plan
from .model_plan import ModelPlan
from .peers import PEERS
from .picture import draw
from .planner import KINDS, Cluster, Cost, sharded, smallest_world_size

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "b": 3, "t": 4}

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Model = Annotated[
    str,
    typer.Argument(
        help="A number of parameters (25M, 7B), package.module:callable that returns a module, or "
        "a checkpoint."
    ),
]
WorldSize = Annotated[int, typer.Option("--world-size", "-n", help="Ranks in all.")]
Stage = Annotated[int | None, typer.Option(help="1 or 2.", show_default="both")]
Replicas = Annotated[
    int, typer.Option(help="Groups of ranks with the same shards: hybrid sharding.")
]
ModelDtype = Annotated[
    Dtype | None, typer.Option(help="Of the parameters.", show_default="as they are")
]
Backend = Annotated[Literal["nccl", "gloo"], typer.Option(help="How ranks communicate.")]
RanksPerHost = Annotated[int, typer.Option(help="Ranks that share a host.")]
WithinGbit = Annotated[float, typer.Option(help="A rank sends this much in its host, Gbit/s.")]
BetweenGbit = Annotated[float, typer.Option(help="A host sends this much to others, Gbit/s.")]
BucketMb = Annotated[float, typer.Option(help="MiB in a bucket.")]
StateDtype = Annotated[
    Literal["float32", "bfloat16"] | None, typer.Option(help="Of the accumulators.")
]
WireDtype = Annotated[Dtype | None, typer.Option(help="What travels, if not the parameters' own.")]
Rounding = Annotated[
    bool, typer.Option("--stochastic-rounding", help="bfloat16 parameters without masters.")
]
Fit = Annotated[
    str | None, typer.Option(help="Also the smallest world size whose peak fits, say 80GB or 80GiB")
]
Picture = Annotated[Path | None, typer.Option(help="A PNG file to write.")]
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]


def plan(
    model: Model,
    world_size: WorldSize = 8,
    stage: Stage = None,
    replicas: Replicas = 1,
    dtype: ModelDtype = None,
    backend: Backend = "nccl",
    ranks_per_host: RanksPerHost = 8,
    within_gbit: WithinGbit = 2400.0,
    between_gbit: BetweenGbit = 400.0,
    bucket_mb: BucketMb = 25.0,
    state_dtype: StateDtype = None,
    reduce_dtype: WireDtype = None,
    gather_dtype: WireDtype = None,
    stochastic_rounding: Rounding = False,
    fit: Fit = None,
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """Say what training will cost a rank: memory, bytes and time a step, beside its peers.

    Nothing is allocated. Activations come on top.
    """
    with errors():
        planned = _model(model).cast(_dtype(dtype))
        if not planned.numel:
            raise ValueError(f"{model} has no parameters to train")
        cluster = Cluster(world_size, replicas, ranks_per_host, backend, within_gbit, between_gbit)
        policy = ShardPolicy(
            bucket_mb=bucket_mb,
            stochastic_rounding=stochastic_rounding,
            state_dtype=_dtype(state_dtype),
            reduce_dtype=_dtype(reduce_dtype),
            gather_dtype=_dtype(gather_dtype),
        )
        stages = [replace(policy, stage=s) for s in ((1, 2) if stage is None else (stage,))]
        asked: list[Callable[[ModelPlan, Cluster], Cost]]
        asked = [*(partial(sharded, policy=of_stage) for of_stage in stages), *PEERS]
        costs = [cost(planned, cluster) for cost in asked]
        limit = None if fit is None else _nbytes(fit)
        sizes = [
            None if limit is None else smallest_world_size(partial(cost, planned), cluster, limit)
            for cost in asked
        ]
        if picture is not None:
            draw(costs, limit, f"{model} on {world_size} ranks", picture)
    if as_json:
        print(json.dumps(_facts(planned, cluster, policy, costs, limit, sizes), indent=1))
    else:
        _show(planned, cluster, costs, fit, sizes)


def _model(text: str) -> ModelPlan:
    """The model that an argument means.

    Raises:
        ValueError: it means none.
    """
    count = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbgt]?)", text, re.I)
    if count and not Path(text).exists():
        return model_plan.from_count(round(float(count[1]) * 1000 ** _POWERS[count[2].lower()]))
    if ":" in text and not Path(text).exists():
        return model_plan.from_module(_build(text))
    return model_plan.from_content(read(Path(text)))


def _build(text: str) -> nn.Module:
    """Call `package.module:callable` on the meta device.

    Raises:
        ValueError: it cannot be, or what comes is no module.
    """
    module, _, name = text.partition(":")
    sys.path.insert(0, "")  # as `python -m` does
    try:
        with torch.device("meta"):
            built = getattr(import_module(module), name)()
    except Exception as error:  # of the user's code
        raise ValueError(f"{text} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    if not isinstance(built, nn.Module):
        raise ValueError(f"{text} returned a {type(built).__name__}, wanted a torch.nn.Module")
    return built


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _nbytes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", text, re.I)
    if found is None:
        raise ValueError(f"--fit {text}: wanted a size such as 80GB or 80GiB")
    return float(found[1]) * float(1024 if found[3] else 1000) ** _POWERS[found[2].lower()]


def _show(
    model: ModelPlan,
    cluster: Cluster,
    costs: Sequence[Cost],
    fit: str | None,
    sizes: Sequence[int | None],
) -> None:
    dtypes = ", ".join(dict.fromkeys(str(p.dtype)[6:] for p in model.parameters))
    frozen = f", {decimal(model.frozen_bytes)} frozen" if model.frozen_bytes else ""
    print(f"model: {model.numel:,} parameters, {decimal(model.nbytes)} of {dtypes}{frozen}")
    hybrid = f", {cluster.replicas} replicas of {cluster.shards}" if cluster.replicas > 1 else ""
    print(
        f"ranks: {cluster.world_size}{hybrid}, {cluster.ranks_per_host} a host, {cluster.backend}"
    )
    kinds = [kind for kind in KINDS if any(cost.memory.get(kind) for cost in costs)]
    rows = [
        [cost.peer, *(_size(cost.memory.get(kind, 0)) for kind in kinds), _size(cost.peak)]
        for cost in costs
    ]
    print("\nmemory of a rank:")
    show_table(["", *kinds, "peak"], rows, right=(*kinds, "peak"))
    if "masters" in kinds:
        torchs = "DDP, ZeroRedundancyOptimizer and FSDP2"
        print(f"({torchs} have no masters: all is in the parameters' dtype)")
    header = ["", "sent by a rank", "leaves a host", "seconds", "largest share"]
    rows = [
        [
            cost.peer,
            _size(cost.traffic.sent),
            _size(cost.traffic.crossing),
            f"{cost.traffic.seconds:.3g}",
            "-" if cost.balance is None else f"{cost.balance:.4f}",
        ]
        for cost in costs
    ]
    if fit is not None:
        header.append(f"ranks for {fit}")
        rows = [[*row, str(size or "never")] for row, size in zip(rows, sizes, strict=True)]
    print("\na step, and the largest share of what is sharded over the mean:")
    show_table(header, rows, right=header[1:])


def _size(nbytes: float) -> str:
    return decimal(round(nbytes)) if round(nbytes) else "-"


def _facts(
    model: ModelPlan,
    cluster: Cluster,
    policy: ShardPolicy,
    costs: Sequence[Cost],
    limit: float | None,
    sizes: Sequence[int | None],
) -> dict[str, Any]:
    """All of it, for scripts; bytes, seconds, Gbit/s."""
    sizes_of = {"frozen_bytes": model.frozen_bytes, "nbytes": model.nbytes, "numel": model.numel}
    facts = [asdict(cost) | {"peak": cost.peak} for cost in costs]
    if limit is not None:
        facts = [f | {"smallest_world_size": s} for f, s in zip(facts, sizes, strict=True)]
    rules = {key: plain(value) for key, value in asdict(policy).items() if key != "stage"}
    return {
        "model": sizes_of,
        "cluster": asdict(cluster),
        "policy": rules,
        "limit_bytes": limit,
        "costs": facts,
    }
