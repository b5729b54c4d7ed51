import html
import json

import jax
import pytest

from experiments.stage_hlo import count
from tests.experiments.program import run_program

# The tiny LLaMA-2, with the layers embed, attention and mlp of each of four blocks, head.
WIDTH, MLP_WIDTH, NUM_LAYERS = 128, 352, 10
NUM_TOKENS = 16
MLP = 2  # the stage of the first mlp, if each layer is one


def inspect_hlo(*arguments):
    return run_program("inspect_hlo", *arguments)


def test_the_work_and_the_memory_of_a_stage(tmp_path):
    """Three matrices: their products in F, I and W, and the sums that W overwrites."""
    json_path, page_path, folder = (tmp_path / each for each in ("hlo.json", "hlo.html", "hlo"))
    run = inspect_hlo(
        f"--sequence_length={NUM_TOKENS}",
        f"--num_devices={NUM_LAYERS}",
        f"--num_microbatches={NUM_LAYERS}",
        "--strategy=zb-h1",
        f"--stage={MLP}",
        f"--json_output={json_path}",
        f"--html_output={page_path}",
        f"--output_dir={folder}",
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(json_path.read_text())
    assert results["settings"]["stage"] == [MLP] and results["jax"] == jax.__version__
    programs = {each["kind"]: each for each in results["programs"]}
    assert list(programs) == ["F", "I", "W"]
    matrices = 3 * WIDTH * MLP_WIDTH
    for each in programs.values():
        assert each["layers"] == ["layers_0/mlp"]
        assert each["product_flops"] == 2 * NUM_TOKENS * matrices
        assert each["product_flops"] < each["flops"] < 1.1 * each["product_flops"]
        assert (each["collectives"], each["num_open_loops"]) == ({}, 0)
        assert len(each["costliest"]) == 10
        times_s = [op["roofline_s"] for op in each["costliest"]]
        assert times_s == sorted(times_s, reverse=True)
        assert sum(op["share"] for op in each["costliest"]) <= 1 + 1e-9
    params_bytes = 4 * (matrices + WIDTH)  # and the scale of the norm
    stream_bytes = 4 * NUM_TOKENS * WIDTH
    assert programs["F"]["argument_bytes"] == params_bytes + stream_bytes
    assert programs["F"]["overwritten_bytes"] == 0
    assert programs["W"]["overwritten_bytes"] == params_bytes
    assert "stage02.weight_grad: layers_0/mlp" in run.stdout
    assert sorted(path.name for path in folder.iterdir()) == [
        f"stage02.{kind}.{form}.txt"
        for kind in ("forward", "input_grad", "weight_grad")
        for form in ("hlo", "stablehlo")
    ]
    page = page_path.read_text()
    assert "script" not in page and page.count("<pre>") == 6
    for path in folder.iterdir():
        text = path.read_text()
        assert f"tensor<1x{NUM_TOKENS}x{WIDTH}xf32>" in text or text.startswith("HloModule jit_")
        assert f"<pre>{html.escape(text)}</pre>" in page
        assert text not in page


def test_flops_are_written_with_a_prefix():
    written = [count(flops) for flops in (0, 12, 1000, 999_700, 49_490_148, 1.25e12, 7.2e15)]
    assert written == ["0", "12", "1 k", "1 M", "49.5 M", "1.25 T", "7.2 P"]


def test_equal_stages_are_compiled_once(tmp_path):
    path = tmp_path / "hlo.json"
    run = inspect_hlo("--sequence_length=16", "--kind=F", f"--json_output={path}")
    assert run.returncode == 0, run.stderr
    programs = json.loads(path.read_text())["programs"]
    assert [each["stage"] for each in programs] == [0, 1, 2, 3]
    assert [each["same_as"] for each in programs] == [None, None, "stage01.forward", None]
    assert programs[2]["layers"] == ["layers_2/attention", "layers_2/mlp"]
    assert programs[2]["product_flops"] == programs[1]["product_flops"]
    assert "stage02.forward:" not in run.stdout and "stage01.forward:" in run.stdout


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--stage=4", "--stage=4, but there are 4 stages, counted from 0"),
        ("--kind=W", "no tasks of kind W, only of F, B; change --kind or --strategy"),
        ("--kind=X", "value should be one of <F|B|I|W>"),
        ("--size=56B", "the model has no such size"),
        ("--output_dir=/no/such/folder", "the folder around it does not exist"),
        ("--html_output=/no/such/page.html", "its folder does not exist"),
        ("--html_output=page.txt", "let it end in .html"),
        ("--strategy=zbv", "did you mean 'zb-v'?"),
        ("tiny", "belong to no flag"),
    ],
)
def test_a_bad_flag_is_named(flag, complaint):
    run = inspect_hlo("--sequence_length=8", flag)
    assert run.returncode != 0
    assert complaint in run.stderr + run.stdout
    assert "Traceback" not in run.stderr
