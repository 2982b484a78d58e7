"""Ahead of the LLM: O_u and O_i learn to resemble each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from allmrec_jax.config import Injection
from allmrec_jax.models import projection
from allmrec_jax.training import pairing
from allmrec_jax.training.inject import init_heads
from allmrec_jax.training.inject_step import heads_in_use

ITEMS, D, H = 60, 8, 16


@pytest.fixture(scope="module")
def world():
    """Users who stand where their next item stands, but for some noise; e sees the items through a squashed map."""
    random = np.random.default_rng(0)
    E = random.normal(size=(ITEMS + 1, D)).astype(np.float32)
    e = 1 / (1 + np.exp(-0.3 * E @ random.normal(size=(D, 6)))).astype(np.float32)
    targets = random.integers(1, ITEMS + 1, 500)
    x_u = (E[targets] + 0.2 * random.normal(size=(500, D))).astype(np.float32)
    tokens = jnp.asarray(random.normal(1, 0.3, size=(90, H)), jnp.float32)
    frozen = {"x_u": jnp.asarray(x_u[:400]), "e": jnp.asarray(e), "tokens": projection.token_statistics(tokens)}
    return frozen, tokens, jnp.asarray(x_u), jnp.asarray(targets)


@pytest.mark.parametrize("init", ["paper", "held"])
def test_new_users_come_to_stand_near_their_next_item(world, init):
    frozen, tokens, x_u, targets = world
    heads = init_heads(jax.random.key(0), frozen["x_u"], frozen["e"][1:], tokens, init)
    use = partial(heads_in_use, config=Injection(init=init))
    run = partial(pairing.pair, heads, frozen, x_u[:400], targets[:400], jax.random.key(1), use=use, steps=300)
    learned, losses = run()

    def found(heads) -> float:
        near = pairing.similarities(use(heads, frozen), x_u[400:], frozen["e"], frozen["tokens"]["mean"])
        return float(np.mean(np.argmax(near[:, 1:], axis=1) + 1 == targets[400:]))

    assert found(heads) < 0.15
    assert found(learned) > 0.6
    assert losses[-1] < losses[0] - 1
    jax.tree.map(np.testing.assert_array_equal, learned, run()[0])  # the same bits again
    if init == "held":
        O_i = projection.F_I(use(learned, frozen)["F_I"], frozen["e"][1:])
        np.testing.assert_allclose(O_i.mean(0), frozen["tokens"]["mean"], atol=1e-4)


def test_every_position_of_training_is_paired_and_no_other(tmp_path, monkeypatch):
    data = tiny.of_sequences(tmp_path / "d", [[1, 2, 3, 4, 5], [6, 7, 8]], tiny.N_ITEMS)
    x_u, targets = pairing.positions(tiny.cf_model(), data)
    assert targets.tolist() == [2, 3]  # the last two items are held out; a single training item has nothing before it
    assert x_u.shape == (2, tiny.SASREC.width)
    monkeypatch.setattr(pairing, "MOST", 1)
    assert len(pairing.positions(tiny.cf_model(), data)[0]) == 1
