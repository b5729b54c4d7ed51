"""The flags that say on what a step is planned: devices, their memory, and links."""

import dataclasses
import math

from absl import flags

from experiments.chosen_pipeline import NUM_DEVICES, NUM_MICROBATCHES
from jaxptis.cluster import Cluster, DeviceSpec, Link

MEMORY_LIMIT_GIB = flags.DEFINE_float(
    "memory_limit_gib",
    None,
    "Memory of each device; by default what is known of its kind.",
    lower_bound=1e-9,
)
LATENCY_S = flags.DEFINE_float(
    "latency_s", 0.0, "Seconds that a transfer takes beside its bytes.", lower_bound=0.0
)
BYTES_PER_S = flags.DEFINE_float(
    "bytes_per_s",
    None,
    "Of a link between two devices, each way; by default a transfer takes no time for them.",
    lower_bound=1.0,
)

OF_CLUSTER = (NUM_DEVICES, NUM_MICROBATCHES, MEMORY_LIMIT_GIB, LATENCY_S, BYTES_PER_S)


@flags.validator("memory_limit_gib", "use finite GiB above 0")
def _is_finite(limit: float | None) -> bool:
    return limit is None or math.isfinite(limit)


def chosen_cluster(device: DeviceSpec) -> Cluster:
    """Returns equal devices of a kind, with --memory_limit_gib if it is given."""
    if MEMORY_LIMIT_GIB.value is not None:
        device = dataclasses.replace(device, memory_bytes=int(MEMORY_LIMIT_GIB.value * 2**30))
    link = Link(latency_s=LATENCY_S.value, bytes_per_s=BYTES_PER_S.value or math.inf)
    return Cluster((device,) * NUM_DEVICES.value, link)
