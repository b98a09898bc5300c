# SPDX-License-Identifier: Apache-2.0
"""A cache whose layers are kept by different methods."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from kvq_jax.base import KV, CacheSpec, CacheTransform, Implementation, State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayeredState:
    """The state of one layer, and which method it is of: static, as shapes are.

    Attributes:
      state: of the method.
      kind: index of the method.
    """

    state: State
    kind: int = dataclasses.field(metadata={"static": True})

    @property
    def length(self) -> Int[Array, " B"]:
        """Tokens of each row."""
        return self.state.length


@dataclasses.dataclass(frozen=True)
class Layered(CacheTransform):
    """Keeps each layer by a method of its own.

    Args:
      methods: that occur, with the same windows; they take keys after rotary embedding and fit
        nothing to texts.
      kinds: index of each layer's method.
    """

    methods: tuple[CacheTransform, ...]
    kinds: tuple[int, ...]

    def __post_init__(self):
        if any(method.pre_rope or method.needs_texts for method in self.methods):
            raise ValueError("methods of single layers must need neither texts nor rope")
        if len({tuple(method.exact_calls(4096)) for method in self.methods}) > 1:
            raise ValueError("methods of single layers must code tokens in the same groups")

    @property
    def num_layers(self) -> int:
        """Number of layers that have methods; `init_states` compares it with the model's."""
        return len(self.kinds)

    @property
    def needs_prompt(self) -> bool:
        """Whether one of the methods does; see `CacheTransform`."""
        return any(method.needs_prompt for method in self.methods)

    def init(self, spec: CacheSpec, layer: int | None = None) -> LayeredState:
        """Returns the layer's empty cache; None takes the method of most layers.

        Raises:
          ValueError: for a layer beyond those that have methods.
        """
        if layer is not None and layer >= self.num_layers:
            raise ValueError(f"layer {layer} has no method: there are {self.num_layers}, one each")
        kind = max(self.kinds, key=self.kinds.count) if layer is None else self.kinds[layer]
        return LayeredState(self.methods[kind].init(spec, layer), kind)

    def capacity(self, state: LayeredState) -> int:
        """Returns the tokens a row can hold."""
        return self.methods[state.kind].capacity(state.state)

    def prefill(
        self,
        state: LayeredState,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        q: Float[Array, "B T N H"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> LayeredState:
        """Adds a right-padded batch of prompts; see `CacheTransform.prefill`."""
        method = self.methods[state.kind]
        new = method.prefill(state.state, k, v, q=q, lengths=lengths)
        return LayeredState(new, state.kind)

    def append(
        self, state: LayeredState, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
    ) -> LayeredState:
        """Adds T tokens to every row; see `CacheTransform.append`."""
        return LayeredState(self.methods[state.kind].append(state.state, k, v), state.kind)

    def make_room(
        self, states: tuple[LayeredState, ...], num_tokens: int
    ) -> tuple[tuple[LayeredState, ...], "Layered"]:
        """Makes room in all layers of a method at once; see `CacheTransform.make_room`."""
        made, methods = list(states), list(self.methods)
        for kind, method in enumerate(self.methods):
            layers = [i for i, state in enumerate(states) if state.kind == kind]
            if layers:
                new, methods[kind] = method.make_room(
                    tuple(states[i].state for i in layers), num_tokens
                )
                for i, state in zip(layers, new, strict=True):
                    made[i] = LayeredState(state, kind)
        return tuple(made), dataclasses.replace(self, methods=tuple(methods))

    def lacks_room(self, lengths: np.ndarray, num_tokens: int) -> bool:
        """Whether one of the methods does; see `CacheTransform.lacks_room`."""
        return any(method.lacks_room(lengths, num_tokens) for method in self.methods)

    def with_room(self, num_tokens: int) -> "Layered":
        """Returns the method of methods with room; see `CacheTransform.with_room`."""
        methods = tuple(method.with_room(num_tokens) for method in self.methods)
        return dataclasses.replace(self, methods=methods)

    def attend(
        self,
        state: LayeredState,
        q: Float[Array, "B T N H"],
        *,
        sm_scale: float | None = None,
        sliding_window: int | None = None,
        implementation: Implementation | None = None,
    ) -> Float[Array, "B T N H"]:
        """Returns the attention output of the last T tokens; see `CacheTransform.attend`."""
        return self.methods[state.kind].attend(
            state.state,
            q,
            sm_scale=sm_scale,
            sliding_window=sliding_window,
            implementation=implementation,
        )

    def read(self, state: LayeredState) -> KV:
        """Returns all tokens dense; see `CacheTransform.read`."""
        return self.methods[state.kind].read(state.state)

    def exact_calls(self, num_tokens: int) -> list[int]:
        """Cuts as all of the methods do; see `CacheTransform.exact_calls`."""
        return self.methods[0].exact_calls(num_tokens)


def unique_with_index(items: list[Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Returns the distinct items in order of appearance, and the index of each item's own."""
    distinct = tuple(dict.fromkeys(items))
    return distinct, tuple(distinct.index(item) for item in items)
