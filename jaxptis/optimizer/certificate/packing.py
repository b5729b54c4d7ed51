"""The shortest step into which whole layers can be packed, by dynamic programming.

Layers of equal costs are one kind, and what a device holds is a number of each kind. The devices
are taken in the order in which they begin: the j-th of them (from 0) has no layer before layer j,
since the others' first layers are all different and come before its own. So its first layer is, of
each kind that it has, one from layer j on. What a set of layers takes on the j-th device, `_set_s`,
is its work and the time in which the device must idle:

- Before a microbatch can have come to its first layer, the device can do nothing.
- Before a layer's forward can begin (or, for all backwards, before the first gradient is there),
  the device can do nothing but the forwards of its other layers.
- After a layer's last input gradient, until the step ends at the first layer, it can do nothing but
  weight gradients and the backwards of its other layers; after the last forward of the last layer,
  nothing but backwards.

A step of T seconds is possible only if all layers fit on devices whose sets take at most T. The
states of the program are numbers of layers of every kind but the most frequent: of that kind, the
most that can be packed is what it computes. A bisection finds the least such T.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from jaxptis.cluster import DeviceSpec
from jaxptis.optimizer.certificate.least import Least, LeastLayer
from jaxptis.performance.compiled import compiled

_PRECISE = 1e-5  # of a step, as a fraction
_MOST_STEPS = 2e8  # of one try of the dynamic program, about 0.1 s
_MOST_SETS = 1e5
_NEVER = -1  # how many layers fit where the others already do not


class _Kinds(NamedTuple):
    """K kinds of layers: for each layer of a kind, for all microbatches, at speed 1.

    Attributes:
        num: [K] of layers.
        seconds: [K, 3] of forward, path and backward.
        before_s: [P, K] until the forward of the first of them from layer j on can begin; infinite
            if there is none.
        after_s: [P, K] likewise, after the last input gradient of that layer.
        is_last: [K] whether it is the last layer.
        num_bytes: [K, 2] lasting and passing.
        tied: [K, N] whether they read each set of tied parameters.
    """

    num: np.ndarray
    seconds: np.ndarray
    before_s: np.ndarray
    after_s: np.ndarray
    is_last: np.ndarray
    num_bytes: np.ndarray
    tied: np.ndarray

    @property
    def work_s(self) -> np.ndarray:
        """[K] seconds of a device."""
        return self.seconds[:, 0] + self.seconds[:, 2]


class _Line(NamedTuple):
    """The chain of a microbatch, and the devices in classes of equal ones.

    Attributes:
        ends_s: seconds of the whole chain until the first gradient, and from the last forward on.
        last_s: seconds of the last layer that come before and after these on other devices.
        start_s: that tasks of all microbatches take beside their layers.
        tied_bytes: [N] of each set of tied parameters.
        speed: [C] of a device of each class.
        memory: [C] bytes of one.
        num: [C] of devices.
    """

    ends_s: np.ndarray
    last_s: np.ndarray
    start_s: float
    tied_bytes: np.ndarray
    speed: np.ndarray
    memory: np.ndarray
    num: np.ndarray


@dataclass(frozen=True)
class Packing:
    """Whole layers on devices, as a dynamic program that is asked for steps.

    Attributes:
        kinds: of layers, the most frequent first.
        line: the devices.
        sets: [Y, K] numbers of layers of each kind but the first, which is 0 there.
    """

    kinds: _Kinds
    line: _Line
    sets: np.ndarray

    @classmethod
    def of(
        cls, least: Least, devices: Sequence[DeviceSpec], num_microbatches: int
    ) -> "Packing | None":
        """Return the dynamic program, or None if there are too many kinds of layers or devices."""
        kinds = _kinds(least, devices, num_microbatches)
        classes = Counter((x.speed, float(x.memory_bytes or np.inf)) for x in devices)
        if np.prod(kinds.num[1:] + 1.0) > _MOST_SETS:
            return None
        sets = np.array([*product([0], *(range(number + 1) for number in kinds.num[1:]))])
        line = _line(least, classes, num_microbatches)
        # Of these sets, those that are about a device's share of the work; small ones, in the main.
        share_s = 1.1 * kinds.num @ kinds.work_s * max(line.speed) / (line.num @ line.speed)
        num_shares = np.sum(sets @ kinds.work_s <= max(share_s, max(kinds.work_s)))
        num_states = np.prod(line.num + 1.0)
        if num_states * len(classes) * len(sets) * num_shares > _MOST_STEPS:
            return None
        return cls(kinds, line, sets)

    def fits(self, step_s: float) -> bool:
        """Whether all layers fit on devices whose sets take at most so long."""
        return bool(_most_packed(self.kinds, self.line, self.sets, step_s) >= self.kinds.num[0])

    def least_step_s(self, at_least_s: float) -> float:
        """Return seconds of which it is proven that no step is shorter; there must be a step.

        Args:
            at_least_s: for which this is known.
        """
        low_s, high_s, more = at_least_s, at_least_s, _PRECISE
        while not self.fits(high_s):
            low_s, high_s, more = high_s, (1 + more) * high_s, 8 * more
        while high_s - low_s > _PRECISE * high_s:
            middle_s = (low_s + high_s) / 2
            if self.fits(middle_s):
                high_s = middle_s
            else:
                low_s = middle_s
        return low_s


def _kinds(least: Least, devices: Sequence[DeviceSpec], num_microbatches: int) -> _Kinds:
    last = len(least.layers) - 1
    indices: dict[tuple[LeastLayer, bool], list[int]] = {}
    for index, layer in enumerate(least.layers):
        indices.setdefault((layer, index == last), []).append(index)
    every = sorted(indices.items(), key=lambda each: -len(each[1]))
    layers = [layer for (layer, _), _ in every]
    fastest = max(device.speed for device in devices)
    nexts = [
        [next((index for index in members if index >= j), None) for _, members in every]
        for j in range(len(devices))
    ]
    return _Kinds(
        num=np.array([len(members) for _, members in every]),
        seconds=num_microbatches
        * np.array([[x.forward_s, x.path_s, x.backward_s] for x in layers]),
        before_s=_seconds_at(least.before_s / fastest, nexts),
        after_s=_seconds_at(least.after_s / fastest, nexts),
        is_last=np.array([is_last for (_, is_last), _ in every]),
        num_bytes=np.array([[x.lasting_bytes, x.passing_bytes] for x in layers], float),
        tied=np.array(
            [[number in x.tied for number in range(len(least.tied_bytes))] for x in layers], bool
        ).reshape(len(layers), -1),
    )


def _seconds_at(seconds: np.ndarray, indices: Sequence[Sequence[int | None]]) -> np.ndarray:
    return np.array([[np.inf if i is None else seconds[i] for i in row] for row in indices])


def _line(least: Least, classes: Counter[tuple[float, float]], num_microbatches: int) -> _Line:
    fastest = max(speed for speed, _ in classes)
    last = least.layers[-1]
    several = num_microbatches > 1  # then these and what comes before them do not overlap
    return _Line(
        ends_s=np.array([least.before_s[-1], least.after_s[-1]]) / fastest,
        last_s=several * np.array([last.path_s, last.forward_s]) / fastest,
        start_s=num_microbatches * least.start_s,
        tied_bytes=np.array(least.tied_bytes, float),
        speed=np.array([speed for speed, _ in classes]),
        memory=np.array([memory for _, memory in classes]),
        num=np.array([*classes.values()]),
    )


@compiled
def _set_s(kinds: _Kinds, line: _Line, numbers: np.ndarray, j: int, k: int) -> float:
    """Return the seconds of a set of layers on a device of class k, the j-th to begin.

    Infinite if its memory is too small: for what lasts, and for the largest backward; and if it has
    a kind of which there is no layer from layer j on. An empty set takes no time.
    """
    num_bytes, largest = 0.0, 0.0
    forward_s = backward_s = line.start_s
    path_s = 0.0
    before_s = after_s = np.inf  # of the first layer
    has_last = False
    for t in range(len(numbers)):
        if numbers[t]:
            forward_s += numbers[t] * kinds.seconds[t, 0]
            path_s += numbers[t] * kinds.seconds[t, 1]
            backward_s += numbers[t] * kinds.seconds[t, 2]
            before_s = min(before_s, kinds.before_s[j, t])
            after_s = min(after_s, kinds.after_s[j, t])
            if kinds.before_s[j, t] == np.inf:
                return np.inf
            has_last = has_last or kinds.is_last[t]
            num_bytes += numbers[t] * kinds.num_bytes[t, 0]
            largest = max(largest, kinds.num_bytes[t, 1])
    for n in range(len(line.tied_bytes)):
        for t in range(len(numbers)):
            if numbers[t] and kinds.tied[t, n]:
                num_bytes += line.tied_bytes[n]
                break
    if before_s == np.inf:
        return 0.0
    if num_bytes + largest > line.memory[k]:
        return np.inf
    speed = line.speed[k]
    weight_s = (backward_s - line.start_s - path_s) / speed
    forward_s, backward_s = forward_s / speed, backward_s / speed
    first_s, drain_s = line.ends_s
    if not has_last:
        first_s, drain_s = first_s + line.last_s[0], drain_s + line.last_s[1]
    idle_s = max(before_s, first_s - forward_s)
    end_s = max(after_s - weight_s, drain_s - backward_s, 0.0)
    for t in range(len(numbers)):
        if numbers[t]:
            idle_s = max(idle_s, kinds.before_s[j, t] - forward_s + kinds.seconds[t, 0] / speed)
            end_s = max(end_s, kinds.after_s[j, t] - backward_s + kinds.seconds[t, 1] / speed)
    return idle_s + forward_s + backward_s + end_s


@compiled
def _most_packed(kinds: _Kinds, line: _Line, sets: np.ndarray, step_s: float) -> int:
    """Return how many layers of the first kind fit beside all others in a step of this length."""
    num_sets, num_kinds = sets.shape
    # A set's place in the list: what a set holds more than another is at the difference of places.
    strides = np.ones(num_kinds, np.int64)
    for t in range(num_kinds - 2, 0, -1):
        strides[t] = strides[t + 1] * (kinds.num[t + 1] + 1)
    num_classes = len(line.num)
    num_devices = np.sum(line.num)
    fits = np.full((num_devices, num_classes, num_sets), _NEVER)
    for j in range(num_devices):
        for k in range(num_classes):
            for y in range(num_sets):
                numbers = sets[y].copy()
                while numbers[0] <= kinds.num[0]:
                    if _set_s(kinds, line, numbers, j, k) <= step_s:
                        fits[j, k, y] = numbers[0]
                    elif numbers[0]:  # the first may let the device begin sooner, no other
                        break
                    numbers[0] += 1
    num_states = 1
    for number in line.num:
        num_states *= number + 1
    packed = np.full((num_states, num_sets), _NEVER)
    packed[0, 0] = 0
    for state in range(1, num_states):
        rest, used = state, 0
        for k in range(num_classes):
            used += rest % (line.num[k] + 1)
            rest //= line.num[k] + 1
        rest, step = state, 1
        for k in range(num_classes):
            if rest % (line.num[k] + 1):
                before, now = packed[state - step], packed[state]
                _add_device(before, now, fits[used - 1, k], sets, kinds.num, strides)
            rest //= line.num[k] + 1
            step *= line.num[k] + 1
    return int(packed[num_states - 1, num_sets - 1])


@compiled
def _add_device(
    packed: np.ndarray,
    more: np.ndarray,
    fits: np.ndarray,
    sets: np.ndarray,
    count: np.ndarray,
    strides: np.ndarray,
) -> None:
    """Raise what is packed on one device more: for every set, the most layers of the first kind.

    Only sets matter that cannot grow; what is more than there is of a kind stays away.
    """
    num_sets, num_kinds = sets.shape
    for y in range(num_sets):
        grows = fits[y] < 0
        for t in range(1, num_kinds):
            grows = grows or (sets[y, t] < count[t] and fits[y + strides[t]] >= fits[y])
        if grows:
            continue
        for x in range(num_sets):
            if packed[x] >= 0:
                place = 0
                for t in range(1, num_kinds):
                    place += strides[t] * min(sets[x, t] + sets[y, t], count[t])
                more[place] = max(more[place], packed[x] + fits[y])
