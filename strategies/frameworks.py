"""Which Lightning: `lightning`, or `pytorch_lightning` where that is the user's.

The two hold the same code under different names, and their classes do not mix. A strategy
has to come from the one whose Trainer runs it.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning.fabric as fabric
    import lightning.pytorch as pl
elif "lightning" in sys.modules or (
    "pytorch_lightning" not in sys.modules and find_spec("lightning") is not None
):
    pl, fabric = import_module("lightning.pytorch"), import_module("lightning.fabric")
elif find_spec("pytorch_lightning") is not None:
    pl, fabric = import_module("pytorch_lightning"), import_module("lightning_fabric")
else:
    raise ImportError(
        "adadelta_dist.strategies needs Lightning here: pip install 'adadelta-dist[lightning]'"
    )

__all__ = ["fabric", "pl"]
