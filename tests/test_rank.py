"""Scores of users by the LLM: kept while the work goes on, computed again where they are damaged."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console

from allmrec_jax.data.prompts import DOMAINS, PromptBuilder
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation.passes import item_vectors
from allmrec_jax.evaluation.rank import Ranker, score_users
from allmrec_jax.models import projection
from allmrec_jax.training.inject import init_heads
from allmrec_jax.training.mesh import make_mesh

USERS, BATCH = 23, 4
CANDIDATES = np.arange(USERS * 3).reshape(USERS, 3) % 40 + 1
HISTORIES = [np.arange(1, 1 + user % 5) for user in range(USERS)]
X_U = np.random.default_rng(0).normal(size=(USERS, 8)).astype(np.float32)


class Telling(Ranker):
    """A cheap stand-in: a score that says which user and candidate it is of."""

    padding = 0.0

    def __init__(self, *, interrupt_after: int = 10**9, value: float = 0.0):
        self.calls, self.interrupt_after, self.value = 0, interrupt_after, value

    def arrange(self, histories, candidates):
        return np.arange(len(histories))[::-1]

    def __call__(self, histories, candidates, x_u):
        assert len(histories) == len(candidates) == len(x_u) <= BATCH
        if self.calls == self.interrupt_after:
            raise KeyboardInterrupt
        self.calls += 1
        return candidates + 100 * x_u[:, :1] + np.array([[len(h)] for h in histories]) + self.value


def score(ranker, saved, out=None, **options):
    console = Console(file=out or io.StringIO())
    options = {"saved": saved, "label": "ranking", "batch": BATCH, "console": console} | options
    return score_users(ranker, HISTORIES, CANDIDATES, X_U, **options)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return (CANDIDATES + 100 * X_U[:, :1] + np.array([[len(h)] for h in HISTORIES])).astype(np.float32)


def test_every_user_is_scored_in_the_right_row(tmp_path, expected):
    ranker = Telling()
    np.testing.assert_allclose(score(ranker, tmp_path / "new" / "scores.npy"), expected, rtol=1e-6)
    assert ranker.calls == 6
    np.testing.assert_array_equal(np.load(tmp_path / "new" / "scores.npy"), expected)


def test_an_interrupted_evaluation_goes_on_from_what_was_saved(tmp_path, expected):
    saved = tmp_path / "scores.npy"
    with pytest.raises(KeyboardInterrupt):
        score(Telling(interrupt_after=3), saved, save_every=2)
    assert np.isfinite(np.load(saved)).all(1).sum() == 2 * BATCH
    ranker = Telling()
    np.testing.assert_allclose(score(ranker, saved), expected, rtol=1e-6)
    assert ranker.calls == 4
    finished = Telling()
    np.testing.assert_allclose(score(finished, saved), expected, rtol=1e-6)
    assert finished.calls == 0


@pytest.mark.parametrize("damage", ["truncated", "empty", "not an array", "a broken header", "another shape"])
def test_a_damaged_file_is_scored_again(tmp_path, expected, damage):
    saved = tmp_path / "scores.npy"
    score(Telling(value=5.0), saved)
    content = saved.read_bytes()
    if damage == "another shape":
        np.save(saved, np.zeros((USERS, 4), np.float32))
    else:
        saved.write_bytes(
            {
                "truncated": content[:-10],
                "empty": b"",
                "not an array": b"PK\x03\x04 is how a zip file begins",
                "a broken header": content[:10] + b"{(" + content[12:],
            }[damage]
        )
    out = io.StringIO()
    np.testing.assert_allclose(score(Telling(), saved, out), expected, rtol=1e-6)
    assert ("is damaged; scoring again" in out.getvalue()) == (damage != "another shape")


def test_a_likelihood_that_is_not_finite_stops_it(tmp_path):
    with pytest.raises(UserError, match="ranking: a likelihood is not finite"):
        score(Telling(value=np.nan), tmp_path / "scores.npy")
    assert not (tmp_path / "scores.npy").exists()


# ----------------------------------------------------------------------------------------------------- the real one


@pytest.fixture(scope="module")
def rankers():
    """`rankers(inject, mesh shape)`: a ranker by a tiny LLM."""
    titles = [None, *(f"Film {item}" for item in range(1, tiny.N_ITEMS + 1))]
    e = tiny.joint_embeddings()

    def make(inject: bool, data: int = 1, model: int = 1):
        mesh = make_mesh(data, model)
        llm = tiny.frozen_llm(mesh)
        embed = jnp.asarray(jax.device_get(llm.weights["weights"]["embed"]))
        heads = init_heads(jax.random.key(0), jnp.asarray(X_U), jnp.asarray(e[1:]), embed) if inject else None
        builder = PromptBuilder(llm.tokenizer, titles, DOMAINS["movies"], context=512, inject=inject)
        return Ranker(llm, heads, builder=builder, e=e, mesh=mesh, candidates=3, batch=BATCH)

    return make


@pytest.fixture(scope="module")
def injected(rankers):
    ranker = rankers(True)
    return ranker, ranker(HISTORIES[:4], CANDIDATES[:4], X_U[:4])


def test_a_user_s_scores_depend_on_the_user_alone(injected):
    ranker, together = injected
    assert together.shape == (4, 3)
    for user in range(3):
        part = slice(user, user + 2)
        np.testing.assert_allclose(
            ranker(HISTORIES[part], CANDIDATES[part], X_U[part]), together[part], rtol=1e-4, atol=1e-5
        )


def test_the_order_of_candidates_in_the_prompt_is_not_the_order_of_their_scores(injected):
    """Each score belongs to its candidate: mean log-likelihoods, all negative, none repeated."""
    _, together = injected
    assert (together < 0).all()
    assert len(np.unique(together)) == together.size


def test_the_llm_alone_does_not_see_the_user_embedding(rankers, injected):
    alone = rankers(False)
    one = alone(HISTORIES[:2], CANDIDATES[:2], X_U[:2])
    np.testing.assert_array_equal(alone(HISTORIES[:2], CANDIDATES[:2], 5 * X_U[:2]), one)
    ranker, together = injected
    assert (ranker(HISTORIES[:2], CANDIDATES[:2], 5 * X_U[:2]) != together[:2]).all()
    assert (one != together[:2]).all()


def test_ranking_over_a_mesh_equals_one_device(rankers, injected):
    sharded = rankers(True, 2, 2)
    np.testing.assert_allclose(sharded(HISTORIES[:4], CANDIDATES[:4], X_U[:4]), injected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_the_items_vectors_are_the_same_on_one_device_and_on_eight(how):
    e = tiny.joint_embeddings()
    heads = init_heads(jax.random.key(0), jnp.asarray(X_U), jnp.asarray(e[1:]), jnp.ones((4, 16)))
    whole = np.asarray(projection.F_I(heads["F_I"], jnp.asarray(e)))
    np.testing.assert_allclose(item_vectors(heads["F_I"], e, jax.devices()[:8], how), whole, rtol=1e-5, atol=1e-6)
