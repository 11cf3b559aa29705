"""Writing a folder of `torch.distributed.checkpoint` with little memory."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from .folder import disk_error


class StreamingWriter(FileSystemWriter):
    """`FileSystemWriter` that holds one tensor at a time, and leaves syncing to the caller.

    The stock one holds all tensors of a file until it is written, each a copy if it is part of
    a larger memory, as parameters and state in buckets are.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write one file, of what the plan gives to this rank.

        Raises:
            OSError: the disk is full, for example.
        """
        future: Future[list[WriteResult]] = Future()
        try:
            future.set_result(self._write(plan, planner))
        except RuntimeError as error:  # torch's own, when it closes a file cut short
            raise disk_error(error) or error from None
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with Path(self.path, name).open("wb") as file:
            for item in plan.items:
                start = file.tell()
                data = planner.resolve_data(item)
                if isinstance(data, Tensor):
                    torch.save(_alone(data.detach().cpu()), file)
                else:
                    file.write(data.getbuffer())
                del data
                length = file.tell() - start
                stored = _StorageInfo(name, start, length)
                results.append(WriteResult(item.index, length, stored))
        return results


def _alone(tensor: Tensor) -> Tensor:
    """The tensor without the rest of the memory that it is part of, which torch.save writes."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == tensor.nbytes:
        return tensor
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return tensor.clone()
    start = tensor.storage_offset() * tensor.itemsize
    part = storage[start : start + tensor.nbytes]  # the same memory
    alone = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return alone.set_(part, 0, tensor.shape, tensor.stride())
