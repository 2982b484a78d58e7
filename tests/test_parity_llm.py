"""Llama and stage 2 are the same computation in JAX and in PyTorch, down to the likelihoods that `rank` rests on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import tiny  # noqa: E402
from parity import assert_trees_close, gradients_of, load, randomised, weights_of  # noqa: E402

from allmrec_jax.config import Injection  # noqa: E402
from allmrec_jax.data.packing import pack  # noqa: E402
from allmrec_jax.data.prompts import DOMAINS, PromptBuilder, template_of  # noqa: E402
from allmrec_jax.evaluation.rank import Ranker  # noqa: E402
from allmrec_jax.models import projection  # noqa: E402
from allmrec_jax.models.llm import llama  # noqa: E402
from allmrec_jax.models.llm.load import build  # noqa: E402
from allmrec_jax.torch_baseline.inject import Injector  # noqa: E402
from allmrec_jax.torch_baseline.llm import in_transformers  # noqa: E402
from allmrec_jax.training import inject, inject_step  # noqa: E402
from allmrec_jax.training.mesh import make_mesh  # noqa: E402
from allmrec_jax.training.state import create  # noqa: E402

D, JOINT, USERS, CANDIDATES = 8, 6, 4, 5
RATE = 1e-4


def _random(c: llama.LlamaConfig, seed: int = 0):
    """Weights large enough that attention is far from uniform."""
    return randomised(jax.random.key(seed), llama.describe(c), spread=0.2)


CONFIGS = {
    "tied, 2 queries a key": tiny.LLAMA,
    "untied, one key": dataclasses.replace(tiny.LLAMA, num_key_value_heads=1, tie_word_embeddings=False),
    "no grouping, wide rotation": dataclasses.replace(
        tiny.LLAMA, num_key_value_heads=4, head_dim=12, rope_theta=100.0, rms_norm_eps=1e-3
    ),
}


@pytest.mark.parametrize("c", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_random_llama_is_equal_in_logits_and_gradients(c):
    """Rows of different lengths; gradients of the injected embeddings, as stage 2 needs them, and of the weights."""
    tree = _random(c)
    description, model = llama.describe(c), build(c, tree, None)
    theirs = in_transformers(c, tree, "eager")
    random = np.random.default_rng(0)
    mask = np.arange(11)[None] < np.array([11, 4, 7])[:, None]
    embeddings = random.normal(size=(3, 11, c.hidden_size)).astype(np.float32)
    towards = random.normal(size=(3, 11, c.vocab_size)).astype(np.float32) * mask[..., None]

    @jax.jit
    def ours(weights, x):
        def value(weights, x):
            module = nnx.merge(model.graph, weights)
            logits = module.logits(module(x, jnp.where(mask, 0, -1)))
            return jnp.sum(logits * towards), logits

        return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(weights, x)

    (value, logits), (weight_gradients, x_gradient) = ours(model.weights, embeddings)
    x = torch.tensor(embeddings, requires_grad=True)
    expected = theirs(inputs_embeds=x, attention_mask=torch.tensor(mask).long()).logits
    np.testing.assert_allclose(logits[mask], expected.detach().numpy()[mask], rtol=1e-4, atol=1e-4)
    total = (expected * torch.tensor(towards)).sum()
    total.backward()
    np.testing.assert_allclose(value, total.item(), rtol=1e-4)
    scale = x.grad.abs().max().item()
    np.testing.assert_allclose(x_gradient, x.grad.numpy(), rtol=1e-4, atol=1e-5 * scale)
    if c.tie_word_embeddings:  # transformers names the one table twice
        assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    if not c.tie_word_embeddings:  # nothing was embedded, so there is no gradient on that side
        theirs.model.embed_tokens.weight.grad = torch.zeros_like(theirs.model.embed_tokens.weight)
    assert_trees_close(weight_gradients["weights"], gradients_of(theirs, description), atol=1e-5)


def test_token_embeddings_are_looked_up_alike():
    c, tree = tiny.LLAMA, _random(tiny.LLAMA)
    model, theirs = build(c, tree, None), in_transformers(tiny.LLAMA, tree, "eager")
    tokens = np.random.default_rng(0).integers(0, c.vocab_size, (2, 9))
    module = nnx.merge(model.graph, model.weights)
    logits = jax.jit(lambda t: module.logits(module(module.embed(t), jnp.zeros_like(t))))(tokens)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ stage 2


@pytest.fixture(scope="module")
def stage_2():
    """A frozen LLM, heads, users with prompts and candidates: ours, and the PyTorch baseline with the same weights."""
    tree = _random(tiny.LLAMA, seed=3)
    llm = build(tiny.LLAMA, tree, tiny.byte_tokenizer(bos=True))
    heads = {
        "F_U": randomised(jax.random.key(1), projection.describe(D, llm.width)),
        "F_I": randomised(jax.random.key(2), projection.describe(JOINT, llm.width)),
    }
    baseline = Injector(in_transformers(tiny.LLAMA, tree, "eager"), D, JOINT)
    load(baseline.log_proj, projection.describe(D, llm.width), heads["F_U"])
    load(baseline.item_proj, projection.describe(JOINT, llm.width), heads["F_I"])
    titles = [
        None,
        *(("Heat", "Alien 3", "M", 'The "Big" One', "Amélie")[i % 5] + " of" * (i % 4) for i in range(1, 20)),
    ]
    builder = PromptBuilder(llm.tokenizer, titles, DOMAINS["movies"], context=512)
    random = np.random.default_rng(0)
    histories = [random.permutation(np.arange(1, 20))[:n].tolist() for n in (1, 3, 2, 0)]
    candidates = np.stack([random.permutation(np.arange(1, 20))[:CANDIDATES] for _ in range(USERS)])
    x_u = random.normal(size=(USERS, D)).astype(np.float32)
    e = random.uniform(size=(20, JOINT)).astype(np.float32)
    return llm, heads, baseline, builder, histories, candidates, x_u, e


def _batch(stage_2):
    """(prompts, the answer of each, packed): the target is the second candidate."""
    builder, histories, candidates = stage_2[3:6]
    prompts = builder.prompts(histories, candidates)
    answers = builder.answers(candidates[:, 1].tolist())
    return prompts, answers, pack(prompts, [[answer] for answer in answers], rows=range(USERS))


def test_stage_2_loss_and_gradients_are_equal(stage_2):
    llm, heads, baseline, _, _, _, x_u, e = stage_2
    prompts, answers, packed = _batch(stage_2)
    frozen = {"llm": llm.weights, "x_u": jnp.asarray(x_u), "e": jnp.asarray(e)}
    value, gradients = jax.jit(
        jax.value_and_grad(lambda h, f, b: inject_step.losses(h, llm.graph, f, b, Injection())[0])
    )(heads, frozen, packed)
    baseline.zero_grad()
    expected = baseline(prompts, answers, torch.tensor(x_u), torch.tensor(e))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    assert_trees_close(gradients["F_U"], gradients_of(baseline.log_proj, projection.describe(D, llm.width)), atol=1e-5)
    assert_trees_close(
        gradients["F_I"], gradients_of(baseline.item_proj, projection.describe(JOINT, llm.width)), atol=1e-5
    )
    assert all(p.grad is None for p in baseline.llm.parameters())


@pytest.mark.parametrize(
    "options",
    [{}, {"user_vector": False}, {"item_place": "before"}, {"item_place": "before", "user_place": "last"}],
    ids=str,
)
def test_mlp_llm_s_loss_and_gradients_are_equal_wherever_its_vectors_stand(stage_2, options):
    """The paper's baseline: F_I reads E itself."""
    llm, heads, _, with_slots, histories, candidates, x_u, _ = stage_2
    config, E = Injection(item_vectors="E", **options), np.asarray(tiny.cf_model().E)
    heads = heads | {"F_I": randomised(jax.random.key(5), projection.describe(D, llm.width))}
    baseline = Injector(in_transformers(tiny.LLAMA, llm.weights["weights"], "eager"), D, D)
    sides = {"F_U": baseline.log_proj, "F_I": baseline.item_proj}
    for name, module in sides.items():
        load(module, projection.describe(D, llm.width), heads[name])
    builder = PromptBuilder(llm.tokenizer, with_slots.titles, template_of(config), context=512)
    prompts, answers = builder.prompts(histories, candidates), builder.answers(candidates[:, 1].tolist())
    packed = pack(prompts, [[answer] for answer in answers], rows=range(USERS))
    frozen = {"llm": llm.weights, "x_u": jnp.asarray(x_u), "e": jnp.asarray(E)}
    value, gradients = jax.jit(jax.value_and_grad(lambda h, f, b: inject_step.losses(h, llm.graph, f, b, config)[0]))(
        heads, frozen, packed
    )
    expected = baseline(prompts, answers, torch.tensor(x_u), torch.tensor(E))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for name, module in sides.items():
        if name == "F_U" and not config.user_vector:
            assert not any(p.grad is not None and p.grad.any() for p in module.parameters())
            continue
        assert_trees_close(gradients[name], gradients_of(module, projection.describe(D, llm.width)), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=["one device", "2x2 mesh"])
def test_one_step_of_stage_2_is_equal(stage_2, shape):
    llm, heads, baseline, _, _, _, x_u, e = stage_2
    prompts, answers, packed = _batch(stage_2)
    mesh, optimiser = make_mesh(*shape), optax.adam(RATE, b1=0.9, b2=0.98, eps=1e-8)
    frozen, shardings = inject.freeze(llm, mesh, x_u=x_u, e=e)
    step = inject_step.make_step(llm.graph, shardings, mesh, optimiser)
    state, metrics = step(create(jax.device_get(heads), optimiser), frozen, [packed])

    sides = {"F_U": (baseline.log_proj, D), "F_I": (baseline.item_proj, JOINT)}
    for name, (module, width) in sides.items():
        load(module, projection.describe(width, llm.width), heads[name])
    adam = torch.optim.Adam([p for p in baseline.parameters() if p.requires_grad], lr=RATE, betas=(0.9, 0.98), eps=1e-8)
    adam.zero_grad()
    loss = baseline(prompts, answers, torch.tensor(x_u), torch.tensor(e))
    loss.backward()
    adam.step()
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
    for name, (module, width) in sides.items():
        moved, expected = (
            jax.tree.map(lambda a, b: (np.asarray(a) - np.asarray(b)) / RATE, tree, heads[name])
            for tree in (state.params[name], weights_of(module, projection.describe(width, llm.width)))
        )
        assert_trees_close(moved, expected, rtol=1e-2, atol=1e-2)
        assert np.abs(moved["dense1"]["kernel"]).max() > 0.9
        load(module, projection.describe(width, llm.width), heads[name])


def test_the_choice_loss_and_its_gradients_are_equal(stage_2):
    """All candidates of a user as branches of one row, against a row for each candidate."""
    llm, heads, baseline, builder, histories, candidates, x_u, e = stage_2
    config = Injection(candidates=CANDIDATES, title_weight=0.5, choice_weight=2.0, sharpness=3.0)
    targets = np.array([1, 4, 0, 2])
    prompts = builder.prompts(histories, candidates)
    answers = [builder.answers(row.tolist()) for row in candidates]
    packed = pack(prompts, answers, rows=range(USERS), targets=targets)
    frozen = {"llm": llm.weights, "x_u": jnp.asarray(x_u), "e": jnp.asarray(e)}
    gradient = jax.value_and_grad(lambda h, f, b: inject_step.losses(h, llm.graph, f, b, config), has_aux=True)
    (value, terms), gradients = jax.jit(gradient)(heads, frozen, packed)

    baseline.zero_grad()
    tensors = torch.tensor(x_u), torch.tensor(e)
    title = baseline(prompts, [own[target] for own, target in zip(answers, targets, strict=True)], *tensors)
    choice = baseline.choice_loss(prompts, answers, torch.tensor(targets), *tensors, sharpness=config.sharpness)
    expected = config.title_weight * title + config.choice_weight * choice
    expected.backward()
    np.testing.assert_allclose(terms["title"], title.item(), rtol=1e-5)
    np.testing.assert_allclose(terms["choice"], choice.item(), rtol=1e-5)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    assert_trees_close(gradients["F_U"], gradients_of(baseline.log_proj, projection.describe(D, llm.width)), atol=1e-5)
    assert_trees_close(
        gradients["F_I"], gradients_of(baseline.item_proj, projection.describe(JOINT, llm.width)), atol=1e-5
    )


# ----------------------------------------------------------------------------------------------------------- branches


@pytest.mark.parametrize("normalise", [False, True], ids=["sum", "mean"])
def test_candidates_in_one_pass_score_as_each_alone_in_pytorch(stage_2, normalise):
    llm, heads, baseline, builder, histories, candidates, x_u, e = stage_2
    ranker = Ranker(
        llm, heads, builder=builder, e=e, mesh=make_mesh(1, 1), candidates=CANDIDATES, normalise=normalise, batch=USERS
    )
    ours = ranker(histories, candidates, x_u)
    prompts = builder.prompts(histories, candidates)
    for column in range(CANDIDATES):
        answers = builder.answers(candidates[:, column].tolist())
        expected = baseline.log_likelihoods(prompts, answers, torch.tensor(x_u), torch.tensor(e)).detach().numpy()
        if normalise:
            expected = expected / [len(answer) for answer in answers]
        np.testing.assert_allclose(ours[:, column], expected, rtol=1e-4)


def test_the_llm_alone_scores_as_in_pytorch(stage_2):
    """Without heads: a prompt of titles only, nothing injected."""
    llm, _, baseline, with_slots, histories, candidates, x_u, e = stage_2
    builder = PromptBuilder(llm.tokenizer, with_slots.titles, DOMAINS["movies"], context=512, inject=False)
    ranker = Ranker(
        llm, None, builder=builder, e=e, mesh=make_mesh(1, 1), candidates=CANDIDATES, normalise=False, batch=USERS
    )
    ours = ranker(histories, candidates, x_u)
    prompts = builder.prompts(histories, candidates)
    for column in range(CANDIDATES):
        answers = builder.answers(candidates[:, column].tolist())
        expected = baseline.log_likelihoods(prompts, answers, torch.tensor(x_u), torch.tensor(e)).detach().numpy()
        np.testing.assert_allclose(ours[:, column], expected, rtol=1e-4)


def test_candidates_in_one_pass_score_as_each_in_a_row_of_its_own(stage_2):
    """Also in another order and beside other candidates: a branch sees the prompt and itself, nothing else."""
    llm, heads, _, builder, histories, candidates, x_u, e = stage_2
    frozen = {"llm": llm.weights, "x_u": jnp.asarray(x_u), "e": jnp.asarray(e)}
    prompts = builder.prompts(histories, candidates)
    score = jax.jit(
        lambda batch: inject_step.answer_log_likelihood(
            llm.graph, inject_step.from_heads(heads, frozen, batch), frozen, batch
        )
    )

    def totals(lists):
        """Log-likelihood of each user's answers, all in the user's one row."""
        batch = pack(prompts, [builder.answers(row.tolist()) for row in lists], rows=range(USERS))
        tokens = np.asarray(score(batch))
        number = np.where(batch["answer_weight"] > 0, batch["answer_of"], -1)
        return np.stack([np.where(number == k, tokens, 0).sum(1) for k in range(lists.shape[1])], axis=1)

    together = totals(candidates)
    alone = np.concatenate([totals(candidates[:, [k]]) for k in range(CANDIDATES)], axis=1)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    np.testing.assert_allclose(totals(candidates[:, ::-1])[:, ::-1], together, rtol=1e-5)
    assert np.ptp(together, axis=1).min() > 0.1  # the candidates do differ
