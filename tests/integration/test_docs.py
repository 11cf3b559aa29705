"""Every code block in the documents runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.M | re.S)
    return [
        pytest.param(code, id=f"{path.name}-{number}")
        for path in DOCUMENTS
        for number, code in enumerate(fence.findall(path.read_text()), 1)
    ]


WARNINGS = (
    "error",
    # DeepSpeed imports torch's compiler, and calls two collectives by names that torch 2.13 changed
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:`torch.distributed.all_gather_into_tensor` is deprecated:FutureWarning",
    "ignore:`torch.distributed.reduce_scatter_tensor` is deprecated:FutureWarning",
    # torch's, on how Lightning looks at nested batches, and Lightning's, on data so small that
    # they need no worker processes
    "ignore:`isinstance(treespec:FutureWarning",
    "ignore:The 'train_dataloader' does not:UserWarning",
    "ignore:The 'val_dataloader' does not:UserWarning",
)


def environment():
    strict = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ",".join(WARNINGS)}
    return os.environ | {"PYTHONPATH": str(ROOT)} | strict


# torch may abort a process that ends while a thread of gloo still lets go of what it has sent
# (pytorch/pytorch#190489), which plain torch does too: hence the sleep.
ENDS = """
import time
import torch.distributed
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    time.sleep(0.5)
"""


@pytest.mark.parametrize("code", blocks("python"))
def test_a_python_block_runs_in_one_process(code, tmp_path):
    python = [sys.executable, "-X", "faulthandler", "-c"]
    subprocess.run([*python, code + ENDS], cwd=tmp_path, env=environment(), check=True)


@pytest.mark.parametrize("code", blocks("python"))
def test_a_python_block_runs_under_torchrun(code, tmp_path):
    script = tmp_path / "block.py"
    # A block that does not initialise the process group itself is given one.
    if "init_process_group" not in code:
        code = "import torch.distributed\ntorch.distributed.init_process_group('gloo')\n" + code
    script.write_text(code + ENDS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    quiet = environment() | {"PYTHONWARNINGS": "default"}  # torchrun's own warnings
    subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script)], cwd=tmp_path, env=quiet, check=True
    )


@pytest.mark.parametrize("code", blocks("console"))
def test_a_console_block_names_real_targets(code):
    """Run for real by CI (`make check`, `make test`); here make itself checks the names."""
    for line in code.splitlines():
        subprocess.run([*line.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_no_block_is_left_out():
    """A block in another language must be plain text, marked as such."""
    for path in DOCUMENTS:
        fences = re.findall(r"^```(\S*)$", path.read_text(), re.M)
        assert set(fences) <= {"python", "console", "text", ""}
        assert fences[1::2] == [""] * (len(fences) // 2), f"{path.name} has an unmarked block"
