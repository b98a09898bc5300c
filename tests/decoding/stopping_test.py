# SPDX-License-Identifier: Apache-2.0
"""Where rows end: stop tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvq_jax.decoding.stopping import stop_sets


@pytest.mark.parametrize(
    "stop_tokens, sets",
    [
        ((), [set(), set()]),
        (5, [{5}, {5}]),
        (np.int64(5), [{5}, {5}]),
        (jnp.array(5), [{5}, {5}]),
        ([5, 6], [{5, 6}, {5, 6}]),
        ({5, 6}, [{5, 6}, {5, 6}]),
        (np.array([5, 6]), [{5, 6}, {5, 6}]),
        (jnp.array([5, 6]), [{5, 6}, {5, 6}]),
        ([np.int64(5)], [{5}, {5}]),
        (np.array([], int), [set(), set()]),
        ([[5], ()], [{5}, set()]),
        (np.array([[5, 6], [7, 8]]), [{5, 6}, {7, 8}]),
        ([{5}, np.array([6])], [{5}, {6}]),
        ([5, [6]], [{5}, {6}]),
    ],
)
def test_stop_tokens_as_people_write_them(stop_tokens, sets, as_users_run_it):
    assert stop_sets(stop_tokens, 2) == sets


@pytest.mark.parametrize(
    "stop_tokens, message",
    [
        ("\n", r"stop_tokens takes token ids, got the text '\\n': pass it as stop_strings"),
        (["\n"], "stop_tokens takes token ids"),
        ([[5], ["\n"]], "stop_tokens takes token ids"),
        ([5, "\n"], "stop_tokens takes token ids"),
        (5.0, r"a stop token must be a token id, got 5\.0"),
        ([True], "a stop token must be a token id, got True"),
        ([None], "a stop token must be a token id, got None"),
        ([[[5]], [6]], r"a stop token must be a token id, got \(5,\)"),
        ([[5]], "1 lists of stop tokens for 2 prompts"),
    ],
)
def test_what_is_no_stop_token_is_refused(stop_tokens, message, as_users_run_it):
    with pytest.raises(ValueError, match=message):
        stop_sets(stop_tokens, 2)
