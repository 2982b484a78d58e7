"""`allmrec compare`: this program and PyTorch agree number by number, and where they do not it is said where."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import write_encoder, write_llm, write_movielens

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")

from allmrec_jax import cli, cli_fields  # noqa: E402
from allmrec_jax.comparison import checks, compare, stage_align, stage_cf, stage_llm  # noqa: E402
from allmrec_jax.comparison.checks import Run  # noqa: E402
from allmrec_jax.config import Experiment, load_config  # noqa: E402
from allmrec_jax.pipeline import Pipeline  # noqa: E402

STAGES = ("stage 0", "stage 1", "stage 2")


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """The demo's config on tiny data and models: its loss, its schedule, heads held among the token embeddings."""
    root = tmp_path_factory.mktemp("inputs")
    small = {
        "data.name": write_movielens(root / "raw"),
        "align.encoder": write_encoder(root / "encoder"),
        "llm.llm": write_llm(root / "llm"),
        "cf.width": 8,
        "cf.maxlen": 10,
        "cf.batch": 16,
        "cf.epochs": 3,
        "align.joint": 6,
        "align.batch": 16,
        "align.epochs": 2,
        "llm.history": 2,
        "llm.candidates": 3,
        "llm.epochs": 0.5,
        "evaluation.candidates": 4,
    }
    return [str(part) for name, value in small.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def experiment(options) -> Experiment:
    return cli_fields.override(load_config("demo"), options, prog="test")


@pytest.fixture(scope="module")
def compared(options, tmp_path_factory) -> tuple[Path, dict]:
    """(work directory, what machines read) of a comparison of initial weights."""
    work = tmp_path_factory.mktemp("compare") / "work"
    arguments = ["compare", "--config", "demo", "--workdir", str(work), "--steps", "2", "--users", "3"]
    assert cli.main([*arguments, *options, "--json", str(work.parent / "c.json")]) == 0
    return work, json.loads((work.parent / "c.json").read_text())


def test_every_stage_agrees_far_within_its_tolerances(compared):
    _, found = compared
    assert found["passed"]
    assert len({entry["name"] for entry in found["checks"]}) == len(found["checks"])
    for entry in found["checks"]:
        assert {"name", "max_abs", "max_rel", "tolerance", "passed"} <= set(entry)
        assert entry["passed"] == (entry["max_rel"] <= entry["tolerance"])
        assert entry["tolerance"] <= 1e-3 or "metrics" in entry["name"]
    for stage in STAGES:
        kinds = {
            entry["name"].removeprefix(f"{stage}: ") for entry in found["checks"] if entry["name"].startswith(stage)
        }
        assert {"losses of 2 steps", "gradients", "parameters after 2 steps"} <= kinds
        assert "ranking" in kinds or stage == "stage 1"


def test_the_report_is_there_for_people(compared):
    work, found = compared
    page, text = (work / "compare.html").read_text(), (work / "compare.md").read_text()
    for entry in found["checks"]:
        assert entry["name"] in page
        assert entry["name"] in text
    assert f"All {len(found['checks'])} checks agree." in text
    assert "compared with initial weights: cf, align, llm" in text
    assert not re.search(r'(?:src|href)="?https?:', page)


# ----------------------------------------------------------------------------------------- where something is different


def altered(original, change):
    """`original`, what it makes changed before anybody sees it."""

    def make(*arguments, **options):
        made = original(*arguments, **options)
        with torch.no_grad():
            change(made)
        return made

    return make


def test_a_difference_in_sasrec_is_found_in_its_block_and_the_command_fails(options, tmp_path, monkeypatch, capsys):
    def change(model):
        model.forward_layers[-1].conv1.bias += 0.05

    monkeypatch.setattr(stage_cf, "baseline", altered(stage_cf.baseline, change))
    work, file = tmp_path / "w", tmp_path / "c.json"
    arguments = ["compare", "--config", "demo", "--workdir", str(work), "--stage", "cf", "--steps", "2"]
    assert cli.main([*arguments, *options, "--json", str(file)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "checks differ; the first is stage 0: x_u, first in SASRec's block 2" in said
    found = json.loads(file.read_text())
    assert not found["passed"]
    failed = {entry["name"]: entry for entry in found["checks"] if not entry["passed"]}
    assert {"stage 0: x_u", "stage 0: losses of 2 steps"} <= set(failed)
    assert {entry["parts"] for entry in failed.values()} == {"SASRec's block 2"}
    assert "DIFFERS; first in SASRec's block 2" in (work / "compare.md").read_text()


@pytest.fixture(scope="module")
def parts(experiment, tmp_path_factory) -> compare.Parts:
    return compare.Parts(Pipeline(experiment, tmp_path_factory.mktemp("parts") / "w"))


def test_a_difference_in_the_encoder_is_found_in_its_layer(parts, monkeypatch):
    def change(modules):
        bias = modules["encoder"].transformer.encoder.layer[0].output.dense.bias
        bias += torch.linspace(0, 0.3, len(bias))

    def found() -> str:
        encoder, items = parts.pipeline.encoder, np.arange(1, 6)
        trace = stage_align.trace(parts.begin, encoder, parts.aligned, parts.aligned, items)
        return checks.first_parting(trace, checks.TOLERANCES["output"])

    assert found() == ""
    monkeypatch.setattr(stage_align, "baseline", altered(stage_align.baseline, change))
    assert found() == "the sentence encoder's layer 1"


def test_a_difference_in_the_llm_or_a_head_is_found_there(parts):
    pipeline, config = parts.pipeline, parts.x.llm
    examples, _ = parts.examples
    random = np.random.default_rng(0)
    x_u = random.normal(size=(len(examples.users), 8)).astype(np.float32)
    inputs = stage_llm.Inputs(x_u, random.uniform(size=(pipeline.dataset.n_items + 1, 6)).astype(np.float32))
    heads, model = parts.heads(inputs), stage_llm.transformer(parts.llm, pipeline.llm_folder)
    [prompt] = examples.builder.prompts([[1, 2]], [[3, 4]])

    def found(theirs) -> str:
        sides = (heads, theirs), (inputs, inputs), (x_u[0], x_u[0])
        return checks.first_parting(stage_llm.trace(parts.llm, model, prompt, *sides), checks.TOLERANCES["output"])

    assert config.init == "held"
    assert found(heads) == ""
    other = jax.tree.map(np.array, heads)
    other["F_I"]["dense1"]["bias"][0] += 1
    assert found(other) == "F_I"
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 2
    assert found(heads) == "the LLM's layer 2"


def tree(**arrays) -> dict:
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def test_differences_are_measured_against_each_array_s_own_size():
    a, b = tree(large=[100.0, 1.0], small=[1e-3]), tree(large=[100.0, 1.001], small=[1.1e-3])
    entry = checks.check("x", "output", a, b)
    assert (entry.worst, entry.passed) == ("small", False)
    np.testing.assert_allclose([entry.max_abs, entry.max_rel], [1e-3, 1 / 11], rtol=1e-3)
    assert checks.check("x", "output", a, a).passed


@pytest.mark.parametrize("other", [[1.0, np.nan], [1.0, np.inf], [1.0], []])
def test_what_is_not_finite_or_of_another_shape_differs(other):
    entry = checks.check("x", "output", tree(a=[1.0, 2.0]), tree(a=other))
    assert not entry.passed
    assert json.loads(json.dumps(checks.as_json([entry]), allow_nan=False))["passed"] is False


def test_a_missing_array_differs():
    assert not checks.check("x", "output", tree(a=[1.0]), tree(a=[1.0], b=[1.0])).passed


def test_a_wrong_step_shows_however_small_it_is_beside_the_parameters():
    start, step = tree(w=[5.0, -5.0]), np.array([1e-4, -1e-4], np.float32)
    squares = tree(w=[1.0, 1.0])

    def run(moved) -> Run:
        return Run([1.0], tree(w=[1.0, 1.0]), start, tree(w=start["w"] + moved), squares)

    assert checks.moved("x", run(step), run(step)).passed
    assert not checks.moved("x", run(step), run(1.02 * step)).passed
    assert not checks.moved("x", run(step), run(-step)).passed


def test_steps_that_follow_rounding_alone_are_left_out():
    """Adam moves an element whose gradient is rounding as far as any other."""
    start, squares = tree(w=[5.0, 5.0]), tree(w=[1.0, 1e-14])

    def run(second: float) -> Run:
        return Run([1.0], tree(w=[1.0, 0.0]), start, tree(w=[5.001, 5 + second]), squares)

    assert checks.moved("x", run(1e-3), run(-1e-3)).passed


def test_orders_may_differ_among_equals_only():
    theirs = np.array([[1.0, 2.0, 2.00001]])
    assert checks.check_order("x", np.array([[1.0, 2.00001, 2.0]]), theirs).passed
    assert not checks.check_order("x", np.array([[2.0, 1.0, 3.0]]), theirs).passed


def test_metrics_agree_if_each_lies_in_the_other_s_interval():
    random = np.random.default_rng(0)
    scores, column = random.normal(size=(40, 5)), random.integers(5, size=40)
    better = scores + 10 * np.eye(5)[column]
    same, _ = compare.check_metrics("x", {"ours": scores, "theirs": scores}, column, 0)
    assert (same.max_abs, same.passed) == (0.0, True)
    assert not compare.check_metrics("x", {"ours": scores, "theirs": better}, column, 0)[0].passed


def test_the_first_parting_is_found_by_bisection():
    asked = []

    def part(k: int):
        def pairs():
            asked.append(k)
            return [(f"part {k}", np.ones(2), np.ones(2) + (k >= 11))]

        return pairs

    assert checks.first_parting([part(k) for k in range(32)], 1e-4) == "part 11"
    assert len(asked) <= 6
    assert checks.first_parting([part(k) for k in range(11)], 1e-4) == ""
    assert checks.first_parting([], 1e-4) == ""


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["compare", "--workdir", "nowhere"], "nowhere is not a work directory"),
        (["compare", "--workdir", "w", "--config", "demo", "--steps", "0"], "at least 1"),
        (["compare", "--workdir", "w", "--config", "demo", "--json", "no/such/folder.json"], "no such folder"),
        (["compare", "--workdir", "w", "--config", "demo", "--cf.epohs", "3"], "did you mean --cf.epochs"),
    ],
)
def test_mistakes(arguments, hint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert hint in said
    assert said.count("\n") == 1


# ----------------------------------------------------------------------------------------------------- a whole training


def test_both_trained_from_the_same_weights_end_with_the_same_metrics(options, tmp_path):
    work, file = tmp_path / "w", tmp_path / "c.json"
    arguments = ["compare", "--config", "demo", "--workdir", str(work), "--train", "--users", "3"]
    assert cli.main([*arguments, *options, "--json", str(file)]) == 0
    found = {entry["name"]: entry for entry in json.loads(file.read_text())["checks"]}
    for stage in STAGES:
        assert found[f"{stage}: metrics after training"]["passed"]
        assert any(name.startswith(f"{stage}: mean loss") for name in found)
    assert (work / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "data:image/png" in (work / "compare.html").read_text()


@pytest.mark.slow
def test_both_trained_on_real_data_end_with_the_same_metrics(options, test_data, tmp_path):
    real = ["--data.name", str(test_data("ml-100k")), "--cf.width", "50", "--cf.maxlen", "50", "--cf.batch", "128"]
    real += ["--cf.epochs", "10", "--align.batch", "32", "--align.epochs", "1", "--llm.epochs", "0.25"]
    real += ["--llm.candidates", "3", "--evaluation.candidates", "3"]  # of real titles, in tokens of a byte each
    wanted = [part for at in range(0, len(options), 2) if options[at] not in real for part in options[at : at + 2]]
    work, file = tmp_path / "w", tmp_path / "c.json"
    arguments = ["compare", "--config", "demo", "--workdir", str(work), "--train", "--users", "64"]
    assert cli.main([*arguments, *wanted, *real, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["passed"]
