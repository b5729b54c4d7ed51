"""The flags that say what estimated costs are of: a device, and an optimizer's state."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from absl import flags

from jaxptis.cluster import DEVICE_SPECS, DeviceSpec, kind_of
from jaxptis.performance.calibrate import calibrate
from models import Model

OPTIMIZERS: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    "adafactor": lambda: optax.adafactor(1e-3),
    "adamw": lambda: optax.adamw(1e-3),
    "lion": lambda: optax.lion(1e-4),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "sgd": lambda: optax.sgd(1e-2),
}

DEVICE = flags.DEFINE_enum(
    "device",
    None,
    [kind for kind in DEVICE_SPECS if kind != "cpu"],
    "The kind of device to estimate for; by default the one that is here, calibrated if nothing is "
    "published of it.",
)
OPTIMIZER = flags.DEFINE_enum("optimizer", "adamw", sorted(OPTIMIZERS), "Whose state is counted.")


def device_spec(dtype: Any) -> DeviceSpec:
    """Returns what is known of --device, or of the device that is here."""
    if DEVICE.value is not None:
        return DEVICE_SPECS[DEVICE.value]
    device = jax.devices()[0]
    kind = kind_of(device)
    return (
        DEVICE_SPECS[kind] if kind != "cpu" and kind in DEVICE_SPECS else calibrate(device, dtype)
    )


def make_optimizer(model: Model) -> optax.GradientTransformation:
    """Returns --optimizer, with what the model adds to it."""
    return model.steer(OPTIMIZERS[OPTIMIZER.value]())
