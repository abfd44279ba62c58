"""FSDP: each process keeps a part of the twig's weights, of their gradients and of the optimiser's state.

The twig is one unit, gathered as a pass begins: training calls single projections and norms of its layers, which FSDP would not
notice if each layer were a unit of its own. The base is no part of it; every process holds all of it.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn

from twigvlm.errors import TwigVLMError


def wanted() -> bool:
    """Whether this process was launched to shard."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def set_up(accelerator: Any) -> None:
    """See to it that sharding, where it is wanted, takes place, and as one unit.

    Raises:
        TwigVLMError: it cannot, or is configured otherwise.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    if not wanted():
        return
    state = accelerator.state
    # accelerate (as of 1.15) leaves FSDP out on CPUs without a word, though it works there.
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        raise TwigVLMError(
            "FSDP: there is only one process; start more with accelerate launch --num_processes or torchrun"
        )
    needed = {
        "fsdp_version: 2": plugin.fsdp_version == 2,
        "fsdp_auto_wrap_policy: NO_WRAP": plugin.auto_wrap_policy is None,
        "fsdp_state_dict_type: FULL_STATE_DICT": "FULL_STATE_DICT" in str(plugin.state_dict_type),
        "fsdp_cpu_ram_efficient_loading: false": not plugin.cpu_ram_efficient_loading,
        "fsdp_offload_params: false": not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing: false": not plugin.activation_checkpointing,
    }
    for setting, met in needed.items():
        if not met:
            raise TwigVLMError(f"FSDP: a twig needs {setting}; set it as in recipes/training/fsdp.yaml")


def local(parameter: nn.Parameter) -> Tensor:
    """The part of a parameter that this process holds; without sharding all of it."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


@torch.no_grad()
def unshard(module: nn.Module) -> None:
    """Give every process the whole weights again; all must call it. Without sharding nothing happens."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if hasattr(parameter, "full_tensor"):
                setattr(owner, name, nn.Parameter(parameter.full_tensor(), parameter.requires_grad))
