# SPDX-License-Identifier: Apache-2.0
"""Whether a model with a cache fits a TPU: asked of the real compiler, which needs neither.

One decode step of all layers is compiled, of shapes alone: no weights are made or downloaded.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from kvq_jax import aot
from kvq_jax.base import CacheSpec, CacheTransform, nbytes
from kvq_jax.decoding import steps
from kvq_jax.engines import Layered, Window
from kvq_jax.kernels.decode_attention import tpu
from kvq_jax.models import Decoder, DecoderConfig, init_states
from kvq_jax.models.decoder import cache_spec
from kvq_jax.models.sharding import partition_specs
from kvq_jax.sharding import Sharded

STEP = 1024
"""`Fit.max_context` is a multiple of this."""

MARGIN = 0.99
"""Share of a device's memory that is reckoned with: what compilers need differs a little, and when
they refuse they round."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """The compiler's answer, and what follows from it by arithmetic.

    Attributes:
      chip: one of `aot.CHIPS`.
      context: tokens of a row that were asked for.
      fits: whether the step compiled. It does not if its memory exceeds the device's.
      hbm_bytes: that a program may take of a device.
      required_bytes: that this one takes at once at the most, as the compiler says.
      weights_bytes: of all weights, unpadded.
      cache_bytes: of all layers' caches, unpadded.
      compiled: all that the compiler says; None if it does not fit.
      larger_chips: those that have `required_bytes`, the smallest first.
      max_context: tokens of a row that this chip has memory for, if what is neither weights nor
        cache grows with a longer cache and stays with a shorter one; 0 if there are none.
      num_devices: least number of these chips that have the memory, if weights and caches are
        shared out evenly, by KV heads, and each needs all the rest; None if there is none.
    """

    chip: str
    context: int
    fits: bool
    hbm_bytes: int
    required_bytes: int
    weights_bytes: int
    cache_bytes: int
    compiled: aot.Compiled | None
    larger_chips: tuple[str, ...]
    max_context: int
    num_devices: int | None


def fits(
    config: DecoderConfig,
    method: CacheTransform,
    chip: str,
    *,
    context: int,
    batch_size: int = 1,
    dtype: Any = jnp.bfloat16,
    timeout: float = 1800.0,
) -> Fit:
    """Compiles a decode step of a model for a chip, and tells whether it fits.

    Args:
      config: of the model.
      method: of the cache.
      chip: one of `aot.CHIPS`.
      context: tokens that a row of the cache can hold.
      batch_size: rows.
      dtype: of weights, activations and what the cache doesn't code.
      timeout: seconds to wait for the compiler.

    Raises:
      aot.CompileError: the step does not compile, for another reason than its size.
      ModuleNotFoundError: libtpu isn't installed.
      TimeoutError: it took too long.
    """
    step = Step(config, method, context, batch_size, dtype)
    try:
        compiled = step.compile_for(chip, timeout)
        required = compiled.peak_bytes
    except aot.DoesNotFit as error:
        compiled, required = None, error.required_bytes

    method = step.method
    weights, cache = nbytes(step.decoder), nbytes(step.states)
    rest = max(0, required - weights - cache)

    hbm = aot.CHIPS[chip].hbm_bytes

    def has_room(context: int, num_devices: int) -> bool:
        spec = cache_spec(config, method, batch_size, context, dtype)
        kinds = method.kinds if isinstance(method, Layered) else (0,) * config.num_layers
        grown = 0
        for kind in set(kinds):  # layers of one kind are of one shape
            state = jax.eval_shape(functools.partial(method.init, spec, kinds.index(kind)))
            grown += kinds.count(kind) * nbytes(state)
        # Padding grows with the cache, temporaries hardly do: on the safe side for both.
        more = rest * max(1, grown / cache)
        return (weights + grown) / num_devices + more <= MARGIN * hbm

    longest = STEP * _last(lambda n: has_room(n * STEP, 1))
    counts = [n for n in range(2, config.num_kv_heads + 1) if config.num_kv_heads % n == 0]
    if isinstance(method, Window) and method.shares_heads:
        counts = []
    chips = sorted(aot.CHIPS.values(), key=lambda other: other.hbm_bytes)
    return Fit(
        chip=chip,
        context=context,
        fits=compiled is not None,
        hbm_bytes=hbm,
        required_bytes=required,
        weights_bytes=weights,
        cache_bytes=cache,
        compiled=compiled,
        larger_chips=tuple(
            x.name for x in chips if x.hbm_bytes > hbm and required <= MARGIN * x.hbm_bytes
        ),
        # Where they differ, the compiler is right.
        max_context=max(longest, context)
        if compiled
        else min(longest, (context - 1) // STEP * STEP),
        num_devices=1 if compiled else next((n for n in counts if has_room(context, n)), None),
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """A decode step of all layers, of shapes alone.

    Args:
      config: of the model.
      method: of the cache.
      context: tokens that a row of the cache can hold.
      batch_size: rows.
      dtype: of weights, activations and what the cache doesn't code.
      num_devices: that share the KV heads.
    """

    config: DecoderConfig
    method: CacheTransform
    context: int
    batch_size: int = 1
    dtype: Any = jnp.bfloat16
    num_devices: int = 1

    def __post_init__(self):
        method = _as_on_tpu(self.config, self.method, self.dtype)
        method = Sharded(method) if self.num_devices > 1 else method
        object.__setattr__(self, "method", method)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The model, of shapes."""
        return _abstract_decoder(self.config, self.dtype)

    @functools.cached_property
    def states(self) -> tuple[Any, ...]:
        """All layers' caches, of shapes."""
        sizes = self.batch_size, self.context, self.dtype
        return jax.eval_shape(functools.partial(init_states, self.config, self.method, *sizes))

    def compile_for(self, chip: str, timeout: float = 1800.0) -> aot.Compiled:
        """Compiles it; see `aot.compile_for`.

        Raises:
          aot.DoesNotFit: its memory exceeds that of a device.
        """
        mesh = specs = None
        if isinstance(self.method, Sharded):
            spec = cache_spec(self.config, self.method, self.batch_size, self.context, self.dtype)
            of_weights = jax.tree.leaves(partition_specs(self.decoder))
            of_states = (self.method.partition_specs(spec),) * self.config.num_layers
            mesh, specs = {"heads": self.num_devices}, [of_weights, of_states, PartitionSpec()]
        return aot.compile_for(
            chip,
            functools.partial(decode_step, self.config, self.method, self.dtype),
            jax.tree.leaves(self.decoder),
            self.states,
            jax.ShapeDtypeStruct((self.batch_size, 1), jnp.int32),
            donate_argnums=1,
            mesh=mesh,
            specs=specs,
            timeout=timeout,
        )


def decode_step(
    config: DecoderConfig,
    method: CacheTransform,
    dtype: Any,
    params: list[Array],
    states: tuple[Any, ...],
    tokens: Int[Array, "B 1"],
) -> tuple[Array, tuple[Any, ...]]:
    """Is `steps.decode_step` as a function of arrays: what `fits` compiles.

    Args:
      config: of the model.
      method: of the cache.
      dtype: of the decoder.
      params: leaves of the decoder.
      states: of all layers; to be donated.
      tokens: the latest of each row.
    """
    structure = jax.tree.structure(_abstract_decoder(config, dtype))
    decoder = jax.tree.unflatten(structure, params)
    return steps.decode_step(decoder, method)(states, tokens)


def _as_on_tpu(config: DecoderConfig, method: CacheTransform, dtype: Any) -> CacheTransform:
    """Returns the method with the layout that its codes have on a TPU, not on this machine."""
    if isinstance(method, Layered):
        methods = tuple(_as_on_tpu(config, x, dtype) for x in method.methods)
        return dataclasses.replace(method, methods=methods)
    if not isinstance(method, Window):
        return method
    spec = CacheSpec(1, config.num_kv_heads, 1, config.head_dim, dtype)
    codecs = method.key_codec, method.value_codec
    suits = tpu.suits(spec, *codecs, method.group_size)
    return dataclasses.replace(method, layout="tpu" if suits else "plain")


def _abstract_decoder(config: DecoderConfig, dtype: Any) -> Decoder:
    """Returns a decoder of shapes instead of arrays."""
    return nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))


def _last(holds) -> int:
    """Returns the last number from 1 on for which it still holds, or 0."""
    high = 1
    while holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
