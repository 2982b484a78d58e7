"""int8 and int4 weights: how far off they may be, what they weigh, that they are the same however they are made."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from allmrec_jax.errors import UserError
from allmrec_jax.models import params
from allmrec_jax.models.llm import llama, load, opt, quantize
from allmrec_jax.models.llm.quantize import Precision
from allmrec_jax.models.params import Parameter, constant
from allmrec_jax.training.mesh import make_mesh

INT8, INT4 = Precision("int8"), Precision("int4")
# The shapes of q, o, up and down: the product, what is summed over, and the axes.
PRODUCTS = {
    "h -> heads": ("bth,hnk->btnk", (256, 4, 64), (0,), ("embed", "heads", None)),
    "heads -> h": ("btnk,nkh->bth", (4, 64, 256), (0, 1), ("heads", None, "embed")),
    "h -> mlp": ("bth,hf->btf", (256, 384), (0,), ("embed", "mlp")),
    "mlp -> h": ("btf,fh->bth", (384, 256), (0,), ("mlp", "embed")),
}


def _product(name: str) -> tuple[str, Parameter, jax.Array]:
    pattern, shape, inputs, axes = PRODUCTS[name]
    spread = np.exp(np.random.default_rng(1).normal(size=shape[-1]))  # channels of very different sizes
    weight = jnp.asarray(np.random.default_rng(0).normal(size=shape) * spread, jnp.float32)
    return pattern, Parameter(shape, axes, constant(0.0), inputs=inputs), weight


def _float(kept: dict[str, jax.Array], parameter: Parameter) -> jax.Array:
    """The weight that the integers and scales stand for."""
    if kept["integers"].ndim == kept["scales"].ndim:
        return quantize.written_out(kept)
    return kept["integers"].astype(jnp.float32) * jnp.expand_dims(kept["scales"], parameter.inputs)


@pytest.mark.parametrize("name", PRODUCTS)
def test_int8_is_off_by_half_a_scale_of_its_own_channel(name):
    _, parameter, weight = _product(name)
    kept = INT8(weight, parameter)
    largest = jnp.max(jnp.abs(weight), axis=parameter.inputs, keepdims=True)
    assert kept["integers"].dtype == jnp.int8
    assert (jnp.abs(_float(kept, parameter) - weight) <= largest / 254 * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", PRODUCTS)
def test_int4_is_off_by_half_a_scale_of_its_own_group_and_a_whole_one_at_the_far_end(name):
    _, parameter, weight = _product(name)
    kept, last = INT4(weight, parameter), parameter.inputs[-1]
    assert kept["integers"].dtype == jnp.int4
    n = kept["scales"].shape[last]
    size = weight.shape[last] // n
    assert size == quantize.group(weight.shape[last], parameter.axes[last]) >= 48
    off = jnp.abs(_float(kept, parameter) - weight).reshape(*weight.shape[:last], n, size, *weight.shape[last + 1 :])
    scales = jnp.abs(jnp.expand_dims(kept["scales"], last + 1))
    assert (off <= scales * (1 + 1e-5)).all()
    assert (off <= scales / 2 * (1 + 1e-5)).mean() > 0.99


@pytest.mark.parametrize("how", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_of_the_weight_which_the_integers_stand_for(name, how):
    pattern, parameter, weight = _product(name)
    kept = how(weight, parameter)
    inputs = [parameter.shape[axis] for axis in parameter.inputs]
    x = jax.random.normal(jax.random.key(3), (2, 5, *inputs))
    expected = jnp.einsum(pattern, x, _float(kept, parameter))
    np.testing.assert_allclose(quantize.einsum(pattern, x, kept), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(quantize.einsum(pattern, x, weight), jnp.einsum(pattern, x, weight))


def test_a_weight_of_zeros_stays_zeros():
    parameter = Parameter((128, 4), ("embed", "mlp"), constant(0.0), inputs=(0,))
    for how in (INT8, INT4):
        assert not _float(how(jnp.zeros((128, 4)), parameter), parameter).any()


@pytest.mark.parametrize(
    ("size", "axis", "expected"),
    [(4096, "embed", 128), (9216, "embed", 128), (576, "embed", 96), (64, None, 64), (80, None, 80),
     (14336, "mlp", 128), (11008, "mlp", 86), (1536, "mlp", 96), (131, "embed", 1)],
)  # fmt: skip
def test_a_group_never_lies_on_two_devices(size, axis, expected):
    assert quantize.group(size, axis) == expected
    if axis == "mlp":
        assert size // 8 % expected == 0


# ------------------------------------------------------------------------------------------------------ a whole model

C = dataclasses.replace(
    tiny.LLAMA, hidden_size=256, intermediate_size=512, num_attention_heads=8, head_dim=32, num_hidden_layers=3
)


@pytest.fixture(scope="module")
def floats():
    return jax.device_get(jax.jit(lambda key: params.init(key, llama.describe(C)))(jax.random.key(0)))


@functools.cache
def _kept(how: Precision):
    return jax.jit(lambda weights: quantize.tree(llama.describe(C), weights, how))


def _of(weights, how: Precision, mesh=None) -> load.FrozenLLM:
    return load.build(C, _kept(how)(weights), None, mesh=mesh, precision=how)


def _forward(llm: load.FrozenLLM):
    def forward(weights, tokens):
        module = nnx.merge(llm.graph, weights)
        return module.logits(module(module.embed(tokens), jnp.zeros_like(tokens)))

    return jax.jit(forward)


TOKENS = np.random.default_rng(0).integers(0, C.vocab_size, (4, 32))


@pytest.mark.parametrize(("dtype", "agree", "off"), [("int8", 0.95, 0.02), ("int4", 0.7, 0.3)])
def test_a_quantised_model_says_nearly_the_same(floats, dtype, agree, off):
    plain, llm = _of(floats, Precision()), _of(floats, Precision(dtype))
    expected, found = _forward(plain)(plain.weights, TOKENS), _forward(llm)(llm.weights, TOKENS)
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= agree
    assert jnp.sqrt(jnp.mean((found - expected) ** 2) / jnp.mean(expected**2)) < off
    assert not np.array_equal(found, expected)


def test_what_the_layers_weigh(floats):
    """A quarter of float32 in int8, an eighth in int4, and the scales."""

    def size(llm):
        return jax.jit(lambda x: x).lower(llm.weights["weights"]["layers"]).compile().memory_analysis()

    plain, int8, int4 = (size(_of(floats, Precision(d))).argument_size_in_bytes for d in ("float32", "int8", "int4"))
    assert 1 / 4 <= int8 / plain < 1.03 / 4
    assert 1 / 8 <= int4 / plain < 1.12 / 8


def test_no_more_than_one_layer_is_written_out_at_a_time():
    """The temporaries of the compiled forward pass do not grow with the number of layers."""
    sizes = {}
    for layers in (3, 9):
        c = dataclasses.replace(C, num_hidden_layers=layers)
        shapes = {"weights": params.shapes(quantize.describe(llama.describe(c), INT8))}
        graph = nnx.split(nnx.eval_shape(lambda c=c: llama.Llama(c, jax.random.key(0), INT8)))[0]

        def forward(weights, tokens, graph=graph):
            module = nnx.merge(graph, weights)
            return module(module.embed(tokens), jnp.zeros_like(tokens))

        compiled = jax.jit(forward).lower(shapes, TOKENS).compile()
        sizes[layers] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes[9] < sizes[3] + 100_000 < 3 * sizes[3]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_mesh_changes_nothing(floats, dtype):
    how, mesh = Precision(dtype), make_mesh(2, 4)
    alone, cut = _of(floats, how), _of(floats, how, mesh)
    layers = cut.weights["weights"]["layers"]
    assert layers["up"]["integers"].sharding.shard_shape((3, 256, 512)) == (3, 256, 128)
    assert layers["q"]["integers"].sharding.shard_shape((3, 256, 8, 32)) == (3, 256, 2, 32)
    scales = layers["down"]["scales"]
    cut_to = scales.sharding.shard_shape(scales.shape)
    assert cut_to == ((3, 256) if dtype == "int8" else (3, scales.shape[1] // 4, 256))
    found, expected = _forward(cut)(cut.weights, TOKENS), _forward(alone)(alone.weights, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_gradients_reach_what_is_injected(floats, dtype):
    """They are those of the float model whose weights the integers stand for."""
    llm = _of(floats, Precision(dtype))
    layers = dict(llm.weights["weights"]["layers"])
    for name, parameter in llama.describe(C)["layers"].items():
        if parameter.inputs:
            layers[name] = _float(layers[name], parameter)
    plain = load.build(C, {**llm.weights["weights"], "layers": layers}, None)
    x = jax.random.normal(jax.random.key(5), (2, 9, C.hidden_size))

    def gradient(llm):
        return jax.jit(
            jax.grad(lambda x: jnp.sum(jnp.sin(nnx.merge(llm.graph, llm.weights)(x, jnp.zeros((2, 9), jnp.int32)))))
        )(x)

    found, expected = gradient(llm), gradient(plain)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_opt_is_quantised_too():
    c = opt.OPTConfig(288, 128, 256, 2, 4, 64, max_position_embeddings=64)
    tree = jax.jit(lambda key: params.init(key, opt.describe(c)))(jax.random.key(0))
    plain = load.build(c, tree, None)
    llm = load.build(c, jax.jit(lambda x: quantize.tree(opt.describe(c), x, INT8))(tree), None, precision=INT8)
    assert llm.weights["weights"]["layers"]["up"]["kernel"]["integers"].dtype == jnp.int8
    assert llm.weights["weights"]["layers"]["up"]["bias"].dtype == jnp.float32
    found, expected = _forward(llm)(llm.weights, TOKENS), _forward(plain)(plain.weights, TOKENS)
    assert jnp.sqrt(jnp.mean((found - expected) ** 2) / jnp.mean(expected**2)) < 0.02


def test_names_of_precisions():
    assert quantize.precision("auto") == quantize.precision(jnp.float32) == Precision("float32", "float32")
    assert quantize.precision(jnp.bfloat16) == Precision("bfloat16", "bfloat16")
    assert quantize.precision("int4") == Precision("int4", "float32")
    with pytest.raises(UserError, match="int3 is not known; choose auto, float32, bfloat16, float16, int8, int4"):
        quantize.precision("int3")


def test_the_real_smollm2_in_int8(weights):
    """Of a prompt's tokens: at most .02 nats worse, the same next token nearly always."""
    plain, llm = (load.load_llm(weights("smollm2-135m-instruct"), dtype=dtype) for dtype in ("float32", "int8"))
    text = 'This user has watched "Toy Story","Heat" in the previous. The recommendation is "12 Monkeys". ' * 4
    tokens = np.array(plain.tokenizer([text]))
    expected, found = (np.asarray(_forward(x)(x.weights, tokens)) for x in (plain, llm))
    losses = [
        -jax.nn.log_softmax(x)[0, np.arange(tokens.shape[1] - 1), tokens[0, 1:]].mean() for x in (expected, found)
    ]
    assert abs(losses[1] - losses[0]) < 0.02
    assert (expected.argmax(-1) == found.argmax(-1)).mean() > 0.9
