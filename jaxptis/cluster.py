"""The devices of a cluster and how fast they are."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, Self


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """What a device can do at best.

    Attributes:
        kind: the name that JAX gives it (`device.device_kind`), or "cpu".
        flops_per_s: dense bfloat16 peak.
        bytes_per_s: peak of reading and writing its memory.
        memory_bytes: that it has; None if that sets no limit.
        speed: how fast it is beside the device that costs are of; 0.5 takes twice as long.
        start_s: seconds that a program takes beside its work, to be started. Estimated costs take
            that of the first device for all; measured costs, and those of a file, have their own.

    Raises:
        ValueError: a number is out of range.
    """

    kind: str
    flops_per_s: float
    bytes_per_s: float
    memory_bytes: int | None = None
    speed: float = 1.0
    start_s: float = 0.0

    def __post_init__(self) -> None:
        for what, rate in ("flops_per_s", self.flops_per_s), ("bytes_per_s", self.bytes_per_s):
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"{what} of {self.kind!r} is {rate}; use a finite rate above 0")
        if not (math.isfinite(self.speed) and self.speed > 0):
            raise ValueError(
                f"speed of {self.kind!r} is {self.speed}; use a finite number above 0, such as 0.5 "
                "for a device that takes twice as long"
            )
        if not (math.isfinite(self.start_s) and self.start_s >= 0):
            raise ValueError(
                f"start_s of {self.kind!r} is {self.start_s}; use finite seconds of 0 or more"
            )
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ValueError(
                f"memory_bytes of {self.kind!r} is {self.memory_bytes}; use 1 or more, or None for "
                "no limit"
            )


_GPU_START_S = 270e-6
"""Measured on an H200: the median of seven sizes of models (experiments/results/costs). It is the
host that starts programs, so other GPUs are taken to be alike."""

# NVIDIA's data sheet of each part: bfloat16 tensor core without sparsity, memory bandwidth, memory.
# Where a sheet prints the figure with sparsity only, half of it. TPUs: the page of each version at
# cloud.google.com/tpu/docs, per chip. "cpu" is nominal: only the ratios of layers matter there.
DEVICE_SPECS = {
    spec.kind: spec
    for spec in (
        DeviceSpec(
            kind=kind,
            flops_per_s=flops_per_s,
            bytes_per_s=bytes_per_s,
            memory_bytes=None if memory_gb is None else memory_gb * 10**9,
            start_s=_GPU_START_S if kind.startswith("NVIDIA") else 0.0,
        )
        for kind, flops_per_s, bytes_per_s, memory_gb in (
            ("NVIDIA A100-SXM4-40GB", 312e12, 1555e9, 40),
            ("NVIDIA A100-SXM4-80GB", 312e12, 2039e9, 80),
            ("NVIDIA A100-PCIE-40GB", 312e12, 1555e9, 40),
            ("NVIDIA A100 80GB PCIe", 312e12, 1935e9, 80),
            ("NVIDIA H100 80GB HBM3", 989.5e12, 3350e9, 80),
            ("NVIDIA H100 PCIe", 756.5e12, 2000e9, 80),
            ("NVIDIA H100 NVL", 835.5e12, 3900e9, 94),
            ("NVIDIA H200", 989.5e12, 4800e9, 141),
            ("NVIDIA H200 NVL", 835.5e12, 4800e9, 141),
            ("NVIDIA B200", 2250e12, 8000e9, 180),
            ("NVIDIA L4", 121e12, 300e9, 24),
            ("NVIDIA L40S", 362e12, 864e9, 48),
            ("TPU v4", 275e12, 1228e9, 32),
            ("TPU v5 lite", 197e12, 819e9, 16),
            ("TPU v5", 459e12, 2765e9, 95),
            ("TPU v6 lite", 918e12, 1640e9, 32),
            ("cpu", 1e11, 1e10, None),
        )
    )
}
"""The known devices by kind."""


class _Device(Protocol):
    """What is looked at of a `jax.Device`."""

    @property
    def platform(self) -> str: ...

    @property
    def device_kind(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Link:
    """How long a transfer takes: `latency_s`, and its bytes over `bytes_per_s`.

    Raises:
        ValueError: a number is out of range.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise ValueError(
                f"latency_s of a link is {self.latency_s}; use finite seconds of 0 or more"
            )
        if not self.bytes_per_s > 0:
            raise ValueError(f"bytes_per_s of a link is {self.bytes_per_s}; use a rate above 0")

    def transfer_s(self, num_bytes: int) -> float:
        """Return the seconds from the start of a transfer to its end."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Cluster:
    """The devices of a pipeline, in order, and what connects them.

    Attributes:
        devices: each of them.
        link: between any two of them, in each direction.
        links: those that differ, by source and target.

    Raises:
        ValueError: there are no devices, or a link is not between two of them.
    """

    devices: tuple[DeviceSpec, ...]
    link: Link = Link()
    links: Mapping[tuple[int, int], Link] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if not self.devices:
            raise ValueError("the cluster has no devices; give it at least one")
        for source, target in self.links:
            if source == target or not {source, target} <= set(range(len(self.devices))):
                raise ValueError(
                    f"there is a link from device {source} to device {target}, but the cluster has "
                    f"{len(self.devices)} devices, counted from 0; name two of them"
                )

    def link_between(self, source: int, target: int) -> Link:
        """Return what connects two devices in this direction."""
        return self.links.get((source, target), self.link)

    @classmethod
    def of(cls, jax_devices: Iterable[_Device]) -> Self:
        """Look up what is published of each device.

        Raises:
            ValueError: nothing is known of a device's kind.
        """
        return cls(tuple(_spec(device) for device in jax_devices))


def kind_of(device: _Device) -> str:
    """Return what `DeviceSpec.kind` is of a `jax.Device`."""
    return "cpu" if device.platform == "cpu" else device.device_kind


def _spec(device: _Device) -> DeviceSpec:
    kind = kind_of(device)
    if kind not in DEVICE_SPECS:
        raise ValueError(
            f"device kind {kind!r} is not known, only {', '.join(map(repr, DEVICE_SPECS))}; "
            "pass pipeline(cluster=Cluster((DeviceSpec(kind=..., flops_per_s=..., "
            "bytes_per_s=...), ...))), one for each device; "
            "jaxptis.performance.calibrate.calibrate(device) measures one"
        )
    return DEVICE_SPECS[kind]
