"""The devices that programs are compiled for: TPUs that are not there, fake CPU devices, or the GPUs of this machine.

    find_devices("v5e:4x4")      # 16 chips; needs libtpu and no TPU
    find_devices("cpu:8")
    find_devices("gpu")
"""

import importlib.util
import os
import re

import jax

from dgpo_jax.flags import set_flags

# Slices that are sold, chips along each dimension; v5e and v6e are flat, the others are blocks.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
BLOCKS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "4x4x16", "8x8x8")
SLICES = {"v4": BLOCKS, "v5e": FLAT, "v5p": BLOCKS, "v6e": FLAT}
WHOLE_HOSTS = {"2x4": (2, 4, 1)}  # eight chips of one host; libtpu would take two hosts of four


def find_devices(name: str) -> list:
    """The devices of a topology; to be asked before JAX starts a backend.

    Args:
        name: a slice such as v5p:2x2x2, cpu:N, or gpu.
    Raises:
        ValueError: no such topology, libtpu is not installed, or there is no GPU.
    """
    kind, _, shape = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d{0,3}", shape):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(shape))
        return jax.devices()[: int(shape)]
    if name == "gpu":
        try:
            return jax.devices("gpu")
        except RuntimeError as error:
            raise ValueError(f"--topology is 'gpu', but JAX sees none ({error}); name a TPU slice, or cpu:8.") from None
    if shape in SLICES.get(kind, ()):
        return _tpu_devices(name)
    listed = "; ".join(f"{chip}:{', '.join(shapes)}" for chip, shapes in SLICES.items())
    raise ValueError(f"--topology is {name!r}, but no such slice is known; choose one of {listed}; cpu:N; gpu.")


def _tpu_devices(name: str) -> list:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"--topology is {name!r}, but TPU programs need TPU's compiler; pip install -e '.[dryrun]'.")
    set_flags(["tpu"])  # those that a run on it would have
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # asks no metadata server what machine this is
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # another process may be compiling too
    jax.config.update("jax_platforms", "cpu")
    # Without a TPU the cache cannot read what it wrote, and what it read would not be dumped (roofline.compile_with_text).
    jax.config.update("jax_enable_compilation_cache", False)
    from jax.experimental import topologies  # only here does libtpu load

    shape = name.partition(":")[2]
    hosts = {"chips_per_host_bounds": WHOLE_HOSTS[shape]} if shape in WHOLE_HOSTS else {}
    return list(topologies.get_topology_desc(name, platform="tpu", **hosts).devices)


def count_hosts(devices) -> int:
    """Machines that these devices are in."""
    return len({device.process_index for device in devices})
