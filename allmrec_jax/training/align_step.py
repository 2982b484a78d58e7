"""Stage 1's compiled programs: a step that trains the sentence encoder too, and an epoch with all Q given.

L_match, L_item and L_text are sums over items, L_rec is one over users and reads no text:

    L = sum_i share_i (match_i + alpha item_i + beta text_i) + mean_u rec_u

where share_i is how often item i stands as a positive (and, with `items="both"`, as a negative) over the number of
users. So each distinct item is encoded once, and the texts' gradients may be summed in groups of any shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from allmrec_jax.data import batches
from allmrec_jax.data.text_groups import Shape
from allmrec_jax.models import alignment, bert, collaborative
from allmrec_jax.training import mesh
from allmrec_jax.training.state import State, update


class Terms(NamedTuple):
    """What the loss of stage 1 is made of.

    weights: factors of `match`, `item`, `text` and `rec`.
    cf: the CF model's config if x_u is made anew at each step, with its dropout; else None.
    """

    weights: Mapping[str, float]
    score: Literal["dot", "mean"] = "dot"
    both: bool = False
    cf: Any = None

    def of_items(self, heads: Any, E: jax.Array, Q: jax.Array, shares: jax.Array) -> tuple[jax.Array, dict]:
        """The items' part of the loss, and its terms."""
        rows = alignment.item_terms(heads["f_I"], heads["f_T"], E, Q)
        terms = {name: jnp.sum(row * shares) for name, row in rows.items()}
        return alignment.weigh(terms, self.weights), terms

    def of_users(self, f_I: Any, data: Any, drawn: Any, key: jax.Array, step: jax.Array, count: jax.Array):
        """The users' part of the loss, and its term."""
        E, who = data["E"], drawn["who"]
        if self.cf is None:
            x_u = data["x_u"][who]
        else:
            keys = batches.dropout_keys(jax.random.fold_in(key, 1), step, who)
            users = data["users"][who]
            module = collaborative.module_of(self.cf)
            x_u = module.features(data["cf"], self.cf, data["windows"][who], keys, users=users)[:, -1]
        rows = alignment.rec_term(f_I, x_u, E[drawn["positive"]], E[drawn["negative"]], self.score)
        terms = {"rec": jnp.sum(rows * drawn["real"]) / count}
        return alignment.weigh(terms, self.weights), terms


def spans(n: int, batch: int, chunk: int | None) -> np.ndarray:
    """(steps, 2): where in an epoch's order of n users each optimiser step starts and ends.

    >>> spans(5, 3, 2).tolist()
    [[0, 2], [2, 3], [3, 5]]
    """
    starts = [s for b in range(0, n, batch) for s in range(b, min(b + batch, n), chunk or batch)]
    ends = [min(s + (chunk or batch), s // batch * batch + batch, n) for s in starts]
    return np.stack([starts, ends], axis=1).astype(np.int32)


def draw(
    data: Mapping[str, Any], order: jax.Array, span: jax.Array, rows: jax.Array, step: batches.Index, key: jax.Array
) -> dict[str, jax.Array]:
    """A step's rows: `who` (a row of data's users), `positive`, `negative` (item 0 beside 0) and `real`."""
    at = span[0] + rows
    real = at < span[1]
    who = order[jnp.where(real, at, 0)]
    positive = data["positives"][who]
    negative = batches.draw_negatives(key, step, rows, data["users"][who], data["seen"])[:, 0]
    return {"who": who, "positive": positive, "negative": jnp.where(positive > 0, negative, 0), "real": real}


def keep_gradients(steps: np.ndarray, batch: int) -> optax.GradientTransformation:
    """Adds to each step's gradients those of the earlier steps of the same batch, which the public code never clears.

    Args:
      steps: `spans` of an epoch.
    """
    first = jnp.asarray(steps[:, 0] % batch == 0)

    def init(trained: Any) -> tuple[jax.Array, Any]:
        return jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, trained)

    def add(gradients: Any, kept: tuple[jax.Array, Any], _: Any = None) -> tuple[Any, tuple[jax.Array, Any]]:
        step, before = kept
        gradients = jax.tree.map(lambda g, b: g + jnp.where(first[step % len(first)], 0, b), gradients, before)
        return gradients, (step + 1, gradients)

    return optax.GradientTransformation(init, add)


def make_step(
    graph: Any,
    optimiser: optax.GradientTransformation,
    devices: Sequence[Any],
    *,
    terms: Terms,
    shapes: tuple[Shape, ...],
    dropout: bool = True,
    dtype: Any = jnp.float32,
    remat: bool = False,
    how: mesh.Mapping = "shard_map",
):
    """The mapped step `(state, data, batch, key) -> (state, losses)` that trains f_I, f_T and the encoder.

    `data` is replicated: E, tokens, lengths, and what `Terms.of_users` reads. `batch` is cut over devices: what
    `align_batches.with_texts` gives. Each device goes through its own groups, whatever their number, with one branch
    for each shape; gradients are added up and meet at the end.
    """

    def step(state: State, data: Any, batch: Any, key: jax.Array):
        heads = {name: state.params[name] for name in ("f_I", "f_T")}
        weights = state.params["encoder"]["weights"]
        word = weights["embeddings"]["word"]
        rest = jax.tree.map(lambda leaf: leaf.astype(dtype), _without_word(weights))

        def branch(rows: int, width: int):
            def add(sums: Any, *group: jax.Array):
                texts, starts, shares = (part[:rows] for part in group)
                lengths = jnp.where(starts < width, data["lengths"][texts], 0)
                of_row, position, _ = bert.layout(starts, lengths, width)
                tokens = data["tokens"][jnp.take_along_axis(texts, of_row, axis=1), position]
                texts, shares = texts.ravel(), shares.ravel()
                keys = batches.dropout_keys(key, state.step, texts).reshape(starts.shape) if dropout else None

                def loss(heads: Any, rest: Any, words: jax.Array):
                    # The rows of the word table that this group reads stand for the whole of it, so that its gradient
                    # is one scatter into the sum, not a table for each group.
                    weights = {**rest, "embeddings": {**rest["embeddings"], "word": words}}
                    own = jnp.arange(rows * width).reshape(rows, width)
                    Q = nnx.merge(graph, {"weights": weights}).packed(own, starts, lengths, keys, remat=remat)
                    return terms.of_items(heads, data["E"][texts], Q.reshape(len(texts), -1), shares)

                arguments = heads, rest, word[tokens.ravel()].astype(dtype)
                (_, values), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arguments)
                (*of_weights, word_sum), values_sum = sums
                *more, of_words = gradients
                of_weights = jax.tree.map(lambda a, b: a + b.astype(a.dtype), of_weights, more)
                word_sum = word_sum.at[tokens.ravel()].add(of_words.astype(word_sum.dtype))
                return (*of_weights, word_sum), jax.tree.map(jnp.add, values_sum, values)

            return add

        branches = [branch(*shape) for shape in shapes]

        def one_group(g: jax.Array, sums: Any):
            group = (batch[name][g] for name in ("texts", "starts", "shares"))
            return jax.lax.switch(batch["shape"][g], branches, sums, *group)

        zeros = jax.tree.map(jnp.zeros_like, (heads, _without_word(weights), word))
        none = {name: jnp.float32(0) for name in ("match", "item", "text")}
        groups = jnp.sum(batch["shape"] >= 0)
        (of_heads, of_rest, of_word), found = jax.lax.fori_loop(0, groups, one_group, (zeros, none))
        count = jax.lax.psum(jnp.sum(batch["real"]), mesh.DATA)
        users = jax.value_and_grad(terms.of_users, has_aux=True)
        (_, rec), of_f_I = users(heads["f_I"], data, batch, key, state.step, count)
        gradients = {
            "f_I": jax.tree.map(jnp.add, of_heads["f_I"], of_f_I),
            "f_T": of_heads["f_T"],
            "encoder": {"weights": {**of_rest, "embeddings": {**of_rest["embeddings"], "word": of_word}}},
        }
        found, gradients = jax.lax.psum((found | rec, gradients), mesh.DATA)
        return update(state, gradients, optimiser), found | {"loss": alignment.weigh(found, terms.weights)}

    return mesh.map_over_data(step, devices, batched=(False, False, True, False), how=how, donate=(0,))


def _without_word(weights: Any) -> Any:
    embeddings = {name: leaf for name, leaf in weights["embeddings"].items() if name != "word"}
    return {**weights, "embeddings": embeddings}


def make_epoch(
    optimiser: optax.GradientTransformation,
    devices: Sequence[Any],
    *,
    terms: Terms,
    steps: np.ndarray,
    rows: int,
    how: mesh.Mapping = "shard_map",
):
    """The epoch `(state, data, order, keys) -> (state, losses)` that trains f_I and f_T alone; losses (steps,) each.

    `data` is replicated: E and Q, users, positives, seen, and what `Terms.of_users` reads. `order` is that of the
    users; `keys` are those of negatives and dropout. All steps are scanned in one program.

    Args:
      steps: `spans` of the epoch; rows: the most users of a step.
    """
    per_device = rows // len(devices)

    def epoch(state: State, data: Any, order: jax.Array, keys: tuple[jax.Array, jax.Array]):
        def step(state: State, span: jax.Array):
            drawn = draw(data, order, span, mesh.local_rows(per_device), state.step, keys[0])
            count = jax.lax.psum(jnp.sum(drawn["real"]), mesh.DATA)
            share = drawn["real"] / count
            items = jnp.concatenate([drawn["positive"], drawn["negative"]]) if terms.both else drawn["positive"]

            def loss(heads: Any):
                shares = jnp.tile(share, 1 + terms.both)
                of_items, found = terms.of_items(heads, data["E"][items], data["Q"][items], shares)
                of_users, rec = terms.of_users(heads["f_I"], data, drawn, keys[1], state.step, count)
                return of_items + of_users, found | rec

            gradients, found = jax.grad(loss, has_aux=True)(state.params)
            found, gradients = jax.lax.psum((found, gradients), mesh.DATA)
            return update(state, gradients, optimiser), found | {"loss": alignment.weigh(found, terms.weights)}

        return jax.lax.scan(step, state, jnp.asarray(steps))

    return mesh.map_over_data(epoch, devices, batched=(False, False, False, False), how=how, donate=(0,))
