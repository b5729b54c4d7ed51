"""What came of a training run, for a person to read."""

import dataclasses
import statistics

from rich.console import Console
from rich.table import Table

import jaxptis
from experiments.corpus import Corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """The training loss and the seconds of every step, and (step, loss) of every evaluation.

    Losses are of the next token, in nats.
    """

    losses: tuple[float, ...]
    eval_losses: tuple[tuple[int, float], ...]
    step_s: tuple[float, ...]


def report(trainer: jaxptis.Trainer, history: History, corpus: Corpus, console: Console) -> None:
    """Prints the losses, the time of a step, the plan, and each device's share of the work."""
    evaluated = history.eval_losses[-1][1]
    console.print(
        f"\ntraining loss {history.losses[-1]:.3f} nats a token",
        f"evaluation loss {evaluated:.3f} nats a token, "
        f"{evaluated / corpus.bytes_per_token:.3f} a byte",
        f"step {statistics.median(history.step_s) * 1e3:.1f} ms (median)",
        f"\n{trainer.plan}",
        sep="\n",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    busy_s = trainer.timeline.busy_s
    shares = Table("device", "layers", "first", "last", "share of the predicted work", box=None)
    for device, seconds in enumerate(busy_s):
        layers = [n for s in trainer.plan.stages if s.device == device for n in s.layers]
        share = f"{seconds / sum(busy_s):.1%}"
        shares.add_row(str(device), str(len(layers)), layers[0], layers[-1], share)
    console.print(shares)
