import dataclasses
import json
import math
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

from experiments.corpus import load_corpus
from experiments.tokenizer import read_tokenizer
from models import MODELS
from models.load import load
from models.save import save
from tests.experiments.program import assert_refused, run_program

ARGUMENTS = ("--num_devices=2", "--num_microbatches=2", "--batch_size=4", "--sequence_length=16")


def train(*arguments, launcher=()):
    return run_program("train", *ARGUMENTS, *arguments, launcher=launcher)


def save_random(folder, **config):
    """A checkpoint of a small LLaMA-2."""
    model = MODELS["llama2"]
    module = model.module(dataclasses.replace(model.sizes["tiny"], num_blocks=2, **config))
    params = module.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    save(folder, module, params)


def values(folder):
    paths = jax.tree_util.tree_leaves_with_path(load(folder).params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in paths}


def test_training_writes_its_results(tmp_path):
    results_path = tmp_path / "results.json"
    dump_path = tmp_path / "dump"
    outputs = f"--json_output={results_path}", f"--dump_to={dump_path}"
    run = train("--num_steps=2", "--strategy=1f1b", *outputs)
    assert run.returncode == 0, run.stderr
    results = json.loads(results_path.read_text())
    assert results["settings"]["num_microbatches"] == 2
    assert len(results["losses"]) == 2
    assert [step for step, _ in results["eval_losses"]] == [1, 2]
    # Untrained, the model knows little more than that there are 256 bytes.
    assert results["losses"][0] == pytest.approx(math.log(256), rel=0.2)
    assert results["num_tasks"] == 2 * 2 * 2  # stages x microbatches x (forward, backward)
    assert results["num_compilations"] > 0
    assert results["step_s"] > 0 and results["host_s_per_task"] > 0
    assert results["plan"] in run.stdout
    assert any(dump_path.iterdir())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer.json of 300 tokens: the bytes, and 44 of several."""
    tokenizers = pytest.importorskip("tokenizers")
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    learned = tokenizers.Tokenizer(tokenizers.models.BPE())
    learned.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    learned.train_from_iterator([pathlib.Path(json.__file__).read_text()], trainer)
    learned.save(str(file))
    return file


def test_a_checkpoint_is_trained_and_saved_by_any_number_of_processes(tokenizer, tmp_path):
    save_random(tmp_path / "before", vocab_size=300)
    shutil.copy(tokenizer, tmp_path / "before" / "tokenizer.json")
    (tmp_path / "before" / "tokenizer_config.json").write_text("{}")
    arguments = ("--num_steps=2", f"--load={tmp_path}/before")
    one = train(*arguments, f"--save={tmp_path}/one", f"--json_output={tmp_path}/results.json")
    assert one.returncode == 0, one.stderr
    two = train(
        *arguments,
        f"--tokenizer={tokenizer}",
        f"--save={tmp_path}/two",
        launcher=("experiments.launch", "--num_processes=2", "--devices_per_process=1", "--"),
    )
    assert two.returncode == 0, two.stdout + two.stderr
    assert {path.name for path in (tmp_path / "two").glob("*.safetensors")} == {
        "model-00001-of-00002.safetensors",  # of process 0
        "model-00002-of-00002.safetensors",
    }
    for name, has_all in ("one", True), ("two", False):  # two has a tokenizer of its own
        assert (tmp_path / name / "tokenizer.json").read_text() == tokenizer.read_text()
        assert (tmp_path / name / "tokenizer_config.json").exists() == has_all
    before, after, also = (values(tmp_path / name) for name in ("before", "one", "two"))
    for path, value in after.items():
        assert np.abs(value - before[path]).max() > 0
        np.testing.assert_array_equal(value, also[path])

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["load"] == f"{tmp_path}/before"
    assert "model" not in results["settings"]
    # Untrained, the model knows little more than that there are 300 tokens.
    assert results["losses"][0] == pytest.approx(math.log(300), rel=0.2)
    per_token, per_byte = results["eval_losses"][-1][1], results["bytes_per_token"]
    assert f"{per_token:.3f} nats a token, {per_token / per_byte:.3f} a byte" in one.stdout


def test_tokens_are_those_of_the_tokenizer(tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    encode = read_tokenizer(tokenizer)
    texts = ["def f(x):\n    return x\n", "# é\n"]
    tokens = encode([text.encode() for text in texts])
    assert tokens.dtype == np.int32
    assert tokenizers.Tokenizer.from_file(str(tokenizer)).decode(tokens.tolist()) == "".join(texts)
    corpus = load_corpus(encode)
    assert 1.2 < corpus.bytes_per_token < 4
    # The text that tokens are held out of is the same, and they stand for about as many bytes.
    sizes = [len(each.training) * each.bytes_per_token for each in (corpus, load_corpus())]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxptis\[tokenizer\]'"):
        read_tokenizer("tokenizer.json")


def test_a_model_that_does_not_know_the_text_is_refused(tmp_path):
    save_random(tmp_path / "saved", vocab_size=97)
    run = train(f"--load={tmp_path}/saved")
    assert_refused(run, "but the model knows 97 tokens")
    (tmp_path / "saved" / "tokenizer.model").write_text("")
    run = train(f"--load={tmp_path}/saved")
    assert (
        "has tokenizer.model, but no tokenizer.json; write one with save_pretrained" in run.stderr
    )


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--size=8B", "the model has no such size; use 7B, 13B, 70B, small, tiny"),
        ("--num_devices=0", "num_devices"),
        ("--batch_size=5", "num_microbatches does not divide batch_size"),
        ("--json_output=/no/such/folder/results.json", "its folder does not exist"),
        ("--strategy=no-such-strategy", "no-such-strategy"),
        ("tiny", "belong to no flag"),
        (("--load=folder", "--size=tiny"), "says which model; drop --model and --size"),
        ("--load=/no/such/folder", "config.json is missing; name the folder of a checkpoint"),
        ("--save=tests", "name a new folder, or an empty one, in a folder that exists"),
        ("--tokenizer=setup.cfg", "setup.cfg is no tokenizer.json"),
        ("--local_device_ids=0", "is for processes of --coordinator_address"),
    ],
)
def test_a_bad_flag_is_named(flag, complaint):
    run = train(*([flag] if isinstance(flag, str) else flag))
    assert run.returncode != 0
    assert complaint in run.stderr + run.stdout
