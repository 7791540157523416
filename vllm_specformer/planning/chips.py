"""Memory bandwidth and arithmetic peak of a few accelerators, as their makers state them."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_specformer.errors import SpecFormerError


@dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        bytes_per_second: peak memory bandwidth.
        flops_per_second: peak of dense bf16 matrix products; a multiply-add is two operations.
        source: where the two numbers are from.
    """

    name: str
    bytes_per_second: float
    flops_per_second: float
    source: str

    @property
    def ridge(self) -> float:
        """Operations per byte at which neither side waits."""
        return self.flops_per_second / self.bytes_per_second

    def derated(self, bandwidth: float, arithmetic: float) -> Chip:
        """The same device at a share of its peaks, such as those that a program reaches on it."""
        return Chip(
            f"{self.name} at {bandwidth:.0%} of its bandwidth, {arithmetic:.0%} of its arithmetic",
            self.bytes_per_second * bandwidth,
            self.flops_per_second * arithmetic,
            self.source,
        )


# NVIDIA's sheets for H100, H200 and B200 give bf16 "with sparsity"; dense is half of that.
CHIPS = {
    "a100": Chip(
        "NVIDIA A100 SXM 80 GB",
        2.039e12,
        312e12,
        "NVIDIA A100 Tensor Core GPU data sheet: 2,039 GB/s, 312 TFLOPS",
    ),
    "h100": Chip(
        "NVIDIA H100 SXM",
        3.35e12,
        989.5e12,
        "NVIDIA H100 Tensor Core GPU data sheet: 3.35 TB/s, 1,979 TFLOPS with sparsity",
    ),
    "h200": Chip(
        "NVIDIA H200 SXM",
        4.8e12,
        989.5e12,
        "NVIDIA H200 Tensor Core GPU data sheet: 4.8 TB/s, 1,979 TFLOPS with sparsity",
    ),
    "b200": Chip(
        "NVIDIA B200, HGX",
        8e12,
        2250e12,
        "NVIDIA Blackwell architecture brief, HGX B200: 8 TB/s, 4.5 PFLOPS with sparsity",
    ),
    "mi300x": Chip(
        "AMD Instinct MI300X",
        5.3e12,
        1307.4e12,
        "AMD Instinct MI300X data sheet: 5.3 TB/s, 1,307.4 TFLOPS",
    ),
}


def find_chip(name: str) -> Chip:
    """A chip by its short name, in either case.

    Raises:
        SpecFormerError: none of that name.
    """
    chip = CHIPS.get(name.lower())
    if chip is None:
        raise SpecFormerError(f"--chip {name}: unknown", f"choose one of {', '.join(CHIPS)}")
    return chip
