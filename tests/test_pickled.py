"""Files of `torch.save` are read to the bit without PyTorch, and whatever a hostile one asks for is not done."""

import argparse
import collections
import json
import os
import pickle
import struct
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from allmrec_jax.errors import UserError
from allmrec_jax.models import pickled
from allmrec_jax.models.tensor_files import PickledTensors, Renamed, SafeTensors, tensors, weight_files

# ------------------------------------------------------------------------------------------------ what torch.save wrote


def save(value, path: Path, legacy: bool) -> Path:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


both_formats = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


@both_formats
def test_every_kind_of_tensor_is_read_to_the_bit(tmp_path, legacy):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    torch.manual_seed(0)
    whole = torch.randn(6, 5)
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    table = collections.OrderedDict(
        {
            **{str(kind): (whole * 50).to(kind) for kind in kinds},
            "bool": whole > 0,
            "uint8": whole.abs().to(torch.uint8),
            "whole": whole,
            "transposed": whole.T,
            "part": whole[2:4, 1:4],
            "every other": whole[::2, ::3],
            "scalar": torch.tensor(3.5),
            "empty": torch.zeros(0, 4),
            "parameter": torch.nn.Parameter(torch.randn(3)),
            "expanded": torch.arange(7).expand((1, -1)),
            "empty, wide": torch.zeros(10**6, 0, 10**6),
            "empty part": whole[3:3],
            "a column": torch.arange(7.0)[:, None][:1],
            "any stride": torch.arange(7.0).as_strided((1, 2, 1), (10**9, 3, 5), 2),
        }
    )
    found = PickledTensors([save(table, tmp_path / "x.bin", legacy)])
    assert list(found) == list(table)
    for name, tensor in table.items():
        expected = tensor.detach()
        if expected.dtype == torch.bfloat16:
            assert str(found[name].dtype) == "bfloat16"
            np.testing.assert_array_equal(found[name].view(np.int16), expected.view(torch.int16).numpy())
        else:
            assert found[name].dtype == expected.numpy().dtype
            np.testing.assert_array_equal(found[name], expected.numpy(), err_msg=name)


@both_formats
def test_a_module_s_state_with_its_metadata(tmp_path, legacy):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    found = PickledTensors([save(module.state_dict(), tmp_path / "x.bin", legacy)])
    assert {name: found[name].shape for name in found} == {n: tuple(t.shape) for n, t in module.state_dict().items()}
    np.testing.assert_array_equal(found["0.weight"], module[0].weight.detach().numpy())


@both_formats
def test_a_checkpoint_with_a_namespace_where_that_is_allowed(tmp_path, legacy):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    arguments = argparse.Namespace(hidden_units=50, device="cuda:0", dropout_rate=0.5)
    value = [{"user_num": 3, "args": arguments}, collections.OrderedDict({"E": torch.eye(2)})]
    path = save(value, tmp_path / "x.pth", legacy)
    with pytest.raises(UserError, match=r"asks for the global argparse\.Namespace"):
        pickled.load(path)
    head, table = pickled.load(path, allowed=pickled.TORCH | pickled.NAMESPACE)
    assert head["user_num"] == 3
    assert vars(head["args"]) == vars(arguments)
    np.testing.assert_array_equal(table["E"], np.eye(2, dtype=np.float32))


@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_pickle_of_plain_data(tmp_path, protocol):
    value = {
        "title": {1: "Heat", 2: "“Été”\n"},
        "sizes": (1, -2.5, None, True, 2**70, [b"x", []]),
        "long": list(range(300)),
    }
    (tmp_path / "x").write_bytes(pickle.dumps(value, protocol))
    if protocol < 3:  # bytes are written as a call there
        with pytest.raises(UserError, match=r"_codecs\.encode"):
            pickled.load(tmp_path / "x")
        value["sizes"] = (1, -2.5, None, True, 2**70, [])
        (tmp_path / "x").write_bytes(pickle.dumps(value, protocol))
    assert pickled.load(tmp_path / "x") == value


def test_numbers_in_the_other_byte_order(tmp_path):
    """A file from a big-endian machine, made by turning the numbers of one of ours."""
    path = save({"a": pytest.importorskip("torch").arange(5.0)}, tmp_path / "x.bin", legacy=False)
    turned = tmp_path / "big.bin"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(turned, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data/0"):
                content = np.frombuffer(content, "<f4").astype(">f4").tobytes()
            new.writestr(entry.filename, b"big" if entry.filename.endswith("byteorder") else content)
    found = PickledTensors([turned])["a"]
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, np.arange(5, dtype=np.float32))


# -------------------------------------------------------------------------------------------------------- hostile files


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(path: Path, content: bytes, **storages: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("x/data.pkl", content)
        for key, data in storages.items():
            zipped.writestr(f"x/data/{key.strip('_')}", data)
    return path


def stream(path: Path, content: bytes, *storages: tuple[str, int, bytes]) -> Path:
    head = [pickle.dumps(x, 2) for x in (pickled.MAGIC, pickled.PROTOCOL, {"little_endian": True})]
    tail = pickle.dumps([key for key, _, _ in storages], 2)
    body = b"".join(struct.pack("<q", count) + data for _, count, data in storages)
    path.write_bytes(b"".join([*head, bytes(content), tail, body]))
    return path


def plain(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


def hostile(canary: str) -> dict[str, tuple[bytes, str]]:
    """Pickle -> what the error must name. Each would make the file `canary` if it were run."""
    touch = f"touch {canary}"
    code = f"open({canary!r}, 'w').close()"
    inner = pickle.dumps(Calls(os.system, touch))
    system = text(os.system.__module__) + text("system") + pickle.STACK_GLOBAL
    call = text(touch) + pickle.TUPLE1 + pickle.REDUCE
    namespace = text("argparse") + text("Namespace") + pickle.STACK_GLOBAL
    ordered = text("collections") + text("OrderedDict") + pickle.STACK_GLOBAL
    return {
        "os.system": (inner, f"{os.system.__module__}.system"),
        "in a table": (pickle.dumps({"a": [1, (2, Calls(os.system, touch))]}), "system"),
        "eval": (pickle.dumps(Calls(eval, code)), "builtins.eval"),
        "exec": (pickle.dumps(Calls(exec, code), 2), "__builtin__.exec"),
        "a pickle within": (pickle.dumps(Calls(pickle.loads, inner)), "_pickle.loads"),
        "torch.load": (b"ctorch.serialization\nload\n(S'x'\ntR.", "torch.serialization.load"),
        "getattr": (b"c__builtin__\ngetattr\n(cos\npath\nS'os'\ntR.", "__builtin__.getattr"),
        "copyreg": (b"ccopyreg\n_reconstructor\n(cargparse\nNamespace\nc__builtin__\nobject\nNtR.", "copyreg"),
        "copy_reg extension": (b"ccopy_reg\nadd_extension\n(S'os'\nS'system'\nI1\ntR.", "copy_reg.add_extension"),
        "extension code": (pickle.PROTO + b"\x02" + pickle.EXT1 + b"\x01.", "EXT1"),
        "inst": (f"(S'{touch}'\nios\nsystem\n.".encode(), "INST"),
        "obj": (b"(" + f"cos\nsystem\nS'{touch}'\no.".encode(), "os.system"),
        "stack global": (pickle.PROTO + b"\x04" + system + call + b".", "system"),
        "dotted name": (
            pickle.PROTO + b"\x04" + text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93.",
            r"OrderedDict\.__init__\.__globals__",
        ),
        "a dotted module": (pickle.PROTO + b"\x04" + text("torch._utils.os") + text("system") + b"\x93.", "system"),
        "a name in pieces": (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "__globals__"),
        "not a name": (pickle.PROTO + b"\x04" + ordered + text("x") + b"\x93.", "a global without name"),
        "new object": (pickle.PROTO + b"\x02" + b"cos\nPathLike\n)\x81.", "os.PathLike"),
        "new object with keywords": (pickle.PROTO + b"\x04" + ordered + b")}\x92.", "NEWOBJ_EX"),
        "call of a string": (pickle.PROTO + b"\x04" + text("os.system") + call + b".", "a call of str"),
        "call of a result": (pickle.PROTO + b"\x04" + ordered + b")R" + call + b".", "a call of dict"),
        "state of a type": (pickle.PROTO + b"\x04" + ordered + b"}" + text("x") + b"K\x01sb.", "the state of a Global"),
        "item of a type": (pickle.PROTO + b"\x04" + ordered + text("x") + b"K\x01s.", "items put into a Global"),
        "appended to a type": (pickle.PROTO + b"\x04" + ordered + b"K\x01a.", "appended to a Global"),
        "slots of a namespace": (
            pickle.PROTO + b"\x04" + namespace + b")\x81N}" + text("__class__") + b"K\x01s\x86b.",
            "argparse.Namespace",
        ),
        "persistent name": (b"Pos.system\n.", "PERSID"),
        "persistent object": (pickle.PROTO + b"\x02" + text("os.system") + b"Q.", "kept outside"),
        "a tuple as a key": (pickle.PROTO + b"\x02}))\x86K\x01s.", "a tuple as the key"),
        "a set": (pickle.dumps({1, 2}, 4), "EMPTY_SET"),
        "a frozen set": (pickle.dumps(frozenset({1, 2}), 4), "FROZENSET"),
        "a buffer": (pickle.PROTO + b"\x05\x97.", "NEXT_BUFFER"),
        "escapes of a terminal": (b"c\x1b[2Jos\nsystem\n.", r"\\x1b"),
    }


@pytest.mark.parametrize("wrap", [plain, archive, stream])
@pytest.mark.parametrize("case", list(hostile("x")))
def test_a_hostile_pickle_is_refused_by_name_and_nothing_is_run(tmp_path, case, wrap):
    canary = tmp_path / "canary"
    content, named = hostile(str(canary))[case]
    with pytest.raises(UserError, match=f"asks for .*{named}.* nothing in it was run") as error:
        pickled.load(wrap(tmp_path / "x.bin", content))
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()
    assert not canary.exists()


def test_the_hostile_pickles_are_dangerous_elsewhere(tmp_path):
    """Or the test above would prove nothing."""
    canary = tmp_path / "canary"
    for case in ("os.system", "in a table", "eval", "a pickle within", "stack global"):
        pickle.loads(hostile(str(canary))[case][0])
        assert canary.exists(), case
        canary.unlink()


def test_special_attributes_of_a_namespace_are_refused(tmp_path):
    state = (
        pickle.PROTO + b"\x04" + text("argparse") + text("Namespace") + b"\x93)\x81}" + text("__class__") + b"K\x01sb."
    )
    with pytest.raises(UserError, match="special attributes"):
        pickled.load(plain(tmp_path / "x", state), allowed=pickled.NAMESPACE)
    made = pickled.load(plain(tmp_path / "y", pickle.dumps(argparse.Namespace(a=1))), allowed=pickled.NAMESPACE)
    assert made == types.SimpleNamespace(a=1)


def tensor(offset: int, shape: tuple, strides: tuple, count: int = 4, *, name: bytes = b"U\x01a") -> bytes:
    """The pickle of a table of one tensor over the storage `0` of `count` floats."""

    kind = b"ctorch\nFloatStorage\n"
    identity = b"(" + b"".join([b"S'storage'\n", kind, b"S'0'\n", b"S'cpu'\n", b"L%dL\n" % count]) + b"tQ"
    rest = b"".join(pickle.dumps(x, 2)[2:-1] for x in (offset, shape, strides, False))
    ordered = b"ccollections\nOrderedDict\n)R"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity + rest + ordered + b"tR"
    return pickle.PROTO + b"\x02}" + name + made + b"s."


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "count"),
    [
        (0, (5,), (1,), 4),
        (1, (4,), (1,), 4),
        (0, (2, 2), (10**6, 1), 4),
        (-1, (4,), (1,), 4),
        (0, (4,), (-1,), 4),
        (0, (10**12,), (0,), 4),
        (0, (2,), (1, 1), 4),
        (0, (2.0,), (1,), 4),
        (2**62, (1,), (1,), 4),
        (0, (10**9,), (1,), 10**9),
        (0, (1,) * 100, (0,) * 100, 4),
        (0, (2,), (2**63,), 4),
        (0, (1,), (2**63,), 4),
        (0, (0,), (2**63,), 4),
        (2**63, (0,), (1,), 4),
        (0, (0, 2**62, 2**62), (1, 1, 1), 4),
        (0, (0, 2**70), (1, 1), 4),
        (0, (0, 2**55, 2), (1, 1, 1), 4),
        (0, (2**2000,), (0,), 4),
        (0, (4,), (1,), 2**2000),
    ],
)
def test_a_tensor_beyond_its_storage_is_damage(tmp_path, offset, shape, strides, count):
    path = archive(tmp_path / "x", tensor(offset, shape, strides, count), _0=bytes(16))
    with pytest.raises(UserError, match="damaged"):
        PickledTensors([path])["a"]
    path = stream(tmp_path / "y", tensor(offset, shape, strides, count), ("0", 4, bytes(16)))
    with pytest.raises(UserError, match="damaged"):
        PickledTensors([path])["a"]


def test_these_hand_made_tensors_are_read_where_they_fit(tmp_path):
    numbers = np.arange(4, dtype="<f4").tobytes()
    path = archive(tmp_path / "x", tensor(1, (3,), (1,)), _0=numbers)
    np.testing.assert_array_equal(PickledTensors([path])["a"], [1, 2, 3])
    path = stream(tmp_path / "y", tensor(0, (2, 2), (1, 2)), ("0", 4, numbers))
    np.testing.assert_array_equal(PickledTensors([path])["a"], [[0, 2], [1, 3]])


# ----------------------------------------------------------------------------------- small files that ask for much


HUGE = pickle.LONG4 + struct.pack("<i", 2500) + b"\x7f" * 2500  # a number of 20000 bits
PAIRS = b"]q\x00(" + b"".join(b"](K%cNe" % k for k in range(100, 200)) + b"e"  # one list of 100 pairs, kept as 0
STATE = b"}q\x00(" + b"".join(b"U\x02%02dN" % k for k in range(100)) + b"u"
ORDERED, SPACE = b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n)\x81"
AGAIN = {
    "a number": (b"](" + HUGE + b"q\x00" + b"h\x00" * 3000 + b"e.", "a number of 19999 bits"),
    "a shape": (tensor(0, (2**20000,) * 40, (0,) * 40), "a number of 20001 bits"),
    "a name that is a number": (tensor(0, (4,), (1,), name=HUGE), "a number of 19999 bits"),
    "keys that share a hash": (b"}" + pickle.dumps(2**61 - 1, 2)[2:-1] + b"Ns.", "a key too long for a table"),
    "a long key": (b"}X" + struct.pack("<I", 5000) + b"x" * 5000 + b"Ns.", "a key too long for a table"),
    "a list of pairs": (b"](" + PAIRS + (ORDERED + b"h\x00\x85R") * 20 + b"e.", "entries used over and over"),
    "a state": (b"](" + STATE + (SPACE + b"h\x00b") * 20 + b"e.", "entries used over and over"),
    "arguments": (b"](" + b"(" + b"N" * 100 + b"tq\x00" + (ORDERED + b"h\x00R") * 20 + b"e.", "entries|arguments"),
}


@pytest.mark.parametrize("case", list(AGAIN))
def test_a_small_file_cannot_ask_for_much(tmp_path, case):
    """Each would take time or memory that grow with the square of its size, or faster."""
    content, message = AGAIN[case]
    for wrap in (stream, archive):
        path = wrap(tmp_path / wrap.__name__, pickle.PROTO + b"\x02" + content.removeprefix(pickle.PROTO + b"\x02"))
        with pytest.raises(UserError, match=f"damaged .*{message}"):
            pickled.load(path, allowed=pickled.TORCH | pickled.NAMESPACE)


def test_the_keys_of_the_older_format_are_not_hashed_before_they_are_known(tmp_path):
    """((((), ()), ((), ())), ...): 2^60 steps to hash, 60 instructions to write."""
    path = stream(tmp_path / "x", tensor(0, (4,), (1,)), ("0", 4, bytes(16)))
    deep = b")" + b"".join(b"q%ch%c\x86" % (k, k) for k in range(60))
    content = path.read_bytes().replace(pickle.dumps(["0"], 2), pickle.PROTO + b"\x02](" + deep + b"e.")
    with pytest.raises(UserError, match=r"damaged .*numbers of an unknown storage"):
        pickled.load(plain(path, content))


def test_ordered_dicts_as_python_2_wrote_them(tmp_path):
    """With a list of pairs to call them with, each list used once."""
    content = pickle.PROTO + b"\x02](" + (ORDERED + PAIRS + b"\x85R") * 3 + b"e."
    assert pickled.load(plain(tmp_path / "x", content)) == [dict.fromkeys(range(100, 200))] * 3


def test_a_tensor_s_name_that_is_a_number(tmp_path):
    path = archive(tmp_path / "x", tensor(0, (4,), (1,), name=b"K\x05"), _0=bytes(16))
    with pytest.raises(UserError, match="the name of a tensor is no text, but of type int"):
        PickledTensors([path])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shape": [0, 2**70]}, "'a' has an impossible shape"),
        ({"shape": [1] * 100}, "'a' has an impossible shape"),
        ({"shape": [0, 2**62, 2**62]}, "'a' has an impossible shape"),
        ({"shape": [-2, -2]}, "'a' has an impossible shape"),
        ({"shape": [2.0, 2]}, "'a' has an impossible shape"),
        ({"shape": [10**4000] * 300}, "'a' has an impossible shape"),
        ({"shape": [5]}, "'a' has another size than its shape"),
        ({"data_offsets": [16, 32]}, "'a' is cut"),
        ({"data_offsets": [10**30, 10**30 + 16]}, "'a' is cut"),
        ({"data_offsets": [0.0, 16.0]}, "damaged"),
        ({"data_offsets": [0]}, "damaged"),
        ({"dtype": ["F32"]}, "damaged"),
        ({"dtype": "F8_E4M3"}, "'a' is stored as F8_E4M3, which is not supported"),
    ],
)
def test_a_damaged_header_of_safetensors(tmp_path, entry, message):
    def write(entry):
        header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | entry}).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        return tensors(tmp_path)

    assert write({})["a"].tolist() == [0] * 4
    with pytest.raises(UserError, match=message):
        write(entry)


# --------------------------------------------------------------------------------------------------------------- damage


@both_formats
def test_a_file_cut_anywhere_is_damage(tmp_path, legacy):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    content = save({"a": torch.arange(50.0)}, tmp_path / "x.bin", legacy).read_bytes()
    for size in sorted({0, 1, 2, 10, 40, *range(50, len(content), len(content) // 15), len(content) - 1}):
        cut = plain(tmp_path / "cut.bin", content[:size])
        with pytest.raises(UserError, match=r"damaged|cannot be read"):
            PickledTensors([cut])["a"]


# Older pickles have their text as Python wrote it down, with escapes.
escapes = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")


@escapes
@both_formats
def test_a_pickle_with_random_damage_is_read_or_refused_in_one_line(tmp_path, legacy):
    content = tensor(1, (3,), (1,)) if legacy else tensor(0, (2, 1, 2), (2, 1, 1))
    numbers = np.arange(4, dtype="<f4").tobytes()
    random = np.random.default_rng(0)
    refused, read = [], 0
    for _ in range(400):
        damaged = bytearray(content)
        for at in random.integers(0, len(content), random.integers(1, 3)):
            damaged[at] = random.choice([random.integers(256), ord(random.choice([*"().0Rbtsua}])QcK"]))])
        path = tmp_path / "x"
        (stream(path, damaged, ("0", 4, numbers)) if legacy else archive(path, bytes(damaged), _0=numbers))
        try:
            read += sum(array.size for array in PickledTensors([path]).values()) > 0
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert read > 5
    assert not any("\n" in message for message in refused)


@escapes
@both_formats
def test_a_file_with_random_damage_is_read_or_refused_in_one_line(tmp_path, legacy):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    table = collections.OrderedDict(a=torch.arange(6.0).reshape(2, 3), b=torch.zeros(0, 2), c=torch.ones(3).half())
    content = save(table, tmp_path / "x.bin", legacy).read_bytes()
    random, refused = np.random.default_rng(1), []
    for _ in range(300):
        damaged = bytearray(content)
        for at in random.integers(0, len(content), random.integers(1, 6)):
            damaged[at] = random.integers(256)
        try:
            dict(PickledTensors([plain(tmp_path / "x", bytes(damaged))]))
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert not any("\n" in message for message in refused)


def test_flipped_bits_are_noticed(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    path = save({"a": torch.zeros(64)}, tmp_path / "x.bin", legacy=False)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as zipped:
        (entry,) = (e for e in zipped.infolist() if e.filename.endswith("data/0"))
    at = content.index(bytes(256), entry.header_offset + 30 + len(entry.filename))
    path.write_bytes(content[: at + 100] + b"\x01" + content[at + 101 :])
    with pytest.raises(UserError, match="fails its checksum"):
        PickledTensors([path])["a"]


@pytest.mark.parametrize(
    "content", [b"\x89HDF\r\n", b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b"\x80\x02"]
)
def test_something_else_altogether(tmp_path, content):
    with pytest.raises(UserError, match="not a file of PyTorch weights"):
        PickledTensors([plain(tmp_path / "x.bin", content)])


def test_an_archive_without_a_pickle_or_with_packed_parts(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as zipped:
        zipped.writestr("word/document.xml", "x")
    with zipfile.ZipFile(tmp_path / "b.bin", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("x/data.pkl", pickle.dumps({}))
    for name, message in (("a.bin", "0 files data.pkl"), ("b.bin", "compressed")):
        with pytest.raises(UserError, match=message):
            pickled.load(tmp_path / name)


@pytest.mark.parametrize("value", [[1, 2], {"epoch": 3}, {"model": {}}])
def test_a_pickle_of_something_else_than_tensors(tmp_path, value):
    with pytest.raises(UserError, match=r"in place of a table of tensors|not a tensor; is it a checkpoint"):
        PickledTensors([plain(tmp_path / "x.bin", pickle.dumps(value))])


# -------------------------------------------------------------------------------------------------------- whole folders


def test_safetensors_come_first_then_the_bin_whole_or_in_parts(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    from safetensors.numpy import save_file

    with pytest.raises(UserError, match=r"holds no weights: put model\.safetensors or pytorch_model\.bin there"):
        tensors(tmp_path)
    for part, name in enumerate("ab", 1):
        save({name: torch.full((2,), part)}, tmp_path / f"pytorch_model-{part}.bin", legacy=False)
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert {name: array.tolist() for name, array in tensors(tmp_path).items()} == {"a": [1, 1], "b": [2, 2]}
    save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin", legacy=True)
    assert [file.name for file in weight_files(tmp_path)] == ["pytorch_model.bin"]
    assert tensors(tmp_path)["a"].tolist() == [0]
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    assert isinstance(tensors(tmp_path), SafeTensors)
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]


def test_a_part_that_is_missing_or_a_damaged_index(tmp_path):
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere/pytorch_model-1.bin"}}))
    with pytest.raises(UserError, match=r"names pytorch_model-1\.bin, which is missing"):
        tensors(tmp_path)
    index.write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        tensors(tmp_path)


def test_one_tensor_in_two_files_or_two_under_one_name(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    files = [save({"a": torch.zeros(1)}, tmp_path / name, legacy=False) for name in ("x.bin", "y.bin")]
    with pytest.raises(UserError, match="'a' is in another file too"):
        PickledTensors(files)
    with pytest.raises(UserError, match=r"'x\.a' and 'a' are the same parameter"):
        Renamed({"a": 1, "x.a": 2}, lambda name: name.removeprefix("x."), "here")
