"""What several tests of checkpoints read."""

import pytest

from models import MODELS
from models.save import save
from tests.models.checkpoints import DEEP, SHARD, random_params


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A checkpoint of DEEP, its module and its parameters."""
    folder = tmp_path_factory.mktemp("deep") / "saved"
    module = MODELS["llama2"].module(DEEP)
    params = random_params(module)
    save(folder, module, params, shard_bytes=SHARD)
    return folder, module, params
