"""The table from which initial values, shardings and weight conversion are read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from allmrec_jax.errors import UserError
from allmrec_jax.models import alignment, params, projection, sasrec, text_encoder
from allmrec_jax.models.llm import llama
from allmrec_jax.models.params import Parameter, constant, normal
from allmrec_jax.training.mesh import make_mesh

DESCRIPTIONS = {
    "sasrec": sasrec.describe(sasrec.SASRecConfig(n_items=9, width=6, heads=2, maxlen=5)),
    "alignment": alignment.describe(6, 4),
    "projection": projection.describe(6, 4),
    "text encoder": text_encoder.describe(text_encoder.EncoderConfig(11, 6, 10, 3, 2, max_position_embeddings=7)),
    "llama": llama.describe(llama.LlamaConfig(11, 8, 10, 3, 4, 2, 6, tie_word_embeddings=False)),
}


@pytest.fixture(params=list(DESCRIPTIONS))
def description(request):
    return DESCRIPTIONS[request.param]


def _zeros(description):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params.shapes(description))


def _tensors(description):
    """Random tensors under their PyTorch names: no transposition goes unnoticed."""
    random = np.random.default_rng(0)
    empty = params.to_torch(description, _zeros(description))
    return {name: random.normal(size=array.shape).astype(np.float32) for name, array in empty.items()}


def test_to_torch_is_the_inverse_of_from_torch_to_the_bit(description):
    tensors = _tensors(description)
    tree = params.from_torch(description, tensors)
    back = params.to_torch(description, tree)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name].view(np.uint32), tensor.view(np.uint32), err_msg=name)
    again = params.from_torch(description, back)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), tree, again)))


def test_init_shapes_and_count_agree(description):
    tree, shapes = params.init(jax.random.key(0), description), params.shapes(description)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert params.count(description) == sum(x.size for x in jax.tree.leaves(tree))
    narrow = params.init(jax.random.key(0), description, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}


def test_a_parameter_starts_the_same_whatever_stands_beside_it():
    one = {"b": Parameter((3,), (None,), normal(1.0))}
    more = {"a": Parameter((3,), (None,), normal(1.0)), **one}
    key = jax.random.key(0)
    np.testing.assert_array_equal(params.init(key, one)["b"], params.init(key, more)["b"])
    assert not np.array_equal(params.init(key, more)["a"], params.init(key, more)["b"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("forward_layers.1.conv2.bias"), "forward_layers.1.conv2.bias.*missing"),
        (lambda t: t.update({"attention_layers.2.in_proj_bias": np.zeros(18)}), "unknown.*attention_layers.2.in_proj"),
        (lambda t: t.update({"item_emb.weight": np.zeros((10, 7))}), "item_emb.weight.*10, 7.*10, 6"),
        (lambda t: t.update({"attention_layers.0.in_proj_weight": np.zeros((18, 5))}), "in_proj_weight.*18, 5"),
        (lambda t: t.update({"attention_layers.0.in_proj_weight": np.zeros((17, 6))}), "in_proj_weight.*17, 6"),
        (lambda t: t.update({"forward_layers.0.conv1.weight": np.zeros((6, 6))}), "conv1.weight.*6, 6"),
        (lambda t: t.update({"forward_layers.0.conv1.weight": np.zeros((6, 6, 2))}), "conv1.weight.*6, 6, 2"),
        (lambda t: t.update({"last_layernorm.bias": np.zeros(())}), "last_layernorm.bias"),
    ],
)
def test_a_tensor_that_is_missing_unknown_or_misshaped_is_named(change, named):
    tensors = _tensors(DESCRIPTIONS["sasrec"])
    change(tensors)
    with pytest.raises(UserError, match=f"^model.pth: .*{named}"):
        params.from_torch(DESCRIPTIONS["sasrec"], tensors, source="model.pth")


def test_a_name_claimed_twice_is_an_error_both_ways():
    twin = Parameter((2,), (None,), constant(0.0), "weight")
    description = {"a": twin, "b": twin}
    with pytest.raises(UserError, match=r"'weight'.*two parameters"):
        params.from_torch(description, {"weight": np.zeros(2)})
    with pytest.raises(UserError, match=r"two parameters.*'weight'"):
        params.to_torch(description, {"a": np.zeros(2), "b": np.ones(2)})


def test_a_parameter_without_a_name_cannot_be_converted():
    description = {"a": {"b": Parameter((2,), (None,), constant(0.0))}}
    with pytest.raises(UserError, match="'a/b' has no name"):
        params.from_torch(description, {})
    with pytest.raises(UserError, match="'a/b' has no name"):
        params.to_torch(description, {"a": {"b": np.zeros(2)}})


def test_ignored_names_may_be_there():
    tensors = _tensors(DESCRIPTIONS["alignment"]) | {"position_ids": np.arange(3)}
    params.from_torch(DESCRIPTIONS["alignment"], tensors, ignore=lambda name: name == "position_ids")
    with pytest.raises(UserError, match="position_ids"):
        params.from_torch(DESCRIPTIONS["alignment"], tensors)


def test_to_torch_refuses_another_models_tree():
    description = DESCRIPTIONS["alignment"]
    tree = _zeros(description)
    with pytest.raises(ValueError, match="described"):
        params.to_torch(description, {"encode": tree["encode"], "other": tree["decode"]})
    with pytest.raises(ValueError, match="encode/bias"):
        params.to_torch(description, tree | {"encode": tree["encode"] | {"bias": np.zeros(5)}})


def test_each_tensor_is_fetched_once():
    fetched = []

    class Lazy(dict):
        def __getitem__(self, name):
            fetched.append(name)
            return super().__getitem__(name)

    tensors = _tensors(DESCRIPTIONS["text encoder"])
    params.from_torch(DESCRIPTIONS["text encoder"], Lazy(tensors))
    assert sorted(fetched) == sorted(tensors)


def test_axes_that_the_mesh_does_not_divide_stay_whole():
    mesh = make_mesh(data=2, model=4)
    c = llama.LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=4,
                          num_attention_heads=4, num_key_value_heads=2, head_dim=6)  # fmt: skip
    description = llama.describe(c)
    shardings = params.shardings(description, mesh)
    specs = jax.tree.map(lambda s: tuple(s.spec), shardings)
    assert specs["embed"] == (None, None)  # 11 rows
    assert specs["layers"]["q"] == (None, None, "model", None)
    assert specs["layers"]["k"] == (None, None, None, None)  # 2 heads
    assert specs["layers"]["up"] == (None, None, "model")
    assert specs["layers"]["down"] == (None, "model", None)
    assert specs["layers"]["attention_norm"] == (None, None)  # its 4 layers are no devices
    placed = jax.device_put(_zeros(description), shardings)
    assert placed["layers"]["q"].addressable_shards[0].data.shape == (4, 8, 1, 6)


def test_shardings_leave_axes_whole_that_the_mesh_lacks():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    for sharding in jax.tree.leaves(params.shardings(DESCRIPTIONS["llama"], mesh)):
        assert sharding.is_fully_replicated


def test_a_parameter_must_name_all_its_axes():
    with pytest.raises(ValueError, match="axis names"):
        Parameter((2, 3), (None,), constant(0.0), "w")
