"""A checkpoint from one form into another, a tensor at a time."""

from collections.abc import Callable, Mapping
from io import BufferedWriter, BytesIO, FileIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from . import sources
from .content import Content, Keys, Value, foreign_state
from .folder import disk_error, staged, verify, write_manifest, write_sums
from .writing import StreamingWriter

Progress = Callable[[int, int], None]
"""Called with the bytes done so far, and all there are to do."""


def convert(
    src: str | Path,
    dst: str | Path,
    to: Literal["torch", "dcp"],
    on_progress: Progress | None = None,
    *,
    read: Callable[[Path], Content] | None = None,
) -> None:
    """Write the checkpoint `src` in another form, as `dst`, which appears whole or not at all.

    "torch": one file of `torch.save`, {"model": ..., "optimizer": ...}, whose optimizer state
    `torch.optim.Adadelta` loads. It is held in memory whole while it is written. "dcp": a
    folder that `load_checkpoint` and `torch.distributed.checkpoint` load, at any number of
    ranks. Here memory holds a tensor at a time.

    Args:
        src: a folder of `save_checkpoint` or `torch.distributed.checkpoint`, or a torch file.
        dst: a path that does not exist, in a folder that does.
        to: the form to write.
        on_progress: called as bytes are read and written.
        read: reads a checkpoint of another form; None: `read_intact`.

    Raises:
        OSError: a file cannot be read or written; `dst` exists.
        ValueError: `src` is damaged, is of another optimizer, holds code in a pickle, or its
            parameters have no names.
    """
    src, dst = Path(src), Path(dst)
    if to not in ("torch", "dcp"):
        raise ValueError(f"to must be 'torch' or 'dcp', got {to!r}")
    with staged(dst, is_folder=to == "dcp") as temporary:
        content = (read or read_intact)(src)
        try:
            if to == "torch":
                _write_torch(content, temporary, _Count(on_progress, 2 * _nbytes(content)))
            else:
                check_names(content, src)
                _write_dcp(content, temporary, _Count(on_progress, _nbytes(content)))
        except (OSError, RuntimeError) as error:  # torch's own, when it closes a file cut short
            raise _named(disk_error(error), dst) or error from None


def _named(error: OSError | None, path: Path) -> OSError | None:
    if error is not None and error.filename is None:
        error.filename = str(path)
    return error


def read_intact(src: Path) -> Content:
    """A checkpoint of Adadelta, or of a model alone, once its files are known to be intact.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, of another optimizer, or holds code.
    """
    problems = verify(src)
    if problems:
        raise ValueError(f"{src} is damaged: {'; '.join(problems)}")
    content = sources.read(src)
    foreign = foreign_state(content)
    if foreign:
        raise ValueError(f"{src} is of another optimizer: this holds {foreign}")
    return content


class _Count:
    """How many bytes are done."""

    def __init__(self, on_progress: Progress | None, total: int) -> None:
        self._on_progress, self._total, self._done = on_progress, total, 0

    def add(self, nbytes: int) -> None:
        self._done = min(self._done + nbytes, self._total)
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)

    def read(self, value: Value) -> Any:
        loaded = value.read()
        self.add(value.nbytes)
        return loaded


def _nbytes(content: Content) -> int:
    return sum(value.nbytes for value in content.values())


def check_names(content: Content, src: Path) -> None:
    """Whether the optimizer's parameters have names, those of the model.

    Raises:
        ValueError: they have not.
    """
    if not content.named:
        raise ValueError(
            f"{src}: the optimizer's parameters have numbers, but no names, which a folder of "
            "torch.distributed.checkpoint needs. Build the optimizer with "
            "torch.optim.Adadelta(model.named_parameters()), load this state, and save it again."
        )
    strangers = [name for name in content.names() if content.model and name not in content.model]
    if strangers:
        raise ValueError(
            f"{src}: the optimizer has {strangers[0]!r}, but the model has no parameter of that "
            "name. Give both the names of the same module: optimizer(model.named_parameters())."
        )


def _write_torch(content: Content, file: Path, count: _Count) -> None:
    ids = {name: i for i, name in enumerate(content.names())}
    groups = []
    for group in content.groups:
        named = {"param_names": list(group["params"])} if content.named else {}
        groups.append({**group, **named, "params": [ids[name] for name in group["params"]]})
    whole: dict[str, Any] = {}
    if content.model:
        whole["model"] = {name: count.read(value) for name, value in content.model.items()}
    if content.groups:
        state = {
            ids[name]: {key: count.read(value) for key, value in entry.items()}
            for name, entry in content.state.items()
        }
        whole["optimizer"] = {"state": dict(sorted(state.items())), "param_groups": groups}
    for path, value in content.others.items():
        set_element(whole, path, count.read(value))
    if content.extra:
        whole["extra"] = {rank: value.read() for rank, value in content.extra.items()}
    with _CountedFile(file, count) as stream:
        torch.save(whole, stream)


class _CountedFile(BufferedWriter):
    def __init__(self, path: Path, count: _Count) -> None:
        super().__init__(FileIO(path, "w"))
        self._count = count

    def write(self, data: Any) -> int:
        self._count.add(len(data))
        return super().write(data)


def _write_dcp(content: Content, folder: Path, count: _Count) -> None:
    """A folder as `save_checkpoint` at world size 1 writes it."""
    values: dict[Keys, Value] = {("model", name): v for name, v in content.model.items()}
    for name, entry in content.state.items():
        values |= {("optimizer", "state", name, key): value for key, value in entry.items()}
    values |= content.others
    whole: dict[Any, Any] = {}
    for path, value in values.items():
        set_element(whole, path, value.read() if value.shape is None else _outline(value))
    if content.groups:
        groups = [{**g, "param_names": list(g["params"])} for g in content.groups]
        whole.setdefault("optimizer", {})["param_groups"] = groups
    _save(whole, folder, values, count)
    for rank, value in content.extra.items():
        torch.save(value.read(), folder / f"extra-{rank}.pt")
    parameters = {name: content.parameter(name) for name in content.names()}
    write_manifest(
        folder,
        world_size=1,
        optimizer="Adadelta",
        parameters={name: _outline(v) for name, v in parameters.items() if v is not None},
        groups=content.groups,
    )
    write_sums(folder)


def _outline(value: Value) -> Tensor:
    """A tensor's shape and dtype without its memory."""
    return torch.empty(value.shape or (), dtype=value.dtype, device="meta")


def _save(
    state_dict: dict[str, Any], folder: Path, values: Mapping[Keys, Value], count: _Count
) -> None:
    """`dcp.save` by one process, of tensors that are read as they are written."""
    planner, writer = _LazyPlanner(values, count), StreamingWriter(folder)
    planner.set_up_planner(state_dict, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    writer.finish(metadata, [writer.write_data(plan, planner).wait()])


class _LazyPlanner(DefaultSavePlanner):
    """Reads a tensor when the writer asks for it."""

    def __init__(self, values: Mapping[Keys, Value], count: _Count) -> None:
        super().__init__()
        self._values, self._count = values, count

    def resolve_data(self, write_item: WriteItem) -> Tensor | BytesIO:
        found = super().resolve_data(write_item)
        if isinstance(found, Tensor) and found.is_meta:
            tensor: Tensor = self._count.read(self._values[self.mappings[write_item.index.fqn]])
            return tensor
        return found
