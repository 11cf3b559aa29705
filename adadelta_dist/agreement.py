"""Ranks agree, or all of them fail with a reason."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from . import collectives
from .groups import Group


def digest(facts: Sequence[str]) -> bytes:
    """Eight bytes that are equal where all facts are."""
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=8).digest()


class RankError(RuntimeError):
    """Raised on the ranks that were well when another rank failed, or when ranks disagree."""


@dataclass
class Agreement:
    """What one rank brings to `agreement`: `facts` must be equal on every rank."""

    facts: list[str] = field(default_factory=list)


@contextmanager
def agreement(group: Group, what: str) -> Iterator[Agreement]:
    """All ranks leave the block well, or all of them raise. Collective at its end.

    A rank whose block raised raises its own error, the others a `RankError` that quotes
    it. If all are well but their `facts` differ, all raise a `RankError` with the first
    difference.

    Args:
        what: the caller's name, for the message.
    """
    mine = Agreement()
    error: Exception | None = None
    try:
        yield mine
    except Exception as raised:
        error = raised
    if group.world_size > 1:
        quoted = None if error is None else f"{type(error).__name__}: {error}"
        message = _disagreement(group, what, quoted, mine.facts)
        if message and error is None:
            raise RankError(f"{message} (raised on every rank; this is rank {group.number})")
    if error is not None:
        raise error


def _disagreement(group: Group, what: str, quoted: str | None, facts: list[str]) -> str | None:
    """The message that all ranks derive from all ranks' errors and facts, or None."""
    heads = collectives.all_gather_object(group, (quoted, digest(facts)))
    for rank, (error, _) in enumerate(heads):
        if error is not None:
            return f"{what}: rank {rank} failed with {error}"
    if all(theirs == digest(facts) for _, theirs in heads):
        return None
    everyones = collectives.all_gather_object(group, facts)
    rank, theirs = next((r, f) for r, f in enumerate(everyones) if f != everyones[0])
    reference = everyones[0]
    line = next(
        (i for i, (a, b) in enumerate(zip(reference, theirs, strict=False)) if a != b),
        min(len(reference), len(theirs)),
    )
    here, there = (f[line] if line < len(f) else "nothing" for f in (reference, theirs))
    return (
        f"{what}: the ranks disagree. Rank 0 has {here}; rank {rank} has {there}. Pass the same "
        "parameters, in the same order, and the same hyperparameters on every rank."
    )
