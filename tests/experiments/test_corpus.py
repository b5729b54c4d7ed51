import itertools

import numpy as np

from experiments.corpus import load_corpus, sample_batch, spread_batches

TEXT = np.arange(100, dtype=np.uint8)


def test_corpus_is_source_held_out_by_the_file():
    corpus = load_corpus()
    sizes = [len(corpus.training), len(corpus.evaluation)]
    assert sizes[0] > 1_000_000 and 0.01 < sizes[1] / sizes[0] < 0.2
    json_decoder = b'"""Implementation of JSONDecoder\n"""'
    assert sum(json_decoder in text.tobytes() for text in (corpus.training, corpus.evaluation)) == 1
    np.testing.assert_array_equal(corpus.training, load_corpus().training)


def test_windows_are_consecutive_bytes():
    sampled = [sample_batch(TEXT, np.random.default_rng(0), 50, 8)]
    for batch in itertools.chain(sampled, spread_batches(TEXT, 3, 5, 8)):
        tokens = batch["tokens"]
        assert tokens.dtype == np.int32 and tokens.shape[1] == 9
        np.testing.assert_array_equal(np.diff(tokens), 1)


def test_spread_windows_reach_both_ends():
    tokens = np.concatenate([batch["tokens"] for batch in spread_batches(TEXT, 3, 5, 8)])
    assert tokens.shape == (15, 9) and tokens.min() == 0 and tokens.max() == 99


def test_sampled_windows_reach_both_ends():
    tokens = sample_batch(TEXT, np.random.default_rng(0), 2000, 8)["tokens"]
    assert tokens.min() == 0 and tokens.max() == 99
