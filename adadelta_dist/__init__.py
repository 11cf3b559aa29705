"""ADADELTA exactly as `torch.optim.Adadelta` defines it, fused and sharded over ranks."""

from .adadelta import Adadelta
from .agreement import RankError
from .checkpoints.history import latest_checkpoint
from .checkpoints.loading import Loaded, load_checkpoint
from .checkpoints.reading import CheckpointError
from .checkpoints.saving import async_save_checkpoint, save_checkpoint
from .flat_slice import FlatSlice
from .policy import ShardPolicy
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
