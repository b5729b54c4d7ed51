"""Plans of named schedules with a layer a stage, and their costs."""

from collections.abc import Callable, Sequence

from jaxptis.performance import Costs, LayerCost
from jaxptis.plan import Plan, Schedule, StagePlan
from jaxptis.schedules import StageCosts, placement, schedule


def named_plan(strategy: str, num_devices: int, num_microbatches: int) -> Plan:
    homes = placement(strategy, num_devices=num_devices)
    rows = schedule(
        strategy,
        num_devices=num_devices,
        num_microbatches=num_microbatches,
        costs=StageCosts.even(len(homes)),
    )
    return plan_of(rows, homes)


def plan_of(rows: Schedule, homes: Sequence[int]) -> Plan:
    stages = (StagePlan(layers=(f"layer{s}",), device=device) for s, device in enumerate(homes))
    return Plan(stages=tuple(stages), schedule=rows)


def layer_costs(plan: Plan, seconds: Callable[[int, str], float]) -> Costs:
    """Return costs of layers by index and kind F, I or W; B takes as long as I and W."""
    return Costs(
        tuple(
            LayerCost(
                name=name,
                forward_s=seconds(index, "F"),
                backward_s=seconds(index, "I") + seconds(index, "W"),
                input_grad_s=seconds(index, "I"),
                weight_grad_s=seconds(index, "W"),
            )
            for index, name in enumerate(plan.layers)
        )
    )
