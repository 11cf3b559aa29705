"""DeepSpeed: Adadelta named in its JSON.

    {"optimizer": {"type": "FusedAdadelta", "params": {"lr": 1.0, "rho": 0.95}}, ...}

"FusedAdadelta" is for ZeRO 1 to 3, where DeepSpeed shards the optimizer itself;
"ShardedAdadelta" for stage 0, where nobody else does. `initialize` is `deepspeed.initialize`
with these two types; `register` teaches them to `deepspeed.initialize` itself, for
frameworks that call it.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import is_optimized_parameter
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor

from adadelta_dist import Adadelta, ShardedAdadelta, ShardPolicy
from adadelta_dist.agreement import agreement
from adadelta_dist.groups import join

from .deepspeed_state import adopt_universal

PARAMETERS = {
    "lr": float,
    "rho": float,
    "eps": float,
    "weight_decay": float,
    "maximize": bool,
    "foreach": bool,
    "fused": bool,
    "capturable": bool,
}
"""What "params" may hold in the JSON."""

_ELSEWHERE = {
    "max_grad_norm": 'clip with "gradient_clipping" beside "optimizer"',
    "betas": "Adadelta's one decay is rho",
    "momentum": "Adadelta's one decay is rho",
    "differentiable": "DeepSpeed's step is not differentiable",
    "torch_adam": "it is for Adam",
    "adam_w_mode": "it is for Adam",
    "bias_correction": "it is for Adam",
    "amsgrad": "it is for Adam",
    "process_group": "DeepSpeed's data-parallel group is taken",
    "policy": "DeepSpeed averages the gradients itself",
}


class FusedAdadelta(Adadelta):
    """`adadelta_dist.Adadelta` as the optimizer that DeepSpeed wraps.

    The step is fused where `fused` says so (default: from 2**20 elements on, which a ZeRO
    shard usually has). Its state has the precision of DeepSpeed's masters, which is fp32 at
    every precision of the model unless the JSON asks for bf16 masters. A universal checkpoint,
    whose loader knows Adam's names only, is taken over at the first step.
    """

    _in_training = True  # False while DeepSpeed builds its wrapper, which may step

    def begin(self) -> None:
        """Steps count from now on."""
        self._in_training = True

    def _update(self) -> None:
        if self._in_training:
            adopt_universal(self.param_groups, self.state)
            super()._update()


class StageZeroAdadelta(ShardedAdadelta):
    """`ShardedAdadelta` within DeepSpeed's engine at stage 0.

    DeepSpeed averages the gradients. With half precision it puts fp32 masters in place of the
    parameters, and steps once with zero gradients, before training: sharding waits until
    that is over. Arguments as `ShardedAdadelta`.
    """

    _in_training = False

    def begin(self) -> None:
        """Shard what the groups hold by now; steps count from now on. Collective."""
        self._in_training = True
        super()._install(0)

    def checkpoint_event_prologue(self) -> None:
        """DeepSpeed's call before it saves or loads: whole state on rank 0. Collective."""
        self.consolidate_state_dict(to=0)

    def checkpoint_event_epilogue(self) -> None:
        """DeepSpeed's call after it saved or loaded."""
        self._consolidated = None

    def _install(self, first_group: int) -> None:
        if self._in_training:
            super()._install(first_group)

    def _update(self) -> None:
        if self._in_training:
            super()._update()


TYPES = {"FusedAdadelta": FusedAdadelta, "ShardedAdadelta": StageZeroAdadelta}
"""What "type" may be in the JSON, besides DeepSpeed's own and the classes of torch.optim."""

_theirs: dict[str, Callable[..., Any]] = {}


def register() -> None:
    """Teach `deepspeed.initialize` the types of this module, for the rest of the process.

    For code that calls it by itself (Lightning's strategy, Transformers, Accelerate). Other
    types are built as before. Calling it again does nothing; `unregister` takes it back.
    """
    if not _theirs:
        for name, ours in _OURS.items():
            _theirs[name] = getattr(DeepSpeedEngine, name)
            setattr(DeepSpeedEngine, name, ours)
        ZERO_SUPPORTED_OPTIMIZERS.append(FusedAdadelta)


def unregister() -> None:
    """Take `register` back. Engines that exist go on."""
    if _theirs:
        for name, theirs in _theirs.items():
            setattr(DeepSpeedEngine, name, theirs)
        _theirs.clear()
        ZERO_SUPPORTED_OPTIMIZERS.remove(FusedAdadelta)


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`, which understands the types of this module in its JSON.

    Args:
        args, kwargs: as `deepspeed.initialize`; its "config" may be a dict, a path, or what
            the argument parser's `--deepspeed_config` names.

    Returns:
        engine, optimizer, training dataloader and LR scheduler, as `deepspeed.initialize`.

    Raises:
        ValueError: an unknown type or parameter, a value out of range, or "ShardedAdadelta"
            at stages 1 to 3.
        RankError: another rank failed, or has other "optimizer" settings.

    Collective.
    """
    was_registered = bool(_theirs)
    register()
    try:
        return deepspeed.initialize(*args, **kwargs)  # type: ignore[no-any-return]
    finally:
        if not was_registered:
            unregister()


functools.update_wrapper(initialize, deepspeed.initialize, assigned=())


def _is_supported_optimizer(engine: Any, name: str) -> bool:
    if engine.local_rank >= 0:  # DeepSpeed does so after this, but ranks talk here already
        get_accelerator().set_device(engine.local_rank)
    with agreement(join(None), "deepspeed.initialize"):
        if name not in TYPES and not _theirs["_is_supported_optimizer"](engine, name):
            raise ValueError(_unknown(name))
    return True


def _unknown(name: str) -> str:
    torchs = [n for n, c in vars(torch.optim).items() if inspect.isclass(c) and n != "Optimizer"]
    known = [*TYPES, *DEEPSPEED_OPTIMIZERS, *sorted(torchs)]
    return (
        f'"optimizer": "type" is {name!r}, which nobody knows. {_guess(name, known)}Here are '
        f"{', '.join(TYPES)}; DeepSpeed's own are {', '.join(sorted(DEEPSPEED_OPTIMIZERS))}; and "
        f"torch.optim has {', '.join(sorted(torchs))}."
    )


def _configure_basic_optimizer(engine: Any, model_parameters: Any) -> Any:
    kind = engine.optimizer_name()
    if kind not in TYPES:
        return _theirs["_configure_basic_optimizer"](engine, model_parameters)
    group = engine.seq_data_parallel_group
    options = engine.optimizer_params() or {}
    with agreement(join(group), "deepspeed.initialize") as mine:
        _check_parameters(kind, options)
        _check_stage(kind, engine)
        mine.facts.append(f"{kind} {sorted(options.items())}")
    if not engine.zero_optimization():
        # DeepSpeed's masters leave out what is frozen, so that names and parameters would differ.
        is_half = engine.bfloat16_enabled() or engine.fp16_enabled()
        kept = is_optimized_parameter if is_half else _is_any
        model_parameters = _named(model_parameters, engine.module, kept)
    if kind == "ShardedAdadelta":
        policy = ShardPolicy(gradients="averaged", overlap=False)
        return StageZeroAdadelta(model_parameters, process_group=group, policy=policy, **options)
    optimizer = FusedAdadelta(model_parameters, **options)
    optimizer._in_training = False
    return optimizer


def _configure_optimizer(engine: Any, client_optimizer: Any, model_parameters: Any) -> None:
    client_optimizer = _client(engine, client_optimizer)
    _theirs["_configure_optimizer"](engine, client_optimizer, model_parameters)
    basic = engine.basic_optimizer
    if isinstance(basic, FusedAdadelta | StageZeroAdadelta):
        basic.begin()
    if isinstance(basic, StageZeroAdadelta) and engine.optimizer is not basic:
        # The wrapper of half precision does not pass these calls on.
        engine.optimizer.checkpoint_event_prologue = basic.checkpoint_event_prologue
        engine.optimizer.checkpoint_event_epilogue = basic.checkpoint_event_epilogue


def _client(engine: Any, given: Any) -> Any:
    """What was passed as `optimizer=`, an optimizer or a callable that makes one, if it fits."""
    if isinstance(given, ShardedAdadelta):
        _check_stage("ShardedAdadelta", engine)
    if isinstance(given, FusedAdadelta):
        given._in_training = False
    if not callable(given):
        return given
    return lambda parameters: _client(engine, given(parameters))


_OURS: dict[str, Callable[..., Any]] = {
    ours.__name__: ours
    for ours in (_is_supported_optimizer, _configure_basic_optimizer, _configure_optimizer)
}


def _check_stage(kind: str, engine: Any) -> None:
    if kind != "ShardedAdadelta":
        return
    stage = engine.zero_optimization_stage()
    if stage > 0:
        raise ValueError(
            f"ShardedAdadelta with ZeRO stage {stage}: DeepSpeed shards the optimizer itself from "
            'stage 1 on, and it would be sharded twice. Use "type": "FusedAdadelta", or stage 0.'
        )
    if engine.has_moe_layers:
        raise ValueError(
            "ShardedAdadelta with experts: their gradients are averaged over other ranks than the "
            'rest. Use "type": "FusedAdadelta".'
        )


def _check_parameters(kind: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        wanted = PARAMETERS.get(name)
        if wanted is None:
            reason = f" ({_ELSEWHERE[name]})" if name in _ELSEWHERE else ""
            raise ValueError(
                f'"optimizer": "params": {name!r} is not a parameter of {kind}{reason}. '
                f"{_guess(name, PARAMETERS)}It has {', '.join(PARAMETERS)}."
            )
        fits = isinstance(value, bool) if wanted is bool else _is_number(value)
        if not fits and not (value is None and name in ("foreach", "fused")):
            kinds = "true or false" if wanted is bool else "a number"
            raise ValueError(f'"optimizer": "params": {name!r} must be {kinds}, got {value!r}')
    Adadelta([torch.empty(0)], **options)  # which looks at ranges, and raises torch's own errors


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _guess(name: str, known: Iterable[str]) -> str:
    folded = {n.lower(): n for n in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1)
    return f"Did you mean {folded[close[0]]!r}? " if close else ""


def _is_any(_: Tensor) -> bool:
    return True


def _named(
    groups: list[Any], module: torch.nn.Module, is_kept: Callable[[Tensor], bool]
) -> list[Any]:
    """The same parameters or groups with names, for a checkpoint that says what is what."""
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}

    def named(params: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
        return [(names.get(p, f"unnamed.{i}"), p) for i, p in enumerate(params) if is_kept(p)]

    if groups and isinstance(groups[0], dict):
        return [group | {"params": named(_listed(group["params"]))} for group in groups]
    return named(groups)


def _listed(params: Any) -> list[Tensor]:
    return [params] if isinstance(params, Tensor) else list(params)
