"""Clusters for tests of the simulator."""

from math import inf

from jaxptis.cluster import Cluster, DeviceSpec, Link


def device(*, speed: float = 1.0, memory_bytes: int | None = None) -> DeviceSpec:
    return DeviceSpec(
        kind="test", flops_per_s=1.0, bytes_per_s=1.0, speed=speed, memory_bytes=memory_bytes
    )


def equal_devices(num_devices: int, *, latency_s: float = 0.0, bytes_per_s: float = inf) -> Cluster:
    link = Link(latency_s=latency_s, bytes_per_s=bytes_per_s)
    return Cluster((device(),) * num_devices, link)
