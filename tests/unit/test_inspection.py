"""A checkpoint is described without reading its tensors."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import FLAT, NESTED, Zoo, build, save_dcp, save_torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from adadelta_dist.checkpoints.convert import convert
from adadelta_dist.checkpoints.inspection import describe

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or")


@pytest.fixture(params=["adadelta-dist", "dcp nested", "dcp flat", "torch"])
def checkpoint(request, tmp_path):
    """One of each kind, of the same training."""
    kind, _, form = request.param.partition(" ")
    path = tmp_path / "saved"
    if kind == "dcp":
        save_dcp(path, *build(), FLAT if form == "flat" else NESTED)
    else:
        save_torch(path, *build())
    if kind == "adadelta-dist":
        path = tmp_path / "folder"
        convert(tmp_path / "saved", path, "dcp")
    return kind, path


def test_every_kind_tells_the_same(checkpoint):
    kind, path = checkpoint
    found = describe(path)
    assert found.kind == kind
    assert found.intact is (None if kind == "dcp" else True)
    assert found.problems == ()
    assert found.optimizer == "Adadelta"
    assert found.path == str(path)

    module, optimizer = build()
    described = {parameter.name: parameter for parameter in found.parameters}
    assert list(described) == list(module.state_dict())
    states = {name: optimizer.state.get(p) for name, p in module.named_parameters()}
    for name, tensor in module.state_dict().items():
        got, state = described[name], states.get(name)
        assert (got.shape, got.dtype) == (tuple(tensor.shape), str(tensor.dtype)[6:]), name
        assert got.nbytes == tensor.nbytes
        assert got.steps == (2 if state else None)
        assert got.state_nbytes == (sum(v.nbytes for v in state.values()) if state else None)
    wanted = {name: i % 2 for i, (name, _) in enumerate(module.named_parameters())}
    assert {name: got.group for name, got in described.items()} == wanted | {"count": None}
    assert found.model_nbytes == sum(t.nbytes for t in module.state_dict().values())
    assert found.optimizer_nbytes == sum(p.state_nbytes or 0 for p in found.parameters)
    assert [(g["params"], g["rho"], g["lr"]) for g in found.groups] == [
        (4, 0.8, pytest.approx(0.7)),
        (4, 0.9, 0.5),
    ]


def test_it_is_json(checkpoint):
    found = describe(checkpoint[1])
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["kind"] == checkpoint[0]


def test_a_folder_of_ours_tells_where_it_comes_from(tmp_path):
    save_torch(tmp_path / "file.pt", *build(), epoch=3)
    convert(tmp_path / "file.pt", tmp_path / "folder", "dcp")
    found = describe(tmp_path / "folder")
    assert (found.world_size, found.extra_ranks) == (1, (0,))
    assert found.versions["torch"] == torch.__version__
    assert found.saved_at.endswith("+00:00")


@pytest.mark.parametrize("options", [NESTED, FLAT], ids=["nested", "flat"])
def test_of_a_folder_steps_and_each_groups_values_are_read(tmp_path, monkeypatch, options):
    save_dcp(tmp_path / "dcp", *build(), options)
    read = []
    stock = FileSystemReader.read_data

    def spy(self, plan, planner):
        read.extend(item.storage_index.fqn for item in plan.items)
        return stock(self, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", spy)
    describe(tmp_path / "dcp")
    assert len(read) == len(set(read))
    steps = [name for name in read if not name.startswith("optimizer.param_groups")]
    assert {name.rpartition(".")[2] for name in steps} == {"step"}
    assert len(steps) == len(list(Zoo().parameters())) - 1  # the frozen one has none
    assert len(read) - len(steps) <= 2 * 10  # flattened, each parameter has its group's


def test_damage_is_told_with_what_can_still_be_read(tmp_path):
    save_torch(tmp_path / "file.pt", *build())
    convert(tmp_path / "file.pt", tmp_path / "folder", "dcp")
    whole = describe(tmp_path / "folder")
    data = tmp_path / "folder" / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = describe(tmp_path / "folder")
    assert found.intact is False
    assert found.problems == ("__0_0.distcp has changed: its checksum is another",)
    assert found == replace(whole, intact=False, problems=found.problems)

    data.unlink()
    (tmp_path / "folder" / "manifest.json").write_text("{")
    found = describe(tmp_path / "folder")
    assert "__0_0.distcp is missing" in found.problems
    (tmp_path / "folder" / ".metadata").unlink()
    assert any("no .metadata" in problem for problem in describe(tmp_path / "folder").problems)


def test_a_damaged_plain_folder_is_not_intact(tmp_path):
    save_dcp(tmp_path / "dcp", *build())
    (tmp_path / "dcp" / ".metadata").write_bytes(b"x")
    found = describe(tmp_path / "dcp")
    assert found.intact is False
    assert ".metadata is damaged" in found.problems[0]


def test_a_damaged_file_is_not_intact(tmp_path):
    save_torch(tmp_path / "file.pt", *build())
    whole = (tmp_path / "file.pt").read_bytes()
    (tmp_path / "file.pt").write_bytes(whole[:-30])
    found = describe(tmp_path / "file.pt")
    assert (found.kind, found.intact) == ("torch", False)
    assert "is damaged, or no file of torch.save" in found.problems[0]


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_another_optimizer_is_named(tmp_path, form):
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.named_parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    (save_torch if form == "torch" else save_dcp)(tmp_path / "saved", module, optimizer)
    found = describe(tmp_path / "saved")
    assert found.optimizer == "Adam state: exp_avg, exp_avg_sq"
    assert [parameter.steps for parameter in found.parameters] == [1, 1]
    json.dumps(asdict(found))


def test_parameters_without_names_have_numbers(tmp_path):
    torch.save(build(named=False)[1].state_dict(), tmp_path / "optimizer.pt")
    found = describe(tmp_path / "optimizer.pt")
    assert [parameter.name for parameter in found.parameters] == [*map(str, range(8))]
    assert found.parameters[0].shape == (5, 7)  # as its state tells
    frozen = [p for p in found.parameters if p.shape is None]
    assert [(p.dtype, p.state_nbytes, p.group) for p in frozen] == [(None, None, 1)]
    assert found.model_nbytes == 0


def test_a_model_alone_has_no_optimizer(tmp_path):
    dcp.save(Zoo().state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    found = describe(tmp_path / "dcp")
    assert (found.optimizer, found.groups, found.optimizer_nbytes) == (None, (), 0)
    assert [parameter.name for parameter in found.parameters] == list(Zoo().state_dict())


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"neither manifest\.json nor \.metadata"):
        describe(tmp_path)
    with pytest.raises(FileNotFoundError):
        describe(tmp_path / "absent")


def test_a_folder_of_deepspeed_is_named_as_such(tmp_path):
    (tmp_path / "latest").write_text("global_step1")
    with pytest.raises(ValueError, match="a checkpoint of DeepSpeed: use `adadelta-dist convert`"):
        describe(tmp_path)


def test_a_file_of_torchs_old_form_is_told_from_a_damaged_one(tmp_path):
    torch.save({"model": {}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    found = describe(tmp_path / "old.pt").problems
    assert all("zip file" in problem for problem in found)
    assert any("Load it, and save it again" in problem for problem in found)
    assert not any("mmap" in problem for problem in found)
