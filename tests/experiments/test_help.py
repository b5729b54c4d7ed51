from xml.etree import ElementTree

import pytest

from tests.experiments.program import run_program


@pytest.mark.parametrize(
    "program",
    [
        *("compare", "gains", "inspect_hlo", "measure_layers", "overhead", "plan", "plan_tables"),
        *("plan_times", "show_plan", "slowed", "split_cost", "train", "uneven_devices"),
    ],
)
def test_help_lists_the_flags_of_shared_files_too(program):
    """It lists those that are key, of which absl tells in XML."""
    run = run_program(program, "--helpxml")
    shared = {
        flag.findtext("name"): flag.findtext("key")
        for flag in ElementTree.fromstring(run.stdout).iter("flag")
        if str(flag.findtext("file")).startswith("experiments.")
    }
    assert shared and set(shared.values()) == {"yes"}, shared
