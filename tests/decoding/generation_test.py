# SPDX-License-Identifier: Apache-2.0
"""Decoding: the tokens, the stops, the compilations, the memory, the errors."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import kvq_jax as kvq
from kvq_jax.decoding import loop, steps
from kvq_jax.decoding.sampling import per_row, sample
from kvq_jax.models import LoadedModel, Tokenizer, init_states, load_decoder

FOLDER = Path(__file__).parents[1] / "models" / "golden" / "families" / "llama"
OTT = kvq.ott(group_size=32, residual_length=16, untraced_layers=0)
DRAWN = kvq.Sampling(temperature=2.0)
METHODS = {"dense": kvq.dense(), "kivi": kvq.kivi(group_size=32, residual_length=16), "ott": OTT}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture(scope="module")
def decoder():
    return load_decoder(FOLDER)


def prompts(*lengths, vocab_size=128):
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


@methods
def test_tokens_are_those_of_a_plain_loop(decoder, method):
    """The last token of each step chosen by hand; 120 of them, so that groups get coded."""
    (prompt,) = prompts(7)
    states = init_states(decoder.config, method, 1, 512, jnp.float32)
    hidden, states = decoder.prefill(jnp.array([prompt]), states, method)
    expected = []
    step = jax.jit(lambda decoder, tokens, states: decoder(tokens, states, method))
    for _ in range(120):
        expected.append(int(decoder.logits(hidden[:, -1]).argmax()))
        hidden, states = step(decoder, jnp.array([expected[-1:]]), states)
    result = kvq.generate(decoder, [prompt], method=method, max_new_tokens=120)
    assert result.tokens == [expected]
    assert result.texts == []
    assert result.states[0].length.tolist() == [7 + 119]


@methods
def test_rows_of_a_batch_decode_as_they_would_alone(decoder, method):
    batch = prompts(3, 90, 20)
    together = kvq.generate(decoder, batch, method=method, max_new_tokens=70)
    for row, prompt in enumerate(batch):
        alone = kvq.generate(decoder, [prompt], method=method, max_new_tokens=70, capacity=512)
        assert together.tokens[row] == alone.tokens[0]


def test_rows_stop_by_themselves(decoder):
    batch = prompts(5, 9)
    free = kvq.generate(decoder, batch, max_new_tokens=20).tokens
    stops = [[free[0][3]], [free[1][8], 10**6]]
    shown = []
    result = kvq.generate(
        decoder, batch, max_new_tokens=20, stop_tokens=stops, on_tokens=shown.append
    )
    ends = [row.index(stop[0]) + 1 for row, stop in zip(free, stops, strict=True)]
    assert result.tokens == [row[:end] for row, end in zip(free, ends, strict=True)]
    shown = np.stack(shown)
    assert shown.shape == (max(ends), 2)
    for row, end in enumerate(ends):
        assert shown[:end, row].tolist() == result.tokens[row]
        assert (shown[end:, row] == -1).all()
    shared = kvq.generate(decoder, batch, max_new_tokens=20, stop_tokens=stops[0])
    assert len(shared.tokens[0]) == ends[0]


def test_one_compilation_serves_all_prompts_of_a_bucket(decoder):
    method = kvq.ott(group_size=32, residual_length=0)  # not compiled by another test
    kvq.generate(decoder, prompts(5), method=method, max_new_tokens=40)
    step = steps._jitted_drawing_step(jax.tree.structure(decoder), method.with_room(1), 1)
    prefills = steps._prefill_layer._cache_size()
    assert step._cache_size() == 1
    for length, new in ((64, 90), (33, 3), (1, 200)):
        kvq.generate(decoder, prompts(length), method=method, max_new_tokens=new)
    assert step._cache_size() == 1
    filtered = kvq.Sampling([0.8], top_p=0.9, min_p=0.1), kvq.Sampling(0.5, top_k=3)
    for settings in (kvq.Sampling(0.7), DRAWN, *filtered):
        kvq.generate(decoder, prompts(5), method=method, sampling=settings, seed=[7])
    assert step._cache_size() == 3  # the most likely token, draws, and draws with filters
    assert steps._prefill_layer._cache_size() == prefills
    kvq.generate(decoder, prompts(65), method=method, max_new_tokens=3)  # the next bucket
    assert steps._prefill_layer._cache_size() > prefills


@pytest.mark.parametrize("num_steps", [1, 4])
@methods
def test_compiled_step_updates_the_cache_in_place(decoder, method, num_steps):
    capacity = 1 << 18  # heads of 16 channels make a small cache; nothing of it is allocated
    states = jax.eval_shape(lambda: init_states(decoder.config, method, 2, capacity, jnp.float32))
    leaves, structure = jax.tree.flatten(decoder)
    token, finite = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.bool)
    drawn, sampling = steps.Drawn(token, finite, token), per_row(None, 0, 2)
    step = steps._jitted_drawing_step(structure, method.with_room(num_steps), num_steps)
    for donated, lowered in (
        (states, step.lower(leaves, states, drawn, sampling)),
        (states[0], steps._make_room.lower(states[0], method, num_steps)),
    ):
        memory = lowered.compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.1 * kvq.nbytes(donated)
        assert memory.alias_size_in_bytes >= kvq.nbytes(donated)


@pytest.mark.parametrize(
    "length, expected", [(1, 64), (64, 64), (65, 128), (1024, 1024), (1025, 2048), (2049, 3072)]
)
def test_buckets(length, expected):
    assert steps.bucket(length) == expected
    padded = steps.pad([[1] * length, [2]])
    assert padded.tokens.shape == (2, expected)
    assert padded.lengths.tolist() == [length, 1]
    assert padded.tokens.sum() == length + 2


@pytest.mark.parametrize(
    "batch, options, message",
    [
        ([[1], [1, 128]], {}, "prompt 1: token id 128 is not in 0 to 127"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"max_new_tokens": 2.5}, r"max_new_tokens must be an integer, got 2\.5"),
        ([[1]], {"max_new_tokens": [3, 4]}, "max_new_tokens has 2 entries for 1 prompts"),
        ([[1]], {"method": "kivi"}, r"method must be a cache such as kvq\.kivi\(\), got 'kivi'"),
        ([[1]], {"method": kvq.dense}, r"a cache such as kvq\.dense\(\), got <function dense"),
        ([[1]], {"method": 2}, r"method must be a cache such as kvq\.ott\(\), got 2"),
        ([[1]], {"stop_strings": "."}, "a bare decoder has no text: stop_strings needs a model"),
        ([[1]], {"stop_tokens": ["\n"]}, "stop_tokens takes token ids"),
        ([[1]], {"sampling": 0.7}, "sampling must be a Sampling"),
        ([[1]], {"seed": [1, 2]}, "seed has 2 entries for 1 prompts"),
        ([[1]], {"capacity": 65.5}, "capacity must be an integer"),
        ([[1] * 60], {"capacity": 100}, "need a capacity of 123, got 100"),
        ([[1]], {"capacity": 65, "steps_per_call": 5}, "5 a call, need a capacity of 66, got 65"),
        ([[1]], {"steps_per_call": 0}, "steps_per_call must be at least 1, got 0"),
        ([[1], [2]], {"stop_tokens": [[1]]}, "1 lists of stop tokens for 2 prompts"),
    ],
)
def test_bad_arguments_are_refused(decoder, batch, options, message, as_users_run_it):
    with pytest.raises(ValueError, match=message):
        kvq.generate(decoder, batch, **options)


def test_logits_that_are_not_finite_are_an_error():
    broken = load_decoder(FOLDER)
    broken.layers[1].mlp_norm.scale[...] = jnp.full_like(
        broken.layers[1].mlp_norm.scale[...], jnp.nan
    )
    with pytest.raises(FloatingPointError, match="logits of row 0 are not finite at new token 0"):
        kvq.generate(broken, prompts(5))


@pytest.mark.parametrize("step", [1, 2, 5])
def test_the_error_names_the_step_whose_logits_were_not_finite(decoder, monkeypatch, step):
    """Row 1 breaks; the steps before it are shown, the one under way is not."""
    drawing_step = loop.drawing_step

    def breaking(*args):
        run = drawing_step(*args)

        def broken(states, last, sampling):
            last, drawn, states = run(states, last, sampling)
            broke = (drawn.number >= step) & jnp.array([False, True])
            return last, drawn._replace(finite=drawn.finite & ~broke), states

        return broken

    monkeypatch.setattr(loop, "drawing_step", breaking)
    shown = []
    with pytest.raises(FloatingPointError, match=f"row 1 are not finite at new token {step}:"):
        kvq.generate(decoder, prompts(5, 5), max_new_tokens=8, on_tokens=shown.append)
    assert len(shown) == step


def test_draws_are_those_of_a_plain_loop(decoder):
    """Step by step on the host; rows code their groups at times."""
    sampling, ragged = kvq.Sampling(temperature=1.5, top_p=0.9), prompts(7, 40, 80)
    run, jitted = steps.decode_step(decoder, OTT), jax.jit(sample)
    states = init_states(decoder.config, OTT, 3, 512, jnp.float32)
    logits, states = steps.prefill(decoder, OTT, states, steps.pad(ragged))
    expected = []
    for i in range(60):
        expected.append(jitted(logits, per_row(sampling, 3, 3), jnp.full(3, i)))
        if i < 59:
            logits, states = run(states, expected[-1][:, None])
    result = kvq.generate(decoder, ragged, method=OTT, max_new_tokens=60, sampling=sampling, seed=3)
    assert result.tokens == np.stack(expected, 1).tolist()
    coded = [np.asarray(x[0].coded.num_coded) for x in (result.states, states)]
    np.testing.assert_array_equal(*coded)
    assert len(set(coded[0].tolist())) == 3


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_steps_of_a_call_are_those_of_as_many_calls(decoder, num_steps):
    """A row ends in the midst of a call, and the last call goes past the last token."""
    run = functools.partial(
        kvq.generate,
        decoder,
        prompts(7, 40, 80),
        method=kvq.dense(),
        max_new_tokens=13,
        sampling=DRAWN,
    )
    step = steps._jitted_drawing_step(jax.tree.structure(decoder), kvq.dense(), num_steps)
    step.clear_cache()
    free, shown = run().tokens, []
    result = run(
        steps_per_call=num_steps, stop_tokens=[(), (), free[2][6:7]], on_tokens=shown.append
    )
    assert result.tokens == [*free[:2], free[2][:7]]
    assert np.stack(shown, 1)[2].tolist() == free[2][:7] + [-1] * 6
    assert result.states[0].length[0] == 7 + -(-12 // num_steps) * num_steps
    assert step._cache_size() == 1


def test_groups_are_coded_before_a_call(decoder):
    """As a call that adds as many tokens would: that's what the windows are for."""
    num_steps, room, ragged = 5, OTT.with_room(5), prompts(7, 40, 80)
    states = init_states(decoder.config, OTT, 3, 512, jnp.float32)
    logits, states = steps.prefill(decoder, OTT, states, steps.pad(ragged))
    run = steps.decode_step(decoder, room)
    make_room = jax.jit(lambda states: OTT.make_room(states, num_steps)[0])
    expected = [logits.argmax(-1)]
    for i in range(60):
        if i % num_steps == 0:
            states = make_room(states)
        logits, states = run(states, expected[-1][:, None])
        expected.append(logits.argmax(-1))
    result = kvq.generate(decoder, ragged, method=OTT, max_new_tokens=61, steps_per_call=num_steps)
    assert result.tokens == np.stack(expected, 1).tolist()
    for got, want in zip(jax.tree.leaves(result.states), jax.tree.leaves(states), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_window_without_room_for_a_call_is_refused(decoder):
    method = kvq.ott(group_size=32, residual_length=2)
    with pytest.raises(ValueError, match=r"steps_per_call must be at most 3 .*, got 4"):
        kvq.generate(decoder, prompts(5), method=method, steps_per_call=4)


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("stop", [None, 0, 1, 2, 4, 6])
def test_a_step_runs_before_the_last_tokens_are_read(decoder, monkeypatch, new_tokens, stop):
    events = []

    def traced(*args):
        step = drawing_step(*args)
        return lambda *args: (events.append("step"), step(*args))[1]

    drawing_step = loop.drawing_step
    prompt = prompts(5)
    free = kvq.generate(decoder, prompt, max_new_tokens=7, seed=1, sampling=DRAWN).tokens[0]
    assert len(set(free)) == 7  # so that a stop token ends at its own step
    monkeypatch.setattr(loop, "drawing_step", traced)
    result = kvq.generate(
        decoder,
        prompt,
        max_new_tokens=new_tokens,
        seed=1,
        sampling=DRAWN,
        stop_tokens=() if stop is None else free[stop : stop + 1],
        on_tokens=lambda tokens: events.append(int(tokens[0])),
    )
    end = min(new_tokens, 7 if stop is None else stop + 1)
    assert result.tokens == [free[:end]]
    # The first two tokens are read before the next step; of the others, all but the last after.
    expected = []
    for i, token in enumerate(free[:end]):
        if i > 1 and i + 1 < new_tokens:
            expected += ["step"] * (2 if i == 2 else 1)
        elif i in (1, 2):
            expected.append("step")
        expected.append(token)
    assert events == expected
    assert result.states[0].length.tolist() == [5 + events.count("step")]


def test_draws_follow_the_seed(decoder):
    sampling = kvq.Sampling(temperature=1.5, top_k=50)

    def run(seed):
        return kvq.generate(
            decoder, prompts(5, 5), max_new_tokens=30, sampling=sampling, seed=seed
        ).tokens

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1)[0] != run(1)[1]
    assert run([5, 1])[0] == run(5)[0]
    assert run([5, 2])[1] == run([1, 2])[1] != run(2)[1]


def test_rows_end_at_their_own_lengths(decoder):
    batch = prompts(5, 9)
    free = kvq.generate(decoder, batch, max_new_tokens=9).tokens
    shown = []
    result = kvq.generate(decoder, batch, max_new_tokens=[9, 4], on_tokens=shown.append)
    assert result.tokens == [free[0], free[1][:4]]
    assert np.stack(shown)[:, 1].tolist() == free[1][:4] + [-1] * 5


@pytest.fixture(scope="module")
def model(decoder):
    """The decoder with a tokenizer of Llama 2's kind, which drops a space that comes first."""
    pieces = [f"{'' if i % 3 else '▁'}{chr(97 + i % 26)}{i}" for i in range(1, 128)]
    vocab = {piece: i for i, piece in enumerate(["<unk>", *pieces])}
    wrapped = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    wrapped.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(content=" ", left=1),
        ]
    )
    return LoadedModel(decoder, decoder.config, Tokenizer(wrapped))


def test_texts_join_on_to_their_prompts(model):
    batch = prompts(5, 9)
    result = kvq.generate(model, batch, method=kvq.dense(), max_new_tokens=12)
    for prompt, new, text in zip(batch, result.tokens, result.texts, strict=True):
        assert model.tokenizer.decode(prompt) + text == model.tokenizer.decode(prompt + new)
    assert any(text.startswith(" ") for text in result.texts)


def test_streams_give_the_text_of_generate(model):
    batch, options = prompts(5, 9), dict(method=kvq.dense(), max_new_tokens=12, sampling=DRAWN)
    expected = kvq.generate(model, batch, seed=[3, 4], **options)
    texts = ["", ""]
    for row, piece in (pairs := Returned(kvq.stream(model, batch, seed=[3, 4], **options))):
        assert piece
        texts[row] += piece
    assert texts == expected.texts == pairs.value.texts
    assert pairs.value.tokens == expected.tokens
    pieces = list(kvq.stream(model, batch[1], seed=4, **options))
    assert "".join(pieces) == texts[1]
    assert len(pieces) == 12


def test_stop_strings_end_rows(model):
    batch, options = prompts(5, 9), dict(method=kvq.dense(), max_new_tokens=12)
    free = kvq.generate(model, batch, **options)
    # From the last digit of a token into the next token.
    heads = [model.tokenizer.continuation(batch[0], free.tokens[0][:n]) for n in (1, 2)]
    stop = free.texts[0][len(heads[0]) - 1 : len(heads[1]) - 1]
    assert stop not in heads[0]
    stops = [[stop], ["never there"]]
    result = kvq.generate(model, batch, stop_strings=stops, **options)
    assert result.texts == [heads[0][:-1], free.texts[1]]
    assert result.tokens == [free.tokens[0][:2], free.tokens[1]]
    pieces = list(kvq.stream(model, batch, stop_strings=stops, **options))
    assert "".join(piece for row, piece in pieces if row == 0) == heads[0][:-1]
    assert "".join(piece for row, piece in pieces if row == 1) == free.texts[1]


def test_a_stream_that_is_closed_frees_the_cache(model, monkeypatch):
    ran = []

    def traced(*args):
        step = drawing_step(*args)
        return lambda *args: (ran.append(1), step(*args))[1]

    drawing_step = loop.drawing_step
    monkeypatch.setattr(loop, "drawing_step", traced)
    options = dict(method=kvq.dense(), max_new_tokens=99, capacity=4321)
    pieces = kvq.stream(model, prompts(5)[0], **options)
    for _ in zip(range(5), pieces, strict=False):
        pass
    held = [x for x in jax.live_arrays() if 4321 in x.shape]
    assert held
    del held
    pieces.close()
    assert not [x for x in jax.live_arrays() if 4321 in x.shape]
    assert len(ran) <= 7
    assert list(pieces) == []


def test_streams_check_their_arguments_at_the_call(decoder, model, as_users_run_it):
    with pytest.raises(ValueError, match="a bare decoder has no text: stream needs a model"):
        kvq.stream(decoder, [1])
    with pytest.raises(ValueError, match="token id 128 is not in"):
        kvq.stream(model, [128])


class Returned:
    """A generator that keeps what it returns."""

    def __init__(self, generator):
        self.generator = generator

    def __iter__(self):
        self.value = yield from self.generator
