"""Callbacks for a Trainer that trains with Adadelta, sharded or not."""

from .decay import EpsDecay, RhoDecay
from .monitor import AdadeltaMonitor
from .report import ShardReport
from .timer import StepTimer

__all__ = ["AdadeltaMonitor", "EpsDecay", "RhoDecay", "ShardReport", "StepTimer"]
