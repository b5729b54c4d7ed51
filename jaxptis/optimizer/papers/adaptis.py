"""The tuning of AdaPtis (arXiv 2509.23722): partition, placement and schedule, one at a time.

What is planned has three phases: which layers make a stage, on which device a stage is, and in
which order a device runs its tasks. A device that idles says which of them to change.

- Some devices idle more than others, by more than the cheapest layer takes: they have less to do.
  A layer moves from the device with the smallest bubble to the one with the largest: partition.
- Devices idle before their first task and after their last more than in between: the pipeline takes
  long to fill and to drain. Stages change places, or become more and smaller ones: placement.
- Else they wait in between, for what others make too late: the schedule.

The tuning starts with a stage of about as many layers on each device, and a list schedule: a free
device prefers a backward, of which it runs the input gradient alone, since others wait for that;
takes forwards and backwards in turn; fills holes with weight gradients; and starts no forward for
which it lacks the memory. Then, again and again: find the phase, try its moves, and keep the first
by which the performance model says that the step is shorter. If it says so of none, they are all
rolled back, and another phase is tried. When none has such a move, the plan is done.
"""

from bisect import insort
from collections.abc import Iterator
from math import inf

from jaxptis.cluster import Cluster
from jaxptis.optimizer.papers.adaptis_log import Adapted, Log, Phase, Step
from jaxptis.optimizer.papers.draft import Draft
from jaxptis.optimizer.papers.phase_moves import Move, change_order, move_layers, move_stages
from jaxptis.optimizer.papers.predictor import Predicted, Predictor
from jaxptis.optimizer.partition.balance import check_fills_devices, uniform
from jaxptis.optimizer.partition.within_memory import partition_within
from jaxptis.performance import Costs, Timeline

_NUM_TRIED = 4  # moves of a phase: those that an estimate takes for the best


def adaptis(
    costs: Costs, cluster: Cluster, num_microbatches: int, *, blocking: bool = False
) -> Adapted:
    """Tune a plan phase by phase.

    >>> from jaxptis.cluster import DEVICE_SPECS
    >>> from jaxptis.performance import LayerCost
    >>> layers = tuple(
    ...     LayerCost(name=n, forward_s=f, backward_s=2 * f, input_grad_s=f, weight_grad_s=f)
    ...     for n, f in zip("abcd", (1, 1, 1, 3))
    ... )
    >>> adapted = adaptis(Costs(layers), Cluster((DEVICE_SPECS["cpu"],) * 2), num_microbatches=4)
    >>> [stage.layers for stage in adapted.plan.stages]
    [('a', 'b', 'c'), ('d',)]
    >>> first = adapted.log.steps[0]
    >>> first.phase, first.before_s, first.after_s, first.kept
    ('partition', 50.0, 39.0, True)

    Args:
        costs: of the layers.
        cluster: the devices, with their memory, speed and links.
        num_microbatches: of a step.
        blocking: how devices hand on results; see `simulate`, which says what every number of the
            log is.

    Raises:
        ValueError: there are fewer layers than devices, or no partition of one stage a device fits
            the memory.
    """
    predictor = Predictor(costs, cluster, num_microbatches, blocking=blocking)
    layers_s = [layer.forward_s + layer.backward_s for layer in costs.layers]
    cheapest_s = num_microbatches * min(filter(None, layers_s), default=0.0)
    now = start = _start(predictor)
    steps: list[Step] = []
    rolled_back: set[Phase] = set()
    while len(rolled_back) < 3:
        likely = likely_phases(now.timeline, cheapest_s)
        phase = next(phase for phase in likely if phase not in rolled_back)
        rolled_back.add(phase)
        for move in _promising(_moves(now, phase, layers_s), predictor):
            after = predictor.predict(move.draft)
            step = Step.of(phase, move.text, now.timeline, after and after.timeline)
            steps.append(step)
            if after and step.kept:
                now = after
                rolled_back.clear()
                break
    return Adapted(now.plan, Log(start.timeline.step_s, tuple(steps)))


def likely_phases(timeline: Timeline, cheapest_s: float) -> tuple[Phase, Phase, Phase]:
    """Return the phase first that the bubbles come from, then the others.

    Args:
        timeline: of a step.
        cheapest_s: what the cheapest layer takes in it.
    """
    bubbles = timeline.bubbles
    idle_s = [bubble.idle_s for bubble in bubbles]
    if max(idle_s) - min(idle_s) > cheapest_s:
        return "partition", "placement", "schedule"
    inside_s = sum(bubble.steady_s for bubble in bubbles)
    if sum(idle_s) - inside_s > inside_s:
        return "placement", "partition", "schedule"
    return "schedule", "partition", "placement"


def _start(predictor: Predictor) -> Predicted:
    """Return a stage on each device, of as many layers each; or, if need be, of what fits."""
    num_layers, num_devices = predictor.problem.num_layers, predictor.problem.num_devices
    check_fills_devices(num_layers, num_devices)
    homes = tuple(range(num_devices))
    even = predictor.predict(Draft(uniform(num_layers, num_devices), homes))
    if even:
        return even
    draft = Draft(
        partition_within(
            predictor.problem,
            [1] * num_devices,
            lambda edges: predictor.one_in_flight(Draft(edges, homes)).timeline,
        ),
        homes,
    )
    return predictor.predict(draft) or predictor.one_in_flight(draft)


def _moves(now: Predicted, phase: Phase, layers_s: list[float]) -> Iterator[Move]:
    idle_s = [bubble.idle_s for bubble in now.timeline.bubbles]
    busiest, *others = sorted(range(len(idle_s)), key=idle_s.__getitem__)
    if phase == "schedule":
        yield from change_order(now.draft)
    elif phase == "partition" and others:
        yield from move_layers(now.draft, busiest, others[-1])
    elif phase == "placement" and others:
        yield from move_stages(now.draft, busiest, others[-1], layers_s)


def _promising(moves: Iterator[Move], predictor: Predictor) -> list[Move]:
    """Return the moves of the shortest estimates, the shortest first."""
    shortest: list[tuple[float, int, Move]] = []
    for number, move in enumerate(moves):
        limit_s = shortest[-1][0] if len(shortest) == _NUM_TRIED else inf
        estimate_s = predictor.estimate_s(move.draft, limit_s)
        if estimate_s < limit_s:
            insort(shortest, (estimate_s, number, move))
            del shortest[_NUM_TRIED:]
    return [move for _, _, move in shortest]
