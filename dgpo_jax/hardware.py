"""What the chips can do at most, by their vendors' own figures: the denominators of MFU and of a roofline.

    chip_of("TPU v5 lite").flops          # 1.97e14
    device_chip(jax.devices()[0])         # what one JAX device has; None on CPUs and chips not listed

Sources, read in 2026. TPUs: docs.cloud.google.com/tpu/docs/ v4, v5e, v5p, v6e and tpu7x ("Peak compute per chip (bf16)",
"HBM capacity", "HBM bandwidth", "Bidirectional inter-chip interconnect bandwidth per chip", of which one direction is
half). NVIDIA: the data sheets of T4, L4, L40S, A100, H100, H200 and the HGX page for B200; tensor-core figures without
sparsity, which is half of what the sheets print for Ada and later; NVLink per direction, half of the total; PCIe where
there is no NVLink. NVIDIA's memory sizes count in GiB, as its own nvidia-smi shows.
"""

import re
from typing import Any, NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One kind of chip."""

    name: str
    kind: str  # regular expression for the whole of jax's device_kind, any case
    flops: float  # bf16 matrix products with f32 sums, FLOP/s
    memory: float  # bytes
    bandwidth: float  # of that memory, bytes/s
    link: float  # to its neighbours in one direction over all links, bytes/s
    cores: int = 1  # TensorCores of a TPU that jax may show as a device each


# In the order in which they are tried.
CHIPS = (
    Chip("TPU v4", r"TPU v4", 275e12, 32 * GIB, 1228e9, 300e9, cores=2),
    Chip("TPU v5e", r"TPU v5 ?(lite|e)", 197e12, 16 * GIB, 819e9, 200e9),
    Chip("TPU v5p", r"TPU v5p?", 459e12, 95 * GIB, 2765e9, 600e9, cores=2),
    Chip("TPU v6e", r"TPU v6 ?(lite|e)", 918e12, 32 * GIB, 1638e9, 400e9),
    Chip("TPU v7x", r"TPU ?v?7x", 2307e12, 192 * GIB, 7380e9, 600e9, cores=2),
    Chip("T4", r"(Tesla|NVIDIA) T4", 65e12, 16 * GIB, 320e9, 16e9),  # float16: it has no bf16
    Chip("L4", r"NVIDIA L4", 121e12, 24 * GIB, 300e9, 32e9),
    Chip("L40S", r"NVIDIA L40S", 362e12, 48 * GIB, 864e9, 32e9),
    Chip("A100 40 GB", r"NVIDIA A100-SXM4-40GB", 312e12, 40 * GIB, 1555e9, 300e9),
    Chip("A100 40 GB PCIe", r"NVIDIA A100-PCIE-40GB", 312e12, 40 * GIB, 1555e9, 32e9),
    Chip("A100 80 GB", r"NVIDIA A100-SXM4-80GB", 312e12, 80 * GIB, 2039e9, 300e9),
    Chip("A100 80 GB PCIe", r"NVIDIA A100 80GB PCIe", 312e12, 80 * GIB, 1935e9, 32e9),
    Chip("H100", r"NVIDIA H100( 80GB HBM3)?", 989e12, 80 * GIB, 3350e9, 450e9),
    Chip("H100 PCIe", r"NVIDIA H100 PCIe", 756e12, 80 * GIB, 2000e9, 64e9),
    Chip("H200", r"NVIDIA H200", 989e12, 141 * GIB, 4800e9, 450e9),
    Chip("B200", r"NVIDIA B200", 2250e12, 180 * GIB, 7700e9, 900e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`, whole; None for a CPU and for a chip not listed."""
    return next((chip for chip in CHIPS if re.fullmatch(chip.kind, device_kind, re.IGNORECASE)), None)


def device_chip(device: Any) -> Chip | None:
    """What one JAX device has of its chip: half of it where each of two cores is a device of its own.

    So it is on TPU v7x, and with TPU v4 in a topology that is only compiled for. None as in `chip_of`.

    Args:
        device: of `jax.devices()`, or of a topology.
    """
    chip = chip_of(device.device_kind)
    if chip is None:
        return None
    share = getattr(device, "num_cores", chip.cores) / chip.cores
    return chip._replace(
        flops=chip.flops * share, memory=chip.memory * share, bandwidth=chip.bandwidth * share, link=chip.link * share
    )
