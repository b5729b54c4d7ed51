"""The moves of the three phases of AdaPtis: each a text for people, and the draft that it makes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxptis.optimizer.papers.draft import Draft
from jaxptis.optimizer.partition.balance import balance
from jaxptis.optimizer.steps.list_kernel import DEEPEST, OLDEST, SHALLOWEST
from jaxptis.schedules.placements import loops

_ORDERS = {OLDEST: "oldest microbatch", DEEPEST: "last stage", SHALLOWEST: "first stage"}
_PATIENCES = 0.0, 0.25, 0.5, 0.75


class Move(NamedTuple):
    """What changes, and the draft after it."""

    text: str
    draft: Draft


def move_layers(draft: Draft, busiest: int, idlest: int) -> Iterator[Move]:
    """Partition: a layer goes from the device of the smallest bubble to that of the largest.

    Each stage between the two takes a layer in and hands one on, so it keeps as many.
    """
    for giver in draft.stages_of(busiest):
        if draft.edges[giver + 1] - draft.edges[giver] == 1:
            continue
        for taker in draft.stages_of(idlest):
            edges = list(draft.edges)
            shifted = range(giver + 1, taker + 1) or range(taker + 1, giver + 1)
            for edge in shifted:
                edges[edge] += 1 if taker < giver else -1
            yield Move(
                f"a layer from stage {giver} on device {busiest} to stage {taker} on device "
                f"{idlest}",
                draft._replace(edges=tuple(edges)),
            )


def move_stages(
    draft: Draft, busiest: int, idlest: int, layers_s: Sequence[float]
) -> Iterator[Move]:
    """Placement: two stages change places, or stages become more and smaller ones.

    All of them do, in so many loops over the devices, of about equal seconds; or one is cut in two,
    of which the device of the largest bubble takes one.
    """
    num_devices = max(draft.homes) + 1
    for num_loops in range(1, len(layers_s) // num_devices + 1):
        edges = balance(layers_s, num_loops * num_devices)
        yield Move(
            f"{num_loops} stages on each device" if num_loops > 1 else "a stage on each device",
            draft.placed(edges, loops(num_devices, num_loops)),
        )
    for one in draft.stages_of(busiest):
        for other in draft.stages_of(idlest):
            homes = list(draft.homes)
            homes[one], homes[other] = idlest, busiest
            yield Move(
                f"stage {one} on device {busiest} and stage {other} on device {idlest} change "
                "places",
                draft.placed(draft.edges, homes),
            )
    for stage in draft.stages_of(busiest):
        before, after = draft.homes[:stage], draft.homes[stage + 1 :]
        for cut in range(draft.edges[stage] + 1, draft.edges[stage + 1]):
            edges = (*draft.edges[: stage + 1], cut, *draft.edges[stage + 1 :])
            for half, both in ("first", (idlest, busiest)), ("second", (busiest, idlest)):
                yield Move(
                    f"stage {stage} on device {busiest} is cut before layer {cut}, and device "
                    f"{idlest} takes the {half} part",
                    draft.placed(edges, (*before, *both, *after)),
                )


def change_order(draft: Draft) -> Iterator[Move]:
    """Schedule: one thing changes of the rule by which a free device takes its next task."""
    rule = draft.rule
    first = "backwards first" if rule.alternate else "forward and backward in turn"
    yield Move(first, draft._replace(rule=rule._replace(alternate=not rule.alternate)))
    for order, text in _ORDERS.items():
        if order != rule.forward_order:
            changed = rule._replace(forward_order=order)
            yield Move(f"of forwards the {text}'s first", draft._replace(rule=changed))
        if order != rule.backward_order:
            changed = rule._replace(backward_order=order)
            yield Move(f"of backwards the {text}'s first", draft._replace(rule=changed))
    for patience in _PATIENCES:
        if patience != rule.patience:
            yield Move(
                f"a weight gradient waits if more arrives within {patience} of it",
                draft._replace(rule=rule._replace(patience=patience)),
            )
    if draft.more_ahead is None:
        yield Move("no more forwards ahead than in 1F1B", draft._replace(more_ahead=0))
    else:
        yield Move("as many forwards ahead as fit", draft._replace(more_ahead=None))
        for more, text in (1, "one more forward ahead"), (-1, "one forward fewer ahead"):
            yield Move(text, draft._replace(more_ahead=draft.more_ahead + more))
    parts = "split" if draft.whole else "whole"
    yield Move(f"{parts} backwards", draft._replace(whole=not draft.whole))
