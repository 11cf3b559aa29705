"""The accumulators that one rank owns, and how they enter and leave a state dict."""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from . import collectives, fingerprint
from .adadelta import check_values
from .buckets import FlatBucket
from .capture import check_warm
from .flat_slice import FlatSlice
from .functional import ACCUMULATORS
from .layout import Interval
from .memory import flatten, unflatten, zeros

State = MutableMapping[Tensor, dict[str, Any]]

MASTER = "master"
"""Name, beside the accumulators', of what half-precision parameters are rounded from."""


@dataclass(frozen=True)
class ShardState:
    """State of one bucket on this rank, allocated when the optimizer is built.

    Args:
        bucket: the bucket it belongs to.
        accumulators: [shard_numel] each, in the order of `ACCUMULATORS`.
        master: [shard_numel], the parameters before rounding, or None where nothing is
            rounded (`Precision.has_master`).
        generator: of stochastic rounding, or None.
        steps: [slots], how often each parameter was updated.
        entries: by slot, what `optimizer.state[p]` holds: views into the tensors above,
            in the parameter's shape with one rank, `FlatSlice` with more.
    """

    bucket: FlatBucket
    accumulators: tuple[Tensor, ...]
    master: Tensor | None
    generator: torch.Generator | None
    steps: Tensor
    entries: tuple[dict[str, Tensor], ...]

    @property
    def flats(self) -> dict[str, Tensor]:
        """What is kept of each element, by name."""
        flats = dict(zip(ACCUMULATORS, self.accumulators, strict=True))
        return flats if self.master is None else flats | {MASTER: self.master}

    @cached_property
    def views(self) -> list[Tensor]:
        """All values of all entries."""
        return _values(self.entries)

    @property
    def is_exact(self) -> bool:
        """Whether all is stored in the dtype of the arithmetic."""
        precision, stored = self.bucket.precision, self.bucket.flat_param.dtype
        return self.master is None and precision.compute == precision.state == stored


def allocate(bucket: FlatBucket, *, capturable: bool) -> ShardState:
    """Zeros for one bucket, and masters that equal the parameters."""
    shard, precision = bucket.own_param, bucket.precision
    device = shard.device if capturable else torch.device("cpu")
    steps = torch.zeros(len(bucket.params), dtype=_get_scalar_dtype(), device=device)
    numel = shard.numel()
    accumulators = tuple(zeros(numel, precision.state, shard.device) for _ in ACCUMULATORS)
    master = None
    if precision.has_master:
        master = zeros(numel, precision.compute, shard.device).copy_(shard)
    rounds = precision.stochastic or precision.state == torch.bfloat16
    generator = torch.Generator(shard.device) if rounds else None
    state = ShardState(bucket, accumulators, master, generator, steps, ())
    entries = tuple(
        {"step": steps[i]} | {name: view(bucket, i, flat) for name, flat in state.flats.items()}
        for i in range(len(bucket.params))
    )
    return replace(state, entries=entries)


def reclaim(shards: Sequence[ShardState], state: State) -> None:
    """Make the optimizer's state views again where somebody replaced or removed entries.

    A replaced value is adopted; a removed one counts as zero, as torch would begin anew.
    """
    held_values = _values(state.values())
    views = chain.from_iterable(shard.views for shard in shards)
    if len(held_values) == sum(len(shard.views) for shard in shards) and all(
        map(is_, held_values, views)
    ):
        return  # the common case, and a slow loop otherwise
    for shard in shards:
        for i, (p, entry) in enumerate(zip(shard.bucket.params, shard.entries, strict=True)):
            held = state.get(p)
            if held is None or not all(map(is_, entry.values(), map(held.get, entry))):
                check_warm("state was replaced, and is adopted")
                check(shard, i, held or {})
                adopt(shard, i, held or {}, state)


def check(shard: ShardState, i: int, values: Mapping[str, Any]) -> None:
    """Whether `adopt` can take these values for slot `i`.

    Raises:
        ValueError: state of another optimizer, or of a tensor of another shape or slice;
            masters that would be dropped.
    """
    name, entry = shard.bucket.names[i], shard.entries[i]
    if MASTER in values and MASTER not in entry:
        raise ValueError(
            f"state of {name} has a {MASTER!r}, the exact parameter, and this optimizer keeps none "
            f"(parameters of {shard.bucket.params[i].dtype}, policy.master_weights): it would be "
            f"dropped. Write it into the parameter, or delete {MASTER!r} from the state dict."
        )
    missing = [key for key in entry if key not in values and key != MASTER]
    if values and missing:
        raise ValueError(
            f"state of {name} holds {sorted(values)}, but Adadelta's is {list(entry)}: it was "
            "saved by another optimizer, or is incomplete"
        )
    for key in shard.flats:
        value, view = values.get(key, entry[key]), entry[key]
        if not isinstance(value, Tensor) or value.shape != view.shape:
            raise ValueError(
                f"{key} of {name} has shape {tuple(getattr(value, 'shape', ()))}, wanted "
                f"{tuple(view.shape)}: the checkpoint is of another model"
            )
        if isinstance(value, FlatSlice) and (
            not isinstance(view, FlatSlice)
            or (value.interval, value.order) != (view.interval, view.order)
        ):
            raise ValueError(
                f"{key} of {name} is the slice {value.interval} of another world size, bucket size "
                "or memory format. Load a gathered state dict instead, or the slices through "
                "torch.distributed.checkpoint."
            )


def check_all(shards: Sequence[ShardState], values: Mapping[Tensor, Any]) -> list[str]:
    """`check` every parameter's values; returns what must be equal on all ranks."""
    facts = []
    for shard in shards:
        for i, (name, p) in enumerate(zip(shard.bucket.names, shard.bucket.params, strict=True)):
            loaded = values.get(p, {})
            check(shard, i, loaded)
            step = fingerprint.plain(loaded.get("step", 0))
            facts.append(f"{name}: step {step}" + ", with a master" * (MASTER in loaded))
    return facts


def check_whole(shards: Sequence[ShardState], values: Mapping[Tensor, Any]) -> None:
    """`check_all` of a state in torch's own form.

    Raises:
        ValueError: as `check`; a slice instead of the whole.
    """
    check_all(shards, values)
    for entry in values.values():
        if any(isinstance(value, FlatSlice) for value in entry.values()):
            raise ValueError(
                "state_dict holds this rank's slices, wanted the whole state: pass what "
                "gather_state_dict returned"
            )


def adopt_all(shards: Sequence[ShardState], values: Mapping[Tensor, Any], state: State) -> None:
    """`adopt` every parameter's checked values."""
    for shard in shards:
        for i, p in enumerate(shard.bucket.params):
            adopt(shard, i, values.get(p, {}), state)


def adopt(shard: ShardState, i: int, values: Mapping[str, Any], state: State) -> None:
    """Copy checked values into the views of slot `i`, and put those in `state`.

    Without values accumulators become zero, and masters what the parameters are.
    """
    p, entry = shard.bucket.params[i], shard.entries[i]
    with torch.no_grad():
        entry["step"].fill_(float(values.get("step", 0)))
        for key in shard.flats:
            _copy(shard.bucket, i, values.get(key), entry[key])
        if MASTER not in values:
            _rebuild_master(shard, i)
    extras = {key: value for key, value in values.items() if key not in entry}
    state[p] = {**entry, **extras}


def scatter_all(
    shards: Sequence[ShardState], values: Mapping[Tensor, Any], state: State, src: int
) -> None:
    """Give every rank its slices of the checked values that `src` of the first replica has.

    Collective. Without values accumulators are zero.
    """
    known = [
        (float(values[p]["step"]), MASTER in values[p]) if values.get(p) else None
        for shard in shards
        for p in shard.bucket.params
    ]
    if not shards:  # of groups that are all empty
        return
    group = shards[0].bucket.group
    told = iter(collectives.all_gather_object(group, known)[src])
    for shard in shards:
        for i, p in enumerate(shard.bucket.params):
            theirs = next(told)
            adopt(shard, i, {}, state)
            if theirs is not None:
                step, has_master = theirs
                shard.entries[i]["step"].fill_(step)
                names = [name for name in shard.flats if has_master or name != MASTER]
                if group.replica == 0:
                    _scatter(shard, i, names, values.get(p), src)
        for flat in shard.flats.values():  # from the first replica to the others
            if group.replicas is not None:
                collectives.broadcast(group.replicas, flat)


def match(
    groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[Tensor, Any]]:
    """Groups to use from now on, and the loaded state by parameter; as torch matches them."""
    saved = deepcopy(state_dict["param_groups"])
    if len(saved) != len(groups):
        raise ValueError("loaded state dict has a different number of parameter groups")
    if any(len(a["params"]) != len(b["params"]) for a, b in zip(saved, groups, strict=True)):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of "
            "optimizer's group"
        )
    ids = list(chain.from_iterable(group["params"] for group in saved))
    strangers = state_dict["state"].keys() - set(ids)
    if strangers:
        raise ValueError(
            f"loaded state dict has state of {min(strangers, key=str)!r}, which is in none of its "
            "parameter groups: were its keys turned into strings?"
        )
    params = chain.from_iterable(group["params"] for group in groups)
    values = {p: state_dict["state"].get(i, {}) for i, p in zip(ids, params, strict=True)}
    for new, old in zip(saved, groups, strict=True):
        new["params"] = old["params"]
        if "param_names" in old:
            new.setdefault("param_names", old["param_names"])
        check_values(old | new)
    return saved, values


def gather(shard: ShardState, i: int, dst: int) -> dict[str, Tensor] | None:
    """Whole state of slot `i` on the CPU of rank `dst`, None elsewhere. Collective."""
    bucket, slot = shard.bucket, shard.bucket.plan.slots[i]
    numels = [bucket.plan.slice(slot, rank).numel for rank in range(bucket.group.world_size)]
    place = bucket.plan.place(slot, bucket.group.rank)
    entry = {"step": shard.steps[i].cpu().clone()}
    for name, flat in shard.flats.items():
        whole = collectives.gather_slices(bucket.group, flat[place.start : place.stop], numels, dst)
        if whole is not None:
            entry[name] = unflatten(whole, bucket.params[i], bucket.orders[i])
    return entry if bucket.group.rank == dst else None


def _scatter(
    shard: ShardState,
    i: int,
    names: Sequence[str],
    values: Mapping[str, Tensor] | None,
    src: int,
) -> None:
    """The inverse of `gather` for what slot `i` keeps, `values` on `src`. Collective."""
    bucket, slot = shard.bucket, shard.bucket.plan.slots[i]
    numels = [bucket.plan.slice(slot, rank).numel for rank in range(bucket.group.world_size)]
    place = bucket.plan.place(slot, bucket.group.rank)
    for name in names:
        whole, flat = None, shard.flats[name]
        if values is not None:
            value = values[name].detach().to(shard.entries[i][name].dtype)
            whole = flatten(value, bucket.orders[i])
        own = flat[place.start : place.stop]
        collectives.scatter_slices(bucket.group, whole, own, numels, src)


def _rebuild_master(shard: ShardState, i: int) -> None:
    if shard.master is not None:
        bucket = shard.bucket
        place = bucket.plan.place(bucket.plan.slots[i], bucket.group.rank)
        own = slice(place.start, place.stop)
        shard.master[own].copy_(bucket.own_param[own])


def _values(entries: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, entries)))


def view(bucket: FlatBucket, i: int, flat: Tensor) -> Tensor:
    """Slot `i` of a tensor [shard_numel]: with more ranks the `FlatSlice` that is in it."""
    p, order, slot = bucket.params[i], bucket.orders[i], bucket.plan.slots[i]
    place = bucket.plan.place(slot, bucket.group.rank)
    local = flat[place.start : place.stop]
    if bucket.group.world_size == 1:
        return unflatten(local, p, order)
    part = bucket.plan.slice(slot, bucket.group.rank)
    if p.is_complex():  # from real elements to the parameter's own
        part = Interval(part.start // 2, part.stop // 2)
    return FlatSlice(bucket.typed(local), p.shape, part, order)


def _copy(bucket: FlatBucket, i: int, value: Tensor | None, view: Tensor) -> None:
    local = view.local if isinstance(view, FlatSlice) else view
    if value is None:
        local.zero_()
    elif isinstance(value, FlatSlice):
        local.copy_(value.local)
    elif isinstance(view, FlatSlice):
        part, whole = view.interval, flatten(value.to(view.dtype), bucket.orders[i])
        local.copy_(bucket.typed(whole)[part.start : part.stop])
    else:
        local.copy_(value)
