import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_the_example_runs_and_learns():
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    command = [sys.executable, "-c", example]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"^\d+ ([\d.]+)$", run.stdout, re.MULTILINE)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2
