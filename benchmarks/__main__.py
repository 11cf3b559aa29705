"""`python -m benchmarks`: measure, print the tables, write a report and its pictures."""

import argparse
import datetime
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import checkpoint, growth, iteration, memory, step, two_hosts
from .peers import BF16_WIRE, HYBRID, PEERS
from .pictures import draw
from .report import Section, facts, report

SECTIONS: dict[str, Callable[[bool], Section]] = {
    "step": step.measure,
    "iteration": iteration.measure,
    "memory": memory.measure,
    "checkpoint": checkpoint.measure,
    "growth": growth.measure,
    "two_hosts": two_hosts.measure,
}


def main(argv: Sequence[str]) -> None:
    """Run the benchmarks that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run at all?")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the report (default: %(default)s)",
    )
    chosen = parser.parse_args(argv)
    if unknown := set(chosen.what) - set(SECTIONS):
        parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(SECTIONS)}")
    where = facts(shlex.join(["python", "-m", "benchmarks", *argv]))
    used = [peer for peer in [*PEERS, *BF16_WIRE, HYBRID] if peer.settings]
    settings = "\n".join(f"- {peer.name}: {peer.settings}." for peer in used)
    date = datetime.date.today().isoformat() + ("-quick" if chosen.quick else "")
    chosen.out.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Section] = {}
    pictures: dict[str, list[str]] = {}
    text, took = "", "\n- Took"
    for name in chosen.what or SECTIONS:
        start = time.monotonic()
        sections[name] = SECTIONS[name](chosen.quick)
        took += f" {name} {time.monotonic() - start:.0f} s,"
        pictures[name] = [file.name for file in draw(sections[name], chosen.out / f"{date}-{name}")]
        text = f"# Benchmarks, {date}\n\n"
        text += report(sections, pictures, settings, where + took.rstrip(",") + ".")
        (chosen.out / f"{date}.md").write_text(text)  # of what there is, should the rest fail
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
