import os

from experiments.json_output import this_run


def test_where_nothing_tells_which_cpus_are_those_of_a_process(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    run = this_run("train", {"size": "tiny"})
    assert run["cpus_of_a_process"] == run["num_cpus"] == 7
