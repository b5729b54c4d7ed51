"""Predict a step from a plan, the costs of its layers and the devices that run it."""

from itertools import zip_longest
from operator import attrgetter

from jaxptis.cluster import Cluster
from jaxptis.performance.blocking import run_blocking
from jaxptis.performance.buffered import run_buffered
from jaxptis.performance.collector import collector_paused
from jaxptis.performance.costs import Costs
from jaxptis.performance.memory_curves import memory_curves
from jaxptis.performance.spans import Rows, TransferSpan
from jaxptis.performance.task_costs import task_costs
from jaxptis.performance.timeline import Timeline
from jaxptis.plan import Plan


def simulate(
    plan: Plan,
    costs: Costs,
    cluster: Cluster | None = None,
    *,
    blocking: bool = False,
    placed_by: tuple[Costs, Cluster] | None = None,
) -> Timeline:
    """Start every task as soon as its device is free and what it needs has arrived.

    A device runs its tasks in the order of its row, one at a time.

    Args:
        plan: the plan to run.
        costs: the costs of the plan's layers, in their order.
        cluster: the devices; by default equal ones, with links that take no time.
        blocking: how devices hand on results. By default a device leaves them to its links and
            goes on; see `buffered`. With `blocking` it takes part in every transfer, as does the
            other device, and both wait; that is how the executor runs. See `blocking`.
        placed_by: the costs and the devices that transfers which block have been placed for; by
            default these.

    Raises:
        ValueError: the costs are not those of the plan's layers, or the cluster has fewer devices
            than the plan.
    """
    _check_costs(plan, costs)
    _check_cluster(plan, cluster)
    with collector_paused():
        rows, transfers = _run(plan, costs, cluster, blocking, placed_by)
        transfers.sort(key=attrgetter("start_s"))
        memory = memory_curves(plan, costs, rows, transfers)
        return Timeline(tuple(map(tuple, rows)), tuple(transfers), memory)


def _run(
    plan: Plan,
    costs: Costs,
    cluster: Cluster | None,
    blocking: bool,
    placed_by: tuple[Costs, Cluster] | None,
) -> tuple[Rows, list[TransferSpan]]:
    of_tasks = task_costs(plan, costs, cluster)
    if not blocking:
        return run_buffered(plan, of_tasks)
    return run_blocking(plan, of_tasks, task_costs(plan, *placed_by) if placed_by else of_tasks)


def _check_costs(plan: Plan, costs: Costs) -> None:
    names = tuple(cost.name for cost in costs.layers)
    for index, (name, layer) in enumerate(zip_longest(names, plan.layers)):
        if name != layer:
            raise ValueError(
                f"layer {index} is {layer!r} in the plan ({len(plan.layers)} layers) and {name!r} "
                f"in the costs ({len(names)} layers); give the costs of the plan's layers, in order"
            )


def _check_cluster(plan: Plan, cluster: Cluster | None) -> None:
    if cluster is not None and len(cluster.devices) < plan.num_devices:
        raise ValueError(
            f"the plan has {plan.num_devices} devices, but the cluster {len(cluster.devices)}; "
            "describe each device of the plan, or make a plan for fewer"
        )
