"""What a config needs on hardware that is not there: memory a chip, what fits, and what to change where it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_inject import X_U, E, assert_close, make_batch

from allmrec_jax.errors import UserError
from allmrec_jax.models import params
from allmrec_jax.models.llm import load, quantize
from allmrec_jax.models.params import FULLY_SHARDED
from allmrec_jax.training import inject, inject_step
from allmrec_jax.training.mesh import make_mesh
from allmrec_jax.training.state import create


def test_a_step_with_weights_cut_over_all_devices_equals_one_device():
    def one_step(data, model, rules):
        mesh = make_mesh(data, model)
        llm = tiny.frozen_llm(mesh, rules=rules)
        frozen, shardings = inject.freeze(llm, mesh, x_u=X_U, e=E)
        embed = jnp.asarray(jax.device_get(llm.weights["weights"]["embed"]))
        heads = inject.init_heads(jax.random.key(4), jnp.asarray(X_U), jnp.asarray(E[1:]), embed)
        step = inject_step.make_step(llm.graph, shardings, mesh, optax.sgd(1.0))
        return jax.device_get(step(create(heads, optax.sgd(1.0)), frozen, [make_batch(llm)])), frozen

    expected, _ = one_step(1, 1, params.AXIS_RULES)
    ours, frozen = one_step(2, 2, FULLY_SHARDED)
    layers, c = frozen["llm"]["weights"]["layers"], tiny.LLAMA
    up = layers["up"].sharding.shard_shape(layers["up"].shape)
    assert up == (c.num_hidden_layers, c.hidden_size // 2, c.intermediate_size // 2)
    assert_close(ours, expected)


@pytest.mark.parametrize(
    ("dtype", "rules"), [("bfloat16", params.AXIS_RULES), ("int8", FULLY_SHARDED), ("int4", FULLY_SHARDED)]
)
def test_bytes_a_device_are_those_that_the_arrays_take(dtype, rules):
    mesh, how = make_mesh(2, 2), quantize.Precision(dtype, "bfloat16")
    described = load.MODULES[type(tiny.LLAMA)].describe(tiny.LLAMA)
    tree = jax.jit(lambda weights: quantize.tree(described, weights, how))(tiny._weights("llama"))
    llm = load.build(tiny.LLAMA, tree, None, mesh=mesh, precision=how, rules=rules)
    shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(llm.weights)]
    taken = sum(int(x.size * (0.5 if x.dtype == jnp.int4 else x.dtype.itemsize)) for x in shards)
    assert params.bytes_per_device(llm.describe(), mesh, rules) == taken


def test_too_little_memory_is_said_before_anything_is_loaded(monkeypatch):
    c = tiny.LLAMA
    whole = params.bytes_per_device(load.MODULES[type(c)].describe(c), make_mesh(1, 1))
    monkeypatch.setattr(load, "memory_limit", lambda device: whole)
    load.check_memory(c, quantize.FLOAT32, make_mesh(1, 1), params.AXIS_RULES, "tiny")
    monkeypatch.setattr(load, "memory_limit", lambda device: whole - 1)
    with pytest.raises(UserError, match=r"tiny: its weights take .* GiB a device \(float32\), but each has .* GiB; set "
                       r"llm.dtype int8 .* or llm.dtype int4 .* or devices.model 2"):  # fmt: skip
        load.check_memory(c, quantize.FLOAT32, make_mesh(1, 1), params.AXIS_RULES, "tiny")
    load.check_memory(c, quantize.FLOAT32, make_mesh(1, 2), params.AXIS_RULES, "tiny")
    monkeypatch.setattr(load, "memory_limit", lambda device: 10)
    with pytest.raises(UserError, match="use more devices or a smaller LLM"):
        load.check_memory(c, quantize.FLOAT32, make_mesh(2, 1), params.AXIS_RULES, "tiny")
    monkeypatch.setattr(load, "memory_limit", lambda device: whole * 0.6)
    with pytest.raises(UserError, match=r"or devices.shard_weights \("):
        load.check_memory(c, quantize.FLOAT32, make_mesh(2, 1), params.AXIS_RULES, "tiny")


def test_opt_s_projections_are_cut_once_a_mesh_axis():
    parameter = params.Parameter((8, 16), ("embed", "embed"), np.zeros)
    assert params.spec(parameter, make_mesh(2, 2), FULLY_SHARDED) == ("data", None)
