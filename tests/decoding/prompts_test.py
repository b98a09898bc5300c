# SPDX-License-Identifier: Apache-2.0
"""Prompts as people write them."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvq_jax.decoding.prompts import token_ids

MESSAGES = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a"}]


class Letters:
    """A tokenizer: a is 1, b is 2, and 0 comes first."""

    def encode(self, text, *, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(x) - 96 for x in text]

    def apply_chat_template(self, messages):
        return "".join(message["role"][0] + message["content"] for message in messages)


@pytest.mark.parametrize(
    "prompts, ids",
    [
        ("ab", [[0, 1, 2]]),
        (["ab", "b"], [[0, 1, 2], [0, 2]]),
        (["ab", [3, 4]], [[0, 1, 2], [3, 4]]),
        ([3, 4], [[3, 4]]),
        ((3, np.int64(4)), [[3, 4]]),
        (range(2), [[0, 1]]),
        (np.array([3, 4]), [[3, 4]]),
        (np.array([[3, 4]]), [[3, 4]]),
        (jnp.array([3, 4]), [[3, 4]]),
        ([jnp.array([3, 4]), np.array([5], np.uint8)], [[3, 4], [5]]),
        (jnp.array([[3], [4]]), [[3], [4]]),
        (list(jnp.array([3, 4])), [[3, 4]]),
        (iter(["a"]), [[0, 1]]),
        (MESSAGES, [[21, 2, 1, 1]]),
        ([MESSAGES, MESSAGES[:1], "a"], [[21, 2, 1, 1], [21, 2], [0, 1]]),
    ],
)
def test_prompts_as_people_write_them(prompts, ids, as_users_run_it):
    made = token_ids(prompts, Letters(), 30)
    assert made == ids
    assert all(type(i) is int for row in made for i in row)


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "prompts is empty"),
        (np.zeros((0, 3), int), "prompts is empty"),
        ([[]], "prompt 0 has no tokens"),
        ([[1], [1, 30]], "prompt 1: token id 30 is not in 0 to 29"),
        ([[-1]], "token id -1"),
        ([1, 2.5], r"prompt 0: a token id must be an integer, got 2\.5"),
        ([[1, True]], "a token id must be an integer, got True"),
        ([[1], 2], "prompt 1 must be a text, a list of token ids or a list of messages.* got 2"),
        ([1, [2]], r"prompt 0: a token id must be an integer, got \(2,\)"),
        (b"ab", "prompts must be texts or lists of token ids, got b'ab'"),
        ([b"ab"], "prompt 0 must be a text.* got b'ab'"),
        (MESSAGES[0], "prompts must be texts or lists of token ids, got {'role'"),
        (None, "prompts must be texts or lists of token ids, got None"),
        (7, "prompts must be texts or lists of token ids, got 7"),
    ],
)
def test_what_is_no_prompt_is_refused(prompts, message, as_users_run_it):
    with pytest.raises(ValueError, match=message):
        token_ids(prompts, Letters(), 30)


@pytest.mark.parametrize(
    "prompts, message",
    [
        (["text"], "a bare decoder takes prompts of token ids, not texts"),
        (MESSAGES, "a bare decoder takes prompts of token ids, not messages.* chat template"),
    ],
)
def test_a_bare_decoder_takes_token_ids(prompts, message):
    with pytest.raises(ValueError, match=message):
        token_ids(prompts, None, 30)
