"""Pipeline parallelism for JAX: a compiler that finds, balances and schedules the stages."""

from jaxptis.cluster import Cluster, DeviceSpec, Link
from jaxptis.decorator import pipeline
from jaxptis.parts import Parts, whole
from jaxptis.performance import Costs
from jaxptis.pipelined import Pipelined
from jaxptis.plan import Plan
from jaxptis.train_step import TrainState
from jaxptis.trainer import Trainer

__all__ = [
    "Cluster",
    "Costs",
    "DeviceSpec",
    "Link",
    "Parts",
    "Pipelined",
    "Plan",
    "TrainState",
    "Trainer",
    "pipeline",
    "whole",
]
