"""ADADELTA exactly as `torch.optim.Adadelta` defines it, fused and sharded over ranks."""

from .adadelta import Adadelta
from .agreement import RankError
from .flat_slice import FlatSlice
from .policy import ShardPolicy
from .sharded import ShardedAdadelta

__all__ = ["Adadelta", "FlatSlice", "RankError", "ShardPolicy", "ShardedAdadelta"]
__version__ = "0.1.0"
