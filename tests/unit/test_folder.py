"""A checkpoint's folder appears whole or not at all, and its damage is noticed."""

import os
import shutil
import subprocess

import pytest
import torch

from adadelta_dist.checkpoints.folder import (
    discard,
    is_incomplete,
    read_manifest,
    staged,
    sums_of,
    temporary_name,
    verify,
    write_manifest,
    write_sums,
)


def fill(folder):
    for name, content in {".metadata": b"m", "__0_0.distcp": b"\0" * 40, "ä b.pt": b"x"}.items():
        (folder / name).write_bytes(content)
    write_manifest(
        folder,
        world_size=4,
        optimizer="ShardedAdadelta",
        parameters={"w": torch.zeros(2, 3, dtype=torch.bfloat16), "s": torch.tensor(1.0)},
        groups=[{"params": ["w", "s"], "lr": torch.tensor(0.5), "eps": float("nan"), "x": {}}],
    )
    write_sums(folder)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "saved").mkdir()
    fill(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_whole_folder_is_intact_to_us_and_to_coreutils(folder):
    assert verify(folder) == []
    names = [line[66:] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert names == [".metadata", "__0_0.distcp", "manifest.json", "ä b.pt"]
    assert "/" not in "".join(names)
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    if shutil.which("sha256sum"):
        assert subprocess.run(check, cwd=folder).returncode == 0


def test_sums_that_are_known_are_not_taken_again(folder):
    sums = sums_of(folder, [".metadata", "__0_0.distcp", "ä b.pt", "manifest.json"])
    before = (folder / "SHA256SUMS").read_bytes()
    write_sums(folder, dict(reversed(sums.items())))
    assert (folder / "SHA256SUMS").read_bytes() == before


def test_any_changed_byte_of_any_file_is_noticed(folder):
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for place in range(len(whole)):
            for flip in (1, 0x20, 0x80):  # 0x20 makes a lower-case letter upper
                path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
                assert verify(folder), f"{path.name}, byte {place}, {flip}"
        for part in (whole[:-1], whole + b"\n", b""):
            path.write_bytes(part)
            assert verify(folder), path.name
        path.write_bytes(whole)
    assert verify(folder) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: (f / ".metadata").unlink(), ".metadata is missing"),
        (lambda f: (f / "new").touch(), "new is not listed in SHA256SUMS"),
        (lambda f: (f / "new").mkdir(), "new is not a file"),
        (
            lambda f: (
                (f / ".metadata").rename(f.parent / "m")
                and (f / ".metadata").symlink_to(f.parent / "m")
            ),
            ".metadata is not a file",
        ),
        (lambda f: (f / ".metadata").write_bytes(b"n"), ".metadata has changed: its checksum"),
        (lambda f: (f / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
        (lambda f: (f / "SHA256SUMS").write_bytes(b""), "SHA256SUMS is empty"),
    ],
)
def test_what_is_wrong_is_said(folder, change, problem):
    change(folder)
    assert any(found.startswith(problem) for found in verify(folder)), verify(folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines[::-1],
        lambda lines: lines[:1] + lines,
        lambda lines: [lines[0].replace(b"  ", b" *"), *lines[1:]],
        lambda lines: [lines[0].replace(b".meta", b"./.meta"), *lines[1:]],
        lambda lines: [*lines, b"0" * 64 + b"  SHA256SUMS\n"],
        lambda lines: [*lines[:-1], lines[-1][:-1]],
    ],
)
def test_sums_must_be_exactly_as_written(folder, edit):
    path = folder / "SHA256SUMS"
    path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
    assert any("SHA256SUMS is damaged in line" in problem for problem in verify(folder))


def test_a_plain_dcp_folder_cannot_be_judged(folder):
    (folder / "SHA256SUMS").unlink()
    (folder / "manifest.json").unlink()
    assert verify(folder) is None


def test_the_manifest_is_json_of_any_hyperparameter(folder):
    manifest = read_manifest(folder)
    assert manifest["world_size"] == 4
    assert manifest["parameters"]["w"] == {"shape": [2, 3], "dtype": "torch.bfloat16"}
    assert manifest["parameters"]["s"]["shape"] == []
    assert manifest["groups"] == [{"params": ["w", "s"], "lr": 0.5, "eps": "nan", "x": "{}"}]
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["saved_at"].endswith("+00:00")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"format": 1}', "lacks"),
        ('{"format": 2}', "of format 2, known is 1"),
    ],
)
def test_a_damaged_manifest_is_refused(folder, text, message):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_manifest(folder)


def test_no_manifest_is_none(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("is_folder", [True, False])
def test_it_appears_under_its_name_when_all_is_well(tmp_path, is_folder):
    path = tmp_path / "saved"
    with staged(path, is_folder=is_folder) as temporary:
        assert is_incomplete(temporary.name)
        assert temporary.parent == tmp_path
        if is_folder:
            fill(temporary)
        else:
            temporary.write_bytes(b"x")
        assert not path.exists()
    assert os.listdir(tmp_path) == ["saved"]
    assert verify(path) == [] if is_folder else path.read_bytes() == b"x"


def save(path, is_folder, error=None, meanwhile=None):
    with staged(path, is_folder=is_folder) as temporary:
        if is_folder:
            fill(temporary)
        else:
            temporary.write_bytes(b"x")
        if error:
            raise error
        if meanwhile:
            path.write_bytes(meanwhile)


@pytest.mark.parametrize("is_folder", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(tmp_path, is_folder, error):
    with pytest.raises(error):
        save(tmp_path / "saved", is_folder, error)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_exists_is_not_overwritten(tmp_path, is_folder):
    path = tmp_path / "saved"
    path.write_bytes(b"before")
    with pytest.raises(FileExistsError, match="saved exists: remove it, or give another name"):
        temporary_name(path)
    path.unlink()
    with pytest.raises(FileExistsError):
        save(path, is_folder, meanwhile=b"meanwhile")
    assert path.read_bytes() == b"meanwhile"
    assert os.listdir(tmp_path) == ["saved"]


def test_other_names_are_not_incomplete(tmp_path):
    assert not is_incomplete("step-1000")
    assert not is_incomplete(".step.incomplete")
    discard(tmp_path / "absent")  # which is no error
