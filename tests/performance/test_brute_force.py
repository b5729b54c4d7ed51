"""Every task and transfer of random steps, second by second, and again by the simulator."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from math import inf
from random import Random

import pytest

from jaxptis.cluster import Link
from jaxptis.executor.instructions import Run, Transfer
from jaxptis.performance import LayerCost, simulate
from jaxptis.plan import Task
from tests.performance.chains import emitted
from tests.performance.random_steps import Step, random_step

NUM_STEPS = 500

Times = dict[str, tuple[float, float]]  # a task's or a transfer's start and end


def seconds_of(step: Step, task: Task) -> float:
    """Add up the layers of a task's stage, another way than `Costs.task_s` does."""
    stage = step.plan.stages[task.stage]
    kind = task.kind
    if kind in "IW" and task.stage == 0 and step.costs.layers[0].input_grad_s == 0:
        if kind == "I":
            return 0.0
        kind = "B"
    total = step.costs.start_s
    for layer in step.costs.layers:
        if layer.name in stage.layers:
            total += {
                "F": layer.forward_s,
                "B": layer.backward_s,
                "I": layer.input_grad_s,
                "W": layer.weight_grad_s,
            }[kind]
            if stage.recompute == "all" and kind in "BI":
                total += layer.recompute_s
    return total / step.cluster.devices[stage.device].speed


def sent(step: Step, task: Task) -> tuple[tuple[int, int], float] | None:
    """Return the link that a task's result takes, and for how long; None if it takes none."""
    other = {"F": task.stage + 1, "B": task.stage - 1, "I": task.stage - 1}.get(task.kind, -1)
    if other not in range(step.plan.num_stages):
        return None
    source, target = (step.plan.stages[s].device for s in (task.stage, other))
    if source == target:
        return None
    first = step.plan.stages[max(task.stage, other)].layers[0]
    (num_bytes,) = (x.input_bytes + x.skipping_bytes for x in step.costs.layers if x.name == first)
    link = step.cluster.links.get((source, target), step.cluster.link)
    return (source, target), link.latency_s + num_bytes / link.bytes_per_s


def needed(task: Task, num_stages: int) -> list[str]:
    """Return what a task reads; D is a backward that hands on a gradient, B or I."""
    s, m = task.stage, task.microbatch
    match task.kind:
        case "F":
            return [f"{s - 1}F{m}"] if s else []
        case "W":
            return [f"{s}D{m}"]
    return [f"{s}F{m}", f"{s + 1}D{m}"] if s + 1 < num_stages else [f"{s}F{m}"]


def made(task: Task) -> str:
    return f"{task.stage}{'D' if task.kind in 'BI' else task.kind}{task.microbatch}"


def buffered(step: Step) -> Times:
    """Let devices and links start what they can, second by second."""
    times: Times = {}
    waiting = [list(row) for row in step.plan.schedule]
    queues: defaultdict[tuple[int, int], list[tuple[float, Task]]] = defaultdict(list)
    free: defaultdict[object, float] = defaultdict(float)  # of devices and links, when
    there: dict[tuple[int, str], float] = {}  # of results on devices, when
    now = 0

    def start_tasks() -> bool:
        for device, row in enumerate(waiting):
            if not row or free[device] > now:
                continue
            task = row[0]
            needs = [(device, need) for need in needed(task, step.plan.num_stages)]
            if all(there.get(need, inf) <= now for need in needs):
                end = free[device] = there[device, made(task)] = now + seconds_of(step, task)
                times[str(task)] = now, end
                link = sent(step, row.pop(0))
                if link is not None:
                    queues[link[0]].append((end, task))
                return True
        return False

    def start_transfers() -> bool:
        for link, queue in queues.items():
            ready = [each for each in queue if each[0] <= now]
            if ready and free[link] <= now:
                _, task = first = min(ready, key=lambda each: each[0])
                queue.remove(first)
                taken = sent(step, task)
                assert taken is not None
                end = free[link] = there[link[1], made(task)] = now + taken[1]
                times[f"transfer {made(task)}"] = now, end
                return True
        return False

    while any(waiting) or any(queues.values()):
        while start_tasks() or start_transfers():
            pass
        now += 1
    return times


def blocking(step: Step) -> Times:
    """Walk the executor's lists second by second: a transfer starts when both ends are at it."""
    times: Times = {}
    rows = [deque(row) for row in emitted(step.plan, step.costs, step.cluster).rows]
    free = [0.0] * len(rows)
    makers = {made(task): task for row in step.plan.schedule for task in row}
    now = 0

    def maker(buffer: str) -> Task:
        """Return the task that makes x0.2 or d1.2."""
        stage, microbatch = buffer[1:].split(".")
        return makers[f"{stage}{'F' if buffer[0] == 'x' else 'D'}{microbatch}"]

    def duration(buffers: Iterable[str]) -> float:
        links = (sent(step, maker(buffer)) for buffer in buffers)
        return sum(link[1] for link in links if link is not None)

    def start(device: int) -> bool:
        each = rows[device][0] if rows[device] else None
        if each is None or free[device] > now:
            return False
        if isinstance(each, Run):
            assert each.task is not None
            free[device] = now + seconds_of(step, each.task)
            times[str(each.task)] = now, free[device]
        else:
            other = rows[each.peer][0] if rows[each.peer] else None
            if other is None or free[each.peer] > now or not each.matches(device, other):
                return False
            end = now + max(duration(each.sends), duration(each.receives))
            free[device] = free[each.peer] = end
            for buffer in (*each.sends, *each.receives):
                times[f"transfer {made(maker(buffer))}"] = now, end
            rows[each.peer].popleft()
        rows[device].popleft()
        return True

    while any(rows):
        while any(start(device) for device in range(len(rows))):
            pass
        now += 1
    return times


@pytest.mark.parametrize("brute_force", [buffered, blocking])
def test_random_steps(brute_force: Callable[[Step], Times]) -> None:
    for seed in range(NUM_STEPS):
        check_step(random_step(Random(seed)), brute_force)


def check_step(step: Step, brute_force: Callable[[Step], Times]) -> None:
    timeline = simulate(step.plan, step.costs, step.cluster, blocking=brute_force is blocking)
    found = {str(span.task): (span.start_s, span.end_s) for row in timeline.spans for span in row}
    for each in timeline.transfers:
        found[f"transfer {made(each.made_by)}"] = each.start_s, each.end_s
        assert sent(step, each.made_by) == (
            (each.source, each.target),
            step.cluster.link_between(each.source, each.target).transfer_s(each.num_bytes),
        )
        assert step.plan.stages[each.reader].device == each.target
    assert found == brute_force(step)
    assert timeline.step_s == max(span.end_s for row in timeline.spans for span in row)
    assert [tuple(span.task for span in row) for row in timeline.spans] == [*step.plan.schedule]
    starts = [each.start_s for each in timeline.transfers]
    assert starts == sorted(starts)


def test_random_steps_have_what_they_are_to_test() -> None:
    """Transfers that wait for their link, exchanges, and two results that go one way together."""
    counts: Counter[str] = Counter()
    for seed in range(NUM_STEPS):
        step = random_step(Random(seed))
        times = buffered(step)
        for each in simulate(step.plan, step.costs, step.cluster).transfers:
            counts["waits"] += each.start_s > times[str(each.made_by)][1]
        for row in emitted(step.plan, step.costs, step.cluster).rows:
            transfers = [each for each in row if isinstance(each, Transfer)]
            counts["exchanges"] += sum(bool(t.sends and t.receives) for t in transfers)
            counts["together"] += sum(len(t.sends) > 1 for t in transfers)
    assert min(counts[what] for what in ("waits", "exchanges", "together")) > 30, counts


def longer(rng: Random, step: Step) -> Step:
    """Return the step with something in it that takes longer."""
    costs, cluster = step.costs, step.cluster
    match rng.randrange(5):
        case 0:
            at = rng.randrange(len(costs.layers))
            names = [each.name for each in fields(LayerCost) if each.name.endswith("_s")]
            what = rng.choice([*names, "input_bytes", "skipping_bytes"])
            if at == 0 and what == "input_grad_s" and costs.layers[0].input_grad_s == 0:
                what = "forward_s"  # with an input gradient, the first stage would have another W
            layer = replace(costs.layers[at], **{what: getattr(costs.layers[at], what) + 4})
            layers = (*costs.layers[:at], layer, *costs.layers[at + 1 :])
            return replace(step, costs=replace(costs, layers=layers))
        case 1:
            return replace(step, costs=replace(costs, start_s=costs.start_s + 1))
        case 2:
            slow = {pair: later(link) for pair, link in cluster.links.items()}
            return replace(step, cluster=replace(cluster, link=later(cluster.link), links=slow))
        case 3 if len(cluster.devices) > 1:
            a, b = rng.sample(range(len(cluster.devices)), 2)
            links = {**cluster.links, (a, b): later(cluster.link_between(a, b))}
            return replace(step, cluster=replace(cluster, links=links))
    devices = list(cluster.devices)
    at = rng.randrange(len(devices))
    devices[at] = replace(devices[at], speed=devices[at].speed / 2)
    return replace(step, cluster=replace(cluster, devices=tuple(devices)))


def later(link: Link) -> Link:
    return Link(latency_s=link.latency_s + 1, bytes_per_s=link.bytes_per_s / 2)


def test_what_takes_longer_lets_nothing_end_sooner() -> None:
    """A task, a transfer or a device: of all tasks, not of the last alone.

    Not so where transfers block: they stand where a timeline puts them, and may move with it.
    """
    for seed in range(NUM_STEPS):
        rng = Random(seed)
        step = random_step(rng)
        slow = longer(rng, step)
        before, after = (simulate(each.plan, each.costs, each.cluster) for each in (step, slow))
        for row, later_row in zip(before.spans, after.spans, strict=True):
            ends = zip(row, later_row, strict=True)
            assert all(first.end_s <= second.end_s for first, second in ends), seed
