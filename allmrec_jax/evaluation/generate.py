"""`generate`: the LLM writes its answer in words, and what it names is looked up among the titles."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int
from rich.console import Console

from allmrec_jax.data.packing import Answers
from allmrec_jax.data.prompts import Items, PromptBuilder
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import answers
from allmrec_jax.evaluation.decode import Decoding, make_writer
from allmrec_jax.evaluation.lists import Lists
from allmrec_jax.evaluation.passes import Passes
from allmrec_jax.models.llm.load import FrozenLLM
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.progress import progress
from allmrec_jax.training.checkpoint import write_json
from allmrec_jax.training.mesh import Mapping


class Writer(Passes):
    """Texts that the LLM writes: `(histories, candidates, x_u, users) -> texts`.

    What is sampled for a user depends on (seed, user) alone.

    Raises:
      UserError: if a prompt with so many new tokens could not fit the LLM's context.
    """

    def __init__(
        self,
        llm: FrozenLLM,
        heads: Any,
        *,
        builder: PromptBuilder,
        e: np.ndarray,
        mesh: Mesh,
        decoding: Decoding = Decoding(),  # noqa: B008, frozen
        seed: int = 0,
        batch: int = 4,
        logit_rows: int | None = None,
        how: Mapping = "shard_map",
        program: Callable[..., jax.Array] | None = None,
    ):
        super().__init__(llm, heads, builder=builder, e=e, mesh=mesh, batch=batch, how=how)
        self.rows = batch  # a step reads all weights for one token of each row: rows are next to free
        self.eos, self.key, self.decoding = builder.tokenizer.eos, jax.random.key(seed), decoding
        options = {"eos": self.eos, "logit_rows": logit_rows}
        self.program = program or make_writer(llm.graph, self.shardings, mesh, decoding, **options)

    def answers(self, candidates: Int[np.ndarray, "users c"]) -> Answers:
        """Nothing stands behind the prompt but what the end token stands for here: an answer of no input."""
        return [[[self.eos]] for _ in candidates]

    def tokens(
        self,
        histories: Sequence[Items],
        candidates: Int[np.ndarray, "users c"],
        x_u: Float[np.ndarray, "users d"],
        users: Int[np.ndarray, " users"],
    ) -> Int[np.ndarray, "users new"]:
        """The tokens written for each user, the end token wherever there is none."""
        out = np.full((len(candidates), self.decoding.new), self.eos, np.int32)
        pending = []
        for part in self.parts(histories, candidates, x_u):
            longest = part.batch["tokens"].shape[1] + self.decoding.new
            if longest > self.llm.context:
                raise UserError(
                    f"prompts of {part.batch['tokens'].shape[1]} tokens leave no room for {self.decoding.new} new ones "
                    f"in the LLM's context of {self.llm.context}; ask for fewer new tokens, or name fewer items"
                )
            rows = np.zeros(self.rows, np.int64)
            rows[: len(part.users)] = users[part.users]
            keys = jax.vmap(lambda user: jax.random.fold_in(self.key, user))(rows)
            pending.append((part.users, self.program(part.tables, self.frozen, part.batch, keys)))
        for chosen, found in pending:
            out[chosen] = np.asarray(found)[: len(chosen)]
        return out

    def __call__(
        self,
        histories: Sequence[Items],
        candidates: Int[np.ndarray, "users c"],
        x_u: Float[np.ndarray, "users d"],
        users: Int[np.ndarray, " users"],
    ) -> list[str]:
        texts = []
        for row in self.tokens(histories, candidates, x_u, users).tolist():
            end = row.index(self.eos) if self.eos in row else len(row)
            texts.append(self.builder.tokenizer.decode(row[:end]))
        return texts


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """What was written for each row of a `Lists`: the text, the answer in it, and what that is worth.

    hits: by the rule (`answers.RULES`). valid: the answer is one of the row's candidates.
    """

    texts: list[str]
    answers: list[str]
    hits: dict[str, Bool[np.ndarray, " rows"]]
    valid: Bool[np.ndarray, " rows"]


def judge(texts: Sequence[str], lists: Lists, titles: Sequence[str | None]) -> Written:
    """What texts are worth. An item without a title is called `No Title`, as in the prompt."""
    named = ["No Title" if title is None else title for title in titles]
    said, targets = [answers.parse(text) for text in texts], [named[item] for item in lists.targets]
    among = [[named[item] for item in row] for row in lists.candidates.tolist()]
    found = {rule: answers.hits(said, targets, rule) for rule in answers.RULES}
    return Written(list(texts), said, found, answers.valid(said, among))


def generate_answers(
    pipeline: Pipeline,
    lists: Lists,
    *,
    heads: Any,
    e: np.ndarray | None = None,
    decoding: Decoding = Decoding(),  # noqa: B008, frozen
    saved: Path | None = None,
    label: str = "generation",
    batch: int | None = None,
    save_every: int = 8,
    console: Console | None = None,
) -> Written:
    """Answers in words for all users of `lists`, each asked among its candidates.

    Args:
      heads: `pipeline.heads`, or None for the LLM alone.
      e: what F_I reads of each item, if not `pipeline.item_table`.
      saved: a file in which the texts are kept every few batches, so that interrupted work goes on.
    """
    x, dataset = pipeline.experiment, pipeline.dataset
    x_u = pipeline.cf.x_u(dataset.histories(lists.users, x.cf.maxlen, lists.split), lists.users)
    histories = [row[row != 0] for row in dataset.histories(lists.users, x.llm.history, lists.split)]
    options = pipeline.through_llm(heads, e=e, batch=batch)
    writer = Writer(pipeline.llm, heads, **options, decoding=decoding, seed=x.seed)
    made_for = json.loads(json.dumps({"decoding": dataclasses.asdict(decoding), "lists": _fingerprint(lists)}))
    texts = _saved(saved, made_for, len(lists.users))
    todo = np.array([u for u, text in enumerate(texts) if text is None], np.int64)
    todo = todo[writer.arrange([histories[u] for u in todo], lists.candidates[todo])]
    size, before = batch or x.evaluation.batch, len(texts) - len(todo)
    with progress(label, len(texts), done=before, unit="users", console=console or pipeline.console) as bar:
        for k, start in enumerate(range(0, len(todo), size)):
            chosen = todo[start : start + size]
            rows = [histories[u] for u in chosen], lists.candidates[chosen], x_u[chosen], lists.users[chosen]
            for user, text in zip(chosen, writer(*rows), strict=True):
                texts[user] = text
            bar.update(before + start + len(chosen))
            if saved is not None and (k % save_every == save_every - 1 or start + size >= len(todo)):
                write_json(saved, made_for | {"texts": texts})
    return judge(texts, lists, dataset.titles())


def _fingerprint(lists: Lists) -> str:
    both = [np.ascontiguousarray(part, np.int64).tobytes() for part in (lists.users, lists.candidates)]
    return f"{zlib.crc32(b''.join(both)):08x}"


def _saved(path: Path | None, made_for: dict[str, Any], rows: int) -> list[str | None]:
    """The texts so far; none where the file is not there, damaged, or made otherwise."""
    if path is not None and path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if {name: found[name] for name in made_for} == made_for and len(found["texts"]) == rows:
                return found["texts"]
        except (ValueError, KeyError, TypeError):
            pass
    return [None] * rows
