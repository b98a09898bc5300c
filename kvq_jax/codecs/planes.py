# SPDX-License-Identifier: Apache-2.0
"""Transform coding: latent channels of a token, each with bits of its own, a plane for each bit."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from kvq_jax import packing
from kvq_jax.base import CacheSpec, Params
from kvq_jax.codecs.base import Codec, Sample

MOST_BITS = 8
"""Of a latent channel."""

_KINDS = 2
"""Planes before those of the channels: of the tokens that are there, and of those not finite."""

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
    """What `Planes` are fitted to; C latent channels have bits, those of the most bits first.

    Attributes:
      mean: of vectors.
      analysis: the direction of each latent channel, bfloat16.
      offset: of the channels' level 0.
      steps: what each bit adds to a latent channel, `1 n` of the n channels that have it: the
        lowest bit, the next, and so on.
      constant: what all levels 0 stand for.
      synthesis: what 1 in a latent channel adds, bfloat16.
    """

    mean: Float[Array, "1 D"]
    analysis: Float[Array, "1 D C"]
    offset: Float[Array, "1 C"]
    steps: tuple[Float[Array, "1 n"], ...]
    constant: Float[Array, "1 D"]
    synthesis: Float[Array, "1 C D"]


@dataclasses.dataclass(frozen=True)
class Planes(Codec):
    """Codes all heads of a token together, as levels of latent channels, static ones.

    With x the D = K H numbers of a token, the level of a channel of b bits is

        round(((x - mean) · analysis - offset) / step), cut to 0 ... 2**b - 1

    and the token is decoded to constant + sum of level * step * synthesis. Planes hold the lowest
    bits of all channels, then the next ones, of fewer channels, and so on.

    A hole is all zero, in all heads: of a mask, the first head's counts.

    Args:
      weighs: fit with the metric of the loss's gradients (Fisher), not with plain distance.
      sizes: of each layer, how many channels have a lowest bit, a next one, and so on; known when
        all layers are fitted.
      params: `PlanesParams`, set by `bind`.
    """

    weighs: bool = True
    sizes: tuple[tuple[int, ...], ...] = ()
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
        (counts,) = self.sizes
        width, channels = spec.num_kv_heads * spec.head_dim, max(1, *counts[:1])
        if channels > width:
            raise ValueError(f"{channels} latent channels are more than the {width} of a token")
        return PlanesParams(
            mean=jnp.full((1, width), jnp.nan),
            analysis=jnp.full((1, width, channels), jnp.nan, jnp.bfloat16),
            offset=jnp.full((1, channels), jnp.nan),
            steps=tuple(jnp.full((1, n), jnp.nan) for n in counts),
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
        counts = [step.shape[-1] for step in p.steps]
        widths = (np.arange(z.shape[-1])[:, None] < counts).sum(1)
        step = p.steps[0][0] if counts else 1
        level = jnp.round((z - p.offset[0]) / step).clip(0, 2.0**widths - 1)
        finite = (jnp.isfinite(x).all(-1) & jnp.isfinite(level).all(-1))[..., None]
        level = jnp.where(finite, level, 0).astype(jnp.uint32)
        bits = [(level[..., :n] >> shift & 1).astype(bool) for shift, n in enumerate(counts)]
        bits = jnp.concatenate([jnp.ones_like(finite), ~finite, *bits], -1)
        filling = -bits.shape[-1] % num_heads
        bits = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, filling)])
        if mask is not None:
            bits &= mask[:, 0, ..., None]
        bits = bits.reshape(*bits.shape[:-1], num_heads, -1)
        return PlanesCode(packing.pack(jnp.moveaxis(bits, -2, 1).astype(jnp.uint8), 1))

    def decode(self, code: PlanesCode, dtype: Any) -> Float[Array, "B K *d S H"]:
        """Returns the tensor that a code stands for, computed in float32; holes are 0."""
        p, num_heads = self.params, code.words.shape[1]
        words = jnp.moveaxis(code.words, 1, -2)
        bits = packing.unpack(words.reshape(*words.shape[:-2], -1), 1)  # [B, *d, S, P]
        z = jnp.zeros((*bits.shape[:-1], p.offset.shape[-1]))
        at = _KINDS
        for step in p.steps:
            n = step.shape[-1]
            part = bits[..., at : at + n].astype(jnp.float32) * step[0]
            z += jnp.pad(part, [(0, 0)] * (z.ndim - 1) + [(0, z.shape[-1] - n)])
            at += n
        synthesis = p.synthesis[0].astype(jnp.float32)
        x = p.constant[0] + jnp.einsum("...c,cd->...d", z, synthesis, precision="highest")
        x = jnp.where(bits[..., :1] == 1, x, 0)
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


def make_params(
    latents: Latents, bits: Int[np.ndarray, " D"]
) -> tuple[PlanesParams, tuple[int, ...]]:
    """Returns parameters for bits of each channel, and how many channels have each bit."""
    channels = np.argsort(-bits, kind="stable")[: max(1, np.count_nonzero(bits))]
    bits = bits[channels]
    counts = tuple(int((bits > bit).sum()) for bit in range(bits.max()))
    analysis = latents.analysis[:, channels].astype(jnp.bfloat16)
    synthesis = latents.synthesis[channels].astype(jnp.bfloat16)
    offset, step = (x[channels, bits].astype(np.float32) for x in (latents.offset, latents.step))
    constant = latents.mean + offset @ synthesis.astype(np.float32)
    params = PlanesParams(
        mean=jnp.asarray(latents.mean, jnp.float32)[None],
        analysis=jnp.asarray(analysis)[None],
        offset=jnp.asarray(offset)[None],
        steps=tuple(jnp.asarray(step[None, :n] * 2**bit) for bit, n in enumerate(counts)),
        constant=jnp.asarray(constant, jnp.float32)[None],
        synthesis=jnp.asarray(synthesis)[None],
    )
    return params, counts
