"""Trains a model, as a pipeline, on the source of Python's standard library.

python -m experiments.train --model=llama2 --size=tiny --num_devices=4 --strategy=1f1b
python -m experiments.train --load=llama-2-7b --tokenizer=llama-2-7b/tokenizer.json --save=trained
python -m experiments.launch --num_processes=4 -- experiments.train --num_devices=4  # one each
"""

import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags, logging
from rich.console import Console
from rich.progress import Progress

import jaxptis
from experiments import distributed
from experiments.chosen_model import MODEL, SIZE
from experiments.chosen_pipeline import NUM_DEVICES, NUM_MICROBATCHES
from experiments.corpus import Corpus, as_bytes, load_corpus, sample_batch, spread_batches
from experiments.json_output import JSON_OUTPUT, write_json
from experiments.refused import refused_plainly
from experiments.report import History, report
from experiments.tokenizer import read_tokenizer
from jaxptis.profile import ProfileError
from models import MODELS, Model
from models.load import load
from models.save import save

NUM_EVALUATIONS = 10
NUM_EVALUATION_BATCHES = 4
TOKENIZER_JSON = "tokenizer.json"

flags.adopt_module_key_flags(distributed)  # --help lists them
for flag in (MODEL, SIZE, NUM_DEVICES, NUM_MICROBATCHES, JSON_OUTPUT):
    flags.declare_key_flag(flag.name)
LOAD = flags.DEFINE_string(
    "load", None, "Folder of a Hugging Face checkpoint to go on from, in place of a model and size."
)
TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "A Hugging Face tokenizer.json; by default that of --load if it is there, or else every byte "
    "is a token.",
)
SAVE = flags.DEFINE_string(
    "save", None, "New folder for what comes of the model, as a Hugging Face checkpoint."
)
STRATEGY = flags.DEFINE_string(
    "strategy",
    "best",
    "best, which searches for a plan; a schedule such as 1f1b or zb-v; or the path of a plan file.",
)
ADAPT_EVERY = flags.DEFINE_integer(
    "adapt_every",
    None,
    "After so many steps each, take seven more on the last batch, measure their tasks, and go on "
    "in the order that is best for what they take.",
    lower_bound=1,
)
NUM_STEPS = flags.DEFINE_integer("num_steps", 200, "Steps to train for.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Sequences in a batch.", lower_bound=1)
SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", 128, "Tokens predicted in each sequence.", lower_bound=1
)
LEARNING_RATE = flags.DEFINE_float(
    "learning_rate",
    None,
    "Peak of warm-up and cosine decay; by default 3e-3, with --load 3e-5.",
    lower_bound=0.0,
)
SEED = flags.DEFINE_integer("seed", 0, "Of the parameters and the order of the data.")
DUMP_TO = flags.DEFINE_string("dump_to", None, "Folder for every step of the compilation, as text.")

SETTINGS = (
    MODEL,
    SIZE,
    LOAD,
    TOKENIZER,
    SAVE,
    NUM_DEVICES,
    NUM_MICROBATCHES,
    STRATEGY,
    ADAPT_EVERY,
    NUM_STEPS,
    BATCH_SIZE,
    SEQUENCE_LENGTH,
    LEARNING_RATE,
    SEED,
)


@flags.multi_flags_validator(
    ["load", "model", "size"], "the checkpoint of --load says which model; drop --model and --size"
)
def _says_it_once(values: dict[str, Any]) -> bool:
    return values["load"] is None or not (MODEL.present or SIZE.present)


@flags.multi_flags_validator(
    ["batch_size", "num_microbatches"],
    "num_microbatches does not divide batch_size; change one to make it a divisor",
)
def _divides(values: dict[str, Any]) -> bool:
    return values["batch_size"] % values["num_microbatches"] == 0


@flags.validator("save", "name a new folder, or an empty one, in a folder that exists")
def _is_free(folder: str | None) -> bool:
    if folder is None:
        return True
    path = pathlib.Path(folder).resolve()
    return path.parent.is_dir() and (
        not path.exists() or (path.is_dir() and not any(path.iterdir()))
    )


def main(argv: list[str]) -> None:
    """Trains, prints what came of it, and writes it to --json_output."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    with refused_plainly():
        devices = distributed.join(NUM_DEVICES.value)
        model, module, params = make_model()
        corpus = load_corpus(make_encode())
        check_vocabulary(corpus, module.config.vocab_size)
    pipeline = jaxptis.pipeline(
        num_microbatches=NUM_MICROBATCHES.value,
        devices=devices,
        strategy=STRATEGY.value,
        has_aux=True,
        dump_to=DUMP_TO.value,
    )
    learning_rate = LEARNING_RATE.value
    if learning_rate is None:
        learning_rate = 3e-3 if LOAD.value is None else 3e-5
    optimizer = make_optimizer(learning_rate, NUM_STEPS.value)
    trainer = pipeline(type(module))(module.config).trainer(
        loss=model.loss(module.config), optimizer=model.steer(optimizer)
    )
    first = jax.process_index() == 0  # which writes for all
    console = Console(quiet=not first)
    params, history = train(trainer, params, corpus, console)
    report(trainer, history, corpus, console)
    if SAVE.value is not None:
        save_with_tokenizer(SAVE.value, module, params)
    if first:
        write_json(to_json(trainer, history, corpus))


def make_model() -> tuple[Model, Any, Any]:
    """Returns the family, the module, and its parameters if it is loaded, or None."""
    if LOAD.value is not None:
        checkpoint = load(LOAD.value)
        return checkpoint.model, checkpoint.module, checkpoint.params
    model = MODELS[MODEL.value]
    return model, model.module(model.sizes[SIZE.value]), None


def make_encode() -> Callable[[Sequence[bytes]], np.ndarray]:
    """Returns what maps texts to tokens.

    Raises:
      ValueError: --load has a tokenizer in another form than is read.
    """
    if TOKENIZER.value is not None:
        return read_tokenizer(TOKENIZER.value)
    if LOAD.value is None:
        return as_bytes
    folder = pathlib.Path(LOAD.value)
    if (folder / TOKENIZER_JSON).exists():
        return read_tokenizer(folder / TOKENIZER_JSON)
    if others := sorted(path.name for path in folder.glob("tokenizer*")):
        raise ValueError(
            f"{folder} has {', '.join(others)}, but no {TOKENIZER_JSON}; write one with "
            "save_pretrained of transformers' AutoTokenizer, and name it as --tokenizer"
        )
    return as_bytes


def save_with_tokenizer(folder: str, module: Any, params: Any) -> None:
    """Writes a checkpoint like --load, but for a tokenizer of its own."""
    own = TOKENIZER.value
    if own is not None and LOAD.value is not None:
        beside = pathlib.Path(LOAD.value) / TOKENIZER_JSON
        own = None if beside.exists() and beside.samefile(own) else own
    save(folder, module, params, like=LOAD.value if own is None else None)
    if own is not None and jax.process_index() == 0:
        shutil.copy(own, pathlib.Path(folder) / TOKENIZER_JSON)


def check_vocabulary(corpus: Corpus, vocab_size: int) -> None:
    """Raises a ValueError if the model does not know some token of the corpus."""
    last = max(corpus.training.max(), corpus.evaluation.max())
    if last >= vocab_size:
        raise ValueError(
            f"the text has token {last}, but the model knows {vocab_size} tokens, from 0 on; give "
            "--tokenizer the tokenizer.json of the model"
        )


def make_optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """AdamW under a clipped gradient: a tenth of the steps to warm up, then a cosine to a tenth."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=max(1, num_steps // 10),
        decay_steps=max(2, num_steps),  # a single step is warm-up
        end_value=learning_rate / 10,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


def train(
    trainer: jaxptis.Trainer, params: Any, corpus: Corpus, console: Console
) -> tuple[Any, History]:
    """Trains for --num_steps steps, and evaluates ten times on the way.

    Args:
        trainer: of the model.
        params: to go on from; None to begin anew.
        corpus: to train and to evaluate on.
        console: to show losses.

    Returns:
        The parameters, where the trainer has them, and what happened.
    """
    rng = np.random.default_rng(SEED.value)
    size = {"batch_size": BATCH_SIZE.value, "sequence_length": SEQUENCE_LENGTH.value}
    held_out = spread_batches(corpus.evaluation, NUM_EVALUATION_BATCHES, **size)
    steps_between = max(1, NUM_STEPS.value // NUM_EVALUATIONS)
    losses, eval_losses, step_s = [], [], []
    with refused_plainly():
        state = (
            trainer.init(jax.random.key(SEED.value), held_out[0])
            if params is None
            else trainer.init_from(params, held_out[0])
        )
    with Progress(console=console) as bar:
        task = bar.add_task("compiling", total=NUM_STEPS.value)
        for step in range(1, NUM_STEPS.value + 1):
            batch = sample_batch(corpus.training, rng, **size)
            start_s = time.perf_counter()
            state, metrics = trainer.step(state, batch)
            losses.append(float(metrics["aux"]))
            step_s.append(time.perf_counter() - start_s)
            if step % steps_between == 0 or step == NUM_STEPS.value:
                eval_loss = statistics.mean(
                    float(trainer.evaluate(state, batch)["aux"]) for batch in held_out
                )
                eval_losses.append((step, eval_loss))
                bar.print(f"step {step:4}  loss {losses[-1]:.3f}  evaluation {eval_loss:.3f}")
            if ADAPT_EVERY.value and step % ADAPT_EVERY.value == 0 and step < NUM_STEPS.value:
                state, found = adapt(trainer, state, batch)
                bar.print(f"step {step:4}  {found}", markup=False)
            bar.update(task, completed=step, description=f"loss {losses[-1]:.3f}")
    history = History(losses=tuple(losses), eval_losses=tuple(eval_losses), step_s=tuple(step_s))
    return state.params, history


def adapt(trainer: jaxptis.Trainer, state: Any, batch: Any) -> tuple[Any, str]:
    """Lets the order of tasks follow what they take; returns the state and what was found."""
    try:
        state, adaptation = trainer.adapt(state, batch)
    except ProfileError as error:
        return error.state, str(error)
    return state, str(adaptation)


def to_json(trainer: jaxptis.Trainer, history: History, corpus: Corpus) -> dict[str, Any]:
    """Returns the settings, by the names of their flags, and the results."""
    unused = () if LOAD.value is None else ("model", "size")
    return {
        "settings": {flag.name: flag.value for flag in SETTINGS if flag.name not in unused},
        "losses": history.losses,
        "eval_losses": history.eval_losses,
        "bytes_per_token": corpus.bytes_per_token,
        "step_s": statistics.median(history.step_s),
        "plan": str(trainer.plan),
        "num_compilations": trainer.num_compilations,
        "num_tasks": trainer.num_tasks,
        "host_s_per_task": trainer.host_s_per_task,
    }


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of JAX, for one; --verbosity=0 shows the rest
    app.run(main)
