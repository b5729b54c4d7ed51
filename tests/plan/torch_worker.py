"""One device of pipelines run by torch.distributed.pipelining; started by test_torch.py.

python torch_worker.py RANK NUM_RANKS FOLDER
"""

import copy
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

WIDTH = 3


def main(rank: int, num_ranks: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks
    )
    for path in sorted(folder.glob("*.csv")):
        check(path, rank)
    dist.destroy_process_group()


def check(path: Path, rank: int) -> None:
    """Run a schedule; its loss, and the gradients of this rank, are those of the plain model."""
    rows = path.read_text().splitlines()
    tasks = re.findall(r"(\d+)[FBIW](\d+)", " ".join(rows))
    num_stages = 1 + max(int(stage) for stage, _ in tasks)
    num_microbatches = 1 + max(int(microbatch) for _, microbatch in tasks)
    here = sorted({int(stage) for stage in re.findall(r"(\d+)[FBIW]", rows[rank])})

    torch.manual_seed(num_stages)
    plain = torch.nn.Sequential(*(make_layer() for _ in range(num_stages)))
    piped = copy.deepcopy(plain)
    x, y = torch.randn(2, 2 * num_microbatches, WIDTH)
    expected = torch.nn.functional.mse_loss(plain(x), y)
    expected.backward()

    stages = [PipelineStage(piped[stage], stage, num_stages, torch.device("cpu")) for stage in here]
    runtime = _PipelineScheduleRuntime(
        stages, num_microbatches, loss_fn=torch.nn.functional.mse_loss
    )
    runtime._load_csv(str(path))
    losses: list[torch.Tensor] = []
    is_last = num_stages - 1 in here
    runtime.step(*([x] if 0 in here else []), target=y if is_last else None, losses=losses)
    if is_last:
        torch.testing.assert_close(torch.stack(losses).mean(), expected)
    for stage in here:
        for ours, theirs in zip(piped[stage].parameters(), plain[stage].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    print(f"{path.stem}: {len(here)} stages equal", flush=True)


def make_layer() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
