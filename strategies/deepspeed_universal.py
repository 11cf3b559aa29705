"""DeepSpeed's universal checkpoints of Adadelta: what its own `load_universal` resumes.

    OUT/zero/<parameter>/{fp32,exp_avg_sq,exp_avg,step}.pt
    OUT/zero/optimizer_state.pt
    OUT/mp_rank_00_model_states.pt                   read at stages 1 and 2
    OUT/zero_pp_rank_0_mp_rank_00_model_states.pt    the same, read at stage 3

`square_avg` is in exp_avg_sq.pt and `acc_delta` in exp_avg.pt, for the loader of stage 3 knows
these names alone; `FusedAdadelta` takes them over at its first step. No file says for how many
ranks it is, so any number resumes.
"""

import os
import uuid
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from adadelta_dist.checkpoints.folder import staged

from .deepspeed_checkpoint import Checkpoint, check_adadelta, load, one_step
from .deepspeed_state import GROUPS_KEY, UNIVERSAL

PARAMS_KEY = "adadelta_params"
"""In optimizer_state.pt: the parameters of each group, which DeepSpeed does not write down."""

_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_COUNTERS = {"skipped_steps": 0, "global_samples": 0, "dp_world_size": 1, "mp_world_size": 1}


def write_universal(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a universal checkpoint, one parameter at a time, and "latest_universal" beside it.

    The folder appears whole or not at all.

    Raises:
        FileExistsError: `folder` exists.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged(folder, is_folder=True) as unfinished:
        for name in checkpoint.shapes:
            _write_parameter(checkpoint, name, unfinished / "zero" / name)
        _save(_optimizer_state(checkpoint), unfinished / "zero" / "optimizer_state.pt")
        engine: dict[str, Any] = _COUNTERS | {
            "global_steps": int(checkpoint.step),
            "lr_scheduler": None,
        }
        engine |= checkpoint.engine
        engine |= {
            "module": checkpoint.rest,
            "optimizer": None,
            "param_shapes": _shapes(checkpoint),
        }
        for file in _MODEL_FILES:
            _save(engine, unfinished / file)
    latest = folder.parent / f".latest_universal.{uuid.uuid4().hex}"
    latest.write_text(folder.name)
    os.replace(latest, folder.parent / "latest_universal")


def read_universal(folder: Path) -> Checkpoint:
    """A universal checkpoint of Adadelta, written by `write_universal` or DeepSpeed's own tool.

    Raises:
        FileNotFoundError: not a universal checkpoint, or files are missing.
        ValueError: another optimizer's state, or parameters at different steps.
    """
    zero = folder / "zero"
    model_file = next((folder / f for f in _MODEL_FILES if (folder / f).is_file()), None)
    if model_file is None or not (zero / "optimizer_state.pt").is_file():
        raise FileNotFoundError(
            f"{folder} is no universal checkpoint: it lacks zero/optimizer_state.pt or "
            f"{_MODEL_FILES[0]}"
        )
    optimizer, engine = load(zero / "optimizer_state.pt"), load(model_file)
    groups = [dict(group) for group in optimizer["param_groups"]]
    check_adadelta(groups)
    names = optimizer.get(PARAMS_KEY) or [list(shapes) for shapes in engine["param_shapes"]]
    if len(names) != len(groups):
        raise ValueError(
            f"{folder} has {len(groups)} parameter groups, and does not say which parameters are "
            "in which. Convert the original checkpoint with adadelta_dist."
        )
    for group, own in zip(groups, names, strict=True):
        group.pop(GROUPS_KEY, None)
        group["params"] = own
    shapes = {name: shape for flat in engine["param_shapes"] for name, shape in flat.items()}
    files = {"fp32": "fp32"} | UNIVERSAL
    lacking = [n for n in shapes for f in files.values() if not (zero / n / f"{f}.pt").is_file()]
    if lacking:
        raise FileNotFoundError(f"{zero / lacking[0]} lacks fp32.pt, exp_avg.pt or exp_avg_sq.pt")

    def read(name: str, key: str) -> Tensor:
        value: Any = load(zero / name / f"{files[key]}.pt")
        tensor: Tensor = value["param"] if isinstance(value, dict) else value
        return tensor.view(shapes[name])

    step_files = {name: zero / name / "step.pt" for name in shapes}
    steps = {name: float(load(file)) for name, file in step_files.items() if file.is_file()}
    rest = dict(engine.pop("module") or {})
    rest = {name: tensor for name, tensor in rest.items() if name not in shapes}
    keep = {key: engine[key] for key in engine if key not in ("optimizer", "param_shapes")}
    scaler = {
        key: value
        for key, value in optimizer.items()
        if key in ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
    }
    return Checkpoint(shapes, groups, read, one_step(steps), rest, keep, scaler)


def _write_parameter(checkpoint: Checkpoint, name: str, folder: Path) -> None:
    _save({"param": checkpoint.read(name, "fp32")}, folder / "fp32.pt")
    for ours, theirs in UNIVERSAL.items():
        _save({"param": checkpoint.read(name, ours)}, folder / f"{theirs}.pt")
    _save(torch.tensor(checkpoint.step), folder / "step.pt")


def _optimizer_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """What stages 1 and 2 read (`param_groups`), and what stage 3 reads (the other two)."""
    groups = [
        {key: value for key, value in group.items() if key != "params"} | {"params": [i]}
        for i, group in enumerate(checkpoint.groups)
    ]
    hyper = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    groups[0] = groups[0] | {GROUPS_KEY: hyper}
    entry = {"step": torch.tensor(checkpoint.step)}
    return checkpoint.scaler | {
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: entry}, "param_groups": groups},
        "ds_version": checkpoint.engine.get("ds_version", deepspeed.__version__),
        PARAMS_KEY: [group["params"] for group in checkpoint.groups],
    }


def _shapes(checkpoint: Checkpoint) -> list[dict[str, torch.Size]]:
    return [{n: checkpoint.shapes[n] for n in group["params"]} for group in checkpoint.groups]


def _save(value: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        torch.save(_compact(value), stream)
        stream.flush()
        os.fsync(stream.fileno())


def _compact(value: Any) -> Any:
    """The same with every tensor in memory of its own: a view is saved with all that it views."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _compact(item) for key, item in value.items()}
    return [_compact(item) for item in value] if isinstance(value, list) else value
