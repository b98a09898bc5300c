# SPDX-License-Identifier: Apache-2.0
"""Quality figures against what a slow token-by-token account gives."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax import measure
from kvq_jax.models import init_states, load_decoder

FOLDER = Path(__file__).parent / "models" / "golden" / "families" / "llama"
CONTEXT, SKIP = 150, 40


@pytest.fixture(scope="module")
def decoder():
    return load_decoder(FOLDER)


def log_probabilities(decoder, windows, method):
    """Next-token distributions, one token at a time."""
    states = init_states(decoder.config, method, len(windows), 256, jnp.float32)
    step = jax.jit(lambda decoder, tokens, states: decoder(tokens, states, method))
    parts = []
    for i in range(CONTEXT - 1):
        hidden, states = step(decoder, windows[:, i : i + 1], states)
        parts.append(jax.nn.log_softmax(decoder.logits(hidden)))
    return np.concatenate(parts, 1).astype(np.float64)[:, SKIP:]


def test_figures_are_those_of_single_steps(decoder):
    windows = np.random.default_rng(0).integers(0, 128, (2, CONTEXT)).astype(np.int32)
    ott = kvq.ott(group_size=32, residual_length=16, untraced_layers=0)
    methods = {"dense": kvq.dense(), "ott": ott, "finer": kvq.kivi(bits=8, group_size=32)}
    seen = []
    found = measure.evaluate(
        decoder, windows, methods, skip=SKIP, on_progress=lambda *x: seen.append(x)
    )
    p, q = (log_probabilities(decoder, windows, methods[name]) for name in ("dense", "ott"))
    kl = (np.exp(p) * (p - q)).sum(-1)
    targets = windows[:, SKIP + 1 :, None]
    assert found["ott"].tokens == 2 * (CONTEXT - 1 - SKIP)
    assert found["ott"].context == CONTEXT
    # Float32 sums of another order can flip a 2-bit rounding, so averages agree, not more.
    np.testing.assert_allclose(found["ott"].kl, kl.mean(), rtol=0.02)
    np.testing.assert_allclose(found["ott"].kl_p99, np.quantile(kl, 0.99), rtol=0.1)
    nll = -np.take_along_axis(q, targets, -1).mean()
    np.testing.assert_allclose(found["ott"].perplexity, np.exp(nll), rtol=1e-3)
    assert abs(found["ott"].top1 - (p.argmax(-1) == q.argmax(-1)).mean()) < 0.02
    assert found["dense"].kl == 0
    assert found["dense"].top1 == 1
    assert found["finer"].kl < 0.05 * found["ott"].kl
    assert {name for name, _, _ in seen} == set(methods)
    assert all(seen[i][1] <= seen[i][2] for i in range(len(seen)))


def test_recall_is_what_greedy_decoding_answers(decoder):
    """Two windows end as the model itself goes on, the third does not."""
    prompts = np.random.default_rng(1).integers(0, 128, (3, 146)).tolist()
    answers = kvq.generate(decoder, prompts, method=kvq.dense(), max_new_tokens=4).tokens
    answers[2][2] = (answers[2][2] + 1) % 128
    windows = np.array([x + y for x, y in zip(prompts, answers, strict=True)], np.int32)
    assert measure.recall(decoder, windows, 4, {"dense": kvq.dense()}) == {"dense": 2 / 3}


def test_windows_are_consecutive():
    windows = measure.consecutive_windows(range(100), 30, 3)
    assert windows.tolist() == [list(range(i, i + 30)) for i in (0, 30, 60)]
    for context, number in ((30, 4), (1, 3), (30, 0)):
        with pytest.raises(ValueError, match=f"{number} windows of {context} tokens"):
            measure.consecutive_windows(range(100), context, number)


def test_too_short_a_window_is_refused(decoder):
    with pytest.raises(ValueError, match="leave nothing to score"):
        measure.evaluate(decoder, np.zeros((1, 41), np.int32), {}, skip=40)
