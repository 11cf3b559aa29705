"""Where every parameter lies in flat memory: pure integers, no tensors.

A *bucket* is one flat buffer that holds the parameters of one kind (parameter
group, dtype, device). A *slot* is one parameter's interval in it. A bucket is
cut into `world_size` equal *shards*; rank r owns the r-th. Slots and shards
start at multiples of 16 bytes, and the gaps that this leaves are *padding*,
which is zero and belongs to nobody.

    bucket   |--slot 3--|-slot 2-|------slot 1------|-slot 0-|pad|
    shards   |        rank 0       |         rank 1             |
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

ALIGN_BYTES = 16

FIRST_BUCKET_BYTES = 2**20
"""As DistributedDataParallel's: the link has something to carry soon after backward begins."""

Kind = tuple[Any, ...]


@dataclass(frozen=True)
class ParamSpec:
    """What the layout needs to know of one parameter.

    Args:
        numel: elements in flat memory (a complex element counts as two).
        itemsize: bytes of one such element.
        kind: parameters of equal kind may share a bucket.
    """

    numel: int
    itemsize: int
    kind: Kind


@dataclass(frozen=True)
class Interval:
    """The half-open range [start, stop)."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def shifted(self, by: int) -> "Interval":
        return Interval(self.start + by, self.stop + by)

    def clipped(self, to: "Interval") -> "Interval":
        """The part inside `to`; empty, but still inside `to`, if they do not meet."""
        start = min(max(self.start, to.start), to.stop)
        return Interval(start, max(start, min(self.stop, to.stop)))


@dataclass(frozen=True)
class Slot:
    """One parameter's place in a bucket.

    Args:
        param: index of the parameter in the sequence given to `plan_layout`.
        start: first element in the bucket.
        numel: number of elements.
    """

    param: int
    start: int
    numel: int

    @property
    def interval(self) -> Interval:
        return Interval(self.start, self.start + self.numel)


@dataclass(frozen=True)
class Bucket:
    """One flat buffer: its slots, and its cut into equal shards."""

    kind: Kind
    slots: tuple[Slot, ...]
    shard_numel: int
    world_size: int

    @property
    def numel(self) -> int:
        return self.shard_numel * self.world_size

    def shard(self, rank: int) -> Interval:
        """The elements of the bucket that `rank` owns."""
        return Interval(rank * self.shard_numel, (rank + 1) * self.shard_numel)

    def slice(self, slot: Slot, rank: int) -> Interval:
        """The elements of `slot`, counted from its own start, that `rank` owns."""
        return (
            slot.interval.clipped(self.shard(rank))
            .shifted(-slot.start)
            .clipped(Interval(0, slot.numel))
        )

    def place(self, slot: Slot, rank: int) -> Interval:
        """`slice(slot, rank)` counted from the start of the rank's shard."""
        return slot.interval.clipped(self.shard(rank)).shifted(-rank * self.shard_numel)

    def runs(self, present: Sequence[bool], rank: int) -> list[Interval]:
        """Intervals of the rank's shard that hold the slots with `present[i]` true.

        Neighbours are joined across the padding between them, so that a bucket
        whose slots are all present is one run.
        """
        runs: list[Interval] = []
        joined = False
        for slot, wanted in zip(self.slots, present, strict=True):
            piece = self.place(slot, rank)
            if wanted and piece.numel:
                if joined:
                    piece = Interval(runs.pop().start, piece.stop)
                runs.append(piece)
                joined = True
            elif piece.numel:
                joined = False
        return runs


def plan_layout(
    specs: Sequence[ParamSpec], world_size: int, bucket_bytes: int
) -> tuple[Bucket, ...]:
    """Assign every parameter a slot.

    Slots follow the reverse order of the parameters, which is about the order in
    which backward makes their gradients, and the buckets are returned in the order
    in which they are complete. A parameter is never split over two buckets.

    Args:
        specs: the parameters, in the optimizer's order.
        world_size: number of shards of each bucket.
        bucket_bytes: a bucket takes parameters until it holds this much; with several ranks the
            first one until it holds `FIRST_BUCKET_BYTES`, if that is less.
    """
    limit = bucket_bytes if world_size == 1 else min(bucket_bytes, FIRST_BUCKET_BYTES)
    filled: list[tuple[Kind, list[Slot]]] = []
    filling: dict[Kind, list[Slot]] = {}
    for index in reversed(range(len(specs))):
        spec = specs[index]
        slots = filling.setdefault(spec.kind, [])
        start = _round_up(slots[-1].interval.stop, _align(spec)) if slots else 0
        slots.append(Slot(index, start, spec.numel))
        if (start + spec.numel) * spec.itemsize >= limit:
            filled.append((spec.kind, filling.pop(spec.kind)))
            limit = bucket_bytes
    filled.extend(filling.items())
    buckets = []
    for kind, slots in filled:
        shard_numel = -(-slots[-1].interval.stop // world_size)
        shard_numel = _round_up(shard_numel, _align(specs[slots[0].param]))
        buckets.append(Bucket(kind, tuple(slots), shard_numel, world_size))
    return tuple(sorted(buckets, key=lambda bucket: -bucket.slots[-1].param))


def bucket_limit(bucket_mb: float, world_size: int) -> int:
    """Bytes that a bucket takes parameters up to; of so many MiB if there is anyone to send to.

    With one rank there is not, and one bucket is one kernel call.
    """
    return sys.maxsize if world_size == 1 else int(bucket_mb * 2**20)


def storage_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The dimensions from the slowest to the fastest in memory.

    `tensor.permute(order)` of a dense tensor (channels-last, transposed) is
    contiguous. A tensor with holes or overlaps gets the row-major order.
    """
    order = sorted(range(len(shape)), key=lambda dim: (-stride[dim], shape[dim] == 1))
    expected = 1
    for dim in reversed(order):
        if shape[dim] != 1 and stride[dim] != expected:
            return tuple(range(len(shape)))
        expected *= shape[dim]
    return tuple(order)


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor that is one contiguous run of a slice of it.

    Args:
        offsets, sizes: where it begins and how far it goes in each dimension of the tensor.
        start: the position of its first element in the slice.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int


def boxes(shape: Sequence[int], order: Sequence[int], interval: Interval) -> list[Box]:
    """The elements `interval` of a tensor flattened in `order`, as at most 2n-1 boxes.

    They come as they lie in memory, and each is row-major in the dimensions `order`.
    """
    found, start = [], 0
    for spans in _cut([shape[dim] for dim in order], interval):
        ordered = [spans[order.index(dim)] for dim in range(len(order))]
        sizes = tuple(span.numel for span in ordered)
        found.append(Box(tuple(span.start for span in ordered), sizes, start))
        start += prod(sizes)
    return found


def _cut(sizes: Sequence[int], part: Interval) -> list[tuple[Interval, ...]]:
    """A part of a row-major tensor: the end of a row, whole rows, the beginning of a row."""
    if not sizes or not part.numel:
        return [()] * part.numel
    inner, row = sizes[1:], prod(sizes[1:])
    first, last = -(-part.start // row), part.stop // row  # the rows [first, last) are whole
    head = Interval(part.start, min(first * row, part.stop))  # all of the part, if first > last
    tail = Interval(max(last * row, head.stop), part.stop)
    before, after = Interval(first - 1, first), Interval(last, last + 1)
    found = [(before, *box) for box in _cut(inner, head.shifted(-before.start * row))]
    if first < last:
        found.append((Interval(first, last), *(Interval(0, size) for size in inner)))
    return found + [(after, *box) for box in _cut(inner, tail.shifted(-last * row))]


def _align(spec: ParamSpec) -> int:
    return max(1, ALIGN_BYTES // spec.itemsize)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
