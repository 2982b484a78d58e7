"""How long a step takes at best: operations, bytes and messages counted by hand, over the chip's published peaks.

No credit for overlap between chips' messages and their work, none for anything left out: a bound to compare with.
"""

from __future__ import annotations

from typing import NamedTuple

from allmrec_jax.data.packing import Room
from allmrec_jax.planning.chips import Chip
from allmrec_jax.planning.programs import Programs


class Work(NamedTuple):
    """Of one pass through the LLM, on each chip."""

    flops: float
    bytes: float
    """Read and written in its memory."""
    messages: float
    """Bytes that it sends."""

    def seconds(self, chip: Chip) -> float:
        """max(flops / peak, bytes / bandwidth) + messages / link"""
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth) + self.messages / chip.link


def forward_flops(programs: Programs, users: int, room: Room) -> tuple[float, float]:
    """(of products with weights, logits included; of attention) of all chips together.

    2 N U T + 2 V h U A  and  4 n k T^2 U layers, with N scalars of weights, U users of T tokens, A of them answers'
    """
    c, layer = programs.llm_config, programs.layer
    vocabulary = programs.experiment.llm.logit_rows or c.vocab_size
    weights = 2 * layer.products * users * room.time + 2 * vocabulary * c.width * users * room.answers
    return weights, 4 * layer.heads * layer.head_dim * room.time**2 * users * layer.layers


def train_work(programs: Programs, users: int) -> Work:
    """A pass of stage 2: forward, and backward to the injected embeddings alone (no gradients of weights).

    The backward pass costs the forward's products once and its attention twice; `remat` adds attention
    (`products`) or all layers (`layers`) a second time.
    """
    room, remat = programs.lengths.train, programs.experiment.llm.remat
    weights, attention = forward_flops(programs, users, room)
    again = {"none": 0.0, "products": attention, "layers": weights + attention}[remat]
    passes = 3 if remat == "layers" else 2
    return _work(programs, users, room, 2 * weights + 3 * attention + again, passes)


def rank_work(programs: Programs, users: int) -> Work:
    """A pass of the ranker: forward alone."""
    return _work(programs, users, programs.lengths.rank, sum(forward_flops(programs, users, programs.lengths.rank)), 1)


def counted_flops(programs: Programs, users: int) -> float:
    """What model FLOP utilisation counts of a pass of stage 2: 4 N U T and attention three times, no recomputation."""
    weights, attention = forward_flops(programs, users, programs.lengths.train)
    return 2 * weights + 3 * attention


def _work(programs: Programs, users: int, room: Room, flops: float, passes: int) -> Work:
    """Of `passes` over the layers.

    Bytes: the weights once a pass; a layer's inputs and outputs, about 6 h + 2 f a token. Messages: two sums of h a
    token and layer over `model`, 2 (m - 1) / m of it by ring; the weights of the others where they are cut over `data`.
    """
    layer, h = programs.layer, programs.layer.heads * programs.layer.head_dim
    data, model = programs.mesh.shape["data"], programs.mesh.shape["model"]
    tokens, item = users * room.time / data, 4 if programs.precision.compute == "float32" else 2
    whole = programs.weight_bytes * (data if programs.experiment.devices.shard_weights else 1)
    moved = passes * (whole + layer.layers * tokens * (6 * h + 2 * layer.mlp / model) * item)
    sums = passes * layer.layers * 2 * tokens * h * item * 2 * (model - 1) / model
    gathered = passes * whole * (data - 1) / data if programs.experiment.devices.shard_weights else 0
    return Work(flops / (data * model), moved, sums + gathered)
