"""Begins with a head of which two of three processes hold a half, and tries to save it.

python -m experiments.launch --num_processes=3 -- tests.models.spread_program --save_to=FOLDER
"""

import dataclasses

import numpy as np
import optax
from absl import app, flags
from flax import traverse_util

import jaxptis
from experiments import distributed
from models import MODELS, next_token_loss
from models.load import parameter_types
from models.save import save
from tests.models.small import LLAMA2
from tests.noted import Noted

SAVE_TO = flags.DEFINE_string("save_to", None, "Folder for the checkpoint.")


def main(argv):
    pipeline = jaxptis.pipeline(
        strategy="1f1b", num_microbatches=2, devices=distributed.join(3), head_slices=2
    )
    # The head is most of the work, so that two devices share it, and the third has the rest.
    module = pipeline(MODELS["llama2"].module)(dataclasses.replace(LLAMA2, vocab_size=4096))
    trainer = module.trainer(loss=next_token_loss, optimizer=optax.sgd(0.1))
    seen = []
    params = {
        path: Noted(np.ones(each.shape, each.dtype), path, seen)
        for path, each in parameter_types(module).items()
    }
    batch = {"tokens": np.zeros((4, 9), np.int32)}
    state = trainer.init_from(traverse_util.unflatten_dict(params, sep="/"), batch)
    print("read:", *sorted(seen))
    state, _ = trainer.step(state, batch)
    try:
        save(SAVE_TO.value, module, state.params)
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    app.run(main)
