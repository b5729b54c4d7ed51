"""Checkpoints are written whole, like those they come from, or not at all."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from models import MODELS
from models.load import load, parameter_types
from models.save import save
from tests.models import small
from tests.models.checkpoints import (
    DEEP,
    LARGEST,
    SHARD,
    change_config,
    files,
    random_params,
    rewrite,
)

pytestmark = pytest.mark.usefixtures("lenient")


def test_what_stands_beside_a_checkpoint_is_kept(tmp_path):
    folder, module = tmp_path / "saved", MODELS["llama2"].module(small.LLAMA2)
    save(folder, module, random_params(module))
    change_config(
        **{"bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": 0},
        **{"max_position_embeddings": 4096, "auto_map": {"AutoConfig": "x.Y"}},
    )(folder)
    beside = [
        *("added_tokens.json", "chat_template.jinja", "configuration_x.py"),
        *("generation_config.json", "merges.txt", "modeling_x.py", "special_tokens_map.json"),
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"),
    ]
    for name in beside:
        (folder / name).write_text(name)
    (folder / "notes.txt").write_text("ours")
    (folder / "tokenizer_old").mkdir()
    save(tmp_path / "again", module, load(folder).params, like=folder)
    again = {path.name: path.read_text() for path in (tmp_path / "again").glob("*[!s]")}
    assert {name: again.pop(name) for name in beside} == {name: name for name in beside}
    assert json.loads(again.pop("config.json")) == json.loads((folder / "config.json").read_text())
    assert not again


def test_the_tokens_of_a_text_model_are_kept(tmp_path):
    """Of Gemma 3 from 4B on, config.json says them in its text_config, or around it."""
    folder, module = tmp_path / "saved", MODELS["gemma"].module(small.GEMMA[3])
    save(folder, module, random_params(module))

    def seeing(text):
        return {
            "model_type": "gemma3",
            "eos_token_id": 5,
            "text_config": text | {"max_position_embeddings": 77},
        }

    rewrite(folder / "config.json", seeing)
    save(tmp_path / "again", module, load(folder).params, like=folder)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (written["eos_token_id"], written["max_position_embeddings"]) == (5, 77)


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (None, "config.json is missing; name the folder of a checkpoint"),
        (small.GEMMA[1], "is a GemmaConfig of [0-9]+ tokens, and this a Llama2Config of 256"),
        (
            dataclasses.replace(small.LLAMA2, vocab_size=98),
            "is a Llama2Config of 98 tokens, and this a Llama2Config of 256; save it like the",
        ),
    ],
)
def test_a_model_is_saved_like_itself(other, complaint, tmp_path):
    if other is not None:
        family = "gemma" if other is small.GEMMA[1] else "llama2"
        module = MODELS[family].module(other)
        save(tmp_path / "other", module, random_params(module))
    module = MODELS["llama2"].module(small.LLAMA2)
    with pytest.raises(ValueError, match=complaint):
        save(tmp_path / "saved", module, random_params(module), like=tmp_path / "other")
    assert not (tmp_path / "saved").exists()


def test_what_cannot_be_saved_is_said(deep, tmp_path):
    folder, module, params = deep
    with pytest.raises(ValueError, match="shard_bytes is 0; make it 1 or more"):
        save(tmp_path / "saved", module, params, shard_bytes=0)
    with pytest.raises(ValueError, match="params is of type list; pass the params of a state"):
        save(tmp_path / "saved", module, [params])
    with pytest.raises(ValueError, match=r"\n  and \d+ more$"):
        renamed = {f"blocks_{i}": block for i, block in enumerate(params.values())}
        save(tmp_path / "saved", module, renamed)
    for taken in folder, folder / "config.json":
        with pytest.raises(ValueError, match="holds something already; name a new folder"):
            save(taken, module, params)
    with pytest.raises(ValueError, match="RMSNorm is none of the models deepseek, gemma, llama2"):
        from models.parts.norm import RMSNorm

        save(tmp_path / "saved", RMSNorm(DEEP), params)
    wrong = {key: value for key, value in params.items() if key != "norm"} | {
        "gain": params["norm"]["scale"],
        "embed": {"embedding": np.zeros((255, 64), np.int32)},
    }
    with pytest.raises(ValueError) as raised:
        save(tmp_path / "saved", module, wrong)
    assert str(raised.value).splitlines() == [
        "these are not the parameters of this model:",
        "  embed/embedding has shape (255, 64), in the model (256, 64)",
        "  embed/embedding is of type int32; use one of float32, float16, bfloat16",
        "  norm/scale is missing",
        "  the model has no gain",
    ]
    assert not list(tmp_path.iterdir())


def test_a_leaf_that_processes_share_is_read_by_these_and_not_saved(tmp_path):
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.launch", "--num_processes=3", "--"),
            *("tests.models.spread_program", f"--save_to={tmp_path}/saved"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    lines = launched.stdout.splitlines()
    read = [path for line in lines if "] read:" in line for path in line.split(": ")[1].split()]
    module = MODELS["llama2"].module(small.LLAMA2)
    assert sorted(read) == sorted([*parameter_types(module), "head/kernel"])
    complaint = "head/kernel is spread over processes, of which none holds all of it"
    assert launched.stdout.count(complaint) == 3
    assert launched.stdout.count("is spread") == 3  # the head alone
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass
class Broken:
    """A leaf whose device fails."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype=None, copy=None):
        raise OSError("the device is gone")


def test_a_save_that_fails_leaves_no_checkpoint(deep, tmp_path):
    _, module, params = deep
    scale = params["norm"]["scale"]
    broken = params | {"norm": {"scale": Broken(scale.shape, scale.dtype)}}
    with pytest.raises(OSError, match="the device is gone"):
        save(tmp_path / "saved", module, broken)
    (partial,) = tmp_path.iterdir()
    assert partial.suffix == ".partial"
    (partial / "rest").touch()
    save(tmp_path / "saved", module, params)
    assert files(tmp_path) == ["saved"]
    assert files(tmp_path / "saved") == ["config.json", "model.safetensors"]


def test_files_are_not_longer_than_asked(deep):
    folder = deep[0]
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    # Behind every header at most SHARD bytes, and so many that a further tensor has no place.
    assert all(SHARD - LARGEST < size < SHARD + 10_000 for size in sizes[:-1])
    total = sum(math.prod(each.shape) * 4 for each in parameter_types(deep[1]).values())
    assert 0 < sum(sizes) - total < 10_000 * len(sizes)
