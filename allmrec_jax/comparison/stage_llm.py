"""Stage 2 of both programs, from the same weights on the same prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from allmrec_jax.comparison.checks import Pairs, Run, Trace, recorded
from allmrec_jax.comparison.stage_align import shortened
from allmrec_jax.config import Injection
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.data.packing import pack
from allmrec_jax.data.prompts import Prompt, PromptBuilder, template_of
from allmrec_jax.evaluation.rank import Ranker
from allmrec_jax.models import projection
from allmrec_jax.models.llm import llama
from allmrec_jax.models.llm.load import FrozenLLM, build
from allmrec_jax.training import inject, mesh
from allmrec_jax.training.inject_step import inject as put
from allmrec_jax.training.inject_step import make_step
from allmrec_jax.training.state import create

HEADS = {"F_U": "log_proj", "F_I": "item_proj"}
ROWS = 8  # of (prompt, answer) that PyTorch reads at once


class Inputs(NamedTuple):
    """What the heads read, as one of the two programs made it.

    x_u: of the stage's examples (`inject.Examples`); table: of each item.
    """

    x_u: np.ndarray
    table: np.ndarray


def examples_of(config: Injection, dataset: Dataset, llm: FrozenLLM, *, seed: int) -> tuple[inject.Examples, jax.Array]:
    """The stage's batches, and the key that its heads start from."""
    key = jax.random.fold_in(jax.random.key(seed), inject.SEED_STREAM)
    init_key, order_key, candidate_key = jax.random.split(key, 3)
    context = llm.config.max_position_embeddings
    builder = PromptBuilder(llm.tokenizer, dataset.titles(), template_of(config), context=context)
    return inject.Examples(config, dataset, builder, order_key, candidate_key), init_key


def total_steps(config: Injection, examples: inject.Examples) -> int:
    """Of the whole training."""
    return max(1, round(examples.per_epoch * config.epochs))


def ours(config: Injection, examples: inject.Examples, llm: FrozenLLM, heads: Any, inputs: Inputs, steps: int) -> Run:
    """The steps of `training.inject` on one device."""
    config, one = dataclasses.replace(config, cf_dropout=False, micro=None), mesh.make_mesh(1, 1)
    total = total_steps(config, examples)
    optimiser = recorded(inject.make_optimiser(config, total))
    frozen, shardings = inject.freeze(llm, one, x_u=inputs.x_u, e=inputs.table)
    step = make_step(llm.graph, shardings, one, optimiser, config)
    tiers, losses = examples.tiers(inject.rows_of_a_pass(config, 1), total), []
    state = create(jax.tree.map(jnp.array, heads), optimiser)
    for i in range(steps):
        chosen = examples.rows(i)
        prompts, answers, column = examples.prompts(i, chosen)
        state, terms = step(state, frozen, tiers.parts(prompts, answers, rows=chosen, targets=column))
        losses.append(terms["loss"])
    kept = jax.device_get(state.opt_state[0])
    found = [float(loss) for loss in losses]
    return Run(found, kept["first"], jax.device_get(heads), jax.device_get(state.params), kept["squares"])


def in_use(config: Injection, llm: FrozenLLM, heads: Any, inputs: Inputs) -> Any:
    """The heads that prompts see after training: `held` ones are settled."""
    frozen = {"x_u": jnp.asarray(inputs.x_u), "e": jnp.asarray(inputs.table)}
    frozen["tokens"] = projection.token_statistics(llm.weights["weights"]["embed"])
    return jax.device_get(inject.heads_in_use(heads, frozen, config))


def transformer(llm: FrozenLLM, folder: Path) -> Any:
    """The LLM in transformers: as it reads the folder itself, or, of a GGUF file, with our weights of it."""
    from allmrec_jax.torch_baseline.llm import from_folder, in_transformers

    if (folder / "config.json").is_file():
        return from_folder(folder)
    if not isinstance(llm.config, llama.LlamaConfig):
        raise TypeError(f"a GGUF file of {type(llm.config).__name__}")
    return in_transformers(llm.config, llm.weights["weights"])


def baseline(config: Injection, model: Any, heads: Any, held: Inputs | None = None) -> Any:
    """The heads around transformers' LLM.

    Args:
      held: what `llm.init held` holds the heads by, while they are trained.
    """
    import torch

    from allmrec_jax.torch_baseline.inject import Injector
    from allmrec_jax.torch_baseline.weights import load

    widths = {name: heads[name]["dense1"]["kernel"].shape[0] for name in HEADS}
    injector = Injector(model, widths["F_U"], widths["F_I"], logit_rows=config.logit_rows)
    for name, theirs in HEADS.items():
        load(getattr(injector, theirs), projection.describe(*heads[name]["dense1"]["kernel"].shape), heads[name])
    if held is not None and config.init == "held":
        some = (table[:: -(-len(table) // 2048)] for table in (held.x_u, held.table[1:]))
        injector.held = tuple(torch.tensor(table) for table in some)
    return injector


def batches_of(examples: inject.Examples, x_u: np.ndarray, steps: int) -> Iterator[Any]:
    """The same steps' batches for PyTorch."""
    import torch

    from allmrec_jax.torch_baseline.training import InjectBatch

    for i in range(steps):
        rows = examples.rows(i)
        prompts, answers, column = examples.prompts(i, rows)
        targets = [0] * len(rows) if column is None else [int(target) for target in column]
        yield InjectBatch(prompts, answers, targets, torch.tensor(x_u[rows]))


def theirs(config: Injection, examples: inject.Examples, model: Any, heads: Any, inputs: Inputs, steps: int) -> Run:
    """The steps of `torch_baseline.training`."""
    import torch

    from allmrec_jax.torch_baseline.training import train_inject
    from allmrec_jax.torch_baseline.weights import gradients_of, weights_of

    injector, gradients = baseline(config, model, heads, inputs), []

    def of_both(read: Any) -> dict[str, Any]:
        return {
            name: read(getattr(injector, theirs), projection.describe(*heads[name]["dense1"]["kernel"].shape))
            for name, theirs in HEADS.items()
        }

    def watch() -> None:
        if not gradients:
            gradients.append(of_both(gradients_of))

    drawn, total = batches_of(examples, inputs.x_u, steps), total_steps(config, examples)
    losses = list(train_inject(injector, drawn, torch.tensor(inputs.table), config, total, watch))
    return Run(losses, gradients[0], jax.device_get(heads), of_both(weights_of))


class Asked(NamedTuple):
    """Users whose candidates are ranked, one row each: histories, candidates (users, c)."""

    histories: Sequence[np.ndarray]
    candidates: np.ndarray


def our_scores(
    config: Injection,
    llm: FrozenLLM,
    builder: PromptBuilder,
    heads: Any,
    table: np.ndarray,
    x_u: np.ndarray,
    asked: Asked,
) -> np.ndarray:
    """Mean log-likelihood of each candidate's title, all of a user's in one pass."""
    options = {"mesh": mesh.make_mesh(1, 1), "candidates": asked.candidates.shape[1], "logit_rows": config.logit_rows}
    return Ranker(llm, heads, builder=builder, e=table, **options)(asked.histories, asked.candidates, x_u)


def their_scores(
    config: Injection, model: Any, builder: PromptBuilder, heads: Any, table: np.ndarray, x_u: np.ndarray, asked: Asked
) -> np.ndarray:
    """The same by PyTorch, every (prompt, candidate) a row of its own."""
    import torch

    injector, (users, count) = baseline(config, model, heads), asked.candidates.shape
    prompts = [prompt for prompt in builder.prompts(asked.histories, asked.candidates) for _ in range(count)]
    answers = builder.answers(asked.candidates.ravel().tolist())
    repeated, found = torch.tensor(np.repeat(x_u, count, axis=0)), []
    with torch.no_grad():
        for start in range(0, len(prompts), ROWS):
            part = slice(start, start + ROWS)
            found.append(injector.log_likelihoods(prompts[part], answers[part], repeated[part], torch.tensor(table)))
    lengths = np.array([len(answer) for answer in answers])
    return (torch.cat(found).numpy() / lengths).reshape(users, count)


def trace(
    llm: FrozenLLM,
    model: Any,
    prompt: Prompt,
    heads: tuple[Any, Any],
    inputs: tuple[Inputs, Inputs],
    x_u: tuple[np.ndarray, np.ndarray],
) -> Trace:
    """One prompt: what the heads read, O_u and O_i, what is injected, the LLM's states after each layer, the logits.

    Args:
      heads, inputs, x_u: ours and PyTorch's; x_u (d,) of the prompt's user.
    """
    import torch

    c, weights, items = llm.config, llm.weights["weights"], np.asarray(prompt.slot_items, int)
    injector = baseline(Injection(), model, heads[1])
    batch = pack([prompt], [[[0]]], rows=np.zeros(1, int))

    def read() -> Pairs:
        return [("x_u", x_u[0], x_u[1]), ("what F_I reads", inputs[0].table[items], inputs[1].table[items])]

    def vectors() -> tuple[list[np.ndarray], list[Any]]:
        own = (
            projection.F_U(heads[0]["F_U"], jnp.asarray(x_u[0])[None]),
            projection.F_I(heads[0]["F_I"], jnp.asarray(inputs[0].table[items])),
        )
        with torch.no_grad():
            other = (
                injector.log_proj(torch.tensor(x_u[1])[None]),
                injector.item_proj(torch.tensor(inputs[1].table[items])),
            )
        return [np.asarray(part) for part in own], [part.numpy() for part in other]

    def heads_out() -> Pairs:
        own, other = vectors()
        return [("F_U", own[0], other[0]), ("F_I", own[1], other[1])]

    def embedded() -> tuple[np.ndarray, np.ndarray]:
        own, other = vectors()
        slots = np.zeros((1, batch["slots"].shape[1], llm.width), np.float32)
        slots[0, : len(items)] = own[1]
        plain = nnx.merge(llm.graph, llm.weights).embed(jnp.asarray(batch["tokens"])).astype(jnp.float32)
        found = np.asarray(put(plain, jnp.asarray(own[0]), jnp.asarray(slots), batch))[0, : len(prompt.tokens)]
        x = model.get_input_embeddings()(torch.tensor(prompt.tokens)).detach().clone().numpy()
        x[prompt.slots] = other[1]
        if prompt.user_slot is not None:
            x[prompt.user_slot] = other[0][0]
        return found, x

    def states(layers: int) -> tuple[np.ndarray, np.ndarray]:
        a, b = embedded()
        cut = {**weights, "layers": jax.tree.map(lambda leaf: leaf[:layers], weights["layers"])}
        made = build(dataclasses.replace(c, num_hidden_layers=layers), cut, llm.tokenizer)
        found = nnx.merge(made.graph, made.weights)(jnp.asarray(a)[None], jnp.zeros((1, len(a)), jnp.int32))
        with shortened(model.base_model, layers), torch.no_grad():
            expected = model.base_model(inputs_embeds=torch.tensor(b)[None], use_cache=False).last_hidden_state
        return np.asarray(found)[0], expected[0].numpy()

    def logits() -> Pairs:
        a, b = states(c.num_hidden_layers)
        found = nnx.merge(llm.graph, llm.weights).logits(jnp.asarray(a))
        with torch.no_grad():
            return [("the LLM's logits", found, model.get_output_embeddings()(torch.tensor(b)).numpy())]

    def layer(k: int):
        return lambda: [(f"the LLM's layer {k}" if k else "the LLM before its first layer", *states(k))]

    def injected() -> Pairs:
        return [("the token embeddings with O_u and O_i", *embedded())]

    return [read, heads_out, injected, *(layer(k) for k in range(c.num_hidden_layers + 1)), logits]
