"""How the state of a `ShardedAdadelta` leaves and enters it.

state_dict()            every rank: its own slices          load_state_dict(either)
gather_state_dict()     one rank: the whole, torch's form   scatter_state_dict(whole)
"""

import pickle
from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import collectives, fingerprint, state
from .adadelta import Adadelta
from .agreement import agreement
from .groups import Group
from .reducer import GradientReducer
from .state import ShardState


class StateDicts(Adadelta):
    """An `Adadelta` whose state lies in shards: the base of `ShardedAdadelta`."""

    _group: Group
    _reducer: GradientReducer
    _shards: list[ShardState]
    _installed: bool
    _consolidated: defaultdict[Tensor, Any] | None

    def state_dict(self) -> dict[str, Any]:
        """The state, as torch's. With more ranks, `FlatSlice` of what this rank owns.

        On the rank where `consolidate_state_dict` gathered it, and until the next step,
        the whole state, in torch's own form.
        """
        if self._consolidated is None:
            return super().state_dict()
        return self._state_dict_of(self._consolidated)

    def gather_state_dict(self, dst: int = 0) -> dict[str, Any]:
        """The whole state on the CPU of one rank, in torch's own form. Collective.

        One parameter travels at a time, so that no rank but `dst` needs memory for more
        than a piece of one parameter. The state dict hooks run on `dst` alone.

        Args:
            dst: rank within the process group; with replicas, of the first of them.

        Returns:
            On `dst`, what `torch.optim.Adadelta.state_dict` returns in one process, in
            memory of its own; `{}` on the other ranks.

        Raises:
            ValueError: `dst` is no rank of the group.
        """
        whole = self._gather("gather_state_dict", "dst", dst)
        return {} if whole is None else self._state_dict_of(whole)

    def scatter_state_dict(self, state_dict: dict[str, Any] | None, src: int = 0) -> None:
        """Load a state that one rank alone has: the inverse of `gather_state_dict`. Collective.

        One parameter travels at a time, and each rank receives what it owns right where it
        belongs. Nothing changes on any rank if the state does not fit. The pre-hooks of
        loading run on `src` alone, the post-hooks on every rank.

        Args:
            state_dict: on `src`, the whole state in torch's form; None (or `{}`) elsewhere.
            src: rank within the process group; with replicas, of the first of them.

        Raises:
            ValueError: as `load_state_dict`; `src` is no rank of the group, has no state, or
                is not the only one that has.
        """
        if self._group.world_size > 1:
            self._check_sharded("scatter_state_dict", "load_state_dict on every rank")
        groups: list[dict[str, Any]] = []
        values: dict[Tensor, Any] = {}
        with agreement(self._group, "scatter_state_dict") as mine:
            self._check_rank("src", src)
            mine.facts.append(f"src={src}")
            if bool(state_dict) != (self._group.number == src):
                wanted = "the whole state" if self._group.number == src else "None"
                raise ValueError(
                    f"state_dict on rank {self._group.number} is {type(state_dict).__name__} of "
                    f"{len(state_dict or ())} entries, wanted {wanted}: src={src} alone has it"
                )
            if state_dict and self._group.world_size > 1:
                groups, values = self._match(state_dict)
                state.check_whole(self._shards, values)
                groups = _portable(groups)
        if self._group.world_size == 1:
            self.load_state_dict(state_dict or {})
            return
        groups = self._groups_of(src, groups)
        self._reducer.catch_up()
        state.scatter_all(self._shards, values, self.state, src)
        self._finish_loading(groups)

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the whole state on the CPU of one rank, for its next `state_dict()`.

        Collective. The name that `torch.distributed.optim.ZeroRedundancyOptimizer` and
        Lightning know; `gather_state_dict` returns the state instead of keeping it.

        Args:
            to: rank within the process group.
        """
        if self._group.world_size > 1:  # else `state_dict` is the whole already
            self._consolidated = self._gather("consolidate_state_dict", "to", to)
        else:
            self._check_rank("to", to)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of `torch.optim.Adadelta`, or of this class. Collective.

        Every rank passes either the whole state (torch's form, any world size) or its own
        slices. Parameters without an entry start from zero. Nothing changes on any rank
        if any rank fails.

        Raises:
            ValueError: other groups, other shapes, or state of another optimizer.
            RankError: another rank failed, or the ranks load different checkpoints.
        """
        if not self._installed:
            self._consolidated = None
            super().load_state_dict(state_dict)
            return
        with agreement(self._group, "load_state_dict") as mine:
            groups, values = self._match(state_dict)
            mine.facts.extend(state.check_all(self._shards, values))
            both = zip(self.param_groups, groups, strict=True)
            mine.facts.extend(fingerprint.hyperparameters([old | new for old, new in both]))
        state.adopt_all(self._shards, values, self.state)
        self._finish_loading(groups)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._group.world_size > 1:
            raise TypeError(
                f"{type(self).__name__} at world size {self._group.world_size} cannot be pickled: "
                "it holds this rank's slices only. Call gather_state_dict(dst=0) on every rank, "
                "and save what it returns on rank 0."
            )
        return super().__reduce_ex__(protocol)

    def _state_dict_of(self, whole: defaultdict[Tensor, Any]) -> dict[str, Any]:
        own, self.state = self.state, whole
        try:
            return super().state_dict()
        finally:
            self.state = own

    def _gather(self, what: str, argument: str, dst: int) -> defaultdict[Tensor, Any] | None:
        """Whole entries by parameter on `dst`, None elsewhere. Collective.

        Args:
            what, argument: the caller and its own name for `dst`, for messages.
        """
        with agreement(self._group, what) as mine:
            self._check_rank(argument, dst)
            mine.facts.append(f"{argument}={dst}")
            state.reclaim(self._shards, self.state)
        self._reducer.catch_up()
        whole: defaultdict[Tensor, Any] = defaultdict(dict)
        if not self._installed:  # all is as in torch: no shards, but perhaps a graph
            for p, entry in self.state.items():
                whole[p] = tree_map_only(Tensor, _on_cpu, entry)
        for shard in self._shards if self._group.replica == 0 else ():
            for i, p in enumerate(shard.bucket.params):
                entry = state.gather(shard, i, dst)
                if entry is not None:
                    whole[p] = entry
        return whole if self._group.number == dst else None

    def _check_sharded(self, what: str, remedy: str) -> None:
        if not self._installed:
            raise RuntimeError(
                f"{what} with differentiable=True, which shards nothing: use {remedy}"
            )

    def _check_rank(self, argument: str, rank: int) -> None:
        if not 0 <= rank < self._group.world_size:
            raise ValueError(
                f"{argument} must be a rank below {self._group.world_size}, got {rank}"
            )

    def _match(self, state_dict: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[Tensor, Any]]:
        """The groups to use from now on and the values by parameter, after the pre-hooks."""
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state.match(self.param_groups, state_dict)

    def _groups_of(self, src: int, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups that rank `src` has matched, with this rank's own parameters. Collective."""
        received = collectives.all_gather_object(self._group, groups)[src]
        for new, old in zip(received, self.param_groups, strict=True):
            new["params"] = old["params"]
            if isinstance(old["lr"], Tensor) and isinstance(new["lr"], Tensor):
                new["lr"] = new["lr"].to(old["lr"].device)
        return received  # type: ignore[no-any-return]

    def _finish_loading(self, groups: list[dict[str, Any]]) -> None:
        self._consolidated = None
        super().__setstate__({"param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _portable(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hyperparameters as they can be sent; what cannot raises here, not in a collective."""
    portable = [
        {k: v.cpu() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        for group in groups
    ]
    pickle.dumps(portable)
    return portable


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy without history."""
    return tensor.detach().to("cpu", copy=True)
