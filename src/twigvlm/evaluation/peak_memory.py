"""Peak memory of a piece of work: of tensors on a GPU, or on Linux of the whole process."""

import gc
from pathlib import Path

import torch

from twigvlm.heap import give_back_freed_memory

_PROCESS = Path("/proc/self")
_WATCHED = (_PROCESS / "clear_refs").exists()  # Linux, but not every sandbox on it


def reset_peak(device: torch.device) -> None:
    """Start to measure. Freed memory is first given back to the system, so that earlier work does not count."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif _WATCHED:
        give_back_freed_memory()
        (_PROCESS / "clear_refs").write_text("5")


def peak(device: torch.device) -> int | None:
    """Peak memory in bytes since `reset_peak`, weights included; None where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _WATCHED:
        return None
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
