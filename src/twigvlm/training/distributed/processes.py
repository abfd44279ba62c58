"""The processes of one training, as torchrun or `accelerate launch` started them; a process without others is the main one."""

import os
import sys
from typing import TypeVar

import torch
from torch import nn

from twigvlm.errors import TwigVLMError

T = TypeVar("T")


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def device(name: str) -> str:
    """The device of this process, from the name that a user gave: of several processes on GPUs each has one.

    Raises:
        TwigVLMError: several processes would share one GPU.
    """
    if count() == 1 or name == "cpu" or not torch.cuda.is_available():
        return name
    if name not in ("auto", "cuda"):
        raise TwigVLMError(
            f"device {name!r}: is the same for all {count()} processes; use auto, so that each takes its own"
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


def gather(value: T) -> list[T]:
    """The value of each process, in their order; all must call it."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    return list(gather_object([value]))


@torch.no_grad()
def broadcast_weights(module: nn.Module) -> None:
    """Give every process the main one's weights: what is drawn at random differs between them."""
    if count() > 1:
        for tensor in module.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)


def finish() -> None:
    """In distributed runs: wait for the others, then exit with 0. Call it last."""
    if not torch.distributed.is_initialized():
        return
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # As the interpreter goes down after FSDP over gloo, torch (as of 2.13) aborts now and then: a thread is still joinable.
    os._exit(0)
