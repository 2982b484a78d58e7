"""What a config needs on hardware that is not there: memory a chip, what fits, and what to change where it does not."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from rich.console import Console
from test_inject import X_U, E, assert_close, make_batch
from tiny import write_llm

from allmrec_jax import cli
from allmrec_jax.config import Alignment, Data, Devices, Evaluation, Experiment, load_config
from allmrec_jax.data.packing import Room
from allmrec_jax.errors import UserError
from allmrec_jax.models import params
from allmrec_jax.models.llm import load, quantize, sizes
from allmrec_jax.models.params import FULLY_SHARDED
from allmrec_jax.planning import chips, memory, roofline
from allmrec_jax.planning.chips import GIB, hardware
from allmrec_jax.planning.plan import PARTS, advice, plan, programs_of
from allmrec_jax.planning.programs import used_of
from allmrec_jax.planning.report import show
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


# --------------------------------------------------------------------------------------------------------- the plan


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    """A tiny LLM whose config alone is there, on a mesh of 2 x 2."""
    folder = write_llm(tmp_path_factory.mktemp("plan") / "llm")
    (folder / "model.safetensors").unlink()
    return Experiment(
        cf=tiny.STAGE_0,
        align=Alignment(joint=6),
        llm=dataclasses.replace(tiny.STAGE_2, llm=str(folder), micro=4),
        evaluation=Evaluation(candidates=4),
        devices=Devices(model=2),
    )


@pytest.fixture(scope="module")
def planned(experiment):
    """On four CPU devices that have room for 12 users a pass and a bit: (plan, what was said)."""
    machine, said = hardware("cpu:4"), []
    first = plan(experiment, machine, length=192, largest=False)
    slope = (_bytes(first.programs, 8)[0] - first.used) / 4
    room = int(first.used + 9 * slope)
    found = plan(experiment, dataclasses.replace(machine, usable=room), length=192, report=said.append)
    return found, said, first


def _bytes(programs, users):
    m = programs.compile_step(users)
    resident = programs.weight_bytes + programs.state_bytes + programs.part_bytes(users)
    return resident + m.new + m.temporaries, True


def test_a_plan_says_what_each_chip_holds(planned, experiment):
    found, said, _ = planned
    out = found.as_json()
    assert set(out) == {"fits", "chips", "bytes_per_chip", "hbm_per_chip", "compile_seconds", "largest_batch",
                        "step_seconds_roofline"}  # fmt: skip
    assert out["fits"] is True
    assert out["chips"] == 4
    assert tuple(out["bytes_per_chip"]) == PARTS
    assert json.loads(json.dumps(out)) == out
    mesh, described = make_mesh(2, 2), load.MODULES[type(tiny.LLAMA)].describe(tiny.LLAMA)
    assert out["bytes_per_chip"]["weights"] == params.bytes_per_device(described, mesh)
    # Heads trained, in use and their gradients, two moments: five times; and the tables of ml-100k.
    heads = 8 * 16 + 6 * 16 + 2 * (16 * 16 + 4 * 16)
    tables = 943 * 8 + 1683 * 6
    assert out["bytes_per_chip"]["state"] == pytest.approx(4 * (5 * heads + tables + 17), abs=100)
    assert out["bytes_per_chip"]["activations"] > 0
    assert out["compile_seconds"] > 0
    assert out["step_seconds_roofline"] is None  # nobody publishes the peak of this CPU
    assert len(said) == 4  # three passes and ranking


def test_the_parts_are_the_compiler_s_own_numbers(planned):
    found, _, first = planned
    assert found.used == pytest.approx(_bytes(found.programs, 4)[0], rel=1e-6)
    assert first.used == pytest.approx(found.used, rel=1e-6)
    # Those that grow with the users, against what the traced backward pass keeps: on a CPU it holds some blocks of
    # attention weights beside that, which are larger than all the rest of so small a model.
    assert 1 <= found.parts["activations"] / first.parts["activations"] < 4


def test_the_largest_pass_is_confirmed_by_a_compile(planned):
    found, said, _ = planned
    assert found.largest == 12
    assert found.confirmed
    assert [line.split(":")[0] for line in said] == [
        *(f"stage 2, {users} users a pass" for users in (4, 8, 12)),
        "ranking, 2 users a pass",  # a CPU takes one a device
    ]


def test_what_does_not_fit_is_told_with_what_to_change(planned):
    found, _, _ = planned
    less = dataclasses.replace(found.hardware, usable=int(found.used) - found.programs.weight_bytes // 4)
    refused = dataclasses.replace(found, hardware=less, fits=False)
    refused.advice = advice(refused)
    changes = dict(refused.advice)
    assert {"--llm.remat layers", "--llm.dtype int8", "--llm.micro 2", "--devices.shard-weights"} <= set(changes)
    assert changes["--llm.micro 2"] < refused.used
    out = io.StringIO()
    show(refused, Console(file=out, width=120))
    assert "It does NOT fit." in out.getvalue()
    assert "What would fit:\n  --llm" in out.getvalue()
    # What was predicted of the halved pass is what its compile says, to a fifth.
    assert changes["--llm.micro 2"] == pytest.approx(_bytes(found.programs, 2)[0], rel=0.2)


def test_idle_chips_are_named(experiment):
    x, out = dataclasses.replace(experiment, devices=Devices(model=1)), io.StringIO()
    found = plan(x, hardware("h100:16"), length=192)
    show(found, Console(file=out, width=120))
    assert "12 chips are IDLE" in out.getvalue()
    assert "Estimated, not compiled" in out.getvalue()
    assert found.as_json()["compile_seconds"] is None
    assert found.fits
    assert found.step_seconds > 0


def test_lengths_come_from_the_data_where_it_is_prepared(tmp_path, experiment):
    data = tiny.dataset(tmp_path / "data")
    x = dataclasses.replace(experiment, data=Data(name=str(tmp_path / "data")))
    found = programs_of(x, hardware("cpu:4")).lengths
    assert found.items == data.n_items + 1
    assert 200 < found.train.time < found.rank.time < 320  # two dozen characters a title, and the sentence
    assert "the longest of tiny" in found.source
    assert programs_of(x, hardware("cpu:4"), 192).lengths.train.time == 192
    with pytest.raises(UserError, match="--length 4096 is not between 128 and the LLM's context of 512"):
        programs_of(x, hardware("cpu:4"), 4096)


# ------------------------------------------------------------------------------------------------------- its parts


@pytest.mark.parametrize("says", [True, False])
def test_a_survey_finds_the_largest_even_where_memory_bends(says):
    def measure(users):
        used = 100 + 10 * users + (users > 60) * 150
        return (used if used <= 1000 or says else None), used <= 1000

    line = memory.survey(measure, 8, 4, 1000, 10**6)
    assert (line.fixed, line.slope) == (100, 10)
    assert not line.confirmed
    assert measure(line.largest)[1]
    assert line.largest == (72 if says else 52)
    assert memory.survey(lambda n: (100 + 10 * n, 100 + 10 * n <= 1000), 8, 4, 1000, 10**6).largest == 88
    assert memory.survey(lambda n: (100 + 10 * n, 100 + 10 * n <= 1000), 128, 4, 1000, 10**6).largest == 88
    assert memory.survey(lambda n: (100 + 10 * n, True), 8, 4, 10**9, 40).largest == 40
    assert memory.survey(lambda n: (None, False), 4, 4, 1000, 40).largest == 0


def test_the_compiler_s_complaint_is_understood():
    said = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of "
    assert used_of(said + "15.75G hbm. Exceeded hbm capacity by 4.75G.") == 20.5 * GIB
    assert used_of("RESOURCE_EXHAUSTED: Out of memory") is None


def test_integer_weights_leave_no_float_copies_for_the_backward_pass(experiment):
    machine = hardware("cpu:1")
    for remat in ("none", "products", "layers"):
        kept = {}
        for dtype in ("float32", "int8", "int4"):
            config = dataclasses.replace(experiment.llm, remat=remat)
            x = dataclasses.replace(experiment, llm=config, devices=Devices())
            programs = programs_of(x, machine, 192)
            how = quantize.Precision(dtype, "float32")
            kept[dtype] = sorted(dataclasses.replace(programs, precision=how).kept)
        assert kept["int8"] == kept["float32"] == kept["int4"]


def test_the_roofline_counts_a_pass_of_opt_6_7b():
    programs = programs_of(load_config("beauty_opt_6_7b_h100"), hardware("h100:1"), 1024)
    weights, attention = roofline.forward_flops(programs, 4, Room(1024, 64, 32))
    layers = 12 * 4096**2 * 32
    assert weights == 2 * layers * 4 * 1024 + 2 * 50272 * 4096 * 4 * 64
    assert attention == 4 * 4096 * 1024**2 * 32 * 4
    work = roofline.train_work(programs, 4)
    assert work.flops == 2 * weights + 4 * attention  # `products` recomputes attention
    assert work.messages == 0
    assert work.bytes > 2 * programs.weight_bytes
    assert work.seconds(chips.CHIPS["h100"]) == work.flops / 989e12


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("facebook/opt-6.7b", "opt-6.7b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
        ("smollm2-135m-instruct", "smollm2-135m"),
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("somebody/something", None),
    ],
)
def test_well_known_models_are_recognised(name, known):
    assert sizes.known_as(name) == known


def test_the_configs_that_come_with_the_project_fit_their_hardware():
    for name, topology in [("beauty_opt_6_7b_h100", "h100:1"), ("beauty_opt_6_7b_h100", "a100:1")]:
        found = plan(load_config(name), hardware(topology))
        assert found.fits
        assert found.parts["weights"] / GIB == pytest.approx(12.4, abs=0.1)


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--topology", "v9:2x4"], "--topology v9:2x4 is not known"),
        (["--topology", "h100"], "--topology h100 is not known"),
        (["--topology", "cpu:64"], "this process has 8 CPU devices"),
        (["--topology", "h100:1", "--devices.model", "2"], "needs more chips"),
        (["--topology", "h100:8", "--devices.model", "3"], "cannot be cut over 3"),
        (["--topology", "h100:8", "--llm.llm", "somebody/unknown"], "its sizes are not known"),
        (["--topology", "h100:8", "--llm.micro", "1"], "not a multiple of the 4"),
    ],
)
def test_mistakes_are_one_line(arguments, complaint, capsys):
    assert cli.main(["plan", "--config", "beauty_opt_6_7b_h100", *arguments]) == 1
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1


def test_without_the_tpu_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'allmrec-jax\[tpu\]'"):
        hardware("v5e:2x4")


def test_the_command_writes_what_machines_read(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert cli.main(["plan", "--config", "beauty_opt_6_7b_h100", "--topology", "h200:1", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["fits"] is True
    assert "It fits." in capsys.readouterr().out


@pytest.mark.slow
def test_opt_6_7b_fits_eight_v5e_chips_and_int8_halves_its_weights():
    """Compiled for TPUs that are not there: minutes."""
    pytest.importorskip("libtpu", reason="libtpu is not installed (extra `tpu`)")
    x, machine = load_config("movies_opt_6_7b_v5e8"), hardware("v5e:2x4")
    found = plan(x, machine, largest=False)
    assert found.fits
    assert found.compiled
    assert found.programs.mesh.shape == {"data": 2, "model": 4}
    assert found.parts["weights"] / GIB == pytest.approx(12.4 / 4, rel=0.01)
    assert found.used < found.hardware.usable == int(0.984 * 16 * GIB)
    halved = dataclasses.replace(x, llm=dataclasses.replace(x.llm, dtype="int8"))
    int8 = programs_of(halved, machine)
    assert int8.weight_bytes / found.parts["weights"] == pytest.approx(0.5, abs=0.03)
    compiled, plain = int8.compile_step(found.users), found.programs.compile_step(found.users)
    saved = found.parts["weights"] - int8.weight_bytes
    assert plain.arguments - compiled.arguments == pytest.approx(saved, rel=0.01)
    assert compiled.temporaries < plain.temporaries + saved / 4, "are the weights written out somewhere?"
