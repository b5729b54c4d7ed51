"""The flags that say into what a step is cut: devices and microbatches."""

from absl import flags

NUM_DEVICES = flags.DEFINE_integer("num_devices", 4, "Devices in the pipeline.", lower_bound=1)
NUM_MICROBATCHES = flags.DEFINE_integer(
    "num_microbatches", 8, "Parts that each batch is cut into.", lower_bound=1
)
