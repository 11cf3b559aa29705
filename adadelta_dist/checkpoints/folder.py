"""A checkpoint's folder: it appears whole or not at all, and its files have checksums."""

import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

SUMS = "SHA256SUMS"
MANIFEST = "manifest.json"
_LINE = re.compile(rb"([0-9a-f]{64})  ([^/\\\r\n\0]+)\n")
_INCOMPLETE = re.compile(r"\..+\.[0-9a-f]{16}\.incomplete")


@contextmanager
def staged(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """What the block writes under a temporary name appears as `path` if it ends well.

    Yields:
        The temporary path, beside `path`: an empty folder, or a file yet to be written. It
        is removed if the block raises.

    Raises:
        OSError: `path` exists, or cannot be written.
    """
    temporary = temporary_name(path)
    try:
        if is_folder:
            temporary.mkdir()
        yield temporary
        for file in temporary.iterdir() if is_folder else ():
            sync(file)
        sync(temporary)
        publish(temporary, path)
    except BaseException:
        discard(temporary)
        raise


def temporary_name(path: Path) -> Path:
    """A fresh name beside `path`, that `is_incomplete` knows.

    Raises:
        FileExistsError: `path` exists.
        FileNotFoundError: the folder that it would be in does not.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder: create it first")
    _refuse_existing(path)
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.incomplete")


def is_incomplete(name: str) -> bool:
    """Whether it is a name of `temporary_name`: of a save that is going on, or died."""
    return _INCOMPLETE.fullmatch(name) is not None


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give what was written, and synced, its final name.

    Raises:
        FileExistsError: somebody else made `path` in the meantime.
    """
    _refuse_existing(path)
    temporary.rename(path)
    sync(path.parent)


def disk_error(error: BaseException | None) -> OSError | None:
    """The error of the file system behind another one: torch reports a full disk as its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def discard(temporary: Path) -> None:
    """Remove a temporary file or folder, if it is there."""
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def sums_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files of the folder, as hex digits, by name."""
    return {name: _sha256(folder / name) for name in names}


def write_sums(folder: Path, sums: Mapping[str, str] | None = None) -> None:
    """Write SHA256SUMS, in coreutils' format: `sha256sum -c` checks it.

    Args:
        folder: all its files are there.
        sums: by name, where they are known already; None: of all files.
    """
    if sums is None:
        sums = sums_of(folder, (file.name for file in folder.iterdir()))
    lines = [f"{sums[name]}  {name}\n" for name in sorted(sums, key=str.encode)]
    (folder / SUMS).write_bytes("".join(lines).encode())


def verify(path: Path, reader: int = 0, readers: int = 1) -> list[str] | None:
    """What is wrong with a checkpoint: files missing, changed, or not listed in SHA256SUMS.

    Args:
        path: a folder, or a file of `torch.save`, which has checksums of its own (CRC-32).
        reader, readers: several processes may share the reading; this one computes the
            checksum of every `readers`-th file.

    Returns:
        One line a problem; none: it is intact. None instead of a list: nobody can know, for
        it has neither sums nor a manifest (a folder of plain `torch.distributed.checkpoint`).
    """
    return _verify_folder(path, reader, readers) if path.is_dir() else _verify_zip(path)


def _verify_folder(folder: Path, reader: int, readers: int) -> list[str] | None:
    if not (folder / SUMS).exists():
        return [f"{SUMS} is missing"] if (folder / MANIFEST).exists() else None
    sums, problems = _parse((folder / SUMS).read_bytes())
    found = {entry.name: entry for entry in folder.iterdir() if entry.name != SUMS}
    for i, name in enumerate(sorted(sums.keys() | found.keys())):
        entry = found.get(name)
        if entry is None:
            problems.append(f"{name} is missing")
        elif entry.is_symlink() or not entry.is_file():
            problems.append(f"{name} is not a file")
        elif name not in sums:
            problems.append(f"{name} is not listed in {SUMS}")
        elif i % readers == reader and _sha256(entry) != sums[name]:
            problems.append(f"{name} has changed: its checksum is another")
    return problems


def _verify_zip(file: Path) -> list[str]:
    try:
        with ZipFile(file) as archive:
            changed = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # of many kinds, for any byte may have changed
        return [f"{file.name} is damaged, or no file of torch.save: {error}"]
    return [f"{file.name} has changed: the checksum of its {changed} is another"] if changed else []


def write_manifest(
    folder: Path,
    *,
    world_size: int,
    optimizer: str,
    parameters: Mapping[str, Tensor],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Write manifest.json: what a reader wants to know before reading tensors.

    Args:
        folder: the checkpoint's.
        world_size: the number of ranks that saved it.
        optimizer: its class's name.
        parameters: by name, whole tensors or what has their shape and dtype.
        groups: hyperparameters, and names in "params".
    """
    manifest = {
        "format": 1,
        "saved_at": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        "world_size": world_size,
        "versions": {
            "adadelta_dist": _own_version(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "optimizer": optimizer,
        "parameters": {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}
            for name, tensor in parameters.items()
        },
        "groups": [
            {key: plain(value) for key, value in group.items() if key != "param_names"}
            for group in groups
        ],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """manifest.json; None where there is none.

    Raises:
        ValueError: it is damaged, or of a later format.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        number = manifest["format"]
        missing = {"saved_at", "world_size", "versions", "parameters", "groups"} - manifest.keys()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if number != 1:
        raise ValueError(f"{path} is of format {number!r}, known is 1: update adadelta-dist")
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {sorted(missing)}")
    return manifest


def plain(value: Any) -> Any:
    """A hyperparameter as JSON has it; numbers that JSON lacks become text."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists: remove it, or give another name")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _parse(text: bytes) -> tuple[dict[str, str], list[str]]:
    """Sums by name, and what in the file is not exactly as `write_sums` writes it."""
    sums: dict[str, str] = {}
    problems = []
    last = b""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        match = _LINE.fullmatch(line)
        try:
            name = match[2].decode() if match else ""
        except UnicodeDecodeError:
            name = ""
        if match is None or not name or match[2] <= last or name == SUMS:
            problems.append(f"{SUMS} is damaged in line {number}")
            continue
        last = match[2]
        sums[name] = match[1].decode()
    if not sums and not problems:
        problems.append(f"{SUMS} is empty")
    return sums, problems


def _own_version() -> str:
    try:
        return version("adadelta-dist")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
