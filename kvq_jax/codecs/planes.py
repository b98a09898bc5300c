# SPDX-License-Identifier: Apache-2.0
"""Transform coding: latent channels of a token, each with bits of its own, a plane for each bit."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from kvq_jax import packing
from kvq_jax.base import CacheSpec, Params
from kvq_jax.codecs.base import Codec, Sample

MOST_BITS = 8
"""Of a latent channel."""

_KINDS = 2
"""Planes before those of the channels: of the tokens that are there, and of those not finite."""

_NO_BIT = 31
"""The shift of a plane that only fills up: no level has that many bits."""

_SHRINKAGE = 0.05
"""Of the mean square of a gradient, added to the metric: no direction is without weight."""

_TAILS = (0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
"""Shares of the numbers left out at each end, where the search for the best levels starts."""

_ROUNDS = 2
"""Of the search from each start."""


class PlanesCode(NamedTuple):
    """The planes of a group, each a bit a token, packed along tokens; each head has a K-th."""

    words: UInt32[Array, "B K *d R p"]


class PlanesParams(NamedTuple):
    """What `Planes` are fitted to; C latent channels have bits, P' planes hold them.

    Attributes:
      mean: of vectors.
      analysis: the direction of each latent channel, bfloat16.
      offset: of the channels' level 0.
      step: from level to level.
      top: highest level of each channel.
      channel: of which each plane has a bit.
      shift: which bit.
      constant: what all levels 0 stand for.
      synthesis: what 1 in a latent channel adds, bfloat16.
    """

    mean: Float[Array, "1 D"]
    analysis: Float[Array, "1 D C"]
    offset: Float[Array, "1 C"]
    step: Float[Array, "1 C"]
    top: UInt8[Array, "1 C"]
    channel: Int[Array, "1 p"]
    shift: UInt8[Array, "1 p"]
    constant: Float[Array, "1 D"]
    synthesis: Float[Array, "1 C D"]


@dataclasses.dataclass(frozen=True)
class Planes(Codec):
    """Codes all heads of a token together, as levels of latent channels, static ones.

    With x the D = K H numbers of a token, the level of a channel of b bits is

        round(((x - mean) · analysis - offset) / step), cut to 0 ... 2**b - 1

    and the token is decoded to constant + sum of level * step * synthesis. As the bits of all
    levels are planes of 0 and 1 with a plane of ones besides, that is one product with a matrix
    whose rows are step * 2**shift * synthesis, and the constant. So how many bits a channel has
    is data; static are only the number of planes and of channels, in each layer.

    A hole is all zero, in all heads: of a mask, the first head's counts.

    Args:
      weighs: fit with the metric of the loss's gradients (Fisher), not with plain distance.
      sizes: planes and channels of each layer; known when all layers are fitted.
      params: `PlanesParams`, set by `bind`.
    """

    weighs: bool = True
    sizes: tuple[tuple[int, int], ...] = ()
    params: Any = ()
    fits = "texts"

    @property
    def shares_heads(self) -> bool:
        """Is true; see `Part`."""
        return True

    def of_layer(self, layer: int | None) -> "Planes":
        """Returns the codec with the sizes of a layer alone, or of most layers."""
        if not self.sizes:
            raise ValueError(
                "how many bits each layer has is not known before it is fitted to texts: "
                "calibration = kvq_jax.calibrate(model, texts, method) makes the method to use, "
                "calibration.method, and its parameters"
            )
        if layer is None:
            layer = max(range(len(self.sizes)), key=lambda i: self.sizes.count(self.sizes[i]))
        if layer >= len(self.sizes):
            raise ValueError(f"layer {layer} was not fitted: there were {len(self.sizes)}")
        return dataclasses.replace(self, sizes=(self.sizes[layer],))

    def init(self, spec: CacheSpec) -> Params:
        """Returns NaN in the shapes of one layer's parameters."""
        ((planes, channels),) = self.sizes
        width, held = spec.num_kv_heads * spec.head_dim, planes - _KINDS
        return PlanesParams(
            mean=jnp.full((1, width), jnp.nan),
            analysis=jnp.full((1, width, channels), jnp.nan, jnp.bfloat16),
            offset=jnp.full((1, channels), jnp.nan),
            step=jnp.full((1, channels), jnp.nan),
            top=jnp.zeros((1, channels), jnp.uint8),
            channel=jnp.zeros((1, held), jnp.int16),
            shift=jnp.zeros((1, held), jnp.uint8),
            constant=jnp.full((1, width), jnp.nan),
            synthesis=jnp.full((1, channels, width), jnp.nan, jnp.bfloat16),
        )

    def bind(self, params: Params) -> "Planes":
        """Returns the codec of these parameters."""
        return dataclasses.replace(self, params=params)

    def encode(
        self, x: Float[Array, "B K n S H"], mask: Bool[Array, "B K n S"] | None = None
    ) -> PlanesCode:
        """Returns the code of x; see `Codec.encode`."""
        p, num_heads = self.params, x.shape[1]
        x = jnp.moveaxis(x, 1, -2).astype(jnp.float32)
        x = x.reshape(*x.shape[:-2], -1)  # [B, n, S, D]
        z = jnp.einsum(
            "...d,dc->...c", x - p.mean[0], p.analysis[0].astype(x.dtype), precision="highest"
        )
        level = jnp.round((z - p.offset[0]) / p.step[0]).clip(0, p.top[0].astype(x.dtype))
        finite = (jnp.isfinite(x).all(-1) & jnp.isfinite(level).all(-1))[..., None]
        level = jnp.where(finite, level, 0).astype(jnp.uint32)
        bits = jnp.take(level, p.channel[0], axis=-1) >> p.shift[0].astype(jnp.uint32) & 1
        bits = jnp.concatenate([jnp.ones_like(finite), ~finite, bits.astype(bool)], -1)
        if mask is not None:
            bits &= mask[:, 0, ..., None]
        bits = bits.reshape(*bits.shape[:-1], num_heads, -1)
        return PlanesCode(packing.pack(jnp.moveaxis(bits, -2, 1).astype(jnp.uint8), 1))

    def decode(self, code: PlanesCode, dtype: Any) -> Float[Array, "B K *d S H"]:
        """Returns the tensor that a code stands for, computed in float32; holes are 0."""
        p, num_heads = self.params, code.words.shape[1]
        bits = jnp.moveaxis(packing.unpack(code.words, 1), 1, -2)
        bits = bits.reshape(*bits.shape[:-2], -1)  # [B, *d, S, P]
        size = p.step[0, p.channel[0]] * jnp.exp2(p.shift[0].astype(jnp.float32))
        rows = size[:, None] * p.synthesis[0, p.channel[0]].astype(jnp.float32)
        rows = jnp.concatenate([p.constant, jnp.zeros_like(p.constant), rows])
        x = jnp.einsum("...p,pd->...d", bits.astype(jnp.float32), rows, precision="highest")
        x = jnp.where(bits[..., 1:2] == 1, jnp.nan, x).astype(dtype)
        return jnp.moveaxis(x.reshape(*x.shape[:-1], num_heads, -1), -2, 1)

    def mask(self, code: PlanesCode) -> Bool[Array, "B K *d S"]:
        """Returns False where a token is a hole."""
        present = packing.unpack(code.words[:, :1, ..., :1], 1)[..., 0] == 1
        return jnp.broadcast_to(present, (*code.words.shape[:2], *present.shape[2:]))


class Latents(NamedTuple):
    """Latent channels of one layer's keys or values, and their codes of 0 to 8 bits.

    Attributes:
      mean: of the vectors.
      analysis: the direction of each channel, a column each.
      synthesis: its inverse.
      offset: of level 0, by channel and bits.
      step: from level to level.
      error: mean square that is left, in the metric: what it adds to the loss, twice.
    """

    mean: Float[np.ndarray, " D"]
    analysis: Float[np.ndarray, "D D"]
    synthesis: Float[np.ndarray, "D D"]
    offset: Float[np.ndarray, "D choices"]
    step: Float[np.ndarray, "D choices"]
    error: Float[np.ndarray, "D choices"]


def find_latents(sample: Sample) -> Latents:
    """Returns the latent channels of a sample of one row without padding.

    With C the covariance of the vectors and M the root of F, the mean square of the gradients (I
    without them), they are the principal directions U of M C M: analysis M U, synthesis Uᵀ M⁻¹.
    Squared errors of the channels add up to eᵀ F e, which is twice what an error e of the vector
    adds to the loss, to second order.

    Raises:
      ValueError: for gradients of nothing but zeros.
    """
    num_tokens = sample.x.shape[1]
    x = np.asarray(sample.x, np.float64).reshape(num_tokens, -1)
    width = x.shape[1]
    root = inverse = np.eye(width)
    if sample.gradient is not None:
        gradient = np.asarray(sample.gradient, np.float64).reshape(num_tokens, width)
        metric = gradient.T @ gradient / num_tokens
        if not metric.any():
            raise ValueError("the loss has no gradient: windows of text must be longer")
        metric += _SHRINKAGE * np.trace(metric) / width * np.eye(width)
        square, axes = np.linalg.eigh(metric)
        root, inverse = (axes * square**power @ axes.T for power in (0.5, -0.5))
    mean = x.mean(0)
    x -= mean
    _, axes = np.linalg.eigh(root @ (x.T @ x / num_tokens) @ root)
    axes = axes[:, ::-1]
    tables = _search(jnp.asarray(x @ root @ axes, jnp.float32))
    return Latents(mean, root @ axes, axes.T @ inverse, *(np.asarray(a).T for a in tables))


@jax.jit
def _search(z: Float[Array, "n D"]) -> tuple[Array, Array, Array]:
    """Returns offset, step and mean square error of each channel with 0 to 8 bits."""
    mean, spread = z.mean(0), z.std(0)
    u = (z - mean) / jnp.where(spread == 0, 1, spread)

    def levels(offset: Array, step: Array, top: Array) -> Array:
        return jnp.round((u - offset) / step).clip(0, top)

    def start(case: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """Spreads the levels over a range; then line and levels fit each other."""
        low, high, top = case
        step = jnp.maximum((high - low) / (top + 1), 1e-6)
        offset = low + step / 2
        for _ in range(_ROUNDS):
            level = levels(offset, step, top)
            centred = level - level.mean(0)
            slope = (centred * u).mean(0) / jnp.maximum(jnp.square(centred).mean(0), 1e-12)
            step = jnp.maximum(slope, 1e-6)
            offset = u.mean(0) - step * level.mean(0)
        error = jnp.square(u - offset - step * levels(offset, step, top)).mean(0)
        return offset, step, error

    ends = (jnp.quantile(u, jnp.array(x), axis=0) for x in (_TAILS, [1 - x for x in _TAILS]))
    ranges = (jnp.tile(x, (MOST_BITS, 1)) for x in ends)
    top = jnp.array([2.0**bits - 1 for bits in range(1, MOST_BITS + 1)])
    tried = jax.lax.map(start, (*ranges, jnp.repeat(top, len(_TAILS))))
    tried = [x.reshape(MOST_BITS, len(_TAILS), -1) for x in tried]
    best = tried[2].argmin(1, keepdims=True)
    nothing = jnp.zeros_like(mean), jnp.ones_like(mean), jnp.square(u).mean(0)
    offset, step, error = (
        jnp.concatenate([without[None], jnp.take_along_axis(x, best, 1)[:, 0]])
        for without, x in zip(nothing, tried, strict=True)
    )
    return mean + offset * spread, step * spread, error * jnp.square(spread)


def allot(errors: Float[np.ndarray, "n choices"], budget: int) -> Int[np.ndarray, " n"]:
    """Returns bits of each channel, of least total error within a budget of bits.

    Bits go one by one to whom they help most, by the lower convex hull of each channel's errors.
    No choice within the budget is better where that runs out at a corner of a hull.

    Args:
      errors: of each channel with 0 bits, 1 bit and so on.
      budget: bits of all.
    """
    hull = errors.copy()
    for i, j in itertools.combinations(range(errors.shape[1]), 2):
        for k in range(i + 1, j):
            line = (errors[:, i] * (j - k) + errors[:, j] * (k - i)) / (j - i)
            hull[:, k] = np.minimum(hull[:, k], line)
    gains = -np.diff(hull, axis=1)
    # What sums round to must not let a channel's later bit go before an earlier one.
    gains = np.minimum.accumulate(gains, axis=1)
    order = np.argsort(-gains, axis=None, kind="stable")[:budget]
    order = order[gains.ravel()[order] > 0]
    return np.bincount(order // gains.shape[1], minlength=len(errors))


def make_params(
    latents: Latents, bits: Int[np.ndarray, " D"], num_heads: int
) -> tuple[PlanesParams, tuple[int, int]]:
    """Returns parameters for bits of each channel, and the numbers of planes and channels."""
    channels = np.union1d([0], np.flatnonzero(bits))  # one at the least, if without bits
    bits = bits[channels]
    planes = -(-(_KINDS + bits.sum()) // num_heads) * num_heads
    filling = planes - _KINDS - bits.sum()
    analysis = latents.analysis[:, channels].astype(jnp.bfloat16)
    synthesis = latents.synthesis[channels].astype(jnp.bfloat16)
    offset, step = (x[channels, bits].astype(np.float32) for x in (latents.offset, latents.step))
    channel = np.repeat(np.arange(len(bits)), bits)
    shift = np.concatenate([np.arange(b) for b in [*bits, 0]])
    made = dict(
        mean=latents.mean.astype(np.float32),
        analysis=analysis,
        offset=offset,
        step=step,
        top=(2**bits - 1).astype(np.uint8),
        channel=np.pad(channel, (0, filling)).astype(np.int16),
        shift=np.pad(shift, (0, filling), constant_values=_NO_BIT).astype(np.uint8),
        constant=(latents.mean + offset @ synthesis.astype(np.float32)).astype(np.float32),
        synthesis=synthesis,
    )
    params = PlanesParams(**{name: jnp.asarray(x)[None] for name, x in made.items()})
    return params, (int(planes), len(channels))
