"""Reading checkpoints that nobody vouches for: no code in a pickle runs, no path leads out."""

import pathlib
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from math import prod
from os import PathLike
from typing import IO, Any
from zipfile import is_zipfile

import torch
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

_CLASSES: tuple[type, ...] = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    _StorageInfo,
)
"""What `.metadata` is made of, besides shapes, dtypes, layouts and the path it was saved to."""

_ALLOWED: dict[str, Any] = {f"{cls.__module__}.{cls.__name__}": cls for cls in _CLASSES}
_ALLOWED |= {"torch.Size": torch.Size}
_ALLOWED |= {f"torch.{n}": v for n, v in vars(torch).items() if isinstance(v, torch.dtype)}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not fit to be read."""


class SafeReader(FileSystemReader):
    """Reads a folder of `torch.distributed.checkpoint` as `FileSystemReader` does, safely.

    The stock reader unpickles `.metadata`, which may run any code, and opens whatever files
    it names. This one admits the classes that `torch.distributed.checkpoint` writes and
    files within the folder, and refuses tensors of which a part is missing.

    Args:
        path: the folder.
    """

    def read_metadata(self) -> Metadata:
        """The folder's `.metadata`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it holds code, is damaged, or names files outside of the folder.
        """
        # No `**kwargs` here: DCP would try other files after an error.
        path = pathlib.Path(self.path) / ".metadata"
        with path.open("rb") as file:
            found: Metadata = _unpickle(file, str(path))
        _check(found, str(path))
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class SafeLoadPlanner(DefaultLoadPlanner):
    """`DefaultLoadPlanner` that reads values other than tensors with `weights_only=True`."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Put one value into the state dict.

        Raises:
            ValueError: it holds code, or is damaged.
        """
        name = read_item.dest_index.fqn
        loaded = load_plain(value, what=name)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


@contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    """Turn what `torch.distributed.checkpoint` raises into a sentence.

    Raises:
        CheckpointError: the first rank's failure, in its own words.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = min(error.failures.items())
        raise CheckpointError(
            f"{what}: rank {rank} had {type(reason).__name__}: {reason}"
        ) from reason


def read_into(
    target: dict[str, Any],
    folder: str | PathLike[str],
    *,
    process_group: ProcessGroup | None = None,
) -> None:
    """Fill the tensors of `target`, and replace its other values. Collective in the group.

    Args:
        target: what to read; its nested keys joined by dots are those of the folder.
        folder: of `torch.distributed.checkpoint`.
        process_group: None: this process reads for itself.

    Raises:
        CheckpointError: on every rank, if any could not read.
    """
    with as_checkpoint_error(f"{folder} could not be read"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(
            target,
            storage_reader=SafeReader(folder),
            planner=SafeLoadPlanner(),
            process_group=process_group,
            no_dist=process_group is None,
        )


def load_plain(
    source: str | PathLike[str] | IO[bytes], *, what: str | None = None, mmap: bool = False
) -> Any:
    """`torch.load` on the CPU of tensors and plain values alone.

    Args:
        source: a file.
        what: its name in an error; None: `source`.
        mmap: leave tensors in the file until they are read.

    Raises:
        OSError: it cannot be opened.
        ValueError: it holds code, or is damaged.
    """
    what = str(source) if what is None else what
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:
        code = _code_in(source)
        if code:
            raise ValueError(f"{what} holds a pickle with code in it: {', '.join(code)}") from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if mmap and not is_zipfile(source):  # torch's own words are on mmap, an argument of ours
            reason = "it is no zip file, as torch has saved since 1.6. Load it, and save it again"
        raise ValueError(f"{what} is damaged, or no file of torch.save: {reason}") from error


def _code_in(source: Any) -> list[str]:
    try:
        if hasattr(source, "seek"):
            source.seek(0)
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    except Exception:
        return []  # damaged beyond saying


class _Unpickler(pickle.Unpickler):
    what: str

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get(f"{module}.{name}")
        if found is None and module in ("pathlib", "pathlib._local"):
            found = _PATHS.get(name)
        if found is None and (module, name) == ("torch.serialization", "_get_layout"):
            found = _layout()
        if found is None:
            raise _CodeError(f"{self.what} holds a pickle with code in it: {module}.{name}")
        return found


class _CodeError(ValueError):
    pass


# The machine that saved it may have had other paths than this one.
_PATHS = {
    "PosixPath": pathlib.PurePosixPath,
    "PurePosixPath": pathlib.PurePosixPath,
    "WindowsPath": pathlib.PureWindowsPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
}


def _layout() -> Callable[[str], torch.layout]:
    layouts = {str(v): v for v in vars(torch).values() if isinstance(v, torch.layout)}
    return lambda name: layouts[name]


def _unpickle(file: IO[bytes], what: str) -> Any:
    """Unpickle what `_ALLOWED` has; a pickle that changes those classes changes them back."""
    classes = [*_CLASSES, pathlib.PurePosixPath, pathlib.PureWindowsPath]
    before = [dict(vars(cls)) for cls in classes]
    unpickler = _Unpickler(file)
    unpickler.what = what
    try:
        return unpickler.load()
    except _CodeError:
        raise
    except Exception as error:
        raise ValueError(f"{what} is damaged: {type(error).__name__}: {error}") from error
    finally:
        changed = [_restore(*both) for both in zip(classes, before, strict=True)]
        if any(changed):
            raise ValueError(f"{what} holds a pickle with code in it: it changes classes")


def _restore(cls: type, before: dict[str, Any]) -> bool:
    """Undo what a pickle did to a class; whether it did anything."""
    now = dict(vars(cls))
    for name in now.keys() - before.keys():
        delattr(cls, name)
    for name, value in before.items():
        if now.get(name) is not value:
            setattr(cls, name, value)
    return now != before


def _check(found: Any, what: str) -> None:
    """Whether `found` is as `torch.distributed.checkpoint` would have written it."""
    try:
        for name, meta in found.state_dict_metadata.items():
            if not isinstance(meta, metadata.TensorStorageMetadata):
                continue
            held = sum(prod(chunk.sizes) for chunk in meta.chunks)
            if held != prod(meta.size):
                raise ValueError(
                    f"{what}: {name} has {prod(meta.size)} elements, of which {held} were saved"
                )
        for info in found.storage_data.values():
            if info.relative_path != pathlib.PurePath(info.relative_path).name:
                raise ValueError(f"{what} names a file outside of its folder: {info.relative_path}")
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{what} is not a checkpoint's metadata: {error}") from error
