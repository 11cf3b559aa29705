"""The command: what it prints for people and for scripts, and how it ends."""

import importlib
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checkpoints import assert_same, build, load_torch, save_dcp, save_torch
from typer.testing import CliRunner

import adadelta_dist
from adadelta_dist.cli import app

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or")
ROOT = Path(adadelta_dist.__file__).parent.parent


def run(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def file(tmp_path):
    save_torch(tmp_path / "file.pt", *build())
    return tmp_path / "file.pt"


@pytest.fixture
def folder(tmp_path, file):
    assert run("convert", file, tmp_path / "folder", "--to", "dcp").exit_code == 0
    return tmp_path / "folder"


def damage(folder):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes() + b" ")


def test_inspect_prints_plain_text_into_a_pipe(folder):
    result = run("inspect", folder)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"{folder}: checkpoint of adadelta-dist", "intact: yes"]
    assert re.fullmatch(r"saved: 20.*\+00:00 by 1 rank, with .*torch \d.*", lines[2])
    assert lines[3] == "optimizer: Adadelta, 2.2 kB"
    assert lines[4].startswith("  group 0: 4 parameters, rho 0.8, lr 0.6")
    assert lines[6] == "model: 1.1 kB"
    start = lines.index("") + 1
    assert lines[start].split() == [
        "parameter",
        "shape",
        "dtype",
        "size",
        "group",
        "steps",
        "state",
    ]
    rows = {line.split()[0]: line for line in lines[start + 1 :]}
    assert re.fullmatch(r"matrix +5 x 7 +float32 +140 bytes +0 +2 +284 bytes", rows["matrix"])
    assert re.fullmatch(r"scalar +scalar +float32 +4 bytes +1 +2 +12 bytes", rows["scalar"])
    assert re.fullmatch(r"frozen +3 x 3 +float32 +36 bytes +1 +- +-", rows["frozen"])
    assert re.fullmatch(r"count +scalar +int64 +8 bytes +- +- +-", rows["count"])
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


def test_inspect_prints_json_for_scripts(folder):
    found = json.loads(run("inspect", folder, "--json").stdout)
    assert (found["kind"], found["intact"], found["world_size"]) == ("adadelta-dist", True, 1)
    assert found["parameters"][0]["name"] == "matrix"
    assert found["parameters"][0]["shape"] == [5, 7]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_inspect_exits_with_1_if_not_intact(folder, options):
    damage(folder)
    result = run("inspect", folder, *options)
    assert result.exit_code == 1
    assert "manifest.json has changed" in result.stdout
    assert ("intact: NO" in result.stdout) is not bool(options)


def test_no_checksums_are_no_failure(tmp_path):
    save_dcp(tmp_path / "dcp", *build())
    result = run("inspect", tmp_path / "dcp")
    assert result.exit_code == 0
    assert "intact: unknown, for it has no checksums" in result.stdout


def test_convert_there_and_back(tmp_path, folder):
    result = run("convert", folder, tmp_path / "back.pt", "--to", "torch")
    assert (result.exit_code, result.stdout) == (0, f"wrote {tmp_path / 'back.pt'}\n")
    assert result.stderr == ""  # the bar is for terminals
    assert_same(load_torch(tmp_path / "back.pt"), build())


def test_errors_are_one_line_and_1(tmp_path, file, folder):
    damage(folder)
    cases = {
        ("inspect", tmp_path / "absent"): "No such file or directory",
        ("inspect", tmp_path): "is not a checkpoint: it has neither",
        ("convert", folder, tmp_path / "new", "--to", "torch"): "is damaged: manifest.json has",
        ("convert", file, folder, "--to", "dcp"): "exists: remove it, or give another name",
    }
    for args, message in cases.items():
        result = run(*args)
        assert (result.exit_code, result.stdout) == (1, ""), args
        assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", result.stderr), result.stderr


def test_wrong_use_is_2(file):
    for args in ((), ("inspect",), ("convert", file, "x", "--to", "zip"), ("convert", file, "x")):
        assert run(*args).exit_code == 2, args


def test_names_cannot_steer_the_terminal(tmp_path):
    names = ["\x1b[31mred", "[bold]x", "new\nline", "ä"]
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "model.pt")
    result = run("inspect", tmp_path / "model.pt")
    assert result.exit_code == 0
    shown = [line.split()[0] for line in result.stdout.splitlines()[-4:]]
    assert shown == [r"\x1b[31mred", "[bold]x", r"new\nline", "ä"]


def on_terminal(*commands):
    """What the commands show on a terminal of 100 columns, in one process."""
    here, there = pty.openpty()
    code = f"from adadelta_dist.cli import app\nfor args in {commands}:"
    code += "\n    assert not app(args, standalone_mode=False)"
    env = os.environ | {"COLUMNS": "100", "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, env=env, stdout=there, stderr=there
    )
    os.close(there)
    shown = b""
    with suppress(OSError):  # Linux' way to say that the other end is closed
        while block := os.read(here, 2**16):
            shown += block
    os.close(here)
    assert process.wait(60) == 0, shown.decode()
    return shown.decode()


def test_on_a_terminal_there_is_a_table_and_a_bar(tmp_path, file):
    folder = str(tmp_path / "folder")
    shown = on_terminal(("convert", str(file), folder, "--to", "dcp"), ("inspect", folder))
    bar, _, table = shown.partition("wrote ")
    assert "━━━" in bar
    assert "│ matrix " in table


@pytest.mark.parametrize("name", ["typer", "rich.table"])
def test_without_its_libraries_it_says_what_to_install(monkeypatch, name):
    for module in ("cli", "planning.command", "terminal"):
        monkeypatch.delitem(sys.modules, f"adadelta_dist.{module}")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as exit:
        importlib.import_module("adadelta_dist.cli")
    assert exit.value.code == (  # text: Python prints it to stderr and exits with 1
        f"error: adadelta-dist needs {name}: pip install 'adadelta-dist[cli]'"
    )
