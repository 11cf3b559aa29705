"""Zeiler's experiment on a Ray cluster: `examples/train_torchrun.py` on every worker.

    python configs/ray_train.py --workers 8 --use-gpu --out /shared/runs/ray

Other arguments go to the example. The repository and --out are folders that all hosts share.
"""

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_torchrun.py"


def train(config: dict[str, Any]) -> None:
    """Run the example in one worker, whose process group Ray has made."""
    sys.argv = [str(SCRIPT), *config["arguments"]]
    sys.path.insert(0, str(SCRIPT.parent))
    runpy.run_path(str(SCRIPT), run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2, help="ranks")
    parser.add_argument("--use-gpu", action="store_true", help="one for each worker")
    chosen, arguments = parser.parse_known_args()
    scaling = ScalingConfig(num_workers=chosen.workers, use_gpu=chosen.use_gpu)
    TorchTrainer(train, train_loop_config={"arguments": arguments}, scaling_config=scaling).fit()


if __name__ == "__main__":
    main()
