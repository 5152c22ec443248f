"""Lets torchvision be imported where its operators cannot be loaded.

PyPI's torchvision is built for CUDA. Beside a CPU torch its library of operators does not load, and the import fails
because two operators that it describes to the compiler are unknown. LPIPS needs none: to name the two is enough.
"""

import sys

import torch

torch.set_num_threads(1)  # as in tests/

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
