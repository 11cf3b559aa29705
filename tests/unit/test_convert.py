"""Conversions keep every bit, write all or nothing, and hold a tensor at a time."""

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import (
    FLAT,
    NESTED,
    Zoo,
    assert_same,
    build,
    load_dcp,
    load_torch,
    save_dcp,
    save_torch,
    train,
)
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import adadelta_dist
from adadelta_dist import Adadelta, ShardedAdadelta, load_checkpoint, save_checkpoint
from adadelta_dist.checkpoints.convert import convert
from adadelta_dist.checkpoints.folder import read_manifest, verify

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or")
ROOT = Path(adadelta_dist.__file__).parent.parent
flattened = pytest.mark.parametrize("options", [NESTED, FLAT], ids=["nested", "flat"])


def go_on(loaded):
    """Loaded right, it trains on as if nothing had been."""
    module, optimizer = build()
    assert_same(loaded, (module, optimizer))
    for pair in (loaded, (module, optimizer)):
        train(*pair, [7])
    assert_same(loaded, (module, optimizer))


@flattened
@pytest.mark.parametrize("keys", [("model", "optimizer"), ("net", "optim"), None], ids=str)
def test_a_dcp_folder_becomes_a_file_that_torch_loads(tmp_path, options, keys):
    save_dcp(tmp_path / "dcp", *build(), options, keys=keys)
    convert(tmp_path / "dcp", tmp_path / "file.pt", "torch")
    go_on(load_torch(tmp_path / "file.pt"))


@pytest.mark.parametrize("named", [True, False])
def test_without_param_names_flattened_groups_are_told_by_their_values(tmp_path, named):
    save_dcp(tmp_path / "dcp", *build(named=named), FLAT)
    convert(tmp_path / "dcp", tmp_path / "file.pt", "torch")
    go_on(load_torch(tmp_path / "file.pt"))
    groups = torch.load(tmp_path / "file.pt", weights_only=True)["optimizer"]["param_groups"]
    names = [name for name, _ in Zoo().named_parameters()]
    assert [group["param_names"] for group in groups] == [names[::2], names[1::2]]


@flattened
def test_order_is_the_optimizers_whichever_rank_wrote_what(tmp_path, options):
    """What several ranks have, they write in turns: the metadata lists it rank by rank."""
    save_dcp(tmp_path / "dcp", *build(), options)
    path = tmp_path / "dcp" / ".metadata"
    found = pickle.loads(path.read_bytes())
    found.state_dict_metadata = dict(reversed(found.state_dict_metadata.items()))
    path.write_bytes(pickle.dumps(found))
    convert(tmp_path / "dcp", tmp_path / "file.pt", "torch")
    go_on(load_torch(tmp_path / "file.pt"))


def test_a_torch_file_becomes_a_complete_folder(tmp_path):
    save_torch(tmp_path / "file.pt", *build())
    convert(tmp_path / "file.pt", tmp_path / "dcp", "dcp")
    go_on(load_dcp(tmp_path / "dcp"))
    assert verify(tmp_path / "dcp") == []
    manifest = read_manifest(tmp_path / "dcp")
    assert manifest["world_size"] == 1
    assert [group["lr"] for group in manifest["groups"]] == [pytest.approx(0.7), 0.5]
    shapes = {name: tuple(p["shape"]) for name, p in manifest["parameters"].items()}
    assert shapes == {name: tuple(p.shape) for name, p in Zoo().named_parameters()}


@flattened
def test_there_and_back(tmp_path, options):
    save_dcp(tmp_path / "a", *build(), options)
    convert(tmp_path / "a", tmp_path / "b.pt", "torch")
    convert(tmp_path / "b.pt", tmp_path / "c", "dcp")
    convert(tmp_path / "c", tmp_path / "d", "dcp")  # a folder of ours from a folder
    convert(tmp_path / "d", tmp_path / "e.pt", "torch")
    go_on(load_torch(tmp_path / "e.pt"))
    go_on(load_dcp(tmp_path / "d"))


@pytest.mark.parametrize(
    ("cls", "but"), [(Adadelta, ["frozen"]), (ShardedAdadelta, ["frozen", "brain"])]
)
def test_our_optimizers_read_and_write_both_forms(tmp_path, cls, but):
    save_torch(tmp_path / "file.pt", *build())
    convert(tmp_path / "file.pt", tmp_path / "dcp", "dcp")
    assert_same(load_dcp(tmp_path / "dcp", cls), build(), but=but)
    save_dcp(tmp_path / "ours", *build(cls=cls))
    convert(tmp_path / "ours", tmp_path / "ours.pt", "torch")
    assert_same(load_torch(tmp_path / "ours.pt"), build(), but=but)


def test_masters_go_along(tmp_path):
    saved = build(cls=ShardedAdadelta)
    save_checkpoint(tmp_path / "a", *saved)
    convert(tmp_path / "a", tmp_path / "b.pt", "torch")
    convert(tmp_path / "b.pt", tmp_path / "c", "dcp")
    got = build(seed=1, steps=1, cls=ShardedAdadelta)
    load_checkpoint(tmp_path / "c", *got)
    assert got[1].state[got[0].brain]["master"].dtype == torch.float32
    assert_same(got, saved)


def test_views_of_one_memory_are_written_on_their_own(tmp_path):
    """A world of one keeps its state in a few large tensors, which `torch.save` writes whole."""
    save_torch(tmp_path / "file.pt", *build(cls=ShardedAdadelta))
    convert(tmp_path / "file.pt", tmp_path / "dcp", "dcp")
    assert_same(load_dcp(tmp_path / "dcp"), build(), but=["frozen", "brain"])
    held = sum(p.nbytes for p in Zoo().parameters()) * 3
    tensors = 4 * len(list(Zoo().parameters()))
    assert (tmp_path / "dcp" / "__0_0.distcp").stat().st_size < held + 2500 * tensors


def test_an_optimizer_alone_and_a_model_alone_are_converted(tmp_path):
    module, optimizer = build()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(module.state_dict(), tmp_path / "model.pt")
    for kind in ("optimizer", "model"):
        convert(tmp_path / f"{kind}.pt", tmp_path / kind, "dcp")
        convert(tmp_path / kind, tmp_path / f"{kind}2.pt", "torch")
        assert torch.load(tmp_path / f"{kind}2.pt", weights_only=True).keys() == {kind}
    fresh = build(seed=1, steps=0)
    fresh[0].load_state_dict(torch.load(tmp_path / "model2.pt", weights_only=True)["model"])
    whole = torch.load(tmp_path / "optimizer2.pt", weights_only=True)
    fresh[1].load_state_dict(whole["optimizer"])
    assert_same(fresh, (module, optimizer))


def test_what_else_is_stored_comes_along(tmp_path):
    others = {"epoch": 3, "scheduler": {"milestones": {2: 1}, "last": [0.5]}}
    save_torch(tmp_path / "file.pt", *build(), **others)
    convert(tmp_path / "file.pt", tmp_path / "dcp", "dcp")
    assert torch.load(tmp_path / "dcp" / "extra-0.pt", weights_only=True) == others
    convert(tmp_path / "dcp", tmp_path / "again.pt", "torch")
    assert torch.load(tmp_path / "again.pt", weights_only=True)["extra"] == {0: others}
    convert(tmp_path / "again.pt", tmp_path / "dcp2", "dcp")
    assert torch.load(tmp_path / "dcp2" / "extra-0.pt", weights_only=True) == others

    ema = {"epoch": 3, "ema": {"matrix": torch.arange(4.0)}, "seen": [{"a": 1}, {"a": 2}]}
    save_dcp(tmp_path / "plain", *build(), **ema)
    convert(tmp_path / "plain", tmp_path / "plain.pt", "torch")
    loaded = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert (loaded["epoch"], loaded["seen"]) == (3, ema["seen"])
    assert torch.equal(loaded["ema"]["matrix"], ema["ema"]["matrix"])


def test_names_of_a_state_dict_saved_by_name_are_kept(tmp_path):
    """What `dcp_to_torch_save` makes: names in place of numbers."""
    save_dcp(tmp_path / "dcp", *build(named=False))
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "named.pt")
    convert(tmp_path / "named.pt", tmp_path / "again", "dcp")
    convert(tmp_path / "again", tmp_path / "file.pt", "torch")
    go_on(load_torch(tmp_path / "file.pt"))


def refused(src, dst, to, match, error=ValueError):
    before = sorted(os.listdir(dst.parent))
    with pytest.raises(error, match=match):
        convert(src, dst, to)
    assert sorted(os.listdir(dst.parent)) == before


def test_parameters_without_names_stay_without(tmp_path):
    save_torch(tmp_path / "file.pt", *build(named=False))
    remedy = r"numbers, but no names.*Adadelta\(model.named_parameters\(\)\)"
    refused(tmp_path / "file.pt", tmp_path / "dcp", "dcp", remedy)
    dcp.save({"optim": build(named=False)[1]}, checkpoint_id=tmp_path / "numbers", no_dist=True)
    refused(tmp_path / "numbers", tmp_path / "dcp", "dcp", remedy)
    convert(tmp_path / "numbers", tmp_path / "numbers.pt", "torch")  # needs none
    fresh = build(seed=1, steps=0, named=False)
    whole = torch.load(tmp_path / "numbers.pt", weights_only=True)
    fresh[0].load_state_dict(build()[0].state_dict())
    fresh[1].load_state_dict(whole["optimizer"])
    assert_same(fresh, build())


OTHERS = [
    (torch.optim.Adam, "Adam state: exp_avg, exp_avg_sq"),
    (torch.optim.Adamax, "Adamax state: exp_avg, exp_inf"),
    (torch.optim.RMSprop, "RMSprop state: square_avg"),
    (torch.optim.SGD, "groups of another optimizer: .*momentum, nesterov"),
]


@pytest.mark.parametrize(("cls", "what"), OTHERS, ids=[cls.__name__ for cls, _ in OTHERS])
def test_another_optimizer_is_named(tmp_path, cls, what):
    module = torch.nn.Linear(3, 2)
    optimizer = cls(module.named_parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    save_torch(tmp_path / "file.pt", module, optimizer)
    refused(tmp_path / "file.pt", tmp_path / "new", "dcp", what)
    for options in (NESTED, FLAT):
        save_dcp(tmp_path / f"{options}", module, optimizer, options)
        refused(tmp_path / f"{options}", tmp_path / "new", "torch", what)


def test_damage_is_refused(tmp_path):
    save_torch(tmp_path / "file.pt", *build())
    convert(tmp_path / "file.pt", tmp_path / "dcp", "dcp")
    for path, to in ((tmp_path / "dcp" / "__0_0.distcp", "torch"), (tmp_path / "file.pt", "dcp")):
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        src = path if to == "dcp" else path.parent
        refused(src, tmp_path / "new", to, "is damaged: .* (has changed|damaged)")
        path.write_bytes(whole[:middle])
        refused(src, tmp_path / "new", to, "is damaged")
        path.write_bytes(whole)
        convert(src, tmp_path / f"fine-{to}", to)


def test_a_plain_folder_that_lost_bytes_is_refused_without_sums(tmp_path):
    save_dcp(tmp_path / "dcp", *build())
    (file,) = (tmp_path / "dcp").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1000])
    refused(tmp_path / "dcp", tmp_path / "new", "torch", "is damaged")
    file.unlink()
    refused(tmp_path / "dcp", tmp_path / "new", "torch", "distcp", FileNotFoundError)


def grow(found):
    meta = found.state_dict_metadata["model.matrix"]
    meta.size = meta.chunks[0].sizes = torch.Size([2**40, 2**10])


def forget(found):
    found.storage_data = {k: v for k, v in found.storage_data.items() if k.fqn != "model.matrix"}


def misplace(found):
    next(iter(found.storage_data.values())).offset = 10**9


def cut(found):
    found.planner_data["model.matrix"] = ()


@pytest.mark.parametrize("change", [grow, forget, misplace, cut])
def test_metadata_that_lies_is_refused(tmp_path, change):
    save_dcp(tmp_path / "dcp", *build())
    path = tmp_path / "dcp" / ".metadata"
    found = pickle.loads(path.read_bytes())
    change(found)
    path.write_bytes(pickle.dumps(found))
    refused(tmp_path / "dcp", tmp_path / "new", "torch", "is damaged|holds no state dicts")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weights": 1}, tmp_path / "dict.pt")
    torch.save({"optimizer": {"state": {}, "param_groups": [{"lr": 1}]}}, tmp_path / "odd.pt")
    for src, match in {
        "empty": "is not a checkpoint: it has no .metadata",
        "text": "is damaged, or no file of torch.save",
        "list.pt": "holds a list, wanted a dict",
        "dict.pt": r"holds \['weights'\], wanted 'model', 'optimizer'",
        "odd.pt": "holds no state dicts as torch writes them .*params",
    }.items():
        refused(tmp_path / src, tmp_path / "new", "dcp", match)
    refused(tmp_path / "absent", tmp_path / "new", "dcp", "absent", FileNotFoundError)
    save_torch(tmp_path / "file.pt", *build())
    refused(tmp_path / "file.pt", tmp_path / "new", "zip", "to must be 'torch' or 'dcp'")


def test_names_of_another_module_are_refused(tmp_path):
    module, optimizer = build()
    state = {f"module.{name}": value for name, value in module.state_dict().items()}
    torch.save({"model": state, "optimizer": optimizer.state_dict()}, tmp_path / "file.pt")
    refused(tmp_path / "file.pt", tmp_path / "new", "dcp", "has 'matrix', but the model has no")


def test_several_optimizers_are_refused(tmp_path):
    state = {name: build()[1].state_dict() for name in ("generator", "critic")}
    dcp.save(state, checkpoint_id=tmp_path / "gan", no_dist=True)
    refused(tmp_path / "gan", tmp_path / "new", "torch", "several optimizers, at generator, critic")


def test_what_exists_is_kept(tmp_path):
    save_torch(tmp_path / "file.pt", *build())
    (tmp_path / "there").mkdir()
    for to in ("dcp", "torch"):
        refused(tmp_path / "file.pt", tmp_path / "there", to, "there exists", FileExistsError)
        absent = tmp_path / "absent" / "x"
        with pytest.raises(FileNotFoundError, match="absent is not a folder: create it first"):
            convert(tmp_path / "file.pt", absent, to)


def test_progress_runs_from_nothing_to_all(tmp_path):
    save_torch(tmp_path / "file.pt", *build())
    for src, to in (("file.pt", "dcp"), ("dcp", "torch")):
        calls = []
        convert(tmp_path / src, tmp_path / to, to, lambda *call, seen=calls: seen.append(call))
        done, totals = zip(*calls, strict=True)
        assert list(done) == sorted(done)
        assert {done[-1]} == set(totals)
        assert done[0] < done[-1] / 2


FULL = """
import resource, sys
from adadelta_dist.checkpoints.convert import convert
src, dst = sys.argv[1:]
for to in ("torch", "dcp"):
    for limit in (100, 7000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            convert(src, dst, to)
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            print(error.errno, error.filename, flush=True)
"""


def test_no_space_leaves_nothing(tmp_path):
    save_torch(tmp_path / "file.pt", *build())
    out = tmp_path / "new" / "out"
    out.parent.mkdir()
    command = [sys.executable, "-W", "error", "-c", FULL, tmp_path / "file.pt", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{errno.EFBIG} {out}"] * 4, done.stderr
    assert os.listdir(out.parent) == []


MEMORY = """
import sys, threading, warnings
warnings.simplefilter("ignore")
import torch.distributed.checkpoint.format_utils as stock
from adadelta_dist.checkpoints.convert import convert

def private_mb():  # files that are mapped do not count: the system takes those pages back
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

def watch(over):
    global peak
    while not over.wait(0.0005):
        peak = max(peak, private_mb())

for job in sys.argv[1:]:
    src, dst, to = job.split()
    before = peak = private_mb()
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(over,))
    watcher.start()
    stock.torch_save_to_dcp(src, dst) if to == "stock" else convert(src, dst, to)
    over.set()
    watcher.join()
    print(peak - before)
"""


def test_memory_holds_the_output_or_a_tensor_at_a_time(tmp_path):
    """12 parameters of 4 MB, and twice as much state: 144 MB."""
    module = torch.nn.ParameterDict({f"p{i}": torch.zeros(2**20) for i in range(12)})
    optimizer = ShardedAdadelta(module.named_parameters())  # views of large tensors
    save_torch(tmp_path / "file.pt", module, optimizer)
    slack = 4  # allocator, pickles
    at_most = {
        "file.pt folder dcp": 4 + slack,
        "folder folder2 dcp": 2 * 4 + slack,
        "folder new.pt torch": 144 + 4 + slack,
        "file.pt stock stock": float("inf"),
    }
    jobs = [f"{tmp_path}/{job}".replace(" ", f" {tmp_path}/", 1) for job in at_most]
    # So that the C library gives back what is freed: it is the live memory that counts.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEMORY, *jobs]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    peaks = dict(zip(at_most, map(float, done.stdout.split()), strict=True))
    assert all(peaks[job] < at_most[job] for job in peaks), peaks
    assert peaks["file.pt stock stock"] > 140  # negative control
