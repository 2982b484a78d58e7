"""`constrained`: the LLM writes an answer that can only be a title, greedily or by beams along a trie of titles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from allmrec_jax.data.packing import Answers
from allmrec_jax.data.prompts import Items, PromptBuilder
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation.decode import Decoding, Tries, make_constrained_writer
from allmrec_jax.evaluation.passes import Passes
from allmrec_jax.models.llm.load import FrozenLLM
from allmrec_jax.training.mesh import Mapping

NODES, CHILDREN, DEPTH = 256, 8, 8  # sizes are rounded up to multiples of these, so that few programs are compiled


def trie(answers: Sequence[Sequence[int]]) -> dict[str, Int[np.ndarray, " nodes"]]:
    """`token`, `first`, `count` and `leaf` of one trie (see `decode.Tries`), without a loop over tokens.

    The answers are sorted; a token opens a node where its answer and the one before differ for the first time, or
    later. Level by level, nodes in sorted order: so the children of a node are numbered in a row. Of equal answers the
    first counts.
    """
    lengths = np.array([len(answer) for answer in answers])
    if not len(lengths) or lengths.min() == 0:
        raise ValueError("a trie needs answers, of at least one token each")
    inside = np.arange(lengths.max())[None] < lengths[:, None]
    tokens = np.full(inside.shape, -1, np.int64)
    tokens[inside] = np.concatenate([np.asarray(answer, np.int64) for answer in answers])
    order = np.lexsort(tokens.T[::-1])
    tokens, inside, lengths = tokens[order], inside[order], lengths[order]
    same = np.cumprod(tokens[1:] == tokens[:-1], axis=1).astype(bool)
    opens = inside & ~np.concatenate([np.zeros((1, tokens.shape[1]), bool), same])
    level = np.concatenate([[0], np.cumsum(opens.sum(0))])  # nodes above each level, the root aside
    node = level[:-1][None] + np.cumsum(opens, axis=0)
    parent = np.concatenate([np.zeros((len(tokens), 1), np.int64), node[:, :-1]], axis=1)
    size = int(level[-1]) + 1
    token, first, leaf = (np.full(size, none, np.int64) for none in (0, size, len(answers)))
    token[node[opens]] = tokens[opens]
    np.minimum.at(first, parent[opens], node[opens])
    np.minimum.at(leaf, node[np.arange(len(tokens)), lengths - 1], order)
    first, leaf = np.where(first == size, 0, first), np.where(leaf == len(answers), -1, leaf)
    found = {"token": token, "first": first, "count": np.bincount(parent[opens], minlength=size), "leaf": leaf}
    return {name: part.astype(np.int32) for name, part in found.items()}


def tries(each: Sequence[dict[str, np.ndarray]], rows: int) -> Tries:
    """The tries of a batch as arrays, the last one repeated for rows that only fill up."""
    nodes = _up(max(len(one["token"]) for one in each), NODES)
    children = _up(max(int(one["count"].max()) for one in each), CHILDREN)
    own = {
        name: np.stack([np.pad(one[name], (0, nodes - len(one[name])), constant_values=fill) for one in each])
        for name, fill in (("token", 0), ("first", 0), ("count", 0), ("leaf", -1))
    }
    own = {name: np.concatenate([part, part[-1:].repeat(rows - len(each), axis=0)]) for name, part in own.items()}
    return Tries(**own, place=np.tile(np.arange(children, dtype=np.int32), (rows, 1)))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class TitleWriter(Passes):
    """The best titles that beams find: `(histories, candidates, x_u) -> items, scores (users, beams)`.

    Scores are log-likelihoods as `rank` has them, -inf (and item 0) where there are fewer titles than beams.

    Args (and those of `Passes`):
      beams: how many; 1 is greedy.
      catalogue: the items whose titles may be written; None: those of the user's candidates. Items that share a title
        are told apart by nothing: the first of them is named.
      normalise: divide by the number of the title's tokens.
    """

    def __init__(
        self,
        llm: FrozenLLM,
        heads: Any,
        *,
        builder: PromptBuilder,
        e: np.ndarray,
        mesh: Mesh,
        beams: int = 1,
        catalogue: Items | None = None,
        normalise: bool = True,
        batch: int = 4,
        logit_rows: int | None = None,
        how: Mapping = "shard_map",
    ):
        super().__init__(llm, heads, builder=builder, e=e, mesh=mesh, batch=batch, how=how)
        self.rows, self.beams = batch, beams
        self.options = {"eos": builder.tokenizer.eos, "normalise": normalise, "logit_rows": logit_rows}
        self.programs: dict[int, Callable] = {}
        self.catalogue = None if catalogue is None else np.asarray(catalogue)
        if self.catalogue is not None:
            if not len(self.catalogue):
                raise UserError("there are no titles to choose from")
            titles = builder.answers(self.catalogue.tolist())
            self.trie, self.depth = trie(titles), max(map(len, titles))

    def answers(self, candidates: Int[np.ndarray, "users c"]) -> Answers:
        """Nothing stands behind the prompt: an answer of no input."""
        return [[[self.builder.tokenizer.eos]] for _ in candidates]

    def _program(self, depth: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
        if depth not in self.programs:
            how = Decoding(new=depth, beams=self.beams)
            arguments = self.llm.graph, self.shardings, self.mesh, how
            self.programs[depth] = make_constrained_writer(*arguments, **self.options)
        return self.programs[depth]

    def __call__(
        self,
        histories: Sequence[Items],
        candidates: Int[np.ndarray, "users c"],
        x_u: Float[np.ndarray, "users d"],
        without: Sequence[Items] | None = None,
    ) -> tuple[Int[np.ndarray, "users beams"], Float[np.ndarray, "users beams"]]:
        """The items, best first, and their scores.

        Args:
          without: of each user, items of the catalogue that may not be written.
        """
        items = np.zeros((len(candidates), self.beams), np.int64)
        scores = np.full(items.shape, -np.inf, np.float32)
        if self.catalogue is None:
            titles = [self.builder.answers(row.tolist()) for row in candidates]
            each, depth = [trie(many) for many in titles], max((len(t) for many in titles for t in many), default=1)
        else:
            leaf, depth = self.trie["leaf"], self.depth
            each = [self.trie] * len(candidates)
            if without is not None:
                gone = [np.isin(np.append(self.catalogue, 0)[leaf], np.asarray(row)) for row in without]
                each = [self.trie | {"leaf": np.where(bad, -1, leaf)} for bad in gone]
        program = self._program(_up(depth, DEPTH))
        for part in self.parts(histories, candidates, x_u):
            grown = tries([each[u] for u in part.users], self.rows)
            number, found = map(np.asarray, program(part.tables, self.frozen, part.batch, grown))
            for row, user in enumerate(part.users):
                there = number[row] >= 0
                pool = candidates[user] if self.catalogue is None else self.catalogue
                items[user, there], scores[user, there] = pool[number[row][there]], found[row][there]
        return items, scores
