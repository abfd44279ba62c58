"""Peak memory of one piece of work: a GPU's tensors, or on Linux all that the process holds."""

import gc
from pathlib import Path

import torch

from twigvlm.heap import give_back_freed_memory

_PROCESS = Path("/proc/self")
_WATCHED = (_PROCESS / "clear_refs").exists()  # Linux, but not every sandbox on it


def reset_peak(device: torch.device) -> None:
    """Begin to watch; what is free is handed back first, so that earlier work does not count."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif _WATCHED:
        give_back_freed_memory()
        (_PROCESS / "clear_refs").write_text("5")


def peak(device: torch.device) -> int | None:
    """Most bytes held at once since `reset_peak`, weights included; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _WATCHED:
        return None
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
