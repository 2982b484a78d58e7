"""Stage 2: what is injected and nothing else, loss on the answer only, frozen weights frozen, sharded as whole."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from rich.console import Console

from allmrec_jax.config import Injection
from allmrec_jax.data import packing
from allmrec_jax.data.packing import pack
from allmrec_jax.data.prompts import DOMAINS, PromptBuilder, template_of
from allmrec_jax.errors import UserError
from allmrec_jax.models import projection
from allmrec_jax.training import inject, inject_step
from allmrec_jax.training.mesh import make_mesh
from allmrec_jax.training.state import create

USERS = 4
X_U = np.random.default_rng(0).normal(size=(USERS, 8)).astype(np.float32)
E = tiny.joint_embeddings()
TITLES = [None, *(f"Film {item}" for item in range(1, tiny.N_ITEMS + 1))]
HISTORIES, CANDIDATES, TARGETS = [[1, 2], [3], [4, 5], []], [[6, 7], [8, 9], [10, 11], [12, 13]], [6, 9, 10, 13]


def make_batch(llm, users: int = USERS, batch: int = USERS, **options) -> dict[str, np.ndarray]:
    template = template_of(Injection(domain="movies", **options))
    builder = PromptBuilder(llm.tokenizer, TITLES, template, context=512)
    prompts = builder.prompts(HISTORIES[:users], CANDIDATES[:users])
    answers = [[answer] for answer in builder.answers(TARGETS[:users])]
    return pack(prompts, answers, rows=list(range(users)), batch=batch)


def on_mesh(data: int, model: int, optimiser: optax.GradientTransformation, **options):
    """(step, fresh state, frozen) of a tiny LLM on data x model devices."""
    mesh = make_mesh(data, model)
    llm = tiny.frozen_llm(mesh)
    frozen, shardings = inject.freeze(llm, mesh, x_u=X_U, e=E)
    embed = jnp.asarray(jax.device_get(llm.weights["weights"]["embed"]))
    heads = inject.init_heads(jax.random.key(4), jnp.asarray(X_U), jnp.asarray(E[1:]), embed)
    return inject_step.make_step(llm.graph, shardings, mesh, optimiser, **options), create(heads, optimiser), frozen


@pytest.fixture(scope="module")
def llm():
    return tiny.frozen_llm()


@pytest.fixture(scope="module")
def batch(llm):
    return jax.tree.map(jnp.asarray, make_batch(llm))


@pytest.fixture(scope="module")
def sgd():
    """(step on one device, start, frozen) with plain gradient descent, so that the update is the gradient."""
    step, state, frozen = on_mesh(1, 1, optax.sgd(1.0))
    return lambda batch: jax.device_get(step(jax.tree.map(jnp.array, state), frozen, [batch])), state, frozen


@pytest.fixture(scope="module")
def one_step(sgd, batch):
    return sgd[0](batch)


def tables(heads) -> dict[str, jax.Array]:
    return {"O_u": projection.F_U(heads["F_U"], jnp.asarray(X_U)), "O_i": projection.F_I(heads["F_I"], jnp.asarray(E))}


def assert_close(a, b, rtol=1e-4, atol=1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


# -------------------------------------------------------------------------------------------------------- injection


def test_injected_positions_and_nothing_else_differ_from_the_plain_embeddings(llm, batch, sgd):
    _, state, frozen = sgd
    plain = nnx.merge(llm.graph, llm.weights).embed(batch["tokens"])
    O_u = projection.F_U(state.params["F_U"], frozen["x_u"][batch["rows"]])
    O_i = projection.F_I(state.params["F_I"], frozen["e"][batch["slot_items"]])
    injected = np.asarray(inject_step.inject(plain, O_u, O_i, batch))
    differs = (injected != np.asarray(plain)).any(-1)
    expected = np.zeros(differs.shape, bool)
    for row in range(USERS):
        items = [*HISTORIES[row], *CANDIDATES[row]]
        slots = np.asarray(batch["slots"][row, : len(items)])
        expected[row, [0, *slots]] = True
        np.testing.assert_array_equal(injected[row, 0], O_u[row])
        np.testing.assert_allclose(
            injected[row, slots], projection.F_I(state.params["F_I"], jnp.asarray(E[items])), rtol=1e-5, atol=1e-6
        )
    np.testing.assert_array_equal(differs, expected)


def test_without_heads_the_prompt_stays_as_it_is(llm, batch, sgd):
    _, _, frozen = sgd
    read = jax.jit(lambda b: inject_step.answer_log_likelihood(llm.graph, None, frozen, b))
    elsewhere = batch | {
        "slots": batch["slots"] * 0 + 3,
        "user_slot": batch["user_slot"] + 5,
        "slot_items": batch["slots"],
    }
    np.testing.assert_array_equal(read(batch), read(elsewhere))


@pytest.mark.parametrize(
    ("absent", "options"), [("F_U", {"user_vector": False}), ("F_I", {"item_vectors": "none"}), (None, {})]
)
def test_what_the_config_leaves_out_does_not_enter(llm, sgd, absent, options):
    """Neither value nor gradient: the loss does not see x_u without O_u, nor e without O_i."""
    _, state, frozen = sgd
    packed = make_batch(llm, user_place="last", item_place="before", **options)
    loss = jax.jit(jax.value_and_grad(lambda h, f, b: inject_step.losses(h, llm.graph, f, b, Injection(**options))[0]))
    value, gradients = loss(state.params, frozen, packed)
    for head, table in (("F_U", "x_u"), ("F_I", "e")):
        sizes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients[head])]
        moved = loss(state.params, frozen | {table: frozen[table][::-1] * 2}, packed)[0]
        if head == absent:
            assert max(sizes) == 0
            assert moved == value
        else:
            assert min(sizes) > 0
            assert moved != value


def test_what_f_i_reads():
    cf, never = tiny.cf_model(), pytest.fail

    def table(vectors: str, seed: int = 0, e=lambda: never("stage 1 is not needed")) -> np.ndarray:
        return inject.item_table(Injection(item_vectors=vectors), cf, e, width=6, seed=seed)

    np.testing.assert_array_equal(table("e", e=lambda: E), E)
    np.testing.assert_array_equal(table("E"), cf.E)
    np.testing.assert_array_equal(table("random"), table("random"))
    assert table("random").shape == E.shape
    assert (table("random") != table("random", seed=1)).all()
    assert len(np.unique(table("random"))) == E.size


# ------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_the_cross_entropy_of_the_answers_tokens(llm, batch, sgd, one_step):
    """By hand: the whole sequence's logits, then the answer's tokens and the end token, mean over all of them."""
    _, state, frozen = sgd

    @jax.jit
    def all_logits(batch):
        model = nnx.merge(llm.graph, llm.weights)
        O_u = projection.F_U(state.params["F_U"], frozen["x_u"][batch["rows"]])
        O_i = projection.F_I(state.params["F_I"], frozen["e"][batch["slot_items"]])
        return model.logits(model(inject_step.inject(model.embed(batch["tokens"]), O_u, O_i, batch), batch["branch"]))

    log_p = np.asarray(jax.nn.log_softmax(all_logits(batch)), np.float64)
    branch, tokens = np.asarray(batch["branch"]), np.asarray(batch["tokens"])
    terms = []
    for row in range(USERS):
        answer = [*tokens[row, branch[row] == 1].tolist(), llm.tokenizer.eos]
        assert llm.tokenizer.decode(answer[:-1]) == f'"Film {TARGETS[row]}"'
        last = int((branch[row] == 0).sum()) - 1
        terms += [log_p[row, last + k, token] for k, token in enumerate(answer)]
    np.testing.assert_allclose(one_step[1]["loss"], -np.mean(terms), rtol=1e-5)


def test_nothing_behind_the_answer_and_no_padding_moves_the_loss(llm, batch, sgd):
    _, state, frozen = sgd
    read = jax.jit(lambda b: inject_step.losses(state.params, llm.graph, frozen, b, Injection())[0])
    before = float(read(batch))
    padding = batch["branch"] == -1
    unused = batch["answer_weight"] == 0
    other = batch | {
        "tokens": jnp.where(padding, 77, batch["tokens"]),
        "answer_token": jnp.where(unused, 78, batch["answer_token"]),
        "answer_at": jnp.where(unused, 5, batch["answer_at"]),
    }
    assert float(read(other)) == before
    first = batch | {"answer_token": batch["answer_token"].at[0, 1].set(99)}
    assert float(read(first)) != before
    prompt = batch | {"tokens": batch["tokens"].at[0, 1].set(99)}
    assert float(read(prompt)) != before


def test_rows_that_fill_up_a_batch_change_nothing(llm, sgd):
    step, _, _ = sgd
    state, metrics = step(make_batch(llm, users=2, batch=4))
    expected_state, expected = step(make_batch(llm, users=2, batch=2))
    assert_close(metrics, expected)
    assert_close(state, expected_state)


@pytest.mark.parametrize("rows", [1, 2])
def test_parts_of_a_batch_add_up_to_its_gradient(llm, sgd, rows):
    """Whatever the loss, and however long each part is padded."""
    for config in (Injection(), Injection(candidates=2, choice_weight=0.5, init="held")):
        step, state, frozen = on_mesh(1, 1, optax.sgd(1.0), config=config)
        builder = PromptBuilder(llm.tokenizer, TITLES, DOMAINS["movies"], context=512)
        prompts = builder.prompts(HISTORIES, CANDIDATES)
        answers = [builder.answers(row if config.choice_weight else [row[0]]) for row in CANDIDATES]
        column = [1, 0, 1, 0] if config.choice_weight else None
        whole = pack(prompts, answers, rows=range(USERS), targets=column)
        tiers = packing.Tiers(rows, np.array([200, 300]), packing.Room(0, 0, 0))
        parts = tiers.parts(prompts, answers, rows=range(USERS), targets=column)
        assert len(parts) == USERS // rows
        start = jax.device_get(state)
        expected = jax.device_get(step(jax.tree.map(jnp.array, start), frozen, [whole]))
        assert_close(
            jax.device_get(step(jax.tree.map(jnp.array, start), frozen, parts)), expected, rtol=2e-4, atol=2e-5
        )


@pytest.mark.parametrize("remat", ["products", "layers"])
def test_recomputation_changes_no_gradient(batch, one_step, remat):
    step, state, frozen = on_mesh(1, 1, optax.sgd(1.0), config=Injection(remat=remat))
    assert_close(jax.device_get(step(state, frozen, [batch])), one_step)


def test_several_answers_are_scored_as_each_alone(llm, sgd):
    """All candidates of a user in one forward pass, each a branch, as if each were the only continuation."""
    _, state, _ = sgd
    mesh = make_mesh(1, 1)
    plain, shardings = inject.freeze(llm, mesh)
    builder = PromptBuilder(llm.tokenizer, [*TITLES[:-1], "A longer title"], DOMAINS["movies"], context=512)
    [prompt] = builder.prompts([[1, 2]], [[6, 40, 7]])
    answers = builder.answers([6, 40, 7])

    def score(normalise: bool, *answers: list[int]) -> np.ndarray:
        scorer = inject_step.make_scorer(llm.graph, shardings, mesh, answers=len(answers), normalise=normalise)
        return np.asarray(scorer(tables(state.params), plain, pack([prompt], [answers], rows=[1])))[0]

    total = score(False, *answers)
    np.testing.assert_allclose(total, [score(False, answer)[0] for answer in answers], rtol=1e-4)
    lengths = [len(answer) for answer in answers]
    assert len(set(lengths)) > 1
    np.testing.assert_allclose(score(True, *answers), total / lengths, rtol=1e-5)
    np.testing.assert_allclose(score(False, *answers[::-1]), total[::-1], rtol=1e-4)


def test_the_choice_loss_is_the_cross_entropy_of_the_ranking_and_training_on_it_lowers_it(llm):
    config = Injection(candidates=2, choice_weight=1.0, title_weight=0.0, sharpness=4.0)
    step, state, frozen = on_mesh(1, 1, optax.adam(1e-2), config=config)
    scorer = inject_step.make_scorer(
        llm.graph, inject.freeze(llm, make_mesh(1, 1))[1], make_mesh(1, 1), answers=2, normalise=True
    )
    builder = PromptBuilder(llm.tokenizer, TITLES, DOMAINS["movies"], context=512)
    prompts, answers = builder.prompts(HISTORIES, CANDIDATES), [builder.answers(row) for row in CANDIDATES]
    column = [row.index(target) for row, target in zip(CANDIDATES, TARGETS, strict=True)]
    batch = jax.tree.map(jnp.asarray, pack(prompts, answers, rows=list(range(USERS)), targets=column))

    def expected() -> float:
        scores = 4.0 * np.asarray(scorer(tables(state.params), {"llm": frozen["llm"]}, batch), np.float64)
        return -np.mean([row[c] - np.log(np.exp(row).sum()) for row, c in zip(scores, column, strict=True)])

    first = expected()
    for k in range(30):
        before = expected() if k in (0, 29) else None
        state, terms = step(state, frozen, [batch])
        if before is not None:
            np.testing.assert_allclose(terms["choice"], before, rtol=1e-4)
            np.testing.assert_allclose(terms["loss"], before, rtol=1e-4)
    assert expected() < first


# ----------------------------------------------------------------------------------------------- frozen and sharded


def test_frozen_weights_are_untouched_and_the_optimiser_knows_the_heads_only(batch):
    step, state, frozen = on_mesh(1, 1, optax.adam(1e-2))
    before, start = jax.device_get(frozen), jax.device_get(state.params)
    numbers = sum(x.size for x in jax.tree.leaves(start))
    assert set(start) == {"F_U", "F_I"}
    for _ in range(3):
        state, _ = step(state, frozen, [batch])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * numbers + 1  # two moments and a count
    # All of both heads has moved, so nothing of the heads was frozen by mistake.
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.params, start)
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.parametrize(("data", "model"), [(2, 2), (1, 4), (4, 1)])
def test_a_step_over_a_mesh_equals_one_device(batch, one_step, data, model):
    step, state, frozen = on_mesh(data, model, optax.sgd(1.0))
    sharded = {
        name: leaf.sharding.shard_shape(leaf.shape)
        for name, leaf in [
            ("embed", frozen["llm"]["weights"]["embed"]),
            ("q", frozen["llm"]["weights"]["layers"]["q"]),
            ("k", frozen["llm"]["weights"]["layers"]["k"]),
            ("down", frozen["llm"]["weights"]["layers"]["down"]),
        ]
    }
    c = tiny.LLAMA
    h, k = c.hidden_size, c.head_dim
    kv = c.num_key_value_heads // model if c.num_key_value_heads % model == 0 else c.num_key_value_heads
    assert sharded == {
        "embed": (c.vocab_size // model, h),
        "q": (c.num_hidden_layers, h, c.num_attention_heads // model, k),
        "k": (c.num_hidden_layers, h, kv, k),
        "down": (c.num_hidden_layers, c.intermediate_size // model, h),
    }
    state, metrics = step(state, frozen, [batch])
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    assert_close(jax.device_get((state, metrics)), one_step)


def test_a_batch_that_the_mesh_does_not_divide_is_refused(tmp_path):
    data = tiny.dataset(tmp_path / "data")
    with pytest.raises(UserError, match=r"llm\.batch 3 is not a multiple of the 2"):
        inject.train_llm(
            dataclasses.replace(tiny.STAGE_2, batch=3),
            data,
            tiny.cf_model(),
            E,
            tiny.frozen_llm(),
            tmp_path,
            seed=0,
            mesh=make_mesh(2, 1),
        )


def test_every_position_of_a_history_can_be_an_example(tmp_path):
    data = tiny.of_sequences(tmp_path / "data", [[1], [2, 3], [1, 2, 3, 4, 5, 6], [4, 4, 5]], 6)

    def histories(*arguments, **options) -> list[tuple[int, list[int], int]]:
        users, ends, targets = data.examples(*arguments, **options)
        rows = data.windows(ends, 4, users)
        return [(int(u), row[row > 0].tolist(), int(t)) for u, row, t in zip(users, rows, targets, strict=True)]

    # Training items: [1], [2, 3], [1, 2, 3, 4] and [4].
    assert histories() == [(2, [2], 3), (3, [1, 2, 3], 4)]
    assert histories("all") == [(2, [2], 3), (3, [1], 2), (3, [1, 2], 3), (3, [1, 2, 3], 4)]
    assert histories(single=True) == [(1, [], 0), (2, [2], 3), (3, [1, 2, 3], 4), (4, [], 0)]
    assert histories("all", single=True) == [(1, [], 0), *histories("all"), (4, [], 0)]


def test_the_public_code_s_recipe_trains_with_x_u_made_anew(tmp_path):
    """Users with one training item, dropout in the CF model, another x_u of the same user at each step."""
    data = tiny.dataset(tmp_path / "data")
    config = dataclasses.replace(tiny.STAGE_2.as_public_code(), epochs=1.0, targets="all", micro=1)
    cf, llm = tiny.cf_model(), tiny.frozen_llm()
    assert (data.n_train == 1).any()
    said = io.StringIO()
    _, curves = inject.train_llm(
        config, data, cf, E, llm, tmp_path, seed=0, mesh=make_mesh(1, 1), console=Console(file=said, width=200)
    )
    assert np.isfinite([value for _, value in curves["loss"]]).all()
    assert "of the LLM's tokens were padding" in said.getvalue()
    assert curves["loss"][-1][0] == -(-len(data.examples("all", single=True)[0]) // 2)
    titles, none = data.titles(), jax.random.key(0)
    builder = PromptBuilder(llm.tokenizer, titles, DOMAINS["movies"], context=512)
    examples = inject.Examples(config, data, builder, none, none)
    x_u = inject.dropped_x_u(cf, data, examples, none)
    rows = np.array([3, 4])
    assert not np.allclose(x_u(0, rows), x_u(1, rows))
    np.testing.assert_allclose(x_u(0, rows)[1:], x_u(0, rows[1:]), rtol=1e-5, atol=1e-6)
    single = np.flatnonzero(examples.targets == 0)[:1]
    prompts, answers, _ = examples.prompts(0, single)
    assert llm.tokenizer.decode(answers[0][0][:-1]) == '"No Title"'
    assert len(prompts[0].slots) == config.candidates


# -------------------------------------------------------------------------------------------------- learning rate


def test_schedules():
    def rates(steps: int, **options) -> np.ndarray:
        schedule = inject.schedule(Injection(learning_rate=1.0, **options), steps)
        return np.array([schedule(i) for i in range(steps + 1)])

    np.testing.assert_allclose(rates(10), 1)
    np.testing.assert_allclose(rates(10, warmup=4)[:5], [0, 0.25, 0.5, 0.75, 1])
    decayed = rates(10, warmup=4, decay=True)
    np.testing.assert_allclose(decayed[[4, 7, 10]], [1, 0.5, 0], atol=1e-6)
    assert (np.diff(decayed[4:]) < 0).all()
    assert np.isfinite(rates(2, warmup=5, decay=True)).all()


def test_the_gradient_is_clipped_where_asked():
    weights = {"a": jnp.zeros(3), "b": jnp.zeros(1)}
    gradients = {"a": jnp.full(3, 3.0), "b": jnp.full(1, 3.0)}  # norm 6
    for clip, seen in ((None, 3.0), (12.0, 3.0), (2.0, 1.0)):
        optimiser = inject.make_optimiser(Injection(clip=clip, learning_rate=1.0), 5)
        _, state = optimiser.update(gradients, optimiser.init(weights), weights)
        np.testing.assert_allclose(optax.tree.get(state, "mu")["b"], (1 - 0.9) * seen, rtol=1e-5)


def test_matched_heads_write_among_the_token_embeddings(llm):
    embed = jnp.asarray(llm.weights["weights"]["embed"])
    heads = inject.init_heads(jax.random.key(0), jnp.asarray(X_U), jnp.asarray(E[1:]), embed, "matched")
    O_i = np.asarray(projection.F_I(heads["F_I"], jnp.asarray(E[1:])))
    np.testing.assert_allclose(O_i.mean(0), embed.mean(0), atol=1e-4)
    np.testing.assert_allclose(O_i.std(0).mean() / np.asarray(embed).std(0).mean(), 1, rtol=0.3)


def test_held_heads_neither_move_nor_stretch_however_hard_they_are_pushed(llm, batch):
    config = Injection(init="held")
    step, state, frozen = on_mesh(1, 1, optax.adam(0.3), config=config)
    for _ in range(3):
        state, terms = step(state, frozen, [batch])
    assert np.isfinite(terms["loss"])
    statistics = frozen["tokens"]
    free = projection.F_I(state.params["F_I"], jnp.asarray(E[1:]))
    assert float(jnp.std(free)) > 3 * float(statistics["spread"])  # the raw weights did run away
    heads = inject_step.settle(state.params, jnp.asarray(X_U), jnp.asarray(E[1:]), statistics)
    for outputs in (projection.F_I(heads["F_I"], jnp.asarray(E[1:])), projection.F_U(heads["F_U"], jnp.asarray(X_U))):
        centred = outputs - statistics["mean"][None]
        np.testing.assert_allclose(outputs.mean(0), statistics["mean"], atol=1e-5)
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(centred**2)), statistics["spread"], rtol=1e-3)
