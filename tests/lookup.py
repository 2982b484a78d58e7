"""A tiny LLM that looks things up in lists, and knows nothing else: it is trained on random vectors and random words.

    O_q -> "w7" O,"w2" O; "w9" O,"w4" O,"w1" O, ... : "w4"

The answer is the word of the second list whose vector is most like O_q; the first list may hold such vectors, too.
Found from nothing that takes so small a network many thousands of steps, so it starts from a circuit drawn by hand,
with noise on every weight, and is trained until it works again. Three layers, each writing where the next one reads:

    1   O      the word two tokens before it, into `V`; whether `;` was seen, into SEEN
        ->     the vector one token before it (of O_q), into `Q`
    2   all    what `->` holds in `Q`
    3   "      looks for O behind `;` whose dims `K` are like its own `Q`, and says the word in their `V`
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from allmrec_jax.config import Injection
from allmrec_jax.data.packing import pack
from allmrec_jax.data.prompts import PromptBuilder, template_of
from allmrec_jax.models import params
from allmrec_jax.models.llm import llama, load
from allmrec_jax.models.llm.tokenizer import Tokenizer, from_backend
from allmrec_jax.training.inject_step import answer_log_likelihood

WORDS = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(120)]
MARKS = ["<e>", '"', ',"', ";", ":", ",", "->", "<u>"]
CONFIG = Injection(user_sentence=" -> ", sentence="{history}; {candidates}: ", history=2, candidates=20)

W, K, V, Q = range(24), range(24, 46), range(46, 70), range(70, 92)
MARK = dict(zip(MARKS, range(92, 100), strict=True))
SEEN, OPENING, WORD, TOKEN = range(100, 104)
LLAMA = llama.LlamaConfig(
    vocab_size=128,
    hidden_size=104,
    intermediate_size=8,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    rope_theta=1e12,  # four pairs of dimensions tell positions apart, the others hardly turn
    max_position_embeddings=256,
    qkv_bias=True,
)
FAST, SLOW = range(4), [*range(4, 16), *range(20, 32)]
SPREAD = 0.5  # of the vectors' numbers


def tokenizer() -> Tokenizer:
    """One token a word or mark; spaces are none."""
    backend = Backend(models.WordLevel({token: i for i, token in enumerate([*MARKS, *WORDS])}, unk_token="<u>"))
    cuts = pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.Split(Regex(r',"|[";:,]'), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(cuts))
    return from_backend(backend, eos=0)


def circuit(seed: int = 0, noise: float = 0.0) -> Any:
    """The weights drawn by hand, with noise of this size on each."""
    random = np.random.default_rng(seed)
    weights = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params.shapes(llama.describe(LLAMA)))
    embed, layers, turn = weights["embed"], weights["layers"], LLAMA.rope_theta ** (-np.arange(16) / 16)
    embed[:, TOKEN] = 10
    embed[: len(MARKS), list(MARK.values())] = 5 * np.eye(len(MARKS))
    embed[len(MARKS) :, list(W)] = random.choice([-1, 1], (len(WORDS), len(W)))
    embed[len(MARKS) :, WORD] = 5
    weights["norm"][:] = 0.3
    layers["attention_norm"][:] = layers["mlp_norm"][:] = 1

    def back(head: int, tokens: int) -> None:
        """A head of the first layer that looks so many tokens back."""
        for i in FAST:
            layers["k_bias"][0, head, i] = 9
            layers["q_bias"][0, head, [i, i + 16]] = 9 * np.cos(tokens * turn[i]), -9 * np.sin(tokens * turn[i])

    def at(layer: int, head: int, dim: int, strength: float) -> None:
        """A head that looks at tokens by one dim."""
        layers["q_bias"][layer, head, SLOW[-1]] = strength
        layers["k"][layer, dim, head, SLOW[-1]] = 1

    def copies(layer: int, head: int, read: Any, write: Any, gain: float) -> None:
        for j, (here, there) in enumerate(zip(read, write, strict=True)):
            layers["v"][layer, here, head, j], layers["o"][layer, head, j, there] = 1, gain

    def follows(unit: int, dim: int, mark: str, unless: int | None = None) -> None:
        """Behind a token with `dim` comes this mark."""
        layers["gate"][2, dim, unit] = layers["up"][2, dim, unit] = 1
        layers["down"][2, unit, MARK[mark]] = 200
        if unless is not None:
            layers["gate"][2, unless, unit] = -4

    back(0, 2), copies(0, 0, W, V, 4.7)
    back(1, 1), copies(0, 1, K, Q, 1)
    at(0, 2, MARK[";"], 25), copies(0, 2, [MARK[";"]], [SEEN], 3.3)
    back(3, 1), copies(0, 3, [MARK[":"]], [OPENING], 1.1)
    at(1, 0, MARK["->"], 35), copies(1, 0, Q, Q, 8)
    for slow, key, query in zip(SLOW, K, Q, strict=False):
        layers["q"][2, query, 0, slow] = layers["k"][2, key, 0, slow] = 3.3
    at(2, 0, SEEN, 8.5), copies(2, 0, V, W, 6)
    layers["k"][2, TOKEN, 0, SLOW[-1]] = -3  # vectors only
    follows(0, MARK[":"], '"'), follows(1, WORD, '"'), follows(2, MARK['"'], "<e>", unless=OPENING)
    return jax.tree.map(lambda x: (x + noise * random.normal(size=x.shape)).astype(np.float32), weights)


def layout() -> tuple[dict[str, jax.Array], jax.Array]:
    """A packed prompt of `CONFIG` with its answer, and the number of the listed item at each token, -1 elsewhere."""
    read, history, count = tokenizer(), CONFIG.history, CONFIG.history + CONFIG.candidates
    builder = PromptBuilder(read, ["", *WORDS], template_of(CONFIG), context=LLAMA.context)
    items = list(range(1, count + 1))
    prompts, answers = builder.prompts([items[:history]], [items[history:]]), [builder.answers(items[-1:])]
    batch = pack(prompts, answers, rows=[0], tier=1)
    used = int(batch["answer_weight"].sum())
    cut = {name: array[:, :used] for name, array in batch.items() if name.startswith("answer")}
    batch |= cut | {"slots": batch["slots"][:, :count]}
    item = batch["tokens"][0] - len(MARKS)
    return jax.tree.map(jnp.asarray, batch), jnp.asarray(np.where(item >= 0, item, -1))


def lists(key: jax.Array, rows: int, least: float) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """(batch, (O_q, O)): random words with random vectors; O_q's correlation with its own is `least` to 1."""
    one, item = layout()
    history, count = CONFIG.history, CONFIG.history + CONFIG.candidates
    keys = jax.random.split(key, 7)
    words = jax.vmap(lambda key: jax.random.permutation(key, len(WORDS))[:count])(jax.random.split(keys[0], rows))
    O = jax.random.normal(keys[1], (rows, count, LLAMA.width))
    target = history + jax.random.randint(keys[2], (rows, 1), 0, CONFIG.candidates)
    own = jnp.take_along_axis(O, target[..., None], axis=1)
    like = jax.random.uniform(keys[3], (rows, 1, 1), minval=least)
    O_q = like * own + jnp.sqrt(1 - like**2) * jax.random.normal(keys[4], own.shape)
    misleading = jax.random.bernoulli(keys[5], 0.5, (rows, history, 1))
    O = O.at[:, :history].set(jnp.where(misleading, 0.8 * own + 0.6 * O[:, :history], O[:, :history]))
    length = SPREAD * jnp.exp(jax.random.uniform(keys[6], (rows, 1, 1), minval=-0.35, maxval=0.35))
    batch = {name: jnp.broadcast_to(array, (rows, *array.shape[1:])) for name, array in one.items()}
    word = len(MARKS) + jnp.take_along_axis(words, target, axis=1)
    listed = jnp.where(batch["branch"] == 0, len(MARKS) + words[:, item], word)
    batch |= {"tokens": jnp.where(item[None] >= 0, listed, batch["tokens"])}
    batch |= {"answer_token": jnp.where(batch["answer_token"] >= len(MARKS), word, batch["answer_token"])}
    return batch, (length[:, :, 0] * O_q[:, 0], length * O)


def train(steps: int = 240, rows: int = 16, rate: float = 2e-3) -> tuple[load.FrozenLLM, dict[str, float]]:
    """The LLM, and how often it says the right word: at the start, trained, and for O_q as good as equal."""
    llm = load.build(LLAMA, circuit(noise=0.03), tokenizer())
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(rate, steps)))

    def loss(weights: Any, key: jax.Array, least: float, rows: int) -> tuple[jax.Array, jax.Array]:
        batch, injected = lists(key, rows, least)
        tokens = answer_log_likelihood(llm.graph, injected, {"llm": weights}, batch)
        return -jnp.mean(tokens.sum(1)), jnp.mean(tokens[:, 1] > jnp.log(0.5))

    @jax.jit
    def step(weights: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        gradients = jax.grad(loss, has_aux=True)(weights, key, 0.6, rows)[0]
        changes, state = optimiser.update(gradients, state)
        return optax.apply_updates(weights, changes), state

    right = jax.jit(functools.partial(loss, rows=256))
    key, weights, state = jax.random.key(0), llm.weights, optimiser.init(llm.weights)
    found = {"start": float(right(weights, jax.random.key(1), 0.6)[1])}
    for i in range(steps):
        weights, state = step(weights, state, jax.random.fold_in(key, i))
    found |= {"trained": float(right(weights, jax.random.key(1), 0.6)[1])}
    found |= {"equal": float(right(weights, jax.random.key(1), 0.98)[1])}
    return load.build(LLAMA, jax.device_get(weights)["weights"], llm.tokenizer), found
