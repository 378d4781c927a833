"""The table of chips: the names that jax gives devices find the right line, and half a chip is half."""

from types import SimpleNamespace

import pytest

from dgpo_jax.hardware import CHIPS, chip_of, device_chip


@pytest.mark.parametrize("device_kind, name", [
    ("TPU v4", "TPU v4"),
    ("TPU v5 lite", "TPU v5e"),  # what libtpu calls a v5e
    ("TPU v5e", "TPU v5e"),
    ("TPU v5", "TPU v5p"),  # and a v5p
    ("TPU v5p", "TPU v5p"),
    ("TPU v6 lite", "TPU v6e"),
    ("TPU7x", "TPU v7x"),
    ("Tesla T4", "T4"),
    ("NVIDIA L4", "L4"),
    ("NVIDIA L40S", "L40S"),
    ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
    ("NVIDIA A100 80GB PCIe", "A100 80 GB PCIe"),
    ("NVIDIA H100 80GB HBM3", "H100"),
    ("NVIDIA H100 PCIe", "H100 PCIe"),
    ("NVIDIA H200", "H200"),
])
def test_a_device_is_known_by_what_jax_calls_it(device_kind, name):
    assert chip_of(device_kind).name == name


@pytest.mark.parametrize("device_kind", [
    "cpu",
    "NVIDIA L40",  # begins like the L4 and ends short of the L40S
    "TPU v3",
    "NVIDIA GeForce RTX 4090",
    "",
])
def test_a_chip_that_is_not_listed_is_none_and_not_its_neighbour(device_kind):
    assert chip_of(device_kind) is None


def test_a_device_that_is_one_of_two_cores_has_half_the_chip():
    half = device_chip(SimpleNamespace(device_kind="TPU7x", num_cores=1))
    whole = chip_of("TPU7x")
    assert half.flops == whole.flops / 2 == 1153.5e12
    assert half.memory == 96 * 2**30
    assert (half.bandwidth, half.link) == (whole.bandwidth / 2, whole.link / 2)
    # v5p shows both cores as one device.
    assert device_chip(SimpleNamespace(device_kind="TPU v5", num_cores=2)) == chip_of("TPU v5")
    # A v5e has one core, a GPU counts none.
    assert device_chip(SimpleNamespace(device_kind="TPU v5 lite", num_cores=1)) == chip_of("TPU v5 lite")
    assert device_chip(SimpleNamespace(device_kind="NVIDIA H200")).flops == 989e12


def test_a_cpu_has_no_line():
    assert device_chip(SimpleNamespace(device_kind="cpu")) is None


def test_figures_are_in_units_of_one_and_not_of_tera_or_giga():
    for chip in CHIPS:
        assert 5e13 < chip.flops < 5e15, chip
        assert 15 * 2**30 < chip.memory < 300 * 2**30, chip
        assert 2e11 < chip.bandwidth < 1e13, chip
        assert 1e10 < chip.link < 1e12 and chip.link < chip.bandwidth, chip
