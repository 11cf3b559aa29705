"""What the ranks of a job can send through."""

import torch


def check_backend(device: torch.device, backend: str) -> None:
    """Refuse a backend that cannot send from the device, before a process group is made.

    Raises:
        ValueError: NCCL, of a job on CPUs.
    """
    if device.type == "cpu" and backend == "nccl":
        raise ValueError(
            "process_group_backend='nccl' sends from CUDA devices, and this job uses CPUs. "
            "Leave it out, or pass accelerator='cuda'."
        )
