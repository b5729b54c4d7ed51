"""Instruction lists: how they are written, and what is proven of them before anything runs."""

from random import Random

import pytest

from jaxptis.executor.instructions import Rows, Run, Transfer
from jaxptis.executor.prove import in_one_order, prove
from jaxptis.plan import Task


def freed(rows, held=None):
    return rows.free(held or [set() for _ in rows.rows])


def test_transfer_waits_for_both_ends():
    rows = Rows(2)
    rows.run(1, "late", [], ["y"])
    rows.run(0, "make", ["a"], ["x"])
    rows.transfer(0, 1, "x")
    rows.run(1, "use", ["x", "y"], ["z"])
    assert [[(d, str(each)) for d, each in step.ends] for step in in_one_order(rows)] == [
        [(0, "make(a) -> x")],
        [(1, "late() -> y")],
        [(0, "send x to device 1"), (1, "receive x from device 0")],
        [(1, "use(x, y) -> z")],
    ]


def test_no_instructions():
    assert in_one_order(Rows(3)) == ()


def test_text():
    rows = Rows(2)
    rows.run(0, "stage0.forward", ["param0", "batch0"], ["x0.0"], Task(0, "F", 0))
    rows.transfer(0, 1, "x0.0")
    rows.transfer(1, 0, "d3.stage1.0")
    assert freed(rows, [{"param0"}, set()]).text() == (
        "device 0\n"
        "  stage0.forward(param0, batch0) -> x0.0  (frees batch0)\n"
        "  send x0.0 to device 1 & receive d3.stage1.0 from device 1"
        "  (frees x0.0, d3.stage1.0)\n"
        "\n"
        "device 1\n"
        "  send d3.stage1.0 to device 0 & receive x0.0 from device 0"
        "  (frees d3.stage1.0, x0.0)\n"
    )


def transfers(rows):
    return [[str(each) for each in row if isinstance(each, Transfer)] for row in rows.rows]


def test_transfers_that_follow_each_other_at_both_ends_are_one():
    rows = Rows(3)
    rows.transfer(0, 1, "a")
    rows.transfer(1, 0, "b")
    rows.transfer(0, 1, "c")
    both = "send a to device 1 & send c to device 1 & receive b from device 1"
    assert transfers(rows)[0] == [both]
    assert len(rows.rows[1]) == 1
    # Something between them, at either end, keeps them apart.
    rows.run(1, "f", [], [])
    rows.transfer(0, 1, "d")
    assert [len(row) for row in rows.rows] == [2, 3, 0]
    rows.transfer(0, 2, "d")
    rows.transfer(0, 1, "e")
    assert [len(row) for row in rows.rows] == [4, 4, 1]


def send(buffer, to):
    return Transfer(peer=to, sends=(buffer,), receives=())


def receive(buffer, source):
    return Transfer(peer=source, sends=(), receives=(buffer,))


@pytest.mark.parametrize(
    ("lists", "complaint"),
    [
        pytest.param(
            [[send("a", 1), receive("b", 1)], [send("b", 0), receive("a", 0)]],
            "deadlock, the transfers wait for each other: device 0 waits to send a to device 1; "
            "device 1 waits to send b to device 0",
            id="both send first",
        ),
        pytest.param(
            [[receive("b", 1), send("a", 1)], [receive("a", 0), send("b", 0)]],
            "deadlock, .* device 0 waits to receive b from device 1; "
            "device 1 waits to receive a from device 0",
            id="both receive first",
        ),
        pytest.param(
            [[send("a", 1), send("b", 1)], [receive("b", 0), receive("a", 0)]],
            "deadlock, .* device 0 waits to send a to device 1; "
            "device 1 waits to receive b from device 0",
            id="in another order",
        ),
        pytest.param(
            [
                [send("a", 1), receive("c", 2)],
                [send("b", 2), receive("a", 0)],
                [send("c", 0), receive("b", 1)],
            ],
            "deadlock, .* device 0 waits .*; device 1 waits .*; device 2 waits to send c .*$",
            id="a circle of three",
        ),
        pytest.param(
            [[send("x", 1)], [send("b", 2), receive("x", 0)], [send("c", 1), receive("b", 1)]],
            "deadlock, .* other: device 1 waits to send b .*; device 2 waits to send c .* 1$",
            id="one who waits for a circle",
        ),
        pytest.param(
            [[send("a", 1)], []],
            "device 0 waits forever to send a to device 1: device 1 has no such transfer left",
            id="nobody receives",
        ),
        pytest.param(
            [[], [receive("a", 0)]],
            "device 1 waits forever to receive a from device 0: device 0 has no such",
            id="nobody sends",
        ),
    ],
)
def test_lists_that_wait_forever(lists, complaint):
    rows = Rows(len(lists))
    rows.run(0, "before", [], ["a"])
    for device, instructions in enumerate(lists):
        rows.rows[device].extend(instructions)
    with pytest.raises(ValueError, match=f"^{complaint}"):
        in_one_order(rows)


def frees(rows, held=None):
    return [each.frees for row in freed(rows, held).rows for each in row]


def test_freed_after_the_last_read():
    rows = Rows(1)
    rows.run(0, "f", [], ["x"])
    rows.run(0, "g", ["x"], ["y"])
    rows.run(0, "h", ["x", "y"], ["z"])
    assert frees(rows) == [(), (), ("x", "y", "z")]
    assert frees(rows, held=[{"z", "x"}]) == [(), (), ("y",)]


def test_what_nobody_reads_is_freed_at_once():
    rows = Rows(2)
    rows.run(0, "f", ["input"], ["x", "unread"])
    rows.run(0, "g", ["x"], [])
    rows.transfer(1, 0, "y")
    assert frees(rows) == [("input", "unread"), ("x",), ("y",), ("y",)]


def test_a_sum_lives_as_long_as_it_grows():
    rows = Rows(1)
    rows.run(0, "zeros", [], ["sum"])
    rows.run(0, "add", ["x0", "sum"], ["sum"])
    rows.run(0, "add", ["x1", "sum"], ["sum"])
    rows.run(0, "use", ["sum"], [])
    (row,) = freed(rows).rows
    assert [each.frees for each in row] == [(), ("x0",), ("x1",), ("sum",)]
    # Its old value is consumed by each addition: the new one may take its memory.
    assert [each.consumes for each in row] == [(), ("x0", "sum"), ("x1", "sum"), ("sum",)]


def test_a_value_written_again_without_a_read_is_consumed_by_its_last_reader():
    rows = Rows(1)
    for _ in range(2):
        rows.run(0, "f", [], ["x"])
        rows.run(0, "g", ["x"], [])
    assert frees(rows) == [(), ("x",), (), ("x",)]


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
    assert frees(rows) == [(), (), ("x",), (), ("x",)]
    rows = Rows(2)
    rows.run(0, "f", [], ["x"])
    rows.transfer(0, 1, "x")
    rows.run(1, "g", ["x"], [])
    assert frees(rows) == [(), ("x",), (), ("x",)]


SIZES = {"x": 8, "y": 4, "z": 2, "sum": 16, "input": 32}


def proven(rows, *, given=(), held=(), **more):
    """Prove the list of one device."""
    accounts = prove(rows, given=[set(given)], held=[set(held)], nbytes=SIZES, **more)
    return tuple(each.peak_bytes for each in accounts)


def test_peak_of_live_bytes():
    rows = Rows(1)
    rows.run(0, "f", ["input"], ["x", "sum"])
    rows.run(0, "g", ["x", "sum"], ["y", "sum"])
    rows.run(0, "h", ["y"], ["z"])
    rows = freed(rows, [{"sum"}])
    assert proven(rows, given=["input"], held=["sum"]) == (32 + 8 + 16,)
    kept = {"sum", "input"}
    assert proven(freed(rows, [kept]), given=["input"], held=kept) == (32 + 8 + 16 + 4,)
    # A result that takes the memory of an input needs none of its own.
    reused = proven(freed(rows, [kept]), given=["input"], held=kept, donated={"g": (0,)})
    assert reused == (32 + 8 + 16,)


def complaint_of(rows, **kwargs):
    with pytest.raises(ValueError) as caught:
        proven(rows, **kwargs)
    return str(caught.value)


def run(program, reads, writes, frees=(), task=None):
    return Run(program=program, reads=reads, writes=writes, frees=frees, task=task)


def rows_of(*instructions):
    rows = Rows(1)
    rows.rows[0] = list(instructions)
    return rows


def test_faults_are_named():
    made = run("f", (), ("x",))
    assert complaint_of(rows_of(run("g", ("x",), ()))) == (
        "device 0 at 'g(x) -> ': x is read, but was never made"
    )
    used = run("g", ("x",), (), ("x",))
    assert complaint_of(rows_of(made, used, used)) == (
        "device 0 at 'g(x) -> ': x is read, but was freed before"
    )
    assert complaint_of(rows_of(made, made)) == (
        "device 0 at 'f() -> x': x is written while it is still in use"
    )
    twice = run("g", ("x",), (), ("x", "x"))
    assert "x is freed, but is not there" in complaint_of(rows_of(made, twice))
    assert complaint_of(rows_of(made)) == "device 0 ends with x never freed"
    assert complaint_of(rows_of(), held=["y"]) == "device 0 ends with y missing"
    task = run("f", (), (), task=Task(0, "F", 0))
    assert complaint_of(rows_of(task, task)) == "device 0 runs 0F0 twice"


@pytest.mark.parametrize("seed", range(20))
def test_random_lists(seed):
    """Lists that were written in an order that works are proven, and their frees are right."""
    rng = Random(seed)
    num_devices = rng.randint(1, 4)
    rows = Rows(num_devices)
    has = [{f"input{d}"} for d in range(num_devices)]
    given = [set(buffers) for buffers in has]
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
    touched = [{n for each in row for n in (*each.reads, *each.writes)} for row in rows.rows]
    held = [{b for b in sorted(names) if rng.random() < 0.2} for names in touched]
    given = [names & seen for names, seen in zip(given, touched, strict=True)]
    sizes = {name: rng.randint(1, 9) for names in has for name in sorted(names)}
    lists = freed(rows, held)
    accounts = prove(lists, given=given, held=held, nbytes=sizes)
    peaks = tuple(each.peak_bytes for each in accounts)
    for device, row in enumerate(lists.rows):
        # By hand: a buffer lives from its first use to its last, or for ever.
        first = dict.fromkeys(given[device], 0)
        last = dict.fromkeys(held[device], len(row))
        for i, each in enumerate(row):
            for name in (*each.reads, *each.writes):
                first.setdefault(name, i)
                if name not in held[device]:
                    last[name] = i
        most = [
            sum(sizes[n] for n in first if first[n] <= i <= last[n]) for i in range(len(row) + 1)
        ]
        assert peaks[device] == max(most)
