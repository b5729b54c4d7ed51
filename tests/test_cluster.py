import pathlib
import re
import statistics
from dataclasses import dataclass
from math import inf, nan

import pytest

from jaxptis.cluster import DEVICE_SPECS, Cluster, DeviceSpec, Link
from jaxptis.performance import Costs


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


def test_gpus_take_what_an_h200_was_measured_to_take_to_start_a_program() -> None:
    costs = pathlib.Path(__file__).parents[1] / "experiments/results/costs"
    median_s = statistics.median(Costs.load(path).start_s for path in costs.glob("*-H200.json"))
    # It is written in hundredths of a millisecond.
    assert DEVICE_SPECS["NVIDIA H200"].start_s == pytest.approx(median_s, abs=5e-6)
    started = {kind for kind, spec in DEVICE_SPECS.items() if spec.start_s}
    assert started == {kind for kind in DEVICE_SPECS if kind.startswith("NVIDIA")}


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


@pytest.mark.parametrize("speed", [0.0, -1.0, inf, nan])
def test_bad_speed(speed: float) -> None:
    with pytest.raises(ValueError, match=f"speed of 'x' is {speed}; use a finite number above 0"):
        DeviceSpec(kind="x", flops_per_s=1.0, bytes_per_s=1.0, speed=speed)


@pytest.mark.parametrize("start_s", [-1.0, inf, nan])
def test_bad_start(start_s: float) -> None:
    with pytest.raises(ValueError, match=f"start_s of 'x' is {start_s}; use finite seconds of 0"):
        DeviceSpec(kind="x", flops_per_s=1.0, bytes_per_s=1.0, start_s=start_s)


@pytest.mark.parametrize("memory_bytes", [0, -1])
def test_bad_memory(memory_bytes: int) -> None:
    message = f"memory_bytes of 'x' is {memory_bytes}; use 1 or more, or None for no limit"
    with pytest.raises(ValueError, match=message):
        DeviceSpec(kind="x", flops_per_s=1.0, bytes_per_s=1.0, memory_bytes=memory_bytes)


@pytest.mark.parametrize("latency_s", [-1.0, inf, nan])
def test_bad_latency(latency_s: float) -> None:
    with pytest.raises(ValueError, match=f"latency_s of a link is {latency_s}; use finite seconds"):
        Link(latency_s=latency_s)


@pytest.mark.parametrize("bytes_per_s", [0.0, -1.0, nan])
def test_bad_link_rate(bytes_per_s: float) -> None:
    message = f"bytes_per_s of a link is {bytes_per_s}; use a rate above 0"
    with pytest.raises(ValueError, match=message):
        Link(bytes_per_s=bytes_per_s)


def test_seconds_of_a_transfer() -> None:
    assert Link(latency_s=2, bytes_per_s=10).transfer_s(30) == 5
    assert Link().transfer_s(30) == 0


@pytest.mark.parametrize(("source", "target"), [(0, 2), (-1, 0), (1, 1)])
def test_link_of_devices_that_are_not_there(source: int, target: int) -> None:
    device = DeviceSpec(kind="x", flops_per_s=1.0, bytes_per_s=1.0)
    message = f"a link from device {source} to device {target}, but the cluster has 2 devices"
    with pytest.raises(ValueError, match=message):
        Cluster((device, device), links={(source, target): Link()})


def test_links_differ_by_direction() -> None:
    device = DeviceSpec(kind="x", flops_per_s=1.0, bytes_per_s=1.0)
    slow, usual = Link(latency_s=1.0), Link(latency_s=0.1)
    cluster = Cluster((device, device), usual, links={(0, 1): slow})
    assert cluster.link_between(0, 1) is slow
    assert cluster.link_between(1, 0) is usual
