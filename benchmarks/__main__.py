"""`python -m benchmarks`: measure, print the tables, write a report and a picture."""

import argparse
import datetime
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from . import checkpoint, iteration, step
from .report import Table, picture, report

KINDS = ("step", "iteration", "checkpoint")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="?", default="all", choices=["all", *KINDS])
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    parser.add_argument("--world-size", type=int, default=2, help="ranks of `iteration`")
    parser.add_argument("--repetitions", type=int, help="of each peer")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the report (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Run the benchmarks that the command line asks for."""
    chosen = _arguments(argv)
    changes = {} if chosen.repetitions is None else {"repetitions": chosen.repetitions}
    tables: list[Table] = []
    if chosen.what in ("all", "step"):
        tables += step.measure(replace(step.QUICK if chosen.quick else step.StepPlan(), **changes))
    if chosen.what in ("all", "iteration"):
        plan = iteration.QUICK if chosen.quick else iteration.IterationPlan()
        tables += iteration.measure(replace(plan, world_size=chosen.world_size, **changes))
    if chosen.what in ("all", "checkpoint"):
        saving = checkpoint.QUICK if chosen.quick else checkpoint.CheckpointPlan()
        tables += checkpoint.measure(replace(saving, **changes))
    name = datetime.date.today().isoformat() + ("-quick" if chosen.quick else "")
    text = report(tables, name, shlex.join(["python", "-m", "benchmarks", *argv]))
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / f"{name}.md").write_text(text)
    picture(tables, chosen.out / f"{name}.png")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
