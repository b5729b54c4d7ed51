"""How an experiment joins the other processes of its run; `experiments.launch` passes the flags."""

import jax
from absl import flags

HEARTBEAT_TIMEOUT_S = 30

COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "host:port at which process 0 collects the processes of this run."
)
PROCESS_COUNT = flags.DEFINE_integer(
    "process_count", None, "How many they are, with --coordinator_address.", lower_bound=1
)
PROCESS_INDEX = flags.DEFINE_integer(
    "process_index", None, "Which of them this is, with --coordinator_address.", lower_bound=0
)
LOCAL_DEVICE_IDS = flags.DEFINE_list(
    "local_device_ids", None, "Devices of this machine that this process has; by default all."
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the processes of a Slurm, MPI or Kubernetes job, found by JAX."
)


@flags.multi_flags_validator(
    ["coordinator_address", "process_count", "process_index", "distributed"],
    "give --coordinator_address, --process_count and --process_index together (experiments.launch "
    "does), or --distributed alone, or none of these",
)
def _one_way(values: dict[str, str | int | bool | None]) -> bool:
    distributed = values.pop("distributed")
    given = [value is not None for value in values.values()]
    return not any(given) or (all(given) and not distributed)


@flags.multi_flags_validator(
    ["local_device_ids", "coordinator_address", "distributed"],
    "--local_device_ids is for processes of --coordinator_address or --distributed; give one",
)
def _has_processes(values: dict[str, str | list[str] | bool | None]) -> bool:
    return values["local_device_ids"] is None or bool(
        values["coordinator_address"] or values["distributed"]
    )


def join(num_devices: int) -> list[jax.Device]:
    """Joins the processes that the flags name, if any; returns the first devices of all of them.

    Raises:
      ValueError: there are fewer than `num_devices`.
    """
    local = None if LOCAL_DEVICE_IDS.value is None else [int(i) for i in LOCAL_DEVICE_IDS.value]
    # Without effect on accelerators; on the CPU backend it makes as many devices as are needed.
    if local is not None:
        jax.config.update("jax_num_cpu_devices", len(local))
    elif COORDINATOR_ADDRESS.value is None and not DISTRIBUTED.value:
        jax.config.update("jax_num_cpu_devices", num_devices)
    # With the service a process takes note of SIGTERM, by which it is stopped, and goes on.
    jax.config.update("jax_enable_preemption_service", False)
    if COORDINATOR_ADDRESS.value is not None:
        jax.distributed.initialize(
            COORDINATOR_ADDRESS.value,
            PROCESS_COUNT.value,
            PROCESS_INDEX.value,
            local,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    elif DISTRIBUTED.value:
        jax.distributed.initialize(
            local_device_ids=local, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S
        )
    devices = jax.devices()[:num_devices]
    if len(devices) < num_devices:
        raise ValueError(f"--num_devices={num_devices}, but JAX sees {len(devices)}; lower it")
    return devices
