"""What a checkpoint holds, by name and not yet read, whatever form it is stored in."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element

from ..functional import ACCUMULATORS

Keys = tuple[Any, ...]
"""Where a value lies in nested dicts and lists."""

_OTHER_OPTIMIZERS = {
    ("exp_avg", "exp_avg_sq"): "Adam",
    ("exp_avg", "exp_inf"): "Adamax",
    ("momentum_buffer",): "SGD",
    ("square_avg",): "RMSprop",
    ("sum",): "Adagrad",
}


@dataclass(frozen=True)
class Value:
    """One value of a checkpoint.

    Args:
        read: reads it: a tensor on the CPU, or a plain value. It keeps nothing.
        shape, dtype: of a tensor; None for a plain value.
    """

    read: Callable[[], Any]
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Of the tensor; 0 for a plain value."""
        if self.shape is None or self.dtype is None:
            return 0
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Content:
    """All of a checkpoint: what conversions read, and what they write.

    Args:
        model: the model's state dict.
        state: the optimizer's, by parameter name, then key ("step", "square_avg", ...).
        groups: hyperparameters, and parameter names in "params", in the optimizer's order.
        named: whether the names are names, not numbers for lack of them.
        others: what else is stored beside them.
        extra: by rank, what it passed to `save_checkpoint` as `extra`.
    """

    model: Mapping[str, Value] = field(default_factory=dict)
    state: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    groups: Sequence[Mapping[str, Any]] = ()
    named: bool = True
    others: Mapping[Keys, Value] = field(default_factory=dict)
    extra: Mapping[int, Value] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The optimizer's parameters, in its order."""
        return [name for group in self.groups for name in group["params"]]

    def parameter(self, name: str) -> Value | None:
        """What has a parameter's shape and dtype; None: the checkpoint does not tell them."""
        return self.model.get(name) or self.state.get(name, {}).get(ACCUMULATORS[0])

    def values(self) -> list[Value]:
        """All values but `extra`."""
        states = [value for entry in self.state.values() for value in entry.values()]
        return [*self.model.values(), *states, *self.others.values()]


def foreign_state(content: Content) -> str | None:
    """Whose optimizer state it is if it is not Adadelta's: "Adam state: exp_avg, exp_avg_sq"."""
    for entry in content.state.values():
        if entry and not {"step", *ACCUMULATORS} <= entry.keys():
            keys = sorted(entry.keys() - {"step"})
            name = next((n for k, n in _OTHER_OPTIMIZERS.items() if {*k} <= {*keys}), "unknown")
            return f"{name} state: {', '.join(keys) or 'step alone'}"
    for group in content.groups:
        if not {"lr", "rho", "eps"} <= group.keys():
            return f"groups of another optimizer: {', '.join(sorted(group.keys() - {'params'}))}"
    return None


def flatten(value: Any, at: Keys = ()) -> dict[Keys, Any]:
    """Leaves of an optimizer's state dict by path: into dicts, and into the list of groups."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = value.items()
    elif at == ("param_groups",):
        items = enumerate(value)
    else:
        return {at: value}
    return {path: leaf for key, inner in items for path, leaf in flatten(inner, (*at, key)).items()}


def optimizer_root(paths: Iterable[Keys]) -> Keys | None:
    """Where the optimizer's state dict lies; None if there is none.

    Beside one at "optimizer", what a model calls so is the model's: a child, or extra state.

    Raises:
        ValueError: there are several.
    """
    roots = {
        path[:i]: None
        for path in paths
        for i, key in enumerate(path)
        if str(key).partition(".")[0] == "param_groups"
    }
    # A parameter may have such a name, and so have its state and what a model calls so.
    roots = {r: None for r in roots if not any(r[: len(o) + 1] == (*o, "state") for o in roots)}
    if ("optimizer",) in roots:
        roots = {root: None for root in roots if root[:1] != ("model",)}
    if len(roots) > 1:
        where = ", ".join(".".join(map(str, root)) for root in roots)
        raise ValueError(f"it holds several optimizers, at {where}: save each on its own")
    return next(iter(roots), None)


def take_optimizer(
    values: Mapping[Keys, Value], root: Keys | None
) -> tuple[dict[Keys, Value], dict[Keys, Value]]:
    """The optimizer's values by path below `root`, and all others."""
    optimizer: dict[Keys, Value] = {}
    rest: dict[Keys, Value] = {}
    for path, value in values.items():
        below = path[len(root) :] if root is not None and path[: len(root)] == root else ()
        if below and str(below[0]).partition(".")[0] in ("state", "param_groups"):
            optimizer[below] = value
        else:
            rest[path] = value
    return optimizer, rest


def take_model(
    values: Mapping[Keys, Value], names: Iterable[str]
) -> tuple[dict[str, Value], dict[Keys, Value]]:
    """The model's values by name, and all others.

    Args:
        names: the optimizer's parameters. The model is where most of them lie, or else where
            "model" says, or else the tensors at the top.
    """
    wanted = set(names)
    places = Counter(path[:-1] for path in values if path[-1] in wanted)
    places.update({("model",): 0} if any(path[0] == "model" for path in values) else {(): 0})
    at = places.most_common(1)[0][0]
    model: dict[str, Value] = {}
    others: dict[Keys, Value] = {}
    for path, value in values.items():
        if path[:-1] == at and (at or value.shape is not None):
            model[str(path[-1])] = value
        else:
            others[path] = value
    return model, others


def parse_optimizer(
    optimizer: Mapping[Keys, Value],
) -> tuple[dict[str, dict[str, Value]], list[dict[str, Any]], bool]:
    """State and groups by name, and whether they had names.

    Args:
        optimizer: an optimizer's state dict by path, nested or flattened, with numbers for
            parameters and `param_names` in the groups, or with names for parameters.

    Raises:
        ValueError: state of a parameter that is in no group.
    """
    state: dict[Any, dict[str, Value]] = {}
    nested: dict[Any, dict[str, Any]] = {}
    flat: dict[str, dict[str, Value]] = {}
    for path, value in optimizer.items():
        kind, _, dotted = str(path[0]).partition(".")
        name, _, key = dotted.rpartition(".")
        if kind == "state":
            name, key = (name, key) if dotted else path[1:3]
            state.setdefault(name, {})[key] = value
        elif dotted:
            flat.setdefault(name, {})[key] = value
        else:
            set_element(nested.setdefault(path[1], {}), path[2:], value.read())
    groups = [nested[i] for i in sorted(nested)] or _regroup(flat)
    names: dict[Any, str] = {}
    for group in groups:
        for i, name in zip(group["params"], _names(group), strict=True):
            names[i] = names[str(i)] = name  # DCP makes text of numbers
    strangers = state.keys() - names.keys()
    if strangers:
        raise ValueError(f"it has state of {min(strangers, key=str)!r}, which is in no group")
    named = all(map(_has_names, groups))
    groups = [group | {"params": _names(group)} for group in groups]
    return {names[i]: entry for i, entry in state.items()}, groups, named


def _has_names(group: Mapping[str, Any]) -> bool:
    return "param_names" in group or all(isinstance(i, str) for i in group["params"])


def _names(group: Mapping[str, Any]) -> list[str]:
    """Names of a group's parameters; their numbers if they have none.

    Where parameters are names already, `param_names` may be those of a wrapped module.
    """
    params = group["params"]
    if all(isinstance(i, str) for i in params):
        return list(params)
    names = group.get("param_names", list(map(str, params)))
    if len(names) != len(params):
        raise ValueError(f"a group has {len(params)} parameters, but {len(names)} param_names")
    return list(names)


def _regroup(flat: Mapping[str, Mapping[str, Value]]) -> list[dict[str, Any]]:
    """Groups, from each parameter's hyperparameters, as flattened state dicts have them.

    They come in the optimizer's order. Neighbours of equal hyperparameters are one group:
    nothing tells more, unless the hyperparameters include the group's `param_names`. Those
    are read once a group, for every parameter has the whole list.
    """
    groups: list[dict[str, Any]] = []
    listed: set[str] = set()
    for name, values in flat.items():
        if name in listed:
            groups[-1]["params"].append(name)
            continue
        options = {key: value.read() for key, value in values.items()}
        if groups and _alike(groups[-1], options):
            groups[-1]["params"].append(name)
        else:
            groups.append({**options, "params": [name]})
            listed = set(options.get("param_names", ()))
    return groups


def _alike(group: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    if group.keys() - {"params"} != options.keys():
        return False
    return all(bool(group[key] == value) for key, value in options.items())
