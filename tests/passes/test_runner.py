import dataclasses

import pytest

from passes.runner import Dump, run


@dataclasses.dataclass(frozen=True)
class Number:
    value: int

    def check(self):
        assert self.value < 10, f"{self.value} is too large"

    def text(self):
        return f"{self.value}\n"


def double(number):
    return Number(2 * number.value)


def increment(number):
    return Number(number.value + 1)


def refuse(number):
    raise ValueError("not this one")


def listing(directory):
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_passes_run_in_order():
    assert run(Number(3), (double, increment), Dump(None)) == Number(7)
    assert run(Number(3), (increment, double), Dump(None)) == Number(8)
    assert run(Number(3), (), Dump(None)) == Number(3)


def test_each_pass_writes_a_numbered_file(tmp_path):
    dump = Dump(str(tmp_path / "new" / "folder"))
    dump.step("traced", "text\n")
    run(Number(1), (increment, double), dump)
    dump.step("plan", "a plan\n")
    dump.file("stage0.forward.hlo", "a program\n")
    assert listing(tmp_path / "new" / "folder") == {
        "00.traced.txt": "text\n",
        "01.increment.txt": "2\n",
        "02.double.txt": "4\n",
        "03.plan.txt": "a plan\n",
        "stage0.forward.hlo.txt": "a program\n",
    }
    assert dump.enabled


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dump = Dump(None)
    run(Number(1), (increment, double), dump)
    dump.file("plan", "a plan\n")
    assert not dump.enabled
    assert not listing(tmp_path)


@pytest.mark.parametrize(
    ("a_pass", "error", "message"),
    [(refuse, ValueError, "not this one"), (double, AssertionError, "14 is too large")],
)
def test_a_failure_names_the_pass(a_pass, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        run(Number(6), (increment, a_pass, increment), Dump(str(tmp_path)))
    assert caught.value.__notes__ == [f"in the pass {a_pass.__name__}"]
    # What the passes before it made is there to look at.
    assert listing(tmp_path) == {"00.increment.txt": "7\n"}
