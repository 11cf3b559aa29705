"""What a checkpoint is, found out without reading its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from .content import Content, Value, foreign_state
from .folder import MANIFEST, plain, read_manifest, verify
from .sources import is_deepspeed, read

Kind = Literal["adadelta-dist", "dcp", "torch"]


@dataclass(frozen=True)
class ParameterDescription:
    """One tensor of the model, or one that the optimizer alone knows.

    Args:
        name: the optimizer's number for it where it has no name.
        shape, dtype: None where nothing in the checkpoint tells.
        nbytes: in the model.
        group: its parameter group; None: in none (a buffer, or frozen).
        steps: how often it was updated; None: it has no state, or no count in it.
        state_nbytes: in the optimizer's state; None: it has none.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str | None
    nbytes: int
    group: int | None
    steps: float | None
    state_nbytes: int | None


@dataclass(frozen=True)
class Description:
    """A checkpoint from outside.

    Args:
        kind: "adadelta-dist": a folder of `save_checkpoint`; "dcp": another folder of
            `torch.distributed.checkpoint`; "torch": a file of `torch.save`.
        intact: None: nobody can know, for it was saved without checksums.
        problems: why it is not intact.
        world_size: ranks that saved it, as far as known.
        saved_at: ISO 8601, UTC.
        optimizer: "Adadelta", or whose state it is instead; None: there is none.
        groups: hyperparameters, and "params": how many parameters.
        extra_ranks: the ranks whose `extra` it has.
    """

    path: str
    kind: Kind
    intact: bool | None
    problems: tuple[str, ...] = ()
    world_size: int | None = None
    saved_at: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    optimizer: str | None = None
    groups: tuple[Mapping[str, Any], ...] = ()
    parameters: tuple[ParameterDescription, ...] = ()
    model_nbytes: int = 0
    optimizer_nbytes: int = 0
    extra_ranks: tuple[int, ...] = ()


def describe(path: str | Path) -> Description:
    """What is in a checkpoint, and whether it is intact.

    Files are read whole for their checksums, but no tensor is loaded other than scalars.

    Args:
        path: a folder or a file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is a folder, but not a checkpoint.
    """
    path = Path(path)
    kind: Kind = "dcp" if path.is_dir() else "torch"
    if (path / MANIFEST).exists():
        kind = "adadelta-dist"
    elif is_deepspeed(path):
        raise ValueError(f"{path} is a checkpoint of DeepSpeed: use `adadelta-dist convert` first")
    elif path.is_dir() and not (path / ".metadata").exists():
        raise ValueError(f"{path} is not a checkpoint: it has neither {MANIFEST} nor .metadata")
    problems = verify(path)
    description = Description(str(path), kind, intact=None if problems is None else not problems)
    found = list(problems or ())
    try:
        description = _with_content(description, read(path))
        manifest = read_manifest(path) if kind == "adadelta-dist" else None
        if manifest is not None:
            facts = {key: manifest[key] for key in ("world_size", "saved_at", "versions")}
            description = replace(description, **facts)
    except (OSError, ValueError) as error:
        found.append(str(error))
    return replace(
        description, problems=tuple(found), intact=False if found else description.intact
    )


def _with_content(description: Description, content: Content) -> Description:
    states = [value for entry in content.state.values() for value in entry.values()]
    groups = [
        {key: len(value) if key == "params" else plain(value) for key, value in group.items()}
        for group in content.groups
    ]
    for group in groups:
        group.pop("param_names", None)
    return replace(
        description,
        optimizer=foreign_state(content) or ("Adadelta" if content.groups else None),
        groups=tuple(groups),
        parameters=_parameters(content),
        model_nbytes=sum(value.nbytes for value in content.model.values()),
        optimizer_nbytes=sum(value.nbytes for value in states),
        extra_ranks=tuple(content.extra),
    )


def _parameters(content: Content) -> tuple[ParameterDescription, ...]:
    group_of = {name: i for i, group in enumerate(content.groups) for name in group["params"]}
    found = []
    for name in dict.fromkeys([*content.model, *group_of]):
        known, entry = content.parameter(name), content.state.get(name)
        found.append(
            ParameterDescription(
                name,
                shape=None if known is None else known.shape,
                dtype=None if known is None or known.dtype is None else str(known.dtype)[6:],
                nbytes=content.model[name].nbytes if name in content.model else 0,
                group=group_of.get(name),
                steps=_steps(entry.get("step")) if entry else None,
                state_nbytes=sum(v.nbytes for v in entry.values()) if entry else None,
            )
        )
    return tuple(found)


def _steps(step: Value | None) -> float | None:
    if step is None or step.shape not in (None, (), (1,)):
        return None
    loaded = step.read()
    return float(loaded) if isinstance(loaded, int | float | Tensor) else None
