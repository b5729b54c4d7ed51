from random import Random

import pytest

from jaxptis.executor.instructions import Receive, Rows, Run, Send, in_one_order
from jaxptis.plan import Task


def order(rows, held=None):
    return in_one_order(rows, held or [()] * len(rows.rows))


def test_transfer_waits_for_both_ends():
    rows = Rows(2)
    rows.run(1, "late", [], ["y"])
    rows.run(0, "make", ["a"], ["x"])
    rows.transfer(0, 1, "x")
    rows.run(1, "use", ["x", "y"], ["z"])
    steps = order(rows)
    assert [(s.device, str(s.instruction)) for s in steps] == [
        (0, "make(a) -> x"),
        (1, "late() -> y"),
        (0, "send x to device 1"),
        (1, "use(x, y) -> z"),
    ]


def test_no_instructions():
    assert order(Rows(3)) == ()


def test_text():
    rows = Rows(2)
    rows.run(0, "stage0.forward", ["param0", "batch0"], ["x0.0"], Task(0, "F", 0))
    rows.transfer(0, 1, "x0.0")
    assert rows.text() == (
        "device 0\n"
        "  stage0.forward(param0, batch0) -> x0.0\n"
        "  send x0.0 to device 1\n"
        "\n"
        "device 1\n"
        "  receive x0.0 from device 0\n"
    )


@pytest.mark.parametrize(
    ("lists", "complaint"),
    [
        pytest.param(
            [
                [Send(buffer="a", target=1), Receive(buffer="b", source=1)],
                [Send(buffer="b", target=0), Receive(buffer="a", source=0)],
            ],
            "device 0 at send a to device 1; device 1 at send b to device 0",
            id="both send first",
        ),
        pytest.param(
            [
                [Receive(buffer="b", source=1), Send(buffer="a", target=1)],
                [Receive(buffer="a", source=0), Send(buffer="b", target=0)],
            ],
            "device 0 at receive b from device 1; device 1 at receive a from device 0",
            id="both receive first",
        ),
        pytest.param(
            [
                [Send(buffer="a", target=1), Send(buffer="b", target=1)],
                [Receive(buffer="b", source=0), Receive(buffer="a", source=0)],
            ],
            "device 0 at send a to device 1; device 1 at receive b from device 0",
            id="in another order",
        ),
        pytest.param(
            [
                [Send(buffer="a", target=1), Receive(buffer="c", source=2)],
                [Send(buffer="b", target=2), Receive(buffer="a", source=0)],
                [Send(buffer="c", target=0), Receive(buffer="b", source=1)],
            ],
            "device 0 at send a .*; device 1 at send b .*; device 2 at send c to device 0",
            id="a circle of three",
        ),
        pytest.param(
            [[Send(buffer="a", target=1)], []],
            "device 0 at send a to device 1$",
            id="nobody receives",
        ),
        pytest.param(
            [[], [Receive(buffer="a", source=0)]],
            "device 1 at receive a from device 0$",
            id="nobody sends",
        ),
    ],
)
def test_crossing_transfers(lists, complaint):
    rows = Rows(len(lists))
    rows.run(0, "before", [], ["a"])
    for device, instructions in enumerate(lists):
        rows.rows[device].extend(instructions)
    with pytest.raises(ValueError, match=f"^the transfers wait for each other: {complaint}"):
        order(rows)


def frees(rows, held=None):
    return [step.frees for step in order(rows, held)]


def test_freed_after_the_last_read():
    rows = Rows(1)
    rows.run(0, "f", [], ["x"])
    rows.run(0, "g", ["x"], ["y"])
    rows.run(0, "h", ["x", "y"], ["z"])
    assert frees(rows) == [(), (), ("x", "y", "z")]
    assert frees(rows, held=[("z", "x")]) == [(), (), ("y",)]


def test_what_nobody_reads_is_freed_at_once():
    rows = Rows(1)
    rows.run(0, "f", ["input"], ["x", "unread"])
    rows.run(0, "g", ["x"], [])
    assert frees(rows) == [("input", "unread"), ("x",)]


def test_a_sum_lives_as_long_as_it_grows():
    rows = Rows(1)
    rows.run(0, "zeros", [], ["sum"])
    rows.run(0, "add", ["x0", "sum"], ["sum"])
    rows.run(0, "add", ["x1", "sum"], ["sum"])
    rows.run(0, "use", ["sum"], [])
    steps = order(rows)
    assert [step.frees for step in steps] == [(), ("x0",), ("x1",), ("sum",)]
    # Its old value is consumed by each addition: the new one may take its memory.
    assert [step.consumes for step in steps] == [(), ("x0", "sum"), ("x1", "sum"), ("sum",)]


def test_a_value_written_again_without_a_read_is_consumed_by_its_last_reader():
    rows = Rows(1)
    rows.run(0, "f", [], ["x"])
    rows.run(0, "g", ["x"], [])
    rows.run(0, "f", [], ["x"])
    rows.run(0, "g", ["x"], [])
    steps = order(rows)
    assert [step.frees for step in steps] == [(), ("x",), (), ("x",)]
    assert [step.consumes for step in steps] == [(), ("x",), (), ("x",)]


def test_a_buffer_read_twice_at_once_is_freed_once():
    rows = Rows(1)
    rows.run(0, "f", ["x", "x"], [])
    assert frees(rows) == [("x",)]


def test_each_device_frees_its_own_copy():
    rows = Rows(2)
    rows.run(0, "f", [], ["x"])
    rows.transfer(0, 1, "x")
    rows.run(0, "g", ["x"], [])
    rows.run(1, "g", ["x"], [])
    freed = [(s.device, str(s.instruction), s.frees) for s in order(rows)]
    assert (0, "send x to device 1", ()) in freed
    assert (0, "g(x) -> ", ("x",)) in freed and (1, "g(x) -> ", ("x",)) in freed
    rows = Rows(2)
    rows.run(0, "f", [], ["x"])
    rows.transfer(0, 1, "x")
    rows.run(1, "g", ["x"], [])
    freed = [(s.device, str(s.instruction), s.frees) for s in order(rows)]
    assert (0, "send x to device 1", ("x",)) in freed


@pytest.mark.parametrize("seed", range(20))
def test_random_lists(seed):
    """Carried out step by step, every read finds its value, and in the end only `held` is left."""
    rng = Random(seed)
    num_devices = rng.randint(1, 4)
    rows = Rows(num_devices)
    has = [{f"input{d}"} for d in range(num_devices)]
    for n in range(40):
        device = rng.randrange(num_devices)
        if rng.random() < 0.4 and num_devices > 1:
            buffer = rng.choice(sorted(has[device]))
            target = rng.choice([d for d in range(num_devices) if d != device])
            if buffer not in has[target]:
                rows.transfer(device, target, buffer)
                has[target].add(buffer)
        else:
            reads = rng.choices(sorted(has[device]), k=rng.randint(0, 3))
            writes = list(dict.fromkeys([f"made{n}", *reads][: rng.randint(0, 3)]))
            rows.run(device, f"program{n}", reads, writes)
            has[device].update(writes)
    for device, row in enumerate(rows.rows):
        received = [each.buffer for each in row if isinstance(each, Receive)]
        rows.run(device, "end", received, [])
    held = [{b for b in sorted(buffers) if rng.random() < 0.2} for buffers in has]
    last_touch = {
        (device, buffer): i
        for device, row in enumerate(rows.rows)
        for i, each in enumerate(row)
        for buffer in (*each.reads, *each.writes)
    }
    live = [{f"input{d}"} for d in range(num_devices)]
    done = [0] * num_devices
    for step in in_one_order(rows, held):
        d, instruction = step.device, step.instruction
        assert rows.rows[d][done[d]] == instruction
        assert live[d].issuperset(instruction.reads)
        if isinstance(instruction, Run):
            live[d].update(instruction.writes)
        else:
            target, buffer = instruction.target, instruction.buffer
            assert rows.rows[target][done[target]] == Receive(buffer=buffer, source=d)
            live[target].add(buffer)
            done[target] += 1
        assert all(last_touch[d, buffer] == done[d] for buffer in step.frees)
        live[d].difference_update(step.frees)
        done[d] += 1
    assert done == [len(row) for row in rows.rows]
    for d in range(num_devices):
        assert all(b in held[d] or (d, b) not in last_touch for b in live[d])
        assert live[d] >= {b for b in held[d] if (d, b) in last_touch}
