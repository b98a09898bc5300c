# SPDX-License-Identifier: Apache-2.0
"""The sizes and switches of a decoder, whatever file they were read from."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderConfig:
    """Static description of a decoder-only transformer.

    Attributes:
      vocab_size: V, number of tokens.
      width: M, model width.
      num_layers: L.
      num_q_heads: N; query head n attends to KV head n // (N // K).
      num_kv_heads: K, divides N.
      head_dim: H, even, because rope turns pairs of channels.
      mlp_width: hidden width of the gated MLP.
      max_length: tokens the model was trained for; a longer context is not an error.
      norm_eps: added to the mean square in RMSNorm.
      rope_theta: base of the rope frequencies.
      rope_divisors: H // 2 numbers dividing the rope frequencies (context extension as in
        Llama 3), or None.
      sliding_window: a query sees this many tokens, itself included; None means all.
      tie_embeddings: whether the unembedding is the embedding.
      qkv_bias: whether the query, key and value projections have a bias.
      o_bias: whether the output projection has a bias.
      mlp_bias: whether the MLP's projections have a bias.
      qk_norm: whether queries and keys are RMS-normalized per head before rope.

    Raises:
      ValueError: sizes that fit no decoder.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_length: int
    norm_eps: float
    rope_theta: float
    rope_divisors: tuple[float, ...] | None = None
    sliding_window: int | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "width",
            "num_layers",
            "num_q_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_width",
            "max_length",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads={self.num_q_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, got {self.head_dim}")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise ValueError(
                f"rope_divisors needs head_dim // 2 = {self.head_dim // 2} numbers, "
                f"got {len(self.rope_divisors)}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be positive or None, got {self.sliding_window}")
