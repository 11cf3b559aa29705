"""Reading what `engine.save_checkpoint` wrote, at any stage and world size."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .deepspeed_checkpoint import Checkpoint, check_adadelta, from_torch, load, one_step
from .deepspeed_state import UNIVERSAL, restore_groups

_OF_MODEL_FILE = ("module", "optimizer", "frozen_param_fragments", "param_shapes")


@dataclass(frozen=True)
class _Piece:
    """Elements [start, start + numel) of one flat group of one rank."""

    rank: int
    flat: int
    start: int
    numel: int


def read_deepspeed(folder: Path) -> Checkpoint:
    """What `engine.save_checkpoint` wrote at any stage, with Adadelta in any of its forms.

    Args:
        folder: of one tag, or the folder above it, whose file "latest" names the tag.

    Raises:
        FileNotFoundError: no checkpoint, or shards are missing.
        ValueError: another optimizer's state, shards of different steps, or a checkpoint with
            tensor, pipeline or expert parallelism.
    """
    if (folder / "latest").is_file():
        folder = folder / (folder / "latest").read_text().strip()
    found = folder.glob("*mp_rank_*_model_states.pt")
    files = sorted((file for file in found if "expert" not in file.name), key=_rank_of)
    if not files:
        raise FileNotFoundError(f"{folder} holds no DeepSpeed checkpoint: no *_model_states.pt")
    models = [load(file) for file in files]
    if "zero_pp_rank" in files[0].name:  # stage 3, where frozen parameters are sharded as well
        _of_every_rank(folder, files, models[0]["dp_world_size"])
    _check_parallelism(folder, files, models[0])
    if models[0]["optimizer"] is not None:
        return _stage_zero(models[0])
    return _sharded(folder, models)


def _check_parallelism(folder: Path, files: Sequence[Path], model: dict[str, Any]) -> None:
    degrees = model.get("checkpoint_parallel_dimensions") or {}
    parallel = model.get("mp_world_size", 1) > 1 or any(n > 1 for n in degrees.values())
    if parallel or any("mp_rank_00_model" not in file.name for file in files):
        raise ValueError(
            f"{folder} was saved with tensor or pipeline parallelism: ranks hold slices, each "
            "layer has its own way to join them, and this knows none of them. Go on with it "
            "on the same ranks."
        )
    if model.get("module") is None or "num_experts" in model or list(folder.glob("*expert*")):
        raise ValueError(
            f"{folder} holds experts or pipeline stages in files of their own, whose parameters "
            "other ranks share than the rest. It is not converted."
        )


def _stage_zero(model: dict[str, Any]) -> Checkpoint:
    outer = model["optimizer"]
    half = "fp32_groups" in outer
    optimizer = outer["optimizer_state_dict"] if half else outer
    groups, weights = optimizer["param_groups"], dict(model["module"])
    if "param_names" not in groups[0]:  # torch's own Adadelta: in the model's order
        names = [name for name in weights if name not in model["buffer_names"]]
        if len(groups) > 1 or len(names) != len(groups[0]["params"]):
            raise ValueError(
                "the checkpoint of stage 0 does not say which state is whose: torch's Adadelta had "
                f"{len(groups)} parameter groups, and {sum(len(g['params']) for g in groups)} of "
                f'{len(names)} parameters. "FusedAdadelta" and "ShardedAdadelta" write their names.'
            )
        optimizer = optimizer | {"param_groups": [groups[0] | {"param_names": names}]}
    if half:
        names = [name for group in optimizer["param_groups"] for name in group["param_names"]]
        masters = [p for group in outer["fp32_groups"] for p in group]
        weights |= dict(zip(names, masters, strict=True))
    return replace(from_torch(weights, optimizer), engine=_engine(model))


def _engine(model: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key not in _OF_MODEL_FILE}


def _sharded(folder: Path, models: list[dict[str, Any]]) -> Checkpoint:
    shards = _load_shards(folder, models[0]["dp_world_size"])
    third = "fp32_flat_groups" in shards[0]
    bases = [s["optimizer_state_dict" if third else "base_optimizer_state"] for s in shards]
    masters = [
        s["fp32_flat_groups" if third else "single_partition_of_fp32_groups"] for s in shards
    ]
    if any(isinstance(base, list) for base in bases):
        raise ValueError(
            f"{folder} was saved with elastic_checkpoint, which drops the hyperparameters. Save it "
            "with elastic_checkpoint off."
        )
    groups = [dict(group) for group in bases[0]["param_groups"]]
    restore_groups(groups)
    check_adadelta(groups, {i: e for base in bases for i, e in base["state"].items()})
    shapes_by_flat = models[0]["param_shapes"]
    shapes = {name: shape for flat in shapes_by_flat for name, shape in flat.items()}
    pieces = _pieces_of_stage_3(shapes_by_flat, len(shards)) if third else _pieces(shards)
    _check_whole(folder, shapes, pieces)
    step = one_step(
        {
            f"flat group {i} of rank {rank}": float(entry["step"])
            for rank, base in enumerate(bases)
            for i, entry in base["state"].items()
        }
    )

    def read(name: str, key: str) -> Tensor:
        parts = []
        for piece in pieces[name]:
            flat = masters[piece.rank][piece.flat]
            if key != "fp32":
                entry = bases[piece.rank]["state"].get(piece.flat, {})
                flat = entry.get(key, entry.get(UNIVERSAL[key], torch.zeros_like(flat)))
            parts.append(flat.detach()[piece.start : piece.start + piece.numel])
        return torch.cat(parts).view(shapes[name]).float()  # bf16 with bf16_optimizer_states

    for group in groups:
        group["params"] = [name for flat in group["params"] for name in shapes_by_flat[flat]]
    rest = {name: t for name, t in models[0]["module"].items() if name not in shapes}
    rest |= _frozen(models)
    for alias, name in (models[0].get("shared_params") or {}).items():
        rest[alias] = read(name, "fp32")
    keys = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
    scaler = {key: shards[0][key] for key in keys if key in shards[0]}
    return Checkpoint(shapes, groups, read, step, rest, _engine(models[0]), scaler)


def _load_shards(folder: Path, world_size: int) -> list[dict[str, Any]]:
    files = _of_every_rank(folder, folder.glob("*_optim_states.pt"), world_size)
    return [load(file)["optimizer_state_dict"] for file in files]


def _of_every_rank(folder: Path, files: Iterable[Path], world_size: int) -> list[Path]:
    """The files in the order of the ranks that wrote them, if all are there."""
    by_rank = {_rank_of(file): file for file in files}
    missing = [rank for rank in range(world_size) if rank not in by_rank]
    if missing or len(by_rank) > world_size:
        raise FileNotFoundError(
            f"{folder} was saved by {world_size} ranks and holds shards of ranks "
            f"{sorted(by_rank)}" + (f": those of {missing} are missing" if missing else "")
        )
    return [by_rank[rank] for rank in range(world_size)]


def _pieces(shards: Sequence[dict[str, Any]]) -> dict[str, list[_Piece]]:
    pieces: dict[str, list[_Piece]] = {}
    for rank, shard in enumerate(shards):
        for flat, mapping in enumerate(shard["param_slice_mappings"]):
            for name, address in mapping.items():
                piece = _Piece(rank, flat, address.start, address.numel)
                pieces.setdefault(name, []).append(piece)
    return pieces


def _pieces_of_stage_3(
    shapes_by_flat: Sequence[dict[str, torch.Size]], world_size: int
) -> dict[str, list[_Piece]]:
    """Each parameter is cut into equal pieces, the last padded, side by side in its flat group."""
    pieces: dict[str, list[_Piece]] = {}
    for flat, shapes in enumerate(shapes_by_flat):
        start = 0
        for name, shape in shapes.items():
            each = ceil(prod(shape) / world_size)
            ends = [min(each * (rank + 1), prod(shape)) for rank in range(world_size)]
            numels = [max(0, end - each * rank) for rank, end in enumerate(ends)]
            pieces[name] = [_Piece(rank, flat, start, n) for rank, n in enumerate(numels)]
            start += each
    return pieces


def _check_whole(
    folder: Path, shapes: dict[str, torch.Size], pieces: dict[str, list[_Piece]]
) -> None:
    for name, shape in shapes.items():
        held = sum(piece.numel for piece in pieces.get(name, []))
        if held != prod(shape):
            raise ValueError(
                f"{folder}: the shards hold {held} elements of {name!r}, which has {prod(shape)}"
            )


def _frozen(models: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Frozen parameters, which stage 3 shards in the model's files."""
    shapes = models[0].get("frozen_param_shapes") or {}
    frozen = {}
    for name, shape in shapes.items():
        parts = [model["frozen_param_fragments"][name].flatten() for model in models]
        frozen[name] = torch.cat(parts)[: prod(shape)].view(shape)
    return frozen


def _rank_of(file: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", file.name)
    return int(found[1]) if found else 0
