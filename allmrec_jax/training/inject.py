"""Stage 2: F_U and F_I learn to inject user and item embeddings into the prompt of the frozen LLM.

`jit` with `NamedSharding` over a mesh (data, model): the batch is cut over `data`, the LLM's weights over `model`, the
heads are replicated; XLA places the collectives. Only the heads are differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from rich.console import Console

from allmrec_jax.config import Injection
from allmrec_jax.data import batches
from allmrec_jax.data.candidates import draw_candidates
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.data.prompts import DOMAINS, PromptBuilder, pack
from allmrec_jax.errors import UserError
from allmrec_jax.models import params, projection
from allmrec_jax.models.llm.load import FrozenLLM
from allmrec_jax.training import loop
from allmrec_jax.training.cf import CFModel
from allmrec_jax.training.checkpoint import Checkpoints, Curves
from allmrec_jax.training.state import State, create, update

SEED_STREAM = 2
Batch = dict[str, jax.Array]


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


def answer_log_likelihood(
    graph: Any, heads: Any, frozen: Any, batch: Batch, *, remat: bool = False
) -> Float[Array, "batch answer"]:
    """log P of every answer token, 0 where there is none. `heads=None` leaves the prompt as it is (LLM-only).

    Logits are computed at the answers' positions only.
    """
    llm = nnx.merge(graph, frozen["llm"])
    x = llm.embed(batch["tokens"])
    if heads is not None:
        O_u = projection.F_U(heads["F_U"], jnp.take(frozen["x_u"], batch["rows"], axis=0))
        O_i = projection.F_I(heads["F_I"], jnp.take(frozen["e"], batch["slot_items"], axis=0))
        x = inject(x, O_u, O_i, batch)
    hidden = llm(x, batch["branch"], remat=jax.checkpoint_policies.nothing_saveable if remat else None)
    at = jnp.take_along_axis(hidden, batch["answer_at"][:, :, None], axis=1)
    logits = llm.logits(at)
    chosen = jnp.take_along_axis(logits, batch["answer_token"][:, :, None], axis=-1)[..., 0]
    return (chosen - jax.nn.logsumexp(logits, axis=-1)) * batch["answer_weight"]


def answer_scores(
    tokens: Float[Array, "batch answer"], batch: Batch, answers: int, *, normalise: bool = True
) -> Float[Array, "batch answers"]:
    """Mean (or sum) of the log-likelihoods of each answer's tokens, 0 for an answer that is not there."""
    one_hot = jax.nn.one_hot(batch["answer_of"], answers) * batch["answer_weight"][..., None]
    totals = jnp.einsum("ba,bac->bc", tokens, one_hot)
    return totals / jnp.maximum(one_hot.sum(1), 1) if normalise else totals


def heads_in_use(heads: dict[str, Any], frozen: Any, config: Injection) -> dict[str, Any]:
    """The heads that the prompt sees: the trained ones, settled among the token embeddings if they are held there."""
    if config.init != "held":
        return heads
    return settle(heads, frozen["x_u"], frozen["e"][1:], frozen["tokens"])


def losses(
    heads: Any, graph: Any, frozen: Any, batch: Batch, config: Injection
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted loss and its terms.

    L_title   cross-entropy of the target's tokens, mean over all target tokens of the batch together (paper)
    L_choice  cross-entropy of the target in a softmax over `sharpness` times the candidates' mean log-likelihoods;
              only where `choice_weight` is not 0 (then the batch holds all candidates as answers)
    """
    heads = heads_in_use(heads, frozen, config)
    tokens = answer_log_likelihood(graph, heads, frozen, batch, remat=config.remat)
    own = batch["answer_weight"] * (batch["answer_of"] == batch["target"][:, None])
    terms = {"title": -jnp.sum(tokens * own) / jnp.maximum(jnp.sum(own), 1)}
    total = config.title_weight * terms["title"]
    if config.choice_weight:
        scores = jax.nn.log_softmax(config.sharpness * answer_scores(tokens, batch, config.candidates), axis=-1)
        real = jnp.max(batch["answer_weight"], axis=1)
        chosen = jnp.take_along_axis(scores, batch["target"][:, None], axis=1)[:, 0]
        terms["choice"] = -jnp.sum(chosen * real) / jnp.maximum(jnp.sum(real), 1)
        total = total + config.choice_weight * terms["choice"]
    return total, terms | {"loss": total}


def make_step(
    graph: Any,
    frozen_shardings: Any,
    mesh: Mesh,
    optimiser: optax.GradientTransformation,
    config: Injection = Injection(),  # noqa: B008, frozen
) -> Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]:
    """The jitted step `(state, frozen, batch) -> (state, metrics)`; the state is donated."""
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        (_, terms), gradients = jax.value_and_grad(losses, has_aux=True)(state.params, graph, frozen, batch, config)
        return update(state, gradients, optimiser), terms

    return jax.jit(step, in_shardings=(whole, frozen_shardings, cut), out_shardings=(whole, whole), donate_argnums=(0,))


def make_scorer(
    graph: Any, frozen_shardings: Any, mesh: Mesh, *, answers: int, normalise: bool
) -> Callable[[Any, Any, Batch], Float[Array, "batch answers"]]:
    """The jitted `(heads, frozen, batch) -> scores`: log-likelihood of each whole answer, all in one forward pass.

    `normalise` divides by the number of the answer's tokens (`score="mean"`).
    """
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def scores(heads: Any, frozen: Any, batch: Batch) -> jax.Array:
        tokens = answer_log_likelihood(graph, heads, frozen, batch)
        return answer_scores(tokens, batch, answers, normalise=normalise)

    return jax.jit(scores, in_shardings=(whole, frozen_shardings, cut), out_shardings=cut)


def schedule(config: Injection, steps: int) -> optax.Schedule:
    """The learning rate of each step: linear warm-up, then constant or a cosine down to 0."""
    peak, warmup = config.learning_rate, min(config.warmup, steps)
    after = optax.cosine_decay_schedule(peak, max(1, steps - warmup)) if config.decay else optax.constant_schedule(peak)
    return (
        optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup]) if warmup else after
    )


def make_optimiser(config: Injection, steps: int) -> optax.GradientTransformation:
    """Adam(b1 .9, b2 .98) with the schedule, after clipping the gradient's norm where asked."""
    adam = optax.adam(schedule(config, steps), b1=0.9, b2=0.98, eps=1e-8)
    return adam if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), adam)


def init_heads(
    key: jax.Array,
    x_u: Float[Array, "users d"],
    e: Float[Array, "items joint"],
    tokens: Float[Array, "vocab h"],
    init: Literal["paper", "matched", "held"] = "paper",
) -> dict[str, Any]:
    """Fresh F_U and F_I; unless `paper`, standardised and settled on the users and items of training."""
    key_u, key_i = jax.random.split(key)
    F_U = params.init(key_u, projection.describe(x_u.shape[1], tokens.shape[1]))
    F_I = params.init(key_i, projection.describe(e.shape[1], tokens.shape[1]))
    heads = {"F_U": F_U, "F_I": F_I}
    if init == "paper":
        return heads
    heads = {"F_U": projection.standardise(F_U, x_u), "F_I": projection.standardise(F_I, e)}
    return settle(heads, x_u, e, projection.token_statistics(tokens))


def settle(heads: dict[str, Any], x_u: jax.Array, e: jax.Array, statistics: dict[str, jax.Array]) -> dict[str, Any]:
    """Both heads settled among the token embeddings (`projection.settle`), on at most 2,048 users and items."""

    def some(table: jax.Array) -> jax.Array:
        return table[:: -(-len(table) // 2048)]

    return {
        "F_U": projection.settle(projection.F_U, heads["F_U"], some(x_u), statistics),
        "F_I": projection.settle(projection.F_I, heads["F_I"], some(e), statistics),
    }


def freeze(llm: FrozenLLM, x_u: np.ndarray, e: np.ndarray, mesh: Mesh) -> tuple[Any, Any]:
    """(frozen, its shardings): the LLM's weights by their logical axes, x_u and e replicated."""
    whole = NamedSharding(mesh, P())
    statistics = projection.token_statistics(llm.weights["weights"]["embed"])
    frozen = {"llm": llm.weights, "x_u": jnp.asarray(x_u), "e": jnp.asarray(e), "tokens": statistics}
    shardings = {
        "llm": {"weights": params.shardings(llm.describe(), mesh)},
        "x_u": whole,
        "e": whole,
        "tokens": {"mean": whole, "spread": whole},
    }
    return jax.device_put(frozen, shardings), shardings


def train_llm(
    config: Injection,
    dataset: Dataset,
    cf: CFModel,
    e: np.ndarray,
    llm: FrozenLLM,
    folder: Path,
    *,
    seed: int,
    mesh: Mesh,
    console: Console | None = None,
) -> tuple[dict[str, Any], Curves]:
    """Trains (or goes on with) stage 2 in `folder`: one target a user, the last training item.

    The candidates in the prompt are the target and distinct items outside the user's training items, drawn anew
    each epoch. Returns the heads and the curves.
    """
    if config.batch % mesh.shape["data"]:
        raise UserError(f"llm.batch {config.batch} is not a multiple of the {mesh.shape['data']} data-parallel devices")
    key = jax.random.fold_in(jax.random.key(seed), SEED_STREAM)
    init_key, order_key, candidate_key = jax.random.split(key, 3)
    users = np.flatnonzero(dataset.has_target("train"))
    targets, ends = dataset.targets("train")[users], dataset.history_end("train")[users]
    x_u = cf.x_u(dataset.windows(ends, cf.config.maxlen, users), users)
    histories = dataset.windows(ends, config.history, users)
    seen = batches.seen_items(*dataset.distinct("train"), dataset.n_items)
    builder = PromptBuilder(
        llm.tokenizer, dataset.titles(), DOMAINS[config.domain], context=llm.config.max_position_embeddings
    )
    per_epoch = batches.steps_per_epoch(len(users), config.batch)
    steps = max(1, round(per_epoch * config.epochs))
    optimiser = make_optimiser(config, steps)
    table = llm.weights["weights"]["embed"]
    heads = init_heads(init_key, jnp.asarray(x_u), jnp.asarray(e[1:]), table, config.init)
    state = jax.device_put(create(heads, optimiser), NamedSharding(mesh, P()))
    frozen, shardings = freeze(llm, x_u, e, mesh)
    step = make_step(llm.graph, shardings, mesh, optimiser, config)
    order_of = lru_cache(1)(lambda epoch: np.asarray(batches.epoch_order(order_key, epoch, len(users))))

    def one_step(state: State, i: int) -> tuple[State, dict[str, jax.Array]]:
        chosen, real = map(
            np.asarray, batches.rows_of_step(order_key, i, config.batch, len(users), order_of(i // per_epoch))
        )
        chosen = chosen[real]
        candidates, column = draw_candidates(
            candidate_key, i, np.arange(len(chosen)), users[chosen], targets[chosen], seen, config.candidates
        )
        prompts = builder.prompts([row[row != 0] for row in histories[chosen]], candidates)
        if config.choice_weight:
            answers = [builder.answers(row.tolist()) for row in candidates]
        else:
            answers, column = [[answer] for answer in builder.answers(targets[chosen].tolist())], None
        packed = pack(prompts, answers, rows=chosen, targets=column, batch=config.batch)
        return step(state, frozen, packed)

    checkpoints = Checkpoints(folder)
    try:
        state, curves = loop.run(
            one_step,
            state,
            steps=steps,
            checkpoints=checkpoints,
            label="stage 2: injection",
            items_per_step=config.batch,
            item_name="users",
            log_every=5,
            save_every=config.save_every,
            console=console,
            logs=folder / "logs",
        )
    finally:
        checkpoints.close()
    return heads_in_use(state.params, frozen, config), curves
