"""ADADELTA exactly as `torch.optim.Adadelta` defines it, fused and sharded over ranks."""

from .adadelta import Adadelta
from .agreement import RankError
from .flat_slice import FlatSlice
from .history import latest_checkpoint
from .loading import Loaded, load_checkpoint
from .policy import ShardPolicy
from .reading import CheckpointError
from .saving import async_save_checkpoint, save_checkpoint
from .sharded import ShardedAdadelta

__all__ = [
    "Adadelta",
    "CheckpointError",
    "FlatSlice",
    "Loaded",
    "RankError",
    "ShardPolicy",
    "ShardedAdadelta",
    "async_save_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]
__version__ = "0.1.0"
