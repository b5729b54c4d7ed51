"""Tries to save a head of which each of two processes holds a part; test_load.py starts it.

python -m experiments.launch --num_processes=2 -- tests.models.spread_program --save_to=FOLDER
"""

import dataclasses

import jax
import numpy as np
import optax
from absl import app, flags

import jaxptis
from experiments import distributed
from models import MODELS, next_token_loss
from models.save import save
from tests.models.small import LLAMA2

SAVE_TO = flags.DEFINE_string("save_to", None, "Folder for the checkpoint.")


def main(argv):
    pipeline = jaxptis.pipeline(num_microbatches=2, devices=distributed.join(2), head_slices=4)
    # The head is most of the work, so that both devices share it.
    config = dataclasses.replace(LLAMA2, vocab_size=4096)
    module = pipeline(MODELS["llama2"].module)(config)
    trainer = module.trainer(loss=next_token_loss, optimizer=optax.sgd(0.1))
    state = trainer.init(jax.random.key(0), {"tokens": np.zeros((4, 9), np.int32)})
    try:
        save(SAVE_TO.value, module, state.params)
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    app.run(main)
