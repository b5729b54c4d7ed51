"""Follow what every device holds through the tasks and transfers of a step.

Parameters, the sums of their gradients and the optimizer's state last for the whole step. What a
forward saves, and what it makes for the next stage, is there from the start of the forward on; what
I makes for W from the start of I, and from its end on only what W reads is left. The gradient that
a B makes takes the place of the stage's input, which dies with it, as does what was saved. A first
stage without input gradient has a whole backward in W, and its I does nothing. A result for
another device stays until its transfer is over, and is on the other device from the start of the
transfer on: an input until its B or I is over, a gradient until the task that reads it is. The
input of the first stage is the batch, and is not counted. While a task runs, it has its
temporaries. What skips the first layer of a stage is there until its forward is over; if the stage
recomputes all, it is counted as the input is, as one of its layers may read it.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import NamedTuple

from jaxptis.performance.costs import Costs, LayerCost, TiedParams
from jaxptis.performance.memory import MemoryCurve
from jaxptis.performance.spans import Rows, Span, TransferSpan
from jaxptis.plan import Plan


class _Change(NamedTuple):
    """Bytes that come, or go if negative, by what they are."""

    saved: int = 0
    kept: int = 0
    transfers: int = 0
    temporaries: int = 0


_Changes = Sequence[Mapping[str, tuple[_Change, _Change]]]  # of stage and kind: at start and end
_Moments = defaultdict[float, int]  # how many bytes more there are from a moment on


def memory_curves(
    plan: Plan, costs: Costs, rows: Rows, transfers: Sequence[TransferSpan]
) -> tuple[MemoryCurve, ...]:
    """Return the memory of every device in a step of these tasks and transfers."""
    trains = any(task.kind != "F" for row in plan.schedule for task in row)
    changes = _changes(plan, costs, trains)
    lasting = _lasting(plan, costs, trains)
    moments = [defaultdict(int, {0.0: sum(each.values())}) for each in lasting]
    _note_tasks(moments, rows, changes)
    _note_transfers(moments, transfers)
    totals = [_running_total(moment) for moment in moments]
    peaks_s = [times_s[num_bytes.index(max(num_bytes))] for times_s, num_bytes in totals]
    moved = _moved(transfers, peaks_s)
    return tuple(
        MemoryCurve(
            times_s=times_s,
            num_bytes=num_bytes,
            peak_parts=lasts | _parts(row, changes, peak_s, moving)._asdict(),
        )
        for (times_s, num_bytes), lasts, row, peak_s, moving in zip(
            totals, lasting, rows, peaks_s, moved, strict=True
        )
    )


def _note_tasks(moments: Sequence[_Moments], rows: Rows, changes: _Changes) -> None:
    sums = [{kind: (sum(a), sum(b)) for kind, (a, b) in each.items()} for each in changes]
    for moment, row in zip(moments, rows, strict=True):
        for task, start_s, end_s in row:
            at_start, at_end = sums[task.stage][task.kind]
            moment[start_s] += at_start
            moment[end_s] += at_end


def _note_transfers(moments: Sequence[_Moments], transfers: Sequence[TransferSpan]) -> None:
    for source, target, _, _, start_s, end_s, num_bytes in transfers:
        moments[target][start_s] += num_bytes
        moments[source][end_s] -= num_bytes


def _running_total(moment: _Moments) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return the moments at which something changes, and how much there is from each on."""
    times_s = sorted(time_s for time_s, change in moment.items() if change or not time_s)
    return tuple(times_s), tuple(accumulate(map(moment.__getitem__, times_s)))


def _moved(transfers: Sequence[TransferSpan], peaks_s: Sequence[float]) -> list[_Change]:
    """Return what transfers have brought and taken until a moment of each device."""
    moved = [[0, 0] for _ in peaks_s]  # saved, transfers
    for source, target, made_by, _, start_s, end_s, num_bytes in transfers:
        if start_s <= peaks_s[target]:
            moved[target][made_by.kind != "F"] += num_bytes
        if end_s <= peaks_s[source]:
            moved[source][1] -= num_bytes
    return [_Change(saved=saved, transfers=sent) for saved, sent in moved]


def _parts(row: Sequence[Span], changes: _Changes, moment_s: float, moved: _Change) -> _Change:
    """Return what the tasks of a device, and its transfers, have left there at a moment."""
    ended = bisect_right(row, moment_s, key=attrgetter("end_s"))
    started = bisect_right(row, moment_s, key=attrgetter("start_s"))
    every = [(moved, 1)]
    every += [(changes[task.stage][task.kind][0], 1) for task, _, _ in row[ended:started]]
    counts = Counter((task.stage, task.kind) for task, _, _ in row[:ended])
    for (stage, kind), count in counts.items():
        every += [(change, count) for change in changes[stage][kind]]
    return _Change(*(sum(each[part] * count for each, count in every) for part in range(4)))


def _changes(plan: Plan, costs: Costs, trains: bool) -> _Changes:
    """Return what each task changes when it starts and when it ends, its transfers not counted."""
    home = [stage.device for stage in plan.stages]
    ranges = [range(start, end) for start, end in pairwise(plan.boundaries)]
    firsts = [costs.layers[layers.start] for layers in ranges[1:]]
    reads = [0, *(layer.input_bytes for layer in firsts)]
    crossing = [0, *(layer.crossing_bytes for layer in firsts), 0]

    def of_stage(stage: int) -> dict[str, tuple[_Change, _Change]]:
        layers = [costs.layers[index] for index in ranges[stage]]
        splits = costs.makes_input_grad(ranges[stage])
        recompute = plan.stages[stage].recompute
        came, made = crossing[stage], crossing[stage + 1]
        read = came if recompute == "all" else reads[stage]
        saved = costs.saved_bytes(ranges[stage], recompute) if trains else 0
        kept = sum(layer.kept_bytes for layer in layers)
        made_by_i = sum(layer.made_bytes for layer in layers)
        needs = {kind: costs.temporary_bytes(ranges[stage], kind, recompute) for kind in "FBIW"}
        stays = home[stage + 1 : stage + 2] == [home[stage]]
        back = _Change(saved=-saved - read, transfers=came - made)
        whole = _Change(temporaries=needs["B"]), back._replace(temporaries=-needs["B"])
        split = {
            "I": (
                _Change(kept=made_by_i, temporaries=needs["I"]),
                back._replace(kept=kept - made_by_i, temporaries=-needs["I"]),
            ),
            "W": (
                _Change(temporaries=needs["W"]),
                _Change(kept=-kept, temporaries=-needs["W"]),
            ),
        }
        return {
            "F": (
                _Change(
                    saved=saved + made * stays,
                    transfers=made * (not stays),
                    temporaries=needs["F"],
                ),
                _Change(saved=(read if trains else 0) - came, temporaries=-needs["F"]),
            ),
            "B": whole,
            **(split if splits else {"I": (_Change(), _Change()), "W": whole}),
        }

    return [of_stage(stage) for stage in range(plan.num_stages)]


def _lasting(plan: Plan, costs: Costs, trains: bool) -> list[dict[str, int]]:
    """Return what each device holds for the whole step; what layers share, it holds once.

    The optimizer's state of what they share is on the device of the first of them.
    """
    home = {name: stage.device for stage in plan.stages for name in stage.layers}
    held: list[tuple[Iterable[int], LayerCost | TiedParams]] = [
        *(([home[layer.name]], layer) for layer in costs.layers),
        *((dict.fromkeys(home[name] for name in tied.layers), tied) for tied in costs.tied),
    ]
    lasting = [
        {"parameters": 0, "gradients": 0, "optimizer state": 0} for _ in range(plan.num_devices)
    ]
    for devices, owner in held:
        for device in devices:
            lasting[device]["parameters"] += owner.param_bytes
            lasting[device]["gradients"] += owner.grad_bytes * trains
        for device in list(devices)[:1]:
            lasting[device]["optimizer state"] += owner.state_bytes * trains
    return lasting
