"""The package as a whole: its names, its imports, its size."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import adadelta_dist

ROOT = Path(adadelta_dist.__file__).parent.parent
PARTS = ("checkpoints", "planning")
CORE = [
    *sorted((ROOT / "adadelta_dist").glob("*.py")),
    *(path for part in PARTS for path in sorted((ROOT / "adadelta_dist" / part).glob("[!_]*.py"))),
]
SOURCES = CORE + sorted((ROOT / "strategies").rglob("*.py"))

ORDER = [
    "layout",
    "policy",
    "capture",
    "kernels",
    "functional",
    "hypergradients",
    "memory",
    "adadelta",
    "flat_slice",
    "fingerprint",
    "groups",
    "collectives",
    "communicators",
    "agreement",
    "clipping",
    "scaling",
    "differentiable",
    "rounding",
    "precision",
    "in_order",
    "reduction",
    "lending",
    "buckets",
    "gathering",
    "state",
    "shard_step",
    "reducer",
    "grad_sharding",
    "state_dicts",
    "joining",
    "gradients",
    "sharded",
    "checkpoints.reading",
    "checkpoints.folder",
    "checkpoints.writing",
    "checkpoints.history",
    "checkpoints.content",
    "checkpoints.sources",
    "checkpoints.convert",
    "checkpoints.inspection",
    "checkpoints.named_state",
    "checkpoints.matching",
    "checkpoints.staging",
    "checkpoints.saving",
    "checkpoints.loading",
    "__init__",
    "planning.model_plan",
    "planning.planner",
    "planning.peers",
    "planning.picture",
    "terminal",
    "planning.command",
    "cli",
]
"""A module imports none but those before it; nothing here imports `strategies`."""


def test_the_exported_names_are_these():
    assert adadelta_dist.__all__ == [
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
    for name in adadelta_dist.__all__:
        assert getattr(adadelta_dist, name).__name__ == name


SPY = """
import importlib.abc, sys

class Spy(importlib.abc.MetaPathFinder):
    seen = []

    def find_spec(self, name, *_):
        self.seen.append(name)

sys.meta_path.insert(0, Spy())
import {module}
frameworks = {{"lightning", "pytorch_lightning", "deepspeed", "torchmetrics", "typer", "rich"}}
print(*sorted(frameworks & ({{n.partition(".")[0] for n in Spy.seen}} | set(sys.modules))))
"""


def frameworks_imported_by(module):
    """Those looked for, installed or not."""
    command = [sys.executable, "-c", SPY.format(module=module)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]  # before it, a framework may have its say


def test_the_core_does_not_even_look_for_a_framework():
    assert frameworks_imported_by("adadelta_dist").split() == []


def test_a_framework_would_be_noticed(tmp_path, monkeypatch):
    """Negative control for the test above."""
    (tmp_path / "guilty.py").write_text("import importlib.util as u; u.find_spec('deepspeed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert frameworks_imported_by("guilty").split() == ["deepspeed"]


def name_of(path: Path) -> str:
    """Below adadelta_dist: "sharded", "checkpoints.saving"."""
    return path.stem if path.parent.name == "adadelta_dist" else f"{path.parent.name}.{path.stem}"


def imported(path: Path) -> set[str]:
    """The modules of adadelta_dist that a file imports, anywhere in it."""
    names = set()
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names.update(".".join([*base, alias.name]) for alias in node.names)
    parts = [name.split(".")[1:] for name in names if name.startswith("adadelta_dist.")]
    return {".".join(part[: 1 + (part[0] in PARTS)]) for part in parts}


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_imports_run_one_way(path):
    before = ORDER[: ORDER.index(name_of(path))]
    assert imported(path) <= set(before), f"{name_of(path)} may import {before} only"


def test_the_imports_are_found():
    """Negative control for the test above."""
    package = ROOT / "adadelta_dist"
    assert imported(package / "sharded.py") >= {"reducer", "state", "collectives"}
    saved = imported(package / "checkpoints" / "saving.py")
    assert saved >= {"collectives", "checkpoints.folder", "checkpoints.reading"}
    assert imported(Path(__file__)) == set()


def test_strategies_as_a_bare_package_are_refused_with_the_right_name(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delitem(sys.modules, "strategies", raising=False)
    with pytest.raises(ImportError, match=r"import adadelta_dist\.strategies instead"):
        importlib.import_module("strategies")
    assert importlib.import_module("adadelta_dist.strategies")


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_files_and_functions_fit_the_head(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


def test_a_typed_package_says_so():
    assert (ROOT / "adadelta_dist" / "py.typed").exists()
