"""Folders of weights: every format gives the same model, on every mesh, and the host holds one tensor at a time."""

import dataclasses
import gc
import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from parity import assert_trees_close
from safetensors.numpy import save_file

from allmrec_jax.errors import UserError
from allmrec_jax.models import params, streaming, tensor_files
from allmrec_jax.models.llm import llama, opt, quantize
from allmrec_jax.models.llm.architectures import MODULES
from allmrec_jax.models.llm.load import load_llm
from allmrec_jax.training.mesh import make_mesh

OPT = opt.OPTConfig(288, 32, 64, 3, 4, 16, max_position_embeddings=64, do_layer_norm_before=False)
LLAMA = dataclasses.replace(tiny.LLAMA, hidden_size=32, num_hidden_layers=3, tie_word_embeddings=False)
RAW = {
    "opt": {"architectures": ["OPTForCausalLM"], "model_type": "opt", "eos_token_id": 1, "bos_token_id": 1,
            "activation_function": "relu"},
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "eos_token_id": [1, 0], "bos_token_id": 0},
}  # fmt: skip
CONFIGS = {"opt": OPT, "llama": LLAMA}


def _tensors(config) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = params.shapes(MODULES[type(config)].describe(config))
    tree = jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32), shapes)
    named = params.to_torch(MODULES[type(config)].describe(config), tree)
    return {name: np.ascontiguousarray(tensor) for name, tensor in named.items()}


def _write(folder, kind: str, tensors, *, parts: int = 1, **more) -> None:
    """A folder as on the hub, the tensors in `parts` files."""
    folder.mkdir(exist_ok=True)
    raw = {k: v for k, v in dataclasses.asdict(CONFIGS[kind]).items() if v is not None} | RAW[kind] | more
    (folder / "config.json").write_text(json.dumps(raw))
    tiny.byte_tokenizer().backend.save(str(folder / "tokenizer.json"))
    names = list(tensors)
    for part in range(parts):
        path = folder / (f"model-{part + 1:05}-of-{parts:05}.safetensors" if parts > 1 else "model.safetensors")
        save_file({name: tensors[name] for name in names[part::parts]}, path)


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    _write(tmp_path / "llm", kind, _tensors(CONFIGS[kind]))
    return tmp_path / "llm"


def _expected(kind):
    config = CONFIGS[kind]
    return params.from_torch(MODULES[type(config)].describe(config), _tensors(config))


# ---------------------------------------------------------------------------------------------------------- formats


def test_the_weights_and_the_config_are_those_of_the_folder(kind, folder):
    llm = load_llm(folder)
    assert llm.config == CONFIGS[kind]
    assert_trees_close(llm.weights["weights"], _expected(kind), rtol=0, atol=0)
    assert llm.tokenizer.eos == 1
    assert (llm.width, llm.context) == ((16, 64) if kind == "opt" else (32, 512))
    assert llm.parameters() == sum(tensor.size for tensor in _tensors(CONFIGS[kind]).values())


def test_files_in_parts_are_one_model(kind, tmp_path):
    tensors = _tensors(CONFIGS[kind])
    _write(tmp_path / "parts", kind, tensors, parts=4)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == 4
    assert_trees_close(load_llm(tmp_path / "parts").weights["weights"], _expected(kind), rtol=0, atol=0)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
def test_old_bin_files_are_the_same_model(kind, folder, parts, legacy):
    """Also with the names of 2022, which lack OPT's first part, and with the tied output stored again."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    tensors = _tensors(CONFIGS[kind])
    if kind == "opt":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        tensors["lm_head.weight"] = tensors["decoder.embed_tokens.weight"]
    (folder / "model.safetensors").unlink()
    names, where = list(tensors), {}
    for part in range(parts):
        path = folder / (f"pytorch_model-{part + 1:05}-of-{parts:05}.bin" if parts > 1 else "pytorch_model.bin")
        table = {name: torch.tensor(tensors[name]) for name in names[part::parts]}
        torch.save(table, path, _use_new_zipfile_serialization=not legacy)
        where |= dict.fromkeys(table, path.name)
    if parts > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert_trees_close(load_llm(folder).weights["weights"], _expected(kind), rtol=0, atol=0)


@pytest.mark.parametrize("stored", [np.float16, jnp.bfloat16, np.float64])
def test_stored_numbers_become_the_dtype_that_is_asked_for(stored, tmp_path):
    tensors = {name: tensor.astype(stored) for name, tensor in _tensors(LLAMA).items()}
    _write(tmp_path / "llm", "llama", tensors)
    for dtype in (jnp.float32, "bfloat16"):
        leaf = load_llm(tmp_path / "llm", dtype=dtype).weights["weights"]["layers"]["q"]
        assert leaf.dtype == jnp.dtype(dtype)
        named = "model.layers.1.self_attn.q_proj.weight"
        expected = jnp.asarray(tensors[named].astype(np.float32)).astype(dtype)
        np.testing.assert_array_equal(leaf[1].reshape(32, -1).T.astype(jnp.float32), expected.astype(jnp.float32))


# --------------------------------------------------------------------------------------------------- meshes, precision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("shape", [None, (2, 4)], ids=str)
def test_what_is_streamed_is_what_is_made_at_once(kind, folder, shape, dtype):
    mesh = None if shape is None else make_mesh(*shape)
    llm, how = load_llm(folder, dtype=dtype, mesh=mesh), quantize.precision(dtype)
    described = MODULES[type(CONFIGS[kind])].describe(CONFIGS[kind])
    expected = jax.jit(lambda tree: quantize.tree(described, tree, how))(_expected(kind))
    shapes = params.shapes(llm.describe())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), llm.weights["weights"]) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    for (path, found), wanted in zip(
        jax.tree_util.tree_flatten_with_path(llm.weights["weights"])[0], jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(
            np.asarray(found).astype(np.float32), np.asarray(wanted).astype(np.float32), err_msg=str(path)
        )
    if mesh is not None:
        for found, wanted in zip(
            jax.tree.leaves(llm.weights["weights"]),
            jax.tree.leaves(params.shardings(llm.describe(), mesh)),
            strict=True,
        ):
            assert found.sharding.is_equivalent_to(wanted, found.ndim)


class _Counting(tensor_files.SafeTensors):
    """Says which tensors were asked for."""

    def __init__(self, folder):
        super().__init__(folder)
        self.asked = []

    def __getitem__(self, name):
        self.asked.append(name)
        return super().__getitem__(name)


WIDE = llama.LlamaConfig(1024, 512, 1024, 5, 8, 8, 64, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """50 MB of layers, no tensor above 2 MB, in three files."""
    folder, random = tmp_path_factory.mktemp("wide"), np.random.default_rng(0)
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), params.shapes(llama.describe(WIDE)))
    names = params.to_torch(llama.describe(WIDE), zeros)
    for part in range(3):
        chosen = list(names)[part::3]
        save_file(
            {name: random.normal(size=names[name].shape).astype(np.float32) for name in chosen},
            folder / f"model-{part}.safetensors",
        )
    return folder


@pytest.mark.parametrize(
    ("dtype", "shape"), [("float32", (1, 1)), ("bfloat16", (1, 4)), ("int8", (1, 4)), ("int4", (1, 1))]
)
def test_the_host_holds_about_one_tensor(wide_folder, shape, dtype):
    """NumPy's memory, at its greatest, against the largest tensor of one layer (2 MiB of 54)."""
    how, mesh = quantize.precision(dtype), make_mesh(*shape)
    described = llama.describe(WIDE)
    kept, tensors = quantize.describe(described, how), _Counting(wide_folder)
    total = sum(params.shapes({"": p})[""].size * 4 for _, p in params.paths(described))
    largest = 1024 * 512 * 4
    assert total > 20 * largest

    def run():
        return jax.block_until_ready(streaming.load(described, tensors, kept, how, mesh=mesh))

    run()  # compiled, so that only the loading is measured
    tensors.asked.clear()
    gc.collect()
    tracemalloc.start()
    try:
        run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert largest * 0.9 < peak < 2.5 * largest
    assert sorted(tensors.asked) == sorted(tensors)  # each once


# ---------------------------------------------------------------------------------------------------------- bad input


def _edit(path, **changes):
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (raw | changes).items() if v is not ...}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["GPTNeoXForCausalLM"]},
         r"GPTNeoXForCausalLM is not supported \(known: OPTForCausalLM, LlamaForCausalLM, MistralForCausalLM, Qwen2"),
        ({"architectures": ...}, "architecture llama is not supported"),
        ({"hidden_size": ...}, "damaged or lacks 'hidden_size'"),
        ({"eos_token_id": ...}, "damaged or lacks 'eos_token_id'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not supported .known: default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "damaged or lacks 'low_freq_factor'"),
        ({"hidden_act": "gelu"}, "'gelu', but only 'silu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised .awq.*plain weights, or a GGUF file"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 key-value heads"),
        ({"vocab_size": 200}, r"knows 263 tokens, but the model has 200 embeddings.*not of one model"),
        ({"vocab_size": 300}, "'model.embed_tokens.weight' has shape .288, 32.*does not fit .300, 32"),
        ({"num_hidden_layers": 4}, "'model.layers.3.input_layernorm.weight' is missing"),
        ({"num_hidden_layers": 2}, r"unknown tensor 'model.layers.2.input_layernorm.weight' \(9 such\)"),
        ({"tie_word_embeddings": True}, None),  # the file's own output is the same table then, and is passed over
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_is_refused_plainly(changes, says, tmp_path):
    folder = tmp_path / "llm"
    _write(folder, "llama", _tensors(LLAMA))
    _edit(folder / "config.json", **changes)
    if says is None:
        assert "output" not in load_llm(folder).weights["weights"]
        return
    with pytest.raises(UserError, match=says):
        load_llm(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"activation_function": "gelu"}, "'gelu', but only 'relu'"), ({"enable_bias": False}, "enable_bias is False"),
     ({"num_attention_heads": 5}, "32 is no multiple of 5 heads")],
)  # fmt: skip
def test_other_models_of_opts_architecture_are_refused_plainly(changes, says, tmp_path):
    _write(tmp_path / "llm", "opt", _tensors(OPT), **changes)
    with pytest.raises(UserError, match=says):
        load_llm(tmp_path / "llm")


def test_a_file_that_is_cut_is_named(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for size, says in (
        (len(data) - 1, "is cut: the file ends at"),
        (100, "header is cut"),
        (3, "damaged"),
        (0, "damaged"),
    ):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=rf"model\.safetensors is damaged.*{says}|model\.safetensors is {says}"):
            load_llm(folder)


def test_a_missing_tensor_is_named_before_anything_is_read(kind, tmp_path, monkeypatch):
    tensors = _tensors(CONFIGS[kind])
    gone = next(name for name in tensors if "layers.2" in name and "q_proj" in name)
    del tensors[gone]
    _write(tmp_path / "llm", kind, tensors)
    monkeypatch.setattr(streaming, "_place", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match=f"{gone}' is missing"):
        load_llm(tmp_path / "llm")


def test_a_part_that_is_missing_is_noticed(kind, tmp_path):
    _write(tmp_path / "llm", kind, _tensors(CONFIGS[kind]), parts=3)
    (tmp_path / "llm" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="is missing"):
        load_llm(tmp_path / "llm")
    index = {"weight_map": {"x": "model-00002-of-00003.safetensors", "y": "model-00003-of-00003.safetensors"}}
    (tmp_path / "llm" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names model-00002-of-00003.safetensors, which is missing; fetch it too"):
        load_llm(tmp_path / "llm")


def test_a_mesh_that_does_not_divide_the_heads_is_refused(folder):
    with pytest.raises(UserError, match=r"4 heads cannot be cut over 8 devices; set devices.model to 1, 2, 4"):
        load_llm(folder, mesh=make_mesh(1, 8))


def test_folders_without_a_model_or_a_tokenizer_say_what_is_missing(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        load_llm(tmp_path / "empty")
    shutil.copy(folder / "config.json", tmp_path / "empty")
    with pytest.raises(UserError, match=r"no tokenizer: put tokenizer.json"):
        load_llm(tmp_path / "empty")
    shutil.copy(folder / "tokenizer.json", tmp_path / "empty")
    with pytest.raises(UserError, match=r"holds no weights: put model.safetensors"):
        load_llm(tmp_path / "empty")
