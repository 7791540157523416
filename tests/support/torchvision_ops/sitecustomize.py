"""Lets torchvision's wheel for CUDA be imported beside a PyTorch for CPUs.

Its compiled operations do not load there, and its import fails as it describes two of them. Reading
images needs none. On PYTHONPATH this holds for child processes too, in one of which vLLM inspects a
model's class.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

_DESCRIBED = ("nms", "qnms")


class _BeforeTorchvision(MetaPathFinder):
    library: Any = None

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operation in _DESCRIBED:
                self.library.define(
                    f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


sys.meta_path.insert(0, _BeforeTorchvision())
