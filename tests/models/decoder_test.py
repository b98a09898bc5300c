# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from kvq_jax import dense
from kvq_jax.models import Decoder, DecoderConfig, Layer, init_states, load_decoder

FAMILIES = ["llama", "llama_rope_llama3", "mistral_swa", "qwen2_qkv_bias", "qwen3_qk_norm"]
TINY = DecoderConfig(
    vocab_size=61,
    width=32,
    num_layers=2,
    num_q_heads=6,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_length=64,
    norm_eps=1e-5,
    rope_theta=1e4,
)


def prefill_logits(decoder, tokens, *, lengths=None, capacity=None):
    """Logits of all positions of right-padded prompts, and the filled states."""
    tokens = jnp.asarray(tokens)
    cache = dense()
    batch_size, num_tokens = tokens.shape
    states = init_states(
        decoder.config, cache, batch_size, capacity or num_tokens, dtype=decoder.dtype
    )
    prefill = jax.jit(decoder.prefill, static_argnums=2)
    hidden, states = prefill(tokens, states, cache, lengths=lengths)
    return decoder.logits(hidden), states


def chunked_logits(decoder, tokens, size):
    """Logits of all positions, the tokens appended `size` at a time."""
    tokens = jnp.asarray(tokens)
    cache = dense()
    states = init_states(decoder.config, cache, *tokens.shape, dtype=decoder.dtype)
    step = jax.jit(lambda tokens, states: decoder(tokens, states, cache))
    logits = []
    for start in range(0, tokens.shape[1], size):
        hidden, states = step(tokens[:, start : start + size], states)
        logits.append(decoder.logits(hidden))
    return jnp.concatenate(logits, axis=1)


@pytest.fixture(scope="module")
def smollm2_golden(golden):
    return np.load(golden / "logits.npz")


@pytest.fixture(scope="module")
def smollm2_prefill(smollm2, smollm2_golden):
    """Logits, states and lengths of the golden prompts in one right-padded batch."""
    prompts = [smollm2_golden[f"ids{i}"] for i in range(3)]
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    tokens = np.zeros((3, lengths.max()), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    logits, states = prefill_logits(
        smollm2.decoder, tokens, lengths=jnp.asarray(lengths), capacity=128
    )
    return np.asarray(logits), states, lengths


@pytest.mark.parametrize("prompt", range(3))
def test_smollm2_logits_equal_transformers(smollm2_prefill, smollm2_golden, prompt):
    all_logits, _, lengths = smollm2_prefill
    data = {
        key.removesuffix(f"_{prompt}"): smollm2_golden[key]
        for key in smollm2_golden
        if key.endswith(f"_{prompt}")
    }
    logits = all_logits[prompt, : lengths[prompt]]
    assert logits.dtype == np.float32
    # Two float32 implementations with sums over 1536 terms, 30 layers: 1e-4 measured.
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-3)
    close(np.take_along_axis(logits, data["top32_idx"], axis=-1), data["top32_val"])
    close(jax.nn.logsumexp(logits, axis=-1), data["logsumexp"])
    close(logits.mean(-1), data["mean"])
    close(logits.std(-1), data["std"])
    # Stored in float16: half an ulp, relative 2**-11.
    close(logits[-4:], data["last4_fp16"].astype(np.float32), rtol=2**-11)


def test_smollm2_greedy_tokens_equal_transformers(smollm2, smollm2_prefill, smollm2_golden):
    logits, states, lengths = smollm2_prefill
    cache = dense()
    leaves, treedef = jax.tree.flatten(smollm2.decoder)

    @jax.jit
    def step(leaves, tokens, states):
        decoder = jax.tree.unflatten(treedef, leaves)
        hidden, states = decoder(tokens, states, cache)
        return jnp.argmax(decoder.logits(hidden), axis=-1).astype(jnp.int32), states

    tokens = jnp.asarray(logits[np.arange(3), lengths - 1].argmax(-1)[:, None], jnp.int32)
    steps = []
    for _ in range(64):
        steps.append(tokens)
        tokens, states = step(leaves, tokens, states)
    # The smallest margin between best and second is .026, the error of a logit 1e-4.
    for row, greedy in enumerate(np.concatenate(steps, axis=1).tolist()):
        assert greedy == smollm2_golden[f"greedy{row}"].tolist()
    assert states[0].length.tolist() == (lengths + 64).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_transformers(golden, family):
    folder = golden / "families" / family
    data = np.load(folder / "logits.npz")
    decoder = load_decoder(folder)
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * np.abs(data["logits"]).max()}
    logits, _ = prefill_logits(decoder, data["ids"])
    np.testing.assert_allclose(logits, data["logits"], **tolerance)
    np.testing.assert_allclose(chunked_logits(decoder, data["ids"], 1), data["logits"], **tolerance)


def swap_tensors(tensors, config):
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def swap_query_heads(tensors, config):
    name = "model.layers.1.self_attn.q_proj.weight"
    heads = tensors[name].reshape(config.num_q_heads, config.head_dim, -1)
    tensors[name] = np.ascontiguousarray(heads[[1, 2, 3, 0]].reshape(tensors[name].shape))


def swap_key_channels(tensors, config):
    name = "model.layers.0.self_attn.k_proj.weight"
    pairs = tensors[name].reshape(config.num_kv_heads, 2, config.head_dim // 2, -1)
    tensors[name] = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensors[name].shape)


def drop_bias(tensors, config):
    tensors["model.layers.0.self_attn.k_proj.bias"] *= 0


def drop_query_norm(tensors, config):
    tensors["model.layers.1.self_attn.q_norm.weight"][:] = 1


@pytest.mark.parametrize(
    ("family", "spoil"),
    [(family, spoil) for family in FAMILIES for spoil in (swap_tensors, swap_query_heads)]
    + [("llama", swap_key_channels), ("qwen3_qk_norm", drop_query_norm)],
)
def test_a_wrong_tensor_shows(checkpoint, family, spoil):
    folder = checkpoint(family)
    data = np.load(folder / "logits.npz")
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors, load_decoder(folder).config)
    save_file(tensors, folder / "model.safetensors")
    logits, _ = prefill_logits(load_decoder(folder), data["ids"])
    assert np.abs(logits - data["logits"]).max() > 1e-2 * np.abs(data["logits"]).max()


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "rope_theta", 5e4),
        ("llama_rope_llama3", "rope_divisors", None),
        ("mistral_swa", "sliding_window", None),
        ("mistral_swa", "sliding_window", 9),
        ("qwen3_qk_norm", "norm_eps", 1e-1),
    ],
)
def test_a_wrong_setting_shows(golden, family, field, value):
    folder = golden / "families" / family
    data = np.load(folder / "logits.npz")
    decoder = load_decoder(folder)
    wrong = Decoder(dataclasses.replace(decoder.config, **{field: value}), rngs=nnx.Rngs(0))
    nnx.update(wrong, nnx.state(decoder))
    logits, _ = prefill_logits(wrong, data["ids"])
    assert np.abs(logits - data["logits"]).max() > 1e-3 * np.abs(data["logits"]).max()


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("window", [None, 5])
def test_chunks_equal_prefill(size, window):
    decoder = Decoder(dataclasses.replace(TINY, sliding_window=window), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, TINY.vocab_size)
    logits, _ = prefill_logits(decoder, tokens)
    np.testing.assert_allclose(chunked_logits(decoder, tokens, size), logits, atol=1e-5)


def test_padding_never_leaks():
    decoder = Decoder(TINY, rngs=nnx.Rngs(0))
    cache = dense()
    tokens = jax.random.randint(jax.random.key(1), (3, 12), 0, TINY.vocab_size)
    lengths = jnp.array([12, 5, 1], jnp.int32)
    next_tokens = jnp.array([[3], [4], [5]], jnp.int32)

    @jax.jit
    def run(tokens, lengths, next_tokens):
        states = init_states(TINY, cache, tokens.shape[0], 16)
        hidden, states = decoder.prefill(tokens, states, cache, lengths=lengths)
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
        return last, decoder(next_tokens, states, cache)[0]

    is_padding = jnp.arange(12) >= lengths[:, None]
    expected = run(tokens, lengths, next_tokens)
    # Other padding changes not a bit, even if it is no token at all.
    for other in (7, -1, TINY.vocab_size):
        got = run(jnp.where(is_padding, jnp.int32(other), tokens), lengths, next_tokens)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    # The last valid token does change the result.
    got = run(tokens.at[1, 4].set((tokens[1, 4] + 1) % TINY.vocab_size), lengths, next_tokens)
    assert np.abs(got[1][1] - expected[1][1]).max() > 1e-3
    np.testing.assert_array_equal(got[1][0], expected[1][0])
    # A row alone, without padding, gives what it gives in the batch.
    row = slice(1, 2)
    got = run(tokens[row, :5], lengths[row], next_tokens[row])
    in_batch = jax.tree.map(operator.itemgetter(row), expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, in_batch)


def test_bfloat16_stays_bfloat16_and_near_float32(golden):
    folder = golden / "families" / "qwen3_qk_norm"
    data = np.load(folder / "logits.npz")
    decoder = load_decoder(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(decoder)} == {jnp.dtype(jnp.bfloat16)}
    logits, states = prefill_logits(decoder, data["ids"])
    assert logits.dtype == jnp.float32
    assert states[0].keys.dtype == jnp.bfloat16
    # 8 bits of mantissa, 2**-8, grown by some ten roundings in a row.
    error = np.abs(np.asarray(logits) - data["logits"]).max()
    assert error < 10 * 2**-8 * np.abs(data["logits"]).max()
    step = chunked_logits(decoder, data["ids"][:, :8], 1)
    assert np.abs(step - logits[:, :8]).max() < 10 * 2**-8 * np.abs(data["logits"]).max()


def test_ids_outside_the_vocabulary_are_nan_under_jit():
    decoder = Decoder(TINY, rngs=nnx.Rngs(0))
    size = TINY.vocab_size
    wrong = jnp.array([size, -1, -size, -size - 1, 2**31 - 1, -(2**31)], jnp.int32)
    tokens = jnp.stack([jnp.full_like(wrong, 1), wrong], axis=1)
    tokens = jnp.concatenate([tokens, jnp.array([[1, size - 1]], jnp.int32)])
    logits, _ = prefill_logits(decoder, tokens)
    assert np.isnan(logits[:-1, 1]).all()
    assert np.isfinite(logits[-1]).all()
    step = chunked_logits(decoder, tokens, 1)
    assert np.isnan(step[:-1, 1]).all()
    assert np.isfinite(step[-1]).all()


def test_ids_outside_the_vocabulary_are_refused_outside_jit():
    decoder = Decoder(TINY, rngs=nnx.Rngs(0))
    states = init_states(TINY, dense(), 2, 16)
    for wrong in (TINY.vocab_size, -1, -TINY.vocab_size):
        tokens = jnp.array([[1, 2, 3], [4, wrong, 5]], jnp.int32)
        message = rf"token id {wrong} in row 1 is not in 0 to 60"
        with pytest.raises(ValueError, match=message):
            decoder(tokens, states, dense())
        with pytest.raises(ValueError, match=message):
            decoder.prefill(tokens, states, dense())
        with pytest.raises(ValueError, match=message):
            decoder.prefill(tokens, states, dense(), lengths=jnp.array([3, 2], jnp.int32))
    # In the padding of a prompt anything may stand.
    lengths = jnp.array([3, 1], jnp.int32)
    run_layer = jax.jit(Layer.prefill, static_argnums=4)
    hidden, _ = decoder.prefill(tokens, states, dense(), lengths=lengths, run_layer=run_layer)
    assert np.isfinite(hidden[0]).all()
    assert np.isfinite(hidden[1, 0]).all()


def test_every_switch_changes_the_parameters():
    def names(**changes):
        config = dataclasses.replace(TINY, **changes)
        decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(decoder))}

    plain = names()
    assert plain - names(tie_embeddings=True) == {"unembedding"}
    assert {name.split(".")[-2] for name in names(qkv_bias=True) - plain} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }
    assert {name.split(".")[-2] for name in names(o_bias=True) - plain} == {"o_proj"}
    assert len(names(mlp_bias=True) - plain) == 3 * TINY.num_layers
    assert {name.split(".")[-2] for name in names(qk_norm=True) - plain} == {"q_norm", "k_norm"}


def test_a_step_compiles_once():
    decoder = Decoder(TINY, rngs=nnx.Rngs(0))
    cache = dense()
    step = jax.jit(lambda tokens, states: decoder(tokens, states, cache))
    states = init_states(TINY, cache, 2, 16)
    for _ in range(3):
        _, states = step(jnp.zeros((2, 1), jnp.int32), states)
    assert step._cache_size() == 1


def test_states_of_another_model_are_refused():
    decoder = Decoder(TINY, rngs=nnx.Rngs(0))
    states = init_states(TINY, dense(), 1, 16)
    with pytest.raises(ValueError, match="zip"):
        jax.eval_shape(lambda tokens: decoder(tokens, states[:1], dense()), jnp.zeros((1, 1), "i4"))
