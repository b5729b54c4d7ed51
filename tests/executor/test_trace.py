"""Kernels of a GPU, cut into instructions: made up here, and as JAX's profiler writes them."""

import jax
import pytest

from jaxptis.executor.trace import Kernel, Launch, happenings_of, kernels_of

# By program: the name of its module, and how many kernels it has.
PROGRAMS = {
    0: ("jit_zeros", 2),
    1: ("jit_forward", 3),
    2: ("jit_forward", 1),
    3: ("jit_backward", 2),
}
ORDER = (0, 1, 2, 2, 3, 1, 2, 2, 3)


def launches(order=ORDER):
    return [Launch(2 * k, PROGRAMS[p][0], 70 + p) for k, p in enumerate(order)]


def kernels(order=ORDER):
    """Kernels of half a second, each a second after the other."""
    programs = [p for p in order for _ in range(PROGRAMS[p][1])]
    return [Kernel(k, k + 0.5, PROGRAMS[p][0], 900 - p) for k, p in enumerate(programs)]


def test_an_instruction_is_from_its_first_kernel_to_its_last():
    found = happenings_of(5, launches(), kernels())
    sizes = [PROGRAMS[p][1] for p in ORDER]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    assert [each.device for each in found] == [5] * len(ORDER)
    assert [each.position for each in found] == [2 * k for k in range(len(ORDER))]
    assert [each.start_s for each in found] == starts
    assert [each.end_s for each in found] == [
        start + size - 0.5 for start, size in zip(starts, sizes, strict=True)
    ]


def test_an_instruction_without_kernels_takes_no_time():
    order = [*launches(), Launch(99, "jit_results", 80)]
    *_, last, nothing = happenings_of(0, order, kernels())
    assert nothing.start_s == nothing.end_s == last.end_s
    assert nothing.position == 99


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (ORDER[:-1], "after the last"),
        ((0, 1, 2, 2, 3, 2, 1, 2, 3), "another program does"),
        ((0, 1, 1, 2, 2, 3, 1, 2, 2, 3), "2 runs of jit_forward have 3 kernels"),
        ((*ORDER, 0), "should run"),
    ],
)
def test_a_trace_of_other_instructions_is_refused(order, message):
    with pytest.raises(ValueError, match=message):
        happenings_of(1, launches(order), kernels())


def test_no_kernels_are_refused():
    with pytest.raises(ValueError, match="CUPTI"):
        happenings_of(0, launches(), [])


def test_kernels_are_read_of_every_gpu_and_stream_in_order():
    def event(line, start_ns, program):
        return f"""
            events {{ metadata_id: 1 offset_ps: {start_ns * 1000} duration_ps: 7000
              stats {{ metadata_id: 1 str_value: "{PROGRAMS[program][0]}" }}
              stats {{ metadata_id: 2 int64_value: {program} }} }}"""

    def plane(name, *lines):
        text = "".join(f'lines {{ name: "{k}" {events} }}' for k, events in enumerate(lines))
        return f"""planes {{ name: "{name}" {text}
            event_metadata {{ key: 1 value {{ id: 1 name: "fusion" }} }}
            stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_module" }} }}
            stat_metadata {{ key: 2 value {{ id: 2 name: "program_id" }} }} }}"""

    text = "\n".join(
        [
            plane("/device:GPU:0", event(0, 30, 1) + event(0, 10, 0), event(1, 20, 3)),
            plane("/device:GPU:1", event(0, 5, 2)),
            plane("/host:CPU", event(0, 0, 2)),
        ]
    )
    raw = jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    found = kernels_of(jax.profiler.ProfileData.from_serialized_xspace(raw))
    assert {gpu: [k.program for k in each] for gpu, each in found.items()} == {0: [0, 3, 1], 1: [2]}
    (last,) = found[1]
    assert last.module == "jit_forward"
    assert (last.start_s, last.end_s) == pytest.approx((5e-9, 12e-9))
