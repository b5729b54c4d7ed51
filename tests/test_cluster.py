import re
from dataclasses import dataclass

import pytest

from jaxptis.cluster import DEVICE_SPECS, Cluster, DeviceSpec


@dataclass
class _Device:
    platform: str
    device_kind: str


def test_known_devices_in_order() -> None:
    cluster = Cluster.of([_Device("gpu", "NVIDIA H200"), _Device("gpu", "NVIDIA L4")])
    assert [device.kind for device in cluster.devices] == ["NVIDIA H200", "NVIDIA L4"]


def test_cpu_is_known_by_its_platform() -> None:
    cluster = Cluster.of([_Device("cpu", "some processor")] * 3)
    assert [device.kind for device in cluster.devices] == ["cpu"] * 3


@pytest.mark.parametrize("spec", DEVICE_SPECS.values(), ids=DEVICE_SPECS)
def test_every_spec_is_plausible(spec: DeviceSpec) -> None:
    """A slip of a power of ten shows: every accelerator here does 100 to 600 flops a byte."""
    assert DEVICE_SPECS[spec.kind] is spec
    if spec.kind != "cpu":
        assert 100 < spec.flops_per_s / spec.bytes_per_s < 600
        assert 1e14 < spec.flops_per_s < 1e16


@pytest.mark.parametrize("spec", DEVICE_SPECS.values(), ids=DEVICE_SPECS)
def test_every_memory_is_plausible(spec: DeviceSpec) -> None:
    """Some parts have it in their name; all are read once in 5 to 100 ms."""
    if spec.kind == "cpu":
        assert spec.memory_bytes is None
        return
    assert spec.memory_bytes is not None
    named = re.search("([0-9]+)GB", spec.kind)
    if named:
        assert spec.memory_bytes == int(named[1]) * 10**9
    assert 0.005 < spec.memory_bytes / spec.bytes_per_s < 0.1


def test_unknown_kind_says_what_to_do() -> None:
    message = "'Abacus' is not known, only 'NVIDIA A100.*'cpu'; pass pipeline\\(cluster="
    with pytest.raises(ValueError, match=message):
        Cluster.of([_Device("gpu", "Abacus")])


def test_no_devices() -> None:
    with pytest.raises(ValueError, match="no devices"):
        Cluster.of([])


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_rate(rate: float) -> None:
    with pytest.raises(ValueError, match=f"bytes_per_s of 'x' is {rate}; use a finite rate above"):
        DeviceSpec(kind="x", flops_per_s=1.0, bytes_per_s=rate)
