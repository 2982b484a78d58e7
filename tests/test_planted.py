"""Planted data: only x_u and the items' vectors tell what is next, and stage 2 learns to tell the LLM."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import lookup
import numpy as np
import pytest
import tiny

from allmrec_jax.data import planted
from allmrec_jax.data.candidates import draw_for_test
from allmrec_jax.data.prompts import PromptBuilder, template_of
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation.rank import Ranker
from allmrec_jax.models import alignment, given, params
from allmrec_jax.training import inject
from allmrec_jax.training.cf import CFModel
from allmrec_jax.training.mesh import make_mesh

ITEMS, WIDTH, JOINT = len(lookup.WORDS), 16, 32
TESTED = 300


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(E, users to train on, users held out, their candidates, the targets' columns, a CF model that has E)."""
    folder = tmp_path_factory.mktemp("planted")
    E = planted.vectors(ITEMS, width=WIDTH)
    titles = planted.words(lookup.tokenizer(), ITEMS)
    train, test = (planted.plant(folder / f"{n}", titles, users=n, seed=n) for n in (2400, TESTED))
    # x_u is the mean of the history's E_i.
    cf = CFModel(given.GivenConfig(ITEMS, 0, WIDTH), {"E": jnp.asarray(E)}, np.eye(WIDTH + 1, WIDTH, dtype=np.float32))
    lists, column = draw_for_test(test, np.arange(1, TESTED + 1), seed=0, count=lookup.CONFIG.candidates)
    return E, train, test, lists, column, cf


def represent(cf: CFModel, data) -> np.ndarray:
    users = np.arange(1, data.n_users + 1)
    return cf.x_u(data.windows(data.history_end("test")[users], cf.config.maxlen, users))


def test_the_vectors_tell_the_next_item_and_nothing_else_does(world):
    _, train, test, lists, column, cf = world
    scores = cf.scores(represent(cf, test), lists)
    assert (scores.argmax(1) == column).mean() > 0.98
    counts = train.train_counts()[1:]
    assert counts.min() > 0.5 * counts.mean()
    assert counts.max() < 1.6 * counts.mean()
    popular = train.train_counts()[lists]
    assert (popular.argmax(1) == column).mean() < 0.1
    sequence = test.sequence(7)
    assert len({(item - 1) // 5 for item in sequence}) == 1
    assert len(set(sequence)) == 5
    assert test.titles() == train.titles()
    assert sorted(test.titles()[1:]) == sorted(lookup.WORDS)
    # Words that sort beside each other are in no group together more often than by chance (4 of 119 others).
    places = np.argsort(test.titles()[1:])
    assert np.mean(places[1:] // 5 == places[:-1] // 5) < 0.1


def test_titles_are_one_token_each():
    tokenizer = tiny.byte_tokenizer(merges=[*tiny.MERGES, ("o", "n"), ("u", "p"), ("i", "t")])
    words = planted.words(tokenizer, 50)
    assert len(set(words)) == 50
    assert {len(ids) for ids in tokenizer([f'"{word}"' for word in words])} == {3}
    assert any(len(word) == 2 for word in words)
    assert planted.words(tokenizer, 50, seed=1) != words
    with pytest.raises(UserError, match=r"knows \d+ words of one token, but 1000 titles"):
        planted.words(tokenizer, 1000)


@pytest.mark.parametrize(("items", "each"), [(12, 3), (13, 4)])
def test_groups_that_do_not_work_out_are_refused(tmp_path, items, each):
    with pytest.raises(UserError, match=f"{items} items cannot be cut into groups of {each}"):
        planted.plant(tmp_path / "x", ["title"] * items, users=3, each=each)


@pytest.mark.slow
def test_held_out_users_are_told_to_the_llm_by_vectors_alone(world, tmp_path):
    """The paper's stage 2: its heads, places and loss. The LLM was trained on lists of random vectors and words."""
    E, train, test, lists, column, cf = world
    llm, found = lookup.train()
    assert found["start"] < 0.5 < 0.8 < found["trained"]
    assert found["equal"] > 0.9
    f_I = params.init(jax.random.key(0), alignment.describe(WIDTH, JOINT))
    e = np.asarray(alignment.encode(f_I, jnp.asarray(E)))
    config = replace(lookup.CONFIG, batch=16, micro=16, epochs=1.0, learning_rate=3e-3, save_every=1000)
    mesh = make_mesh(1, 1)
    heads, curves = inject.train_llm(config, train, cf, e, llm, tmp_path / "llm", seed=0, mesh=mesh)
    x_u, histories = represent(cf, test), [row[row != 0] for row in test.windows(test.history_end("test"), 2)[1:]]

    def hits(heads, x_u) -> float:
        titles, template = test.titles(), template_of(config)
        builder = PromptBuilder(llm.tokenizer, titles, template, context=llm.context, inject=heads is not None)
        ranker = Ranker(llm, heads, builder=builder, e=e, mesh=mesh, candidates=lists.shape[1], batch=25)
        return float((ranker(histories, lists, x_u).argmax(1) == column).mean())

    chance = 1 / lists.shape[1]
    figures = {"a-llmrec": hits(heads, x_u), "llm-only": hits(None, x_u), "of another user": hits(heads, x_u[::-1])}
    print(f"the LLM {found}; Hit@1 of {TESTED} held-out users {figures}, chance {chance}")
    assert figures["a-llmrec"] > 0.9
    assert figures["llm-only"] < 2 * chance
    assert figures["of another user"] < 2 * chance + 1 / 24  # one in 24 is of the same group
    assert curves["loss"][-1][1] < 0.5 * curves["loss"][0][1]
