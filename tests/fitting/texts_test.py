# SPDX-License-Identifier: Apache-2.0
"""Windows of text: cut, sampled, and what none can be made of."""

import numpy as np
import pytest

from kvq_jax.fitting.texts import cut_windows, sample_texts
from kvq_jax.models import LoadedModel, Tokenizer


class Letters(Tokenizer):
    """A tokenizer of one token a character."""

    def __init__(self):
        pass

    def encode(self, text):
        return [ord(c) % 128 for c in text]


@pytest.fixture
def model(decoder):
    return LoadedModel(decoder, decoder.config, Letters())


def test_texts_are_cut_into_whole_windows(model, as_users_run_it):
    windows = cut_windows(model, ["abcdefg", "hi", "jkl"], 3)
    assert ["".join(map(chr, x)) for x in windows] == ["abc", "def", "jkl"]
    np.testing.assert_array_equal(cut_windows(model, "abcdefg", 3), windows[:2])
    assert windows.dtype == np.int32


def test_token_ids_are_windows_already(decoder):
    ids = np.arange(6).reshape(2, 3)
    for given in (ids, ids.tolist()):
        np.testing.assert_array_equal(cut_windows(decoder, given, 512), ids)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["abc", "de"], "no text has the 4 tokens of a window, the longest has 3: give longer"),
        ([], "texts is empty: give at least one text"),
        (np.zeros((0, 8), np.int32), "texts is empty"),
        (["abcd", [1, 2]], "got some of both"),
        ([[1, 2], [3]], "must all have the same length"),
        (np.zeros((2, 4)), "got float64 of shape"),
        (np.zeros(4, int), r"got int64 of shape \(4,\)"),
        ([[1], [2]], "a window must have at least 2 tokens, got 1"),
        ([[1, 2], [3, -1]], "token id -1 is not in the vocabulary of 128 tokens"),
        ([[1, 2], [3, 2**40]], "token id 1099511627776 is not in the vocabulary"),
    ],
)
def test_refuses_what_is_not_windows(model, texts, message, as_users_run_it):
    with pytest.raises(ValueError, match=message):
        cut_windows(model, texts, 4)


def test_a_bare_decoder_reads_no_texts(decoder):
    with pytest.raises(ValueError, match="takes windows of token ids, not texts"):
        cut_windows(decoder, ["some text"], 4)


def test_the_model_draws_its_own_texts(decoder):
    windows = sample_texts(decoder, 2, 40)
    assert windows.shape == (2, 40)
    np.testing.assert_array_equal(windows, sample_texts(decoder, 2, 40))
    assert (windows != sample_texts(decoder, 2, 40, seed=1)).mean() > 0.9
    assert len(set(windows[:, 0].tolist())) == 2
    for sizes, message in (((0, 40), "num_windows must be"), ((2, 1), "context must be")):
        with pytest.raises(ValueError, match=message):
            sample_texts(decoder, *sizes)
