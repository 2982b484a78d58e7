"""The compiled programs that write answers token by token: greedy, by sampling, by beam search, along a trie of titles.

    prefill   the prompt once; its keys and values stay in a buffer that has room for all that may follow
    loop      `lax.while_loop`: a token for each answer that has not ended, until all have or there is no more room

Answers are branches of their user's row, as in `rank`: a beam's tokens lie in columns of their own, which no other
beam sees unless it descends from it, so that beams split and end without anything being moved in the buffer:

    columns   prompt . . | a b c | d e f | ...     step 0: beams a b c, step 1: d (after b), e (after b), f (after a)
    d sees    prompt       b       d
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from allmrec_jax.errors import UserError
from allmrec_jax.models.llm import attention
from allmrec_jax.models.llm.cache import Cache
from allmrec_jax.training.inject_step import Batch, from_tables, inject

NEVER = -1e9  # added to the score of what must not be chosen


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen; the defaults are the public code's protocol.

    Raises:
      UserError: for a value that makes no sense.
    """

    new: int = 511
    """Tokens at most."""
    temperature: float = 0.0
    """Of sampling; 0 takes the likeliest token (greedy, or beam search)."""
    top_k: int | None = None
    """Sample among so many of the likeliest tokens."""
    top_p: float | None = None
    """Sample among the fewest likeliest tokens that have this probability together."""
    beams: int = 1
    length_penalty: float = 1.0
    """Ended beams are compared by their log-likelihood divided by their number of tokens to this power."""
    repetition_penalty: float = 1.5
    """A logit (with beams a log-probability) of a token that was generated before, and of the end token from the first
    step, is multiplied by it if negative, else divided. The prompt's tokens do not count."""

    def __post_init__(self) -> None:
        for name, fine, must in (
            ("new", self.new >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("beams", self.beams >= 1, "at least 1"),
            ("beams", self.beams == 1 or self.temperature == 0, "1 where temperature is not 0"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not fine:
                raise UserError(f"decoding: {name} is {getattr(self, name)}, but must be {must}")


class Prefilled(NamedTuple):
    """A batch whose prompts were read."""

    llm: Any
    cache: Cache
    prompt: Bool[Array, "batch columns"]
    """The columns of the prompt."""
    length: Int[Array, " batch"]
    logits: Float[Array, "batch vocab"]
    """Of the first token."""
    first: int
    """The column of the first token that is written."""


def prefill(
    graph: Any, tables: Any, frozen: Any, batch: Batch, *, columns: int, logit_rows: int | None = None
) -> Prefilled:
    """Reads the prompts. `tables` are O_u (rows, h) and O_i (items, h), or None for the LLM alone.

    Args:
      columns: room for what is written.
    """
    llm = nnx.merge(graph, frozen["llm"])
    x = llm.embed(batch["tokens"])
    if tables is not None:
        x = inject(x, *from_tables(tables, frozen, batch), batch)
    time = batch["tokens"].shape[1]
    hidden, cache = llm(x, batch["branch"], columns=time + columns)
    last = jnp.take_along_axis(hidden, batch["answer_at"][:, :1, None], axis=1)[:, 0]
    prompt = jnp.pad(batch["branch"] == attention.PROMPT, ((0, 0), (0, columns)))
    return Prefilled(llm, cache, prompt, prompt.sum(1), llm.logits(last, logit_rows), time)


def penalise(
    scores: Float[Array, "*batch vocab"], before: Bool[Array, "*batch vocab"], penalty: float
) -> Float[Array, "*batch vocab"]:
    """The repetition penalty on the tokens that were there before."""
    return jnp.where(before, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def warp(logits: Float[Array, "batch vocab"], how: Decoding) -> Float[Array, "batch vocab"]:
    """Temperature, then the top k, then the top p of what is left; the others get -inf."""
    logits = logits / how.temperature
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, how.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if how.top_p is not None and how.top_p < 1:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        share = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(share, axis=-1) - share < how.top_p  # the likeliest is always inside
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def one_answer(
    read: Prefilled, keys: Key[Array, " batch"], how: Decoding, eos: int, logit_rows: int | None = None
) -> Int[Array, "batch new"]:
    """The tokens of each row's answer, greedy or sampled, up to its end token; after that the end token repeats.

    Args:
      keys: of each row, so that what is sampled does not depend on the rows beside it.
    """
    rows = read.logits.shape[0]

    def choose(step: jax.Array, logits: jax.Array, before: jax.Array, ended: jax.Array) -> jax.Array:
        logits = penalise(logits, before, how.repetition_penalty)
        if how.temperature == 0:
            token = jnp.argmax(logits, axis=-1)
        else:
            own = jax.vmap(partial(jax.random.fold_in, data=step))(keys)
            token = jax.vmap(jax.random.categorical)(own, warp(logits, how))
        return jnp.where(ended, eos, token).astype(jnp.int32)

    def loop(state: tuple) -> tuple:
        step, tokens, before, cache, seen = state
        last = tokens[:, step - 1]
        at = read.first + step - 1
        seen = seen | (jnp.arange(seen.shape[1]) == at)[None]
        positions = (read.length + step - 1)[:, None]
        hidden, cache = read.llm.extend(read.llm.embed(last[:, None]), positions, seen[:, None], cache, at)
        token = choose(step, read.llm.logits(hidden[:, 0], logit_rows), before, last == eos)
        return step + 1, tokens.at[:, step].set(token), mark(before, token), cache, seen

    def mark(before: jax.Array, token: jax.Array) -> jax.Array:
        return before.at[jnp.arange(rows), token].set(True)

    before = jnp.zeros(read.logits.shape, bool).at[:, eos].set(True)
    first = choose(jnp.int32(0), read.logits, before, jnp.zeros(rows, bool))
    tokens = jnp.full((rows, how.new), eos, jnp.int32).at[:, 0].set(first)
    state = jnp.int32(1), tokens, mark(before, first), read.cache, read.prompt

    def goes_on(state: tuple) -> jax.Array:
        step, tokens = state[:2]
        return (step < how.new) & jnp.any(tokens[:, step - 1] != eos)

    return jax.lax.while_loop(goes_on, loop, state)[1]


class Beams(NamedTuple):
    """Beams that go on: what they have written, how likely, and which columns they see."""

    tokens: Int[Array, "batch beams new"]
    scores: Float[Array, "batch beams"]
    seen: Bool[Array, "batch beams columns"]


class Ended(NamedTuple):
    """The best answers that have ended, best first; scores of `NEVER` and below are of none."""

    tokens: Int[Array, "batch beams new"]
    scores: Float[Array, "batch beams"]


def take(tree: Any, at: Int[Array, "batch some"]) -> Any:
    """Entries of axis 1, for each row its own."""

    def one(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, jnp.reshape(at, (*at.shape, *[1] * (x.ndim - 2))), axis=1)

    return jax.tree.map(one, tree)


def read_on(
    read: Prefilled, cache: Cache, beams: Beams, step: jax.Array, logit_rows: int | None
) -> tuple[Float[Array, "batch beams vocab"], Cache, Beams]:
    """Logits after the last token (number `step` - 1) of every beam."""
    count = beams.scores.shape[1]
    at = read.first + (step - 1) * count
    columns = jnp.arange(beams.seen.shape[2])
    seen = beams.seen | (columns[None] == at + jnp.arange(count)[:, None])[None]
    last = jnp.take_along_axis(beams.tokens, jnp.full((*beams.scores.shape, 1), step - 1), axis=2)[..., 0]
    positions = jnp.broadcast_to((read.length + step - 1)[:, None], last.shape)
    hidden, cache = read.llm.extend(read.llm.embed(last), positions, seen, cache, at)
    return read.llm.logits(hidden, logit_rows), cache, beams._replace(seen=seen)


def start(read: Prefilled, how: Decoding, eos: int) -> tuple[Beams, Ended]:
    """One beam that has written nothing; the others have no chance yet."""
    rows, shape = read.logits.shape[0], (read.logits.shape[0], how.beams)
    tokens = jnp.full((*shape, how.new), eos, jnp.int32)
    scores = jnp.full(shape, NEVER).at[:, 0].set(0)
    seen = jnp.broadcast_to(read.prompt[:, None], (rows, how.beams, read.prompt.shape[1]))
    return Beams(tokens, scores, seen), Ended(tokens, jnp.full(shape, NEVER))


def beam_search(read: Prefilled, how: Decoding, eos: int, logit_rows: int | None = None) -> Ended:
    """The best answers that `how.beams` beams find, ended by the end token or the lack of room.

    A row is done once none of its beams could, at its present length, come before the worst of its ended answers.
    """
    count, vocabulary = how.beams, read.logits.shape[-1]

    def choose(
        step: jax.Array, logits: jax.Array, before: jax.Array, beams: Beams, ended: Ended, open_: jax.Array
    ) -> tuple[Beams, jax.Array, Ended, jax.Array]:
        scores = penalise(jax.nn.log_softmax(logits, axis=-1), before, how.repetition_penalty)
        scores = jnp.reshape(scores + beams.scores[..., None], (scores.shape[0], -1))
        scores, at = jax.lax.top_k(scores, 2 * count)  # as many may end, and as many go on
        parent, token = at // vocabulary, at % vocabulary
        moved, before = take((beams, before), parent)
        tokens = moved.tokens.at[:, :, step].set(token)
        ends = (token == eos) | (step == how.new - 1)
        new = scores / (step + 1.0) ** how.length_penalty
        counts = ends & (jnp.arange(2 * count) < count)[None] & open_[:, None]
        new = jnp.where(counts, new, NEVER)
        every = Ended(jnp.concatenate([ended.tokens, tokens], 1), jnp.concatenate([ended.scores, new], 1))
        ended = take(every, jax.lax.top_k(every.scores, count)[1])
        scores = jnp.where(ends, scores + NEVER, scores)
        best = jax.lax.top_k(scores, count)[1]
        token, before, scores, tokens, seen = take((token, before, scores, tokens, moved.seen), best)
        before = before | jax.nn.one_hot(token, vocabulary, dtype=bool)
        hoped = scores[:, 0] / (step + 1.0) ** how.length_penalty
        full = ended.scores[:, -1] > NEVER
        open_ = open_ & (~full | (hoped > ended.scores[:, -1]))
        return Beams(tokens, scores, seen), before, ended, open_

    def loop(state: tuple) -> tuple:
        step, beams, before, ended, open_, cache = state
        logits, cache, beams = read_on(read, cache, beams, step, logit_rows)
        return step + 1, *choose(step, logits, before, beams, ended, open_), cache

    beams, ended = start(read, how, eos)
    before = jnp.zeros((*beams.scores.shape, vocabulary), bool).at[..., eos].set(True)
    logits = jnp.broadcast_to(read.logits[:, None], before.shape)
    chosen = choose(jnp.int32(0), logits, before, beams, ended, jnp.ones(len(read.logits), bool))
    state = jnp.int32(1), *chosen, read.cache
    state = jax.lax.while_loop(lambda s: (s[0] < how.new) & jnp.any(s[4]), loop, state)
    return state[3]


class Tries(NamedTuple):
    """A trie of answers for each row (`constrained.tries`). Node 0 is the root; a node's children follow each other.

        answers  a b $, a c $      node    0  1  2  3  4  5
                                   token   .  a  b  c  $  $
                                   first   1  2  4  5  .  .
                                   count   1  2  1  1  0  0
                                   leaf   -1 -1 -1 -1  0  1

    token: that leads to each node. first, count: its first child, and how many it has. leaf: the number of the answer
    that ends there, -1 where none does. place: 0, 1, ... as many as any node has children.
    """

    token: Int[Array, "batch nodes"]
    first: Int[Array, "batch nodes"]
    count: Int[Array, "batch nodes"]
    leaf: Int[Array, "batch nodes"]
    place: Int[Array, "batch children"]


def along_tries(
    read: Prefilled, tries: Tries, how: Decoding, eos: int, *, normalise: bool, logit_rows: int | None = None
) -> tuple[Int[Array, "batch beams"], Float[Array, "batch beams"]]:
    """(numbers, scores) of the best answers that beams find in each row's trie, best first; number -1 where none is.

    A beam goes on only to children of its node. The probabilities are those among all tokens, so that an answer's score
    is its log-likelihood as `rank` has it; with as many beams as answers so is the order. One beam is greedy.

    Args:
      normalise: divide by the number of the answer's tokens.
    """
    count = how.beams

    def choose(step: jax.Array, logits: jax.Array, beams: Beams, node: jax.Array, ended: tuple) -> tuple:
        rows = jnp.arange(logits.shape[0])[:, None]
        place = tries.place[:, None]
        child = jnp.where(place < tries.count[rows, node][..., None], tries.first[rows, node][..., None] + place, -1)
        token = tries.token[rows[..., None], child]  # (batch, beams, children)
        scores = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token, axis=2) + beams.scores[..., None]
        scores = jnp.where(child >= 0, scores, 2 * NEVER)
        token, child, scores = (jnp.reshape(x, (x.shape[0], -1)) for x in (token, child, scores))
        width = scores.shape[1] // count
        scores, at = jax.lax.top_k(scores, count)
        token, child = take((token, child), at)
        moved = take(beams, at // width)
        there = (child >= 0) & (scores > NEVER / 2)
        leaf = jnp.where(there, tries.leaf[rows, child], -1)
        new = jnp.where(leaf >= 0, scores / (step + 1.0) if normalise else scores, NEVER)
        every = tuple(jnp.concatenate(pair, axis=1) for pair in zip(ended, (leaf, new), strict=True))
        ended = take(every, jax.lax.top_k(every[1], count)[1])
        scores = jnp.where(there & (leaf < 0), scores, NEVER)
        return (
            moved._replace(tokens=moved.tokens.at[:, :, step].set(token), scores=scores),
            jnp.maximum(child, 0),
            ended,
        )

    def loop(state: tuple) -> tuple:
        step, beams, node, ended, cache = state
        logits, cache, beams = read_on(read, cache, beams, step, logit_rows)
        return step + 1, *choose(step, logits, beams, node, ended), cache

    beams, (_, none) = start(read, how, eos)
    ended = jnp.full(none.shape, -1), none
    logits = jnp.broadcast_to(read.logits[:, None], (*none.shape, read.logits.shape[-1]))
    state = jnp.int32(1), *choose(jnp.int32(0), logits, beams, jnp.zeros(none.shape, jnp.int32), ended), read.cache
    state = jax.lax.while_loop(lambda s: (s[0] < how.new) & jnp.any(s[1].scores > NEVER / 2), loop, state)
    return state[3]


def make_writer(
    graph: Any, frozen_shardings: Any, mesh: Mesh, how: Decoding, *, eos: int, logit_rows: int | None = None
) -> Callable[[Any, Any, Batch, Key[Array, " batch"]], Int[Array, "batch new"]]:
    """The jitted `(tables, frozen, batch, keys) -> tokens` of free answers; with beams the best one."""
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def write(tables: Any, frozen: Any, batch: Batch, keys: jax.Array) -> jax.Array:
        read = prefill(graph, tables, frozen, batch, columns=how.beams * (how.new - 1), logit_rows=logit_rows)
        if how.beams > 1:
            return beam_search(read, how, eos, logit_rows).tokens[:, 0]
        return one_answer(read, keys, how, eos, logit_rows)

    return jax.jit(write, in_shardings=(whole, frozen_shardings, cut, cut), out_shardings=cut)


def make_constrained_writer(
    graph: Any,
    frozen_shardings: Any,
    mesh: Mesh,
    how: Decoding,
    *,
    eos: int,
    normalise: bool,
    logit_rows: int | None = None,
) -> Callable[[Any, Any, Batch, Tries], tuple[Int[Array, "batch beams"], Float[Array, "batch beams"]]]:
    """The jitted `(tables, frozen, batch, tries) -> (numbers, scores)` of answers along tries."""
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def write(tables: Any, frozen: Any, batch: Batch, tries: Tries) -> tuple[jax.Array, jax.Array]:
        read = prefill(graph, tables, frozen, batch, columns=how.beams * (how.new - 1), logit_rows=logit_rows)
        return along_tries(read, tries, how, eos, normalise=normalise, logit_rows=logit_rows)

    return jax.jit(write, in_shardings=(whole, frozen_shardings, cut, cut), out_shardings=cut)
