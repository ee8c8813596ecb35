"""The shape of a transformer: how many weights it has, and what it keeps for each token.

A model is a stack of layers; each layer mixes tokens (attention of one kind or another) and has
a feed-forward part (dense, experts, or both). All counts are per device of a tensor-parallel
group of `tensor_parallel` devices: heads and feed-forward columns are divided, norms, routers
and low-rank down-projections are not, and a key-value head is copied once there are more devices
than heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Softmax attention with grouped heads, in `layers` layers."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window_tokens: int | None = None
    """Only this many last tokens are attended to, and kept."""
    stores_values: bool = True
    """False: keys serve as values too."""
    gated: bool = False
    """The query projection also makes a gate of the same width."""
    bias: bool = False
    qk_norm: bool = False

    state_elements = 0

    def parameters(self, hidden: int, tensor_parallel: int = 1) -> int:
        """Weights of one layer on one device."""
        heads, kv_heads = self.heads // tensor_parallel, self._kv_heads(tensor_parallel)
        key_values = (1 + self.stores_values) * kv_heads
        rows = (1 + self.gated) * heads + key_values
        count = hidden * self.head_dim * (rows + heads)
        if self.bias:
            count += self.head_dim * (heads + key_values)
        return count + self.qk_norm * 2 * self.head_dim

    def kv_elements(self, tensor_parallel: int = 1) -> int:
        """Numbers kept per token, by one layer on one device."""
        return (1 + self.stores_values) * self._kv_heads(tensor_parallel) * self.head_dim

    def pair_flops(self, tensor_parallel: int = 1) -> int:
        """Operations for one token that attends to one other, in one layer on one device."""
        return 4 * (self.heads // tensor_parallel) * self.head_dim

    def divides(self, tensor_parallel: int) -> bool:
        """Whether the heads can be divided: key-value heads evenly, or copied evenly."""
        more, fewer = max(self.kv_heads, tensor_parallel), min(self.kv_heads, tensor_parallel)
        return self.heads % tensor_parallel == 0 and more % fewer == 0

    def _kv_heads(self, tensor_parallel: int) -> int:
        return max(1, self.kv_heads // tensor_parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek): one compressed vector per token for all heads,
    held by every device."""

    layers: int
    heads: int
    kv_rank: int
    query_rank: int | None
    """None: queries are projected directly."""
    rope_dim: int
    nope_dim: int
    value_dim: int

    window_tokens = None
    state_elements = 0

    def parameters(self, hidden: int, tensor_parallel: int = 1) -> int:
        """Weights of one layer on one device; the down-projections are whole on each."""
        heads = self.heads // tensor_parallel
        query_width = heads * (self.rope_dim + self.nope_dim)
        if self.query_rank is None:
            query = hidden * query_width
        else:
            query = self.query_rank * (hidden + query_width + 1)
        down = hidden * (self.kv_rank + self.rope_dim) + self.kv_rank
        up = self.kv_rank * heads * (self.nope_dim + self.value_dim)
        return query + down + up + heads * self.value_dim * hidden

    def kv_elements(self, tensor_parallel: int = 1) -> int:
        """Numbers kept per token, by one layer on one device."""
        return self.kv_rank + self.rope_dim

    def pair_flops(self, tensor_parallel: int = 1) -> int:
        """Operations for one token that attends to one other, in one layer on one device."""
        width = self.rope_dim + self.nope_dim + self.value_dim
        return 2 * (self.heads // tensor_parallel) * width

    def divides(self, tensor_parallel: int) -> bool:
        """Whether the heads can be divided."""
        return self.heads % tensor_parallel == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttention:
    """Gated delta-rule layers (Qwen3-Next and later): a state of fixed size per sequence in the
    place of keys and values."""

    layers: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    """Taps of the short convolution before the recurrence."""

    window_tokens = None

    @property
    def state_elements(self) -> int:
        """Numbers kept per sequence, by one layer."""
        recurrent = self.value_heads * self.key_dim * self.value_dim
        return recurrent + (self.kernel - 1) * self._mixed_width(1)

    def parameters(self, hidden: int, tensor_parallel: int = 1) -> int:
        """Weights of one layer on one device."""
        mixed, heads = self._mixed_width(tensor_parallel), self.value_heads // tensor_parallel
        gate_and_out = 2 * heads * self.value_dim
        return hidden * (mixed + gate_and_out + 2 * heads) + mixed * self.kernel

    def kv_elements(self, tensor_parallel: int = 1) -> int:
        """None per token."""
        return 0

    def pair_flops(self, tensor_parallel: int = 1) -> int:
        """None: the cost does not depend on what came before."""
        return 0

    def divides(self, tensor_parallel: int) -> bool:
        """Whether the heads can be divided."""
        return self.key_heads % tensor_parallel == 0 == self.value_heads % tensor_parallel

    def _mixed_width(self, tensor_parallel: int) -> int:
        keys = 2 * self.key_heads * self.key_dim
        return (keys + self.value_heads * self.value_dim) // tensor_parallel


Mixer: TypeAlias = Attention | LatentAttention | LinearAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Weights held by one device, by how quantisation treats them."""

    embedding: int
    """The input table."""
    head: int
    """The output table; 0 when it is the input's."""
    linear: int
    """All layers, less the experts; norms and biases are in it."""
    experts: int
    """Routed experts, all of them."""
    tower: int
    """The vision tower."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.head + self.linear + self.experts + self.tower


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What memory and time depend on in a model."""

    name: str
    hidden: int
    intermediate: int
    """Width of the dense feed-forward part."""
    vocabulary: int
    max_positions: int
    mixers: tuple[Mixer, ...]
    """Layers by kind of attention."""
    dense_layers: int
    """Layers with a dense feed-forward part."""
    expert_layers: int = 0
    """Layers with experts; a layer may have both."""
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    """Width of what every token passes besides its experts."""
    tied_embeddings: bool = False
    tower_parameters: int = 0
    quantisation: str | None = None
    """What the checkpoint itself is stored in, where its configuration says so."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        return sum(mixer.layers for mixer in self.mixers)

    @property
    def widest_step(self) -> int:
        """Feed-forward width that one token passes in one layer."""
        routed = self.experts_per_token * self.expert_intermediate + self.shared_intermediate
        return max(self.intermediate if self.dense_layers else 0, routed)

    def parameters(self, tensor_parallel: int = 1) -> Parameters:
        """Weights on one device of the group."""
        table = -(-self.vocabulary // tensor_parallel) * self.hidden
        column = 3 * self.hidden  # up, gate and down of one feed-forward column
        mixing = sum(m.layers * m.parameters(self.hidden, tensor_parallel) for m in self.mixers)
        dense = (
            self.dense_layers * self.intermediate + self.expert_layers * self.shared_intermediate
        )
        routed = self.expert_layers * self.experts * self.expert_intermediate
        whole = (2 * self.layers + 1) * self.hidden  # norms
        whole += self.expert_layers * self.experts * self.hidden  # routers
        return Parameters(
            embedding=table,
            head=0 if self.tied_embeddings else table,
            linear=mixing + column * dense // tensor_parallel + whole,
            experts=column * routed // tensor_parallel,
            tower=self.tower_parameters,
        )

    def divides(self, tensor_parallel: int) -> bool:
        """Whether a group of this size can hold the model: heads and widths divide evenly."""
        widths = (
            self.intermediate * (self.dense_layers > 0),
            self.expert_intermediate,
            self.shared_intermediate,
        )
        return (
            tensor_parallel >= 1
            and all(m.divides(tensor_parallel) for m in self.mixers)
            and not any(width % tensor_parallel for width in widths)
        )
