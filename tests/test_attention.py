"""Attention in blocks, as CPUs do it, is the same function as everywhere else, and so are its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from allmrec_jax.models.llm import attention

BLOCK = 8
# Two prompts, one with three branches, one with a long one, both with padding; a row padded on its left.
BRANCH = np.full((3, 29), attention.PAD)
BRANCH[0, :24] = [0] * 13 + [1] * 4 + [2] * 2 + [3] * 5
BRANCH[1, :20] = [0] * 3 + [1] * 17
BRANCH[2, 9:] = 0


def arrays(dtype=jnp.float32, heads: int = 4, kv_heads: int = 2, width: int = 6):
    shapes = [(3, 29, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def plain(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def blocks(q, k, v, mask):
    return attention.attend_in_blocks(q, k, v, mask, BLOCK)


@pytest.fixture(scope="module", params=["branches", "a window"])
def mask(request):
    found = attention.branch_mask(jnp.asarray(BRANCH))
    if request.param == "branches":
        return found
    return found & attention.window_mask(attention.branch_positions(jnp.asarray(BRANCH)), 5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_in_blocks_it_is_the_same_and_so_are_all_gradients(mask, kv_heads):
    q, k, v, towards = arrays(kv_heads=kv_heads)

    def both(attend):
        value, back = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
        return value, *back(towards)

    for ours, expected in zip(jax.jit(lambda: both(blocks))(), jax.jit(lambda: both(plain))(), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_in_blocks_16_bits_are_rounded_no_further(mask):
    exact, rounded = arrays(), arrays(jnp.bfloat16)
    ours = blocks(*rounded[:3], mask)
    assert ours.dtype == jnp.bfloat16
    off, usual = (
        np.abs(np.asarray(x, np.float32) - plain(*exact[:3], mask)).max() for x in (ours, plain(*rounded[:3], mask))
    )
    assert off < 1.5 * usual
    gradients = jax.grad(lambda *x: jnp.sum(blocks(*x, mask).astype(jnp.float32)), argnums=(0, 1, 2))(*rounded[:3])
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 3


def test_large_scores_do_not_overflow():
    q, k, v, _ = arrays()
    mask = attention.branch_mask(jnp.asarray(BRANCH))
    value, back = jax.vjp(lambda *x: blocks(*x, mask), 1e4 * q, k, v)
    assert np.isfinite(value).all()
    assert all(np.isfinite(g).all() for g in back(jnp.ones_like(value)))
    np.testing.assert_allclose(value, plain(1e4 * q, k, v, mask), rtol=1e-4, atol=1e-4)


def test_a_key_after_the_block_is_not_read():
    """Not even multiplied by 0: not a number stays where it is."""
    q, k, v, _ = arrays()
    later = 2 * BLOCK
    k, v = k.at[:, later:].set(jnp.nan), v.at[:, later:].set(jnp.nan)
    mask = attention.branch_mask(jnp.zeros((3, 29), jnp.int32))
    assert np.isfinite(blocks(q, k, v, mask)[:, :later]).all()
    assert not np.isfinite(plain(q, k, v, mask)[:, :later]).any()


def test_long_rows_have_no_more_blocks_than_there_may_be():
    def products(time: int) -> int:
        x = jax.ShapeDtypeStruct((1, time, 1, 4), jnp.float32)
        mask = jax.ShapeDtypeStruct((1, time, time), bool)
        return str(jax.make_jaxpr(attention.attend_in_blocks)(x, x, x, mask)).count("dot_general")

    assert products(2 * attention.BLOCK) == 2 * 2
    assert products(5000) <= 2 * attention.MOST_BLOCKS


def test_accelerators_have_their_own():
    """Whatever JAX runs on: the program that is traced for a TPU has no blocks."""
    q, k, v, _ = arrays()
    mask = attention.branch_mask(jnp.asarray(BRANCH))
    here = str(jax.make_jaxpr(attention.attend)(q, k, v, mask))
    with attention.compiling_for("tpu"):
        there = str(jax.make_jaxpr(lambda *x: attention.attend(*x))(q, k, v, mask))
    assert "custom_vjp" in here
    assert "custom_vjp" not in there
