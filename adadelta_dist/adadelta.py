"""`Adadelta`: `torch.optim.Adadelta` with a fused step. No communication."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT, _get_scalar_dtype, _use_grad_for_differentiable

from . import functional, hypergradients
from .capture import check_warm, is_capturing
from .functional import Entry
from .layout import storage_order
from .memory import zeros

_PACK_NUMEL = 2**18


class Adadelta(torch.optim.Adadelta):
    """`torch.optim.Adadelta`, with `fused`. A drop-in: same arguments, state and messages.

    Args:
        params, lr, rho, eps, weight_decay, foreach, capturable, maximize, differentiable:
            as `torch.optim.Adadelta`. With `differentiable`, `lr` and `weight_decay` may also be
            one-element Tensors that require a gradient, and get it, which torch refuses.
        fused: True: one kernel for the whole formula, or an error where no compiler is
            found; False: never; None: the kernel where a compiler is found, `foreach` is
            not given and a group has at least 2**20 elements, torch's own step elsewhere.
            The fused step differs from torch's by rounding: a few ulp a step.

    DTensor parameters (FSDP2) step on their local shards.

    Raises:
        ValueError: a hyperparameter out of range (in a parameter group too).
        RuntimeError: `fused=True` together with `foreach`, `differentiable` or
            parameters that are not floating point; at the first step: no compiler.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._fused = fused
        super().__init__(
            params,
            lr,
            rho,
            eps,
            weight_decay,
            foreach,
            capturable=capturable,
            maximize=maximize,
            differentiable=differentiable,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`; checks its values too."""
        # torch's constructor comes here with the defaults it has made, which lack `fused`. Left
        # at None it stays out, so that groups and state dicts are those of torch's class.
        fused = self.__dict__.pop("_fused", None)
        if fused is not None:
            self.defaults["fused"] = fused
        count = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            check_values(group)
            functional.check_fused(group, group["params"])
        except Exception:
            del self.param_groups[count:]
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "fused" in self.defaults:
            for group in self.param_groups:
                group.setdefault("fused", self.defaults["fused"])

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self) -> None:
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            functional.check_capturable(group, with_grad)
            if is_capturing() and not all(map(self.state.get, with_grad)):
                check_warm("state is allocated")
            fused = functional.use_fused(group, [_local(p) for p in with_grad])
            if fused:
                self._lay_out_state(with_grad, capturable=group["capturable"])
            columns: tuple[list[Tensor], ...] = ([], [], [], [], [])
            self._init_group(group, *columns)
            params, grads, square_avgs, acc_deltas, steps = columns
            if fused:
                torch._foreach_add_(steps, 1)
                entries = zip(params, grads, square_avgs, acc_deltas, strict=True)
                _step_fused([tuple(map(_local, entry)) for entry in entries], group)  # type: ignore[misc]
            else:
                flows = hypergradients.wanted(group)
                eager_ = hypergradients.eager_ if flows else functional.eager_
                eager_(params, grads, square_avgs, acc_deltas, steps, group)

    def _lay_out_state(self, params: list[Tensor], *, capturable: bool) -> None:
        """Put accumulators that do not exist yet side by side, where no packing is needed."""
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in params:
            if not self.state[p] and p.is_contiguous() and not isinstance(p, DTensor):
                kinds.setdefault((p.device, p.dtype), []).append(p)
        for (device, dtype), new in kinds.items():
            flats = zeros(2 * sum(p.numel() for p in new), dtype, device).view(2, -1)
            rows = [flat.split([p.numel() for p in new]) for flat in flats]
            for p, square_avg, acc_delta in zip(new, *rows, strict=True):
                step_device = p.device if capturable else "cpu"
                self.state[p] = {
                    "step": torch.zeros((), dtype=_get_scalar_dtype(), device=step_device),
                    "square_avg": square_avg.view_as(p),
                    "acc_delta": acc_delta.view_as(p),
                }


def _step_fused(entries: Iterable[Entry], group: dict[str, Any]) -> None:
    """A kernel call each for large entries; small ones go packed, many to a call."""
    small: dict[tuple[torch.device, torch.dtype], list[Entry]] = {}
    large: list[Entry] = []
    for entry in entries:
        param = entry[0]
        flat = _flattened(entry) if param.numel() > _PACK_NUMEL // 4 else None
        if flat is not None:
            large.append(flat)
        else:
            small.setdefault((param.device, param.dtype), []).append(entry)
    functional.fused_(large, group)
    for same_kind in small.values():
        functional.fused_(_packed(same_kind), group)


def _packed(entries: list[Entry]) -> Iterator[Entry]:
    """Flat memory for many small entries at a time; what the caller writes there is copied back.

    Tensors that lie side by side are taken as they are. Others are copied side by side
    into scratch memory, which stays in the cache.
    """
    scratch = entries[0][0].new_empty((4, max(_PACK_NUMEL, *(e[0].numel() for e in entries))))
    for pack in _packs(entries):
        columns = list(zip(*pack, strict=True))
        sizes = [p.numel() for p in columns[0]]
        flat = [_joined(column) for column in columns]
        copied = [index for index in range(4) if flat[index] is None]
        for index in copied:
            flat[index] = row = scratch[index, : sum(sizes)]
            torch.cat([t.reshape(-1) for t in columns[index]], out=row)
        yield tuple(flat)  # type: ignore[misc]
        for index in copied:
            if index != 1:  # the gradient is not written
                pieces = flat[index].split(sizes)  # type: ignore[union-attr]
                new = [piece.view_as(t) for piece, t in zip(pieces, columns[index], strict=True)]
                torch._foreach_copy_(columns[index], new)


def _packs(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Cut the list where a pack would exceed `_PACK_NUMEL` elements."""
    pack: list[Entry] = []
    numel = 0
    for entry in entries:
        if pack and numel + entry[0].numel() > _PACK_NUMEL:
            yield pack
            pack, numel = [], 0
        pack.append(entry)
        numel += entry[0].numel()
    yield pack


def _joined(tensors: tuple[Tensor, ...]) -> Tensor | None:
    """One flat view over tensors that lie side by side in one storage, else None."""
    first, last = tensors[0], tensors[-1]
    end = first.data_ptr()
    for t in tensors:
        if t.data_ptr() != end or not t.is_contiguous():
            return None
        end += t.numel() * t.element_size()
    if first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr():
        return None
    return first.as_strided((sum(t.numel() for t in tensors),), (1,))


def _flattened(entry: Entry) -> Entry | None:
    """Flat views of the tensors, if they lie in memory densely and in the same order."""
    param = entry[0]
    if all(t.is_contiguous() for t in entry):
        return tuple(t.view(-1) for t in entry)  # type: ignore[return-value]
    order = storage_order(param.shape, param.stride())
    views = [t.permute(order) for t in entry]
    if all(view.is_contiguous() for view in views):
        return tuple(view.view(-1) for view in views)  # type: ignore[return-value]
    return None


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_values(group: Mapping[str, Any]) -> None:
    """Raise torch's own message for a hyperparameter out of range."""
    names = ("lr", "rho", "eps", "weight_decay")
    torch.optim.Adadelta([torch.empty(0)], **{name: group[name] for name in names})
