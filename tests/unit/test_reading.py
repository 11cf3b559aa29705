"""No pickle of a checkpoint runs code, and no path in it leads out of its folder."""

import os
import pickle
from io import BytesIO

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from adadelta_dist.checkpoints.reading import SafeLoadPlanner, SafeReader, load_plain

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or")


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def state():
    return {
        "model": {
            "weight": torch.arange(6.0).view(2, 3),
            "bias": torch.zeros(0, dtype=torch.bfloat16),
        },
        "optimizer": {"param_groups": [{"lr": 0.5, "params": ["weight"], "foreach": None}]},
        "count": torch.tensor(3),
    }


@pytest.fixture
def folder(tmp_path):
    dcp.save(state(), checkpoint_id=tmp_path / "saved", no_dist=True)
    return tmp_path / "saved"


def load(folder, into=None, *, safely=True):
    into = state() if into is None else into
    reader, planner = (SafeReader(folder), SafeLoadPlanner()) if safely else (None, None)
    dcp.load(into, checkpoint_id=folder, storage_reader=reader, planner=planner, no_dist=True)
    return into


def edit(folder, change):
    """Rewrite `.metadata`."""
    path = folder / ".metadata"
    found = pickle.loads(path.read_bytes())
    change(found)
    path.write_bytes(pickle.dumps(found))


def test_it_reads_what_the_stock_reader_reads(folder):
    blank = {
        "model": {"weight": torch.zeros(2, 3), "bias": torch.zeros(0, dtype=torch.bfloat16)},
        "optimizer": {"param_groups": [{"lr": 0, "params": [], "foreach": True}]},
        "count": torch.tensor(0),
    }
    loaded = load(folder, blank)
    torch.testing.assert_close(loaded["model"], state()["model"], rtol=0, atol=0)
    assert loaded["optimizer"] == state()["optimizer"]
    assert loaded["count"] == 3
    safe, stock = SafeReader(folder).read_metadata(), dcp.FileSystemReader(folder).read_metadata()
    assert safe.state_dict_metadata == stock.state_dict_metadata
    assert safe.storage_data == stock.storage_data
    assert safe.planner_data == stock.planner_data
    assert safe.storage_meta.save_id == stock.storage_meta.save_id


def test_flat_state_dicts_load_too(folder):
    into = {"optimizer.param_groups.0.lr": 0.0}
    planner = SafeLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = SafeReader(folder)
    dcp.load(into, storage_reader=reader, planner=planner, no_dist=True)
    assert into == {"optimizer.param_groups.0.lr": 0.5}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_is_read(folder, protocol):
    path = folder / ".metadata"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol))
    assert load(folder)["count"] == 3


def test_a_folder_saved_under_windows_is_read(folder):
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"\x8c\x09PosixPath", b"\x8c\x0bWindowsPath"))
    assert b"WindowsPath" in path.read_bytes()
    assert SafeReader(folder).read_metadata().version


def test_code_in_the_metadata_does_not_run(folder, tmp_path):
    edit(folder, lambda found: setattr(found, "version", Code(tmp_path / "made")))
    with pytest.raises(ValueError, match=r"holds a pickle with code in it: posix\.mkdir"):
        SafeReader(folder).read_metadata()
    with pytest.raises(CheckpointException, match="pickle with code in it") as raised:
        load(folder)
    assert "rank local" not in str(raised.value)  # no other file is tried
    assert not (tmp_path / "made").exists()
    load(folder, safely=False)  # negative control
    assert (tmp_path / "made").exists()


def test_code_in_a_value_does_not_run(tmp_path):
    evil = Code(tmp_path / "made")
    dcp.save({"lr": evil}, checkpoint_id=tmp_path / "saved", no_dist=True)
    with pytest.raises(CheckpointException, match=r"lr holds a pickle with code in it: posix"):
        load(tmp_path / "saved", {"lr": 1.0})
    assert not (tmp_path / "made").exists()
    load(tmp_path / "saved", {"lr": 1.0}, safely=False)
    assert (tmp_path / "made").exists()


def test_code_in_a_torch_file_does_not_run(tmp_path):
    torch.save({"lr": Code(tmp_path / "made")}, tmp_path / "file.pt")
    for source in (tmp_path / "file.pt", BytesIO((tmp_path / "file.pt").read_bytes())):
        with pytest.raises(ValueError, match=r"holds a pickle with code in it: posix\.mkdir"):
            load_plain(source)
    assert not (tmp_path / "made").exists()


def test_a_pickle_cannot_change_classes(folder):
    """Opcode `b` with (None, {name: value}) sets attributes, of a class too."""
    cls = b"c" + metadata.__name__.encode() + b"\nMetadata\n"
    (folder / ".metadata").write_bytes(cls + b"(N}(V__init__\nctorch\nSize\nVnew\nNutb.")
    before = dict(vars(metadata.Metadata))
    with pytest.raises(ValueError, match="it changes classes"):
        SafeReader(folder).read_metadata()
    assert dict(vars(metadata.Metadata)) == before
    pickle.loads((folder / ".metadata").read_bytes())  # negative control
    assert metadata.Metadata.__init__ is torch.Size
    metadata.Metadata.__init__ = before["__init__"]
    del metadata.Metadata.new


def lose_a_part(found):
    found.state_dict_metadata["model.weight"].chunks = [
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([1, 3]))
    ]


def lead_out(found):
    next(iter(found.storage_data.values())).relative_path = "../saved/__0_0.distcp"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_a_part, "model.weight has 6 elements, of which 3 were saved"),
        (lead_out, "names a file outside of its folder"),
        (lambda found: setattr(found, "storage_data", None), "not a checkpoint's metadata"),
        (lambda found: found.storage_data.update(x=3), "not a checkpoint's metadata"),
    ],
)
def test_odd_metadata_is_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        SafeReader(folder).read_metadata()


def test_damage_is_an_error_that_names_the_file(folder, tmp_path):
    whole = (folder / ".metadata").read_bytes()
    for part in (b"", whole[:10], whole[: len(whole) // 2], pickle.dumps(3), b"\xff" + whole):
        (folder / ".metadata").write_bytes(part)
        with pytest.raises(ValueError, match=r"saved/\.metadata is"):
            SafeReader(folder).read_metadata()
    torch.save(state(), tmp_path / "file.pt")
    whole = (tmp_path / "file.pt").read_bytes()
    for part in (b"", b"text", whole[:100], whole[:-100]):
        (tmp_path / "file.pt").write_bytes(part)
        with pytest.raises(ValueError, match=r"file\.pt is damaged, or no file of torch.save"):
            load_plain(tmp_path / "file.pt")


def test_what_is_not_there_is_said_to_be_missing(tmp_path):
    for read in (lambda: SafeReader(tmp_path).read_metadata(), lambda: load_plain(tmp_path / "x")):
        with pytest.raises(FileNotFoundError):
            read()
