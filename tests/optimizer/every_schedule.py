"""The shortest step of all plans of few layers, by branch and bound; links take no time.

Every layer is a stage, as a plan whose stages have several does nothing that these cannot. The
microbatches are alike: on every stage the n-th that runs may as well be microbatch n. For each
placement it tries the active schedules of Giffler and Thompson (Operations Research 8(4), 1960):
of all tasks that could come next, one ends first; its device runs it, or another task that could
begin before it ends. Some active schedule is as short as any, delays included. A state that was
seen with all the same times is not looked at again.
"""

from itertools import pairwise, product
from typing import NamedTuple

import numba
import numpy as np

from jaxptis.cluster import Cluster
from jaxptis.performance import Costs

F, B, I, W = range(4)  # noqa: E741
_SEEN = 1 << 18


class _State(NamedTuple):
    done: np.ndarray  # [L, 4] tasks; B counts backwards, whole or split
    end_s: np.ndarray  # [L, 2, M] of forwards and of what gradients take
    free_s: np.ndarray  # [P]
    last_w: np.ndarray  # [P] the layer of a device's last task, if that was W, or -1


def shortest_s(
    costs: Costs, cluster: Cluster, num_microbatches: int, below_s: float, max_nodes: int
) -> tuple[float, bool]:
    """Return the shortest step if it is below this, else this; and whether that is sure."""
    names = ("forward_s", "backward_s", "input_grad_s", "weight_grad_s")
    seconds = np.array([[getattr(layer, name) for name in names] for layer in costs.layers])
    splits_first = costs.layers[0].input_grad_s > 0
    speeds = np.array([device.speed for device in cluster.devices])
    placements = []
    for each in product(range(len(speeds)), repeat=len(seconds)):
        alike = [each.index(d) if d in each else len(each) for d in range(len(speeds))]
        if all(
            speeds[a] != speeds[b] or alike[a] <= alike[b] for a, b in pairwise(range(len(speeds)))
        ):
            placements.append(np.array(each))
    whole_s = [_whole_s(row, splits=splits_first or s > 0) for s, row in enumerate(seconds)]

    def busiest_s(homes: np.ndarray) -> float:
        work_s = num_microbatches * (seconds[:, F] + whole_s) / speeds[homes]
        return max(np.bincount(homes, work_s))

    placements.sort(key=busiest_s)
    nodes = np.array([max_nodes])
    for homes in placements:
        if busiest_s(homes) >= below_s:
            break
        own_s = seconds / speeds[homes][:, None]
        below_s = _shortest(
            own_s, homes, len(speeds), num_microbatches, splits_first, below_s, nodes
        )
    return below_s, bool(nodes[0] > 0)


def _whole_s(row: np.ndarray, *, splits: bool) -> float:
    return min(row[B], row[I] + row[W]) if splits else row[B]


@numba.njit
def _shortest(seconds, homes, num_devices, M, splits_first, below_s, nodes):
    L = len(homes)
    state = _State(
        np.zeros((L, 4), np.int64),
        np.zeros((L, 2, M)),
        np.zeros(num_devices),
        np.full(num_devices, -1),
    )
    seen = np.zeros(_SEEN, np.uint64)
    return _search(seconds, homes, M, splits_first, below_s, nodes, state, seen)


@numba.njit
def _start_s(state, homes, M, s, kind):
    """When the next task of a layer and kind could start; infinite if it cannot be next."""
    L = len(homes)
    done, end_s, free_s, _ = state
    if kind == W:
        return free_s[homes[s]] if done[s, W] < done[s, I] else np.inf
    m = done[s, F] if kind == F else done[s, B]
    if m == M:
        return np.inf
    if kind == F:
        if s == 0:
            return free_s[homes[s]]
        return max(free_s[homes[s]], end_s[s - 1, 0, m]) if done[s - 1, F] > m else np.inf
    if done[s, F] <= m or (s + 1 < L and done[s + 1, B] <= m):
        return np.inf
    start_s = max(free_s[homes[s]], end_s[s, 0, m])
    return max(start_s, end_s[s + 1, 1, m]) if s + 1 < L else start_s


@numba.njit
def _allowed(seconds, splits, kind):
    """Whether a backward is worth running this way: not if the other is at least as good."""
    whole, split = seconds[B], seconds[I] + seconds[W]
    if kind == B:
        return not splits or whole < split
    if kind == I:
        return splits and not whole <= seconds[I]
    return True


@numba.njit
def _at_least_s(seconds, homes, M, splits_first, state):
    """What the whole step takes at least: every device's work, and the chain after each layer."""
    L = len(homes)
    done, end_s, free_s, _ = state
    left_s = np.zeros(len(free_s))
    found_s = 0.0
    after_s = 0.0
    for s in range(L):
        splits = splits_first or s > 0
        whole, path = seconds[s, B], seconds[s, B]
        if splits:
            whole = min(whole, seconds[s, I] + seconds[s, W])
            path = min(path, seconds[s, I])
        num_forwards, num_backwards = M - done[s, F], M - done[s, B]
        left_s[homes[s]] += num_forwards * seconds[s, F] + num_backwards * whole
        left_s[homes[s]] += (done[s, I] - done[s, W]) * seconds[s, W]
        if num_backwards:
            free = free_s[homes[s]]
            if s + 1 < L and num_backwards <= done[s + 1, B] - done[s, B]:
                free = max(free, end_s[s + 1, 1, M - 1] - (num_backwards - 1) * path)
            found_s = max(found_s, free + num_backwards * path + after_s)
        after_s += path
    rest_s = after_s
    for s in range(L - 1, -1, -1):
        num_forwards = M - done[s, F]
        if num_forwards:
            found_s = max(found_s, free_s[homes[s]] + num_forwards * seconds[s, F] + rest_s)
        rest_s += seconds[s, F]
    for d in range(len(free_s)):
        begins_s = np.inf  # of what is left, when the first can
        if left_s[d] > 0:
            for s in range(L):
                if homes[s] == d:
                    if done[s, W] < done[s, I] or done[s, F] > done[s, B]:
                        begins_s = 0.0
                    elif done[s, F] < M:
                        m = done[s, F]
                        early_s, k = 0.0, s
                        while k > 0 and done[k - 1, F] <= m:
                            k -= 1
                            early_s += seconds[k, F]
                        if k > 0:
                            early_s += end_s[k - 1, 0, m]
                        begins_s = min(begins_s, early_s)
            found_s = max(found_s, max(free_s[d], begins_s) + left_s[d])
    return found_s


@numba.njit
def _is_new(homes, M, state, seen):
    L = len(homes)
    done, end_s, free_s, last_w = state
    key = np.uint64(1469598103934665603)
    prime = np.uint64(1099511628211)
    for s in range(L):
        for k in range(4):
            key = (key ^ np.uint64(done[s, k] + 1)) * prime
        if s + 1 < L:
            for m in range(done[s + 1, F], done[s, F]):
                later_s = max(end_s[s, 0, m], free_s[homes[s + 1]])
                key = (key ^ np.uint64(np.int64(later_s * 64) + 7)) * prime
        if s > 0:
            for m in range(done[s - 1, B], done[s, B]):
                later_s = max(end_s[s, 1, m], free_s[homes[s - 1]])
                key = (key ^ np.uint64(np.int64(later_s * 64) + 11)) * prime
    for d in range(len(free_s)):
        key = (key ^ np.uint64(np.int64(free_s[d] * 64) + 13)) * prime
        key = (key ^ np.uint64(last_w[d] + 2)) * prime
    key ^= key >> np.uint64(29)
    place = np.int64(key % np.uint64(_SEEN))
    if seen[place] == key:
        return False
    seen[place] = key
    return True


@numba.njit
def _search(seconds, homes, M, splits_first, below_s, nodes, state, seen):
    L = len(homes)
    done, end_s, free_s, last_w = state
    if nodes[0] <= 0:
        return below_s
    nodes[0] -= 1
    if _at_least_s(seconds, homes, M, splits_first, state) >= below_s:
        return below_s
    if not _is_new(homes, M, state, seen):
        return below_s
    first_end_s, device = np.inf, -1
    for s in range(L):
        for kind in range(4):
            start_s = _start_s(state, homes, M, s, kind)
            allowed = start_s < np.inf and _allowed(seconds[s], splits_first or s > 0, kind)
            if allowed and start_s + seconds[s, kind] < first_end_s:
                first_end_s, device = start_s + seconds[s, kind], homes[s]
    if device < 0:
        return min(below_s, free_s.max())
    for kind in (I, B, F, W):
        for s in range(L - 1, -1, -1):
            if homes[s] != device or not _allowed(seconds[s], splits_first or s > 0, kind):
                continue
            start_s = _start_s(state, homes, M, s, kind)
            if start_s >= first_end_s or (kind == W and last_w[device] > s):
                continue
            m = done[s, F] if kind == F else done[s, B]
            before_s, before_w = free_s[device], last_w[device]
            free_s[device] = start_s + seconds[s, kind]
            last_w[device] = s if kind == W else -1
            done[s, kind] += 1
            if kind == I:
                done[s, B] += 1
            if kind != W:
                end_s[s, int(kind != F), m] = free_s[device]
            below_s = _search(seconds, homes, M, splits_first, below_s, nodes, state, seen)
            done[s, kind] -= 1
            if kind == I:
                done[s, B] -= 1
            free_s[device], last_w[device] = before_s, before_w
    return below_s
