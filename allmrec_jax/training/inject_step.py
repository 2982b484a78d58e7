"""Stage 2's compiled programs: the loss through the frozen LLM, its gradients in parts of a batch, the ranker's scores.

`jit` with `NamedSharding` over a mesh (data, model): rows are cut over `data`, the LLM's weights over `model` (and,
where asked, over `data`, too), the heads are replicated; XLA places the collectives. Only the heads are differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from allmrec_jax.config import Injection
from allmrec_jax.models import projection
from allmrec_jax.training.state import State, update

Batch = dict[str, Any]  # arrays of host or device, as `data.packing.pack` names them
REMAT = {
    "none": None,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "layers": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass finds again: everything, the products of weights, or each layer's input alone."""


def inject(
    embeddings: Float[Array, "batch time h"],
    O_u: Float[Array, "batch h"],
    O_i: Float[Array, "batch slot h"],
    batch: Batch,
) -> Float[Array, "batch time h"]:
    """`embeddings` with O_u at `user_slot` and O_i at `slots`; slots at or beyond `time` are dropped.

    tokens   [ .  is  a  ... "T1"  .  ,"T2"  .  ...]
    result   [O_u is  a  ... "T1" O_1 ,"T2" O_2 ...]
    """
    put = jax.vmap(lambda x, at, values: x.at[at].set(values.astype(x.dtype), mode="drop"))
    return put(put(embeddings, batch["slots"], O_i), batch["user_slot"][:, None], O_u[:, None])


def from_heads(heads: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(O_u, O_i) of a batch, made by the heads."""
    x_u = batch["x_u"] if "x_u" in batch else jnp.take(frozen["x_u"], batch["rows"], axis=0)
    O_u = projection.F_U(heads["F_U"], x_u)
    return O_u, projection.F_I(heads["F_I"], jnp.take(frozen["e"], batch["slot_items"], axis=0))


def from_tables(tables: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(O_u, O_i) of a batch, looked up where the heads have gone over everything before."""
    return tuple(jnp.take(tables[name], batch[at], axis=0) for name, at in (("O_u", "rows"), ("O_i", "slot_items")))


def answer_log_likelihood(
    graph: Any,
    injected: tuple[jax.Array, jax.Array] | None,
    frozen: Any,
    batch: Batch,
    *,
    remat: str = "none",
    logit_rows: int | None = None,
) -> Float[Array, "batch answer"]:
    """log P of every answer token, 0 where there is none.

    Logits are computed at the answers' positions only.

    Args:
      injected: O_u (batch, h) and O_i (batch, slot, h); None leaves the prompt as it is (LLM-only).
      logit_rows: the vocabulary's first entries among which a token is predicted; None is all.
    """
    llm = nnx.merge(graph, frozen["llm"])
    x = llm.embed(batch["tokens"])
    if injected is not None:
        x = inject(x, *injected, batch)
    hidden = llm(x, batch["branch"], remat=REMAT[remat])
    at = jnp.take_along_axis(hidden, batch["answer_at"][:, :, None], axis=1)
    logits = llm.logits(at, logit_rows)
    chosen = jnp.take_along_axis(logits, batch["answer_token"][:, :, None], axis=-1)[..., 0]
    return (chosen - jax.nn.logsumexp(logits, axis=-1)) * batch["answer_weight"]


def answer_scores(
    tokens: Float[Array, "batch answer"], batch: Batch, answers: int, *, normalise: bool = True
) -> Float[Array, "batch answers"]:
    """Mean (or sum) of the log-likelihoods of each answer's tokens, 0 for an answer that is not there."""
    one_hot = jax.nn.one_hot(batch["answer_of"], answers) * batch["answer_weight"][..., None]
    totals = jnp.einsum("ba,bac->bc", tokens, one_hot)
    return totals / jnp.maximum(one_hot.sum(1), 1) if normalise else totals


def settle(heads: dict[str, Any], x_u: jax.Array, e: jax.Array, statistics: dict[str, jax.Array]) -> dict[str, Any]:
    """Both heads settled among the token embeddings (`projection.settle`), on at most 2,048 users and items."""

    def some(table: jax.Array) -> jax.Array:
        return table[:: -(-len(table) // 2048)]

    return {
        "F_U": projection.settle(projection.F_U, heads["F_U"], some(x_u), statistics),
        "F_I": projection.settle(projection.F_I, heads["F_I"], some(e), statistics),
    }


def heads_in_use(heads: dict[str, Any], frozen: Any, config: Injection) -> dict[str, Any]:
    """The heads that the prompt sees: the trained ones, settled among the token embeddings if they are held there."""
    if config.init != "held":
        return heads
    return settle(heads, frozen["x_u"], frozen["e"][1:], frozen["tokens"])


def losses(
    heads: Any, graph: Any, frozen: Any, batch: Batch, config: Injection
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted loss and its terms, of one part of a batch: the parts' sums are the batch's.

    L_title   cross-entropy of the target's tokens, mean over all target tokens of the batch together (paper)
    L_choice  cross-entropy of the target in a softmax over `sharpness` times the candidates' mean log-likelihoods;
              only where `choice_weight` is not 0 (then the batch holds all candidates as answers)

    Args:
      heads: those in use (`heads_in_use`).
    """
    injected = from_heads(heads, frozen, batch)
    options = {"remat": config.remat, "logit_rows": config.logit_rows}
    tokens = answer_log_likelihood(graph, injected, frozen, batch, **options)
    own = batch["answer_of"] == batch["target"][:, None]
    terms = {"title": -jnp.sum(tokens * own * batch["token_share"][:, None])}
    total = config.title_weight * terms["title"]
    if config.choice_weight:
        scores = jax.nn.log_softmax(config.sharpness * answer_scores(tokens, batch, config.candidates), axis=-1)
        chosen = jnp.take_along_axis(scores, batch["target"][:, None], axis=1)[:, 0]
        terms["choice"] = -jnp.sum(chosen * batch["row_share"])
        total = total + config.choice_weight * terms["choice"]
    return total, terms | {"loss": total}


def make_step(
    graph: Any,
    frozen_shardings: Any,
    mesh: Mesh,
    optimiser: optax.GradientTransformation,
    config: Injection = Injection(),  # noqa: B008, frozen
) -> Callable[[State, Any, Sequence[Batch]], tuple[State, dict[str, jax.Array]]]:
    """The step `(state, frozen, parts) -> (state, metrics)`: the parts' gradients are added up, then one update.

    The state is donated. Each shape of a part is compiled once; how a batch is cut into parts changes nothing but
    rounding.
    """
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    use = partial(heads_in_use, config=config)

    @partial(jax.jit, in_shardings=(whole, frozen_shardings), out_shardings=whole)
    def start(trained: Any, frozen: Any) -> tuple[Any, Any]:
        heads = use(trained, frozen)
        names = ("title", *(("choice",) if config.choice_weight else ()), "loss")
        return heads, jax.tree.map(jnp.zeros_like, (heads, dict.fromkeys(names, jnp.float32(0))))

    @partial(jax.jit, in_shardings=(whole, whole, frozen_shardings, cut), out_shardings=whole, donate_argnums=(0,))
    def add(sums: Any, heads: Any, frozen: Any, part: Batch) -> Any:
        (_, terms), gradients = jax.value_and_grad(losses, has_aux=True)(heads, graph, frozen, part, config)
        return jax.tree.map(jnp.add, sums, (gradients, terms))

    @partial(jax.jit, in_shardings=(whole, frozen_shardings, whole), out_shardings=whole, donate_argnums=(0,))
    def finish(state: State, frozen: Any, gradients: Any) -> State:
        _, back = jax.vjp(lambda trained: use(trained, frozen), state.params)
        return update(state, back(gradients)[0], optimiser)

    def step(state: State, frozen: Any, parts: Sequence[Batch]) -> tuple[State, dict[str, jax.Array]]:
        heads, sums = start(state.params, frozen)
        for part in parts:
            sums = add(sums, heads, frozen, part)
        return finish(state, frozen, sums[0]), sums[1]

    step.programs = {"start": start, "add": add, "finish": finish}
    return step


def make_scorer(
    graph: Any, frozen_shardings: Any, mesh: Mesh, *, answers: int, normalise: bool, logit_rows: int | None = None
) -> Callable[[Any, Any, Batch], Float[Array, "batch answers"]]:
    """The jitted `(tables, frozen, batch) -> scores`: log-likelihood of each whole answer, all in one forward pass.

    Args:
      normalise: divide by the number of the answer's tokens (`score="mean"`).

    `tables` are O_u (users, h) and O_i (items, h), or None for the LLM alone.
    """
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def scores(tables: Any, frozen: Any, batch: Batch) -> jax.Array:
        injected = None if tables is None else from_tables(tables, frozen, batch)
        tokens = answer_log_likelihood(graph, injected, frozen, batch, logit_rows=logit_rows)
        return answer_scores(tokens, batch, answers, normalise=normalise)

    return jax.jit(scores, in_shardings=(whole, frozen_shardings, cut), out_shardings=cut)
