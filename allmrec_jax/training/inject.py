"""Stage 2: F_U and F_I learn to inject user and item embeddings into the prompt of the frozen LLM."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from rich.console import Console

from allmrec_jax.config import Injection
from allmrec_jax.data import batches, packing
from allmrec_jax.data.candidates import draw_candidates
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.data.prompts import Prompt, PromptBuilder, template_of
from allmrec_jax.errors import UserError
from allmrec_jax.models import collaborative, params, projection
from allmrec_jax.models.llm.load import FrozenLLM
from allmrec_jax.progress import say
from allmrec_jax.training import loop
from allmrec_jax.training.cf import CFModel
from allmrec_jax.training.checkpoint import Checkpoints, Curves
from allmrec_jax.training.inject_step import heads_in_use, make_step, settle
from allmrec_jax.training.state import State, create

SEED_STREAM = 2
SAMPLES = 16  # steps whose prompts decide which lengths are compiled
LABEL = "stage 2: injection"


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


def item_table(
    config: Injection, cf: CFModel, e: Callable[[], Float[np.ndarray, "items joint"]], *, width: int, seed: int
) -> Float[np.ndarray, "items width"]:
    """What F_I reads of each item, by `item_vectors`; `e` is asked for where they are stage 1's.

    Args:
      width: of the random ones.
    """
    if config.item_vectors == "E":
        return np.asarray(cf.E, np.float32)
    if config.item_vectors == "random":
        return np.random.default_rng([seed, SEED_STREAM]).normal(size=(len(cf.E), width)).astype(np.float32)
    return e()


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


def freeze(llm: FrozenLLM, mesh: Mesh, **tables: np.ndarray) -> tuple[Any, Any]:
    """(frozen, its shardings): the LLM's weights by their logical axes; `tables` (x_u, e) replicated."""
    frozen = {"llm": llm.weights} | {name: jnp.asarray(table) for name, table in tables.items()}
    if tables:
        frozen["tokens"] = projection.token_statistics(llm.weights["weights"]["embed"])
    shardings = frozen_shardings(llm, mesh, *tables)
    return jax.device_put(frozen, shardings), shardings


def frozen_shardings(llm: FrozenLLM, mesh: Mesh, *tables: str) -> Any:
    """Of what `freeze` gives with these tables."""
    whole = NamedSharding(mesh, P())
    shardings = {"llm": llm.shardings(mesh)} | dict.fromkeys(tables, whole)
    return shardings | {"tokens": {"mean": whole, "spread": whole}} if tables else shardings


class Examples:
    """The batches of stage 2: who is asked about what, among which candidates, as a function of the step."""

    def __init__(
        self,
        config: Injection,
        dataset: Dataset,
        builder: PromptBuilder,
        order_key: jax.Array,
        candidate_key: jax.Array,
    ):
        self.config, self.builder = config, builder
        self.users, self.ends, self.targets = dataset.examples(config.targets, single=config.single_items)
        self.per_epoch = batches.steps_per_epoch(len(self.users), config.batch)
        self.histories = dataset.windows(self.ends, config.history, self.users)
        self.seen = batches.seen_items(*dataset.distinct("train"), dataset.n_items)
        self.order_key, self.candidate_key = order_key, candidate_key
        self._order = lru_cache(1)(
            lambda epoch: np.asarray(batches.epoch_order(self.order_key, epoch, len(self.users)))
        )

    def rows(self, i: int) -> np.ndarray:
        """The examples of step i."""
        order = self._order(i // self.per_epoch)
        chosen, real = batches.rows_of_step(self.order_key, i, self.config.batch, len(self.users), order)
        return np.asarray(chosen)[np.asarray(real)]

    def prompts(self, i: int, rows: np.ndarray) -> tuple[list[Prompt], list[list[list[int]]], np.ndarray | None]:
        """(prompts, answers, number of each target among the answers) of step i."""
        users, targets = self.users[rows], self.targets[rows]
        candidates, column = draw_candidates(
            self.candidate_key, i, np.arange(len(rows)), users, targets, self.seen, self.config.candidates
        )
        prompts = self.builder.prompts([row[row != 0] for row in self.histories[rows]], candidates)
        if self.config.choice_weight:
            return prompts, [self.builder.answers(row.tolist()) for row in candidates], column
        return prompts, [[answer] for answer in self.builder.answers(targets.tolist())], None

    def tiers(self, rows: int, steps: int) -> packing.Tiers:
        """Lengths for parts of so many rows, from steps spread over the first epoch."""
        some = np.unique(np.linspace(0, min(steps, self.per_epoch) - 1, SAMPLES).astype(int))
        seen = [self.prompts(int(i), self.rows(int(i)))[:2] for i in some]
        prompts, answers = ([part for batch in side for part in batch] for side in zip(*seen, strict=True))
        lengths = np.array(list(map(packing.row_length, prompts, answers)))
        return packing.Tiers(rows, lengths, packing.room_for(prompts, answers))


def dropped_x_u(cf: CFModel, dataset: Dataset, examples: Examples, key: jax.Array) -> Callable[[int, np.ndarray], Any]:
    """`(step, examples) -> x_u` with the CF model's dropout, as the public code has it in this stage, too."""
    windows = dataset.windows(examples.ends, cf.config.maxlen, examples.users)
    weights, module = jax.tree.map(np.asarray, cf.params), collaborative.module_of(cf.config)

    @jax.jit
    def x_u(weights: Any, windows: jax.Array, users: jax.Array, step: jax.Array, rows: jax.Array) -> jax.Array:
        keys = batches.dropout_keys(key, step, rows)
        return module.features(weights, cf.config, windows, keys, users=users)[:, -1]

    return lambda step, rows: np.asarray(x_u(weights, windows[rows], examples.users[rows], step, rows))


def rows_of_a_pass(config: Injection, data: int) -> int:
    """Users of one pass through the LLM, a multiple of the data-parallel devices.

    Raises:
      UserError: if the batch, or `llm.micro`, cannot be cut over them.
    """
    for name, rows in (("llm.batch", config.batch), ("llm.micro", config.micro)):
        if rows is not None and rows % data:
            raise UserError(f"{name} {rows} is not a multiple of the {data} data-parallel devices")
    if config.micro is not None:
        return config.micro
    return data if jax.default_backend() == "cpu" else config.batch


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
    each epoch. Returns the heads and the curves; a head whose vectors the prompt does not hold stays as it began.

    Args:
      e: what F_I reads of each item (`item_table`).
    """
    console = console or Console()
    rows = rows_of_a_pass(config, mesh.shape["data"])
    key = jax.random.fold_in(jax.random.key(seed), SEED_STREAM)
    init_key, order_key, candidate_key = jax.random.split(key, 3)
    context = llm.config.max_position_embeddings
    builder = PromptBuilder(llm.tokenizer, dataset.titles(), template_of(config), context=context)
    examples = Examples(config, dataset, builder, order_key, candidate_key)
    steps = max(1, round(examples.per_epoch * config.epochs))
    x_u = cf.x_u(dataset.windows(examples.ends, cf.config.maxlen, examples.users), examples.users)
    optimiser, table = make_optimiser(config, steps), llm.weights["weights"]["embed"]
    heads = init_heads(init_key, jnp.asarray(x_u), jnp.asarray(e[1:]), table, config.init)
    state = jax.device_put(create(heads, optimiser), NamedSharding(mesh, P()))
    frozen, shardings = freeze(llm, mesh, x_u=x_u, e=e)
    step = make_step(llm.graph, shardings, mesh, optimiser, config)
    tiers = lru_cache(1)(lambda: examples.tiers(rows, steps))
    drops = config.cf_dropout and getattr(cf.config, "dropout", 0) > 0
    dropped = dropped_x_u(cf, dataset, examples, jax.random.fold_in(key, 3)) if drops else None

    def one_step(state: State, i: int) -> tuple[State, dict[str, jax.Array]]:
        chosen = examples.rows(i)
        prompts, answers, column = examples.prompts(i, chosen)
        if dropped is None:
            return step(state, frozen, tiers().parts(prompts, answers, rows=chosen, targets=column))
        parts = tiers().parts(prompts, answers, rows=range(len(chosen)), targets=column)
        fresh = dropped(i, chosen)
        return step(state, frozen, [part | {"x_u": fresh[part["rows"]]} for part in parts])

    checkpoints = Checkpoints(folder)
    try:
        state, curves = loop.run(
            one_step,
            state,
            steps=steps,
            checkpoints=checkpoints,
            label=LABEL,
            items_per_step=config.batch,
            item_name="users",
            log_every=5,
            save_every=config.save_every,
            console=console,
            logs=folder / "logs",
        )
    finally:
        checkpoints.close()
    if tiers.cache_info().currsize and tiers().computed:
        used = tiers()
        say(console, f"{LABEL}: {1 - used.real / used.computed:.1%} of the LLM's tokens were padding")
    return heads_in_use(state.params, frozen, config), curves
