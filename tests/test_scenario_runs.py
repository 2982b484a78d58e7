"""Scenarios whose models are trained otherwise, or on other data, in folders of the work directory."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny

from allmrec_jax import cli
from allmrec_jax.config import load_config, table_numbers
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import cross_domain, genres, paper, paper_runs
from allmrec_jax.models import alignment
from allmrec_jax.models.cf_model import CFModel
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.training import loop

TABLES = ["--data.recipe", "clean", "--data.strip-years", "--llm.dtype", "float32"]
CF = ["--cf.width", "8", "--cf.maxlen", "10", "--cf.batch", "16", "--cf.epochs", "2", "--cf.evaluate-every", "2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work directory with stage 0, on 150 users who each have their own corner of the catalogue."""
    root = tmp_path_factory.mktemp("few")
    random = np.random.default_rng(0)
    tiny.of_sequences(root / "data", [random.permutation(60)[: random.integers(4, 9)] + 1 for _ in range(150)], 60)
    config = ["--config", "demo", "--data.name", str(root / "data"), *CF, "--evaluation.users", "40"]
    assert cli.main(["train", "cf", *config, "--workdir", str(root / "work")]) == 0
    return root / "work"


def test_few_shot_trains_again_in_a_folder_of_its_own_and_stands_beside_the_others(work, capsys):
    assert (
        cli.main(["evaluate", "--workdir", str(work), "--models", "cf", "--scenario", "overall", "few-shot-128"]) == 0
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert "few-shot-128: all stages on 128 users" in shown
    results = json.loads((work / "metrics.json").read_text())
    assert list(results["scenarios"]) == ["overall", "few-shot-128"]
    overall, few = results["scenarios"].values()
    assert overall["cf"] != few["cf"]
    assert overall["popularity"] != few["popularity"]  # counted on the same users
    assert overall["cf"]["mrr"]["n"] == few["cf"]["mrr"]["n"] == 40
    within = json.loads((work / "few-shot-128" / "metrics.json").read_text())
    assert within["scenarios"] == {"few-shot-128": few}
    trained = {path.name for path in (work / "few-shot-128" / "cf" / "checkpoints").glob("[0-9]*")}
    assert trained == {"2"}
    # It goes on from there, and by itself too.
    assert cli.main(["evaluate", "--workdir", str(work / "few-shot-128"), "--models", "cf"]) == 0
    assert json.loads((work / "few-shot-128" / "metrics.json").read_text())["scenarios"] == {"few-shot-128": few}
    capsys.readouterr()
    assert cli.main(["evaluate", "--workdir", str(work / "few-shot-128"), "--scenario", "overall"]) == 1
    assert "overall needs models of all users; those of this work directory saw 128 alone" in capsys.readouterr().err


def test_what_does_not_apply_is_said_and_the_rest_is_there(work, capsys):
    assert cli.main(["evaluate", "--workdir", str(work), "--models", "cf", "--scenario", "all"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "few-shot-256: not applicable: only 150 users can be trained on" in shown
    assert "cold-users: not applicable: no user has exactly 3 interactions" in shown
    results = json.loads((work / "metrics.json").read_text())
    assert {"overall", "few-shot-128"} <= set(results["scenarios"])
    assert {"cold-users", "few-shot-256"} <= set(results["not_applicable"])


# ---------------------------------------------------------------------------- other data and another prompt


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a work directory with all stages, the command line's fields of it)."""
    root = tmp_path_factory.mktemp("all")
    options = tiny.options(root)
    assert cli.main(["train", "llm", "--config", "demo", *options, "--workdir", str(root / "work")]) == 0
    return root / "work", options


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another data set, prepared: 25 users of 5 to 8 of 30 games."""
    random = np.random.default_rng(2)
    path = tmp_path_factory.mktemp("other") / "games"
    sequences = [random.permutation(30)[: random.integers(5, 9)] + 1 for _ in range(25)]
    titles = [f"Game {item}" for item in range(30)]
    tiny.of_sequences(path, sequences, 30, titles=titles, descriptions=titles)
    return path


def test_cross_domain_carries_items_by_their_texts(trained, other):
    source = Pipeline(cli.opened(trained[0]), trained[0])
    there = cross_domain.Transferred(source, str(other), "games")
    f_I, f_T = (source.aligned.parameters[name] for name in ("f_I", "f_T"))
    assert there.q.shape == (31, 6)
    assert ((there.q > 0) & (there.q < 1)).all()
    E = there.q @ f_I["decode"]["kernel"] + f_I["decode"]["bias"][None]
    np.testing.assert_allclose(there.cf.E[1:], E[1:], rtol=1e-5)
    np.testing.assert_array_equal(there.cf.E[0], source.cf.E[0])
    np.testing.assert_allclose(there.aligned.e, alignment.encode(f_I, there.cf.E), rtol=1e-5)
    assert there.heads is source.heads
    assert there.builder(inject=True).template.done == "played"
    # The same texts give the same q, wherever they stand: that of an item of the trained data set is stage 1's own.
    same = cross_domain.Transferred(source, str(source.dataset.path))
    np.testing.assert_allclose(same.q, source.aligned.q, atol=1e-6)
    windows = there.dataset.histories(np.array([1, 2]), 10)
    scores = there.cf.scores(there.cf.x_u(windows), np.array([[1, 2], [3, 4]]))
    params = {**source.cf.params, "E": there.cf.E}
    x_u = CFModel(dataclasses.replace(source.cf.config, n_items=30), params).x_u(windows)
    np.testing.assert_allclose(scores[0], np.asarray(there.cf.E)[[1, 2]] @ x_u[0], rtol=1e-4, atol=1e-6)
    assert f_T is source.aligned.parameters["f_T"]


def test_cross_domain_and_genres_on_the_command_line(trained, other, capsys):
    work = trained[0]
    asked = ["--scenario", "cross-domain", "genres", "--models", "cf", "llm-only", "a-llmrec", "a-llmrec-q"]
    assert cli.main(["evaluate", "--workdir", str(work), *asked]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "cross-domain: not applicable: it needs another data set; name it with --on" in shown
    assert "categories, of which" in shown
    results = json.loads((work / "metrics.json").read_text())
    assert set(results["scenarios"]) == {"genres"}
    assert set(results["scenarios"]["genres"]) == {"popularity", "repeat", "cf", "llm-only", "a-llmrec"}
    assert {of["mrr"]["n"] for of in results["scenarios"]["genres"].values()} == {results["facts"]["genres"]["users"]}
    assert cli.main(["evaluate", "--workdir", str(work), *asked[:2], "--models", *asked[4:], "--on", str(other)]) == 0
    assert "trained on raw, tested on tiny" in " ".join(capsys.readouterr().out.split())
    results = json.loads((work / "metrics.json").read_text())
    assert set(results["scenarios"]) == {"cross-domain", "genres"}
    models = {"popularity", "repeat", "markov", "leak-check", "cf", "llm-only", "a-llmrec", "a-llmrec-q"}
    assert set(results["scenarios"]["cross-domain"]) == models
    assert results["scenarios"]["cross-domain"]["a-llmrec"]["mrr"]["n"] == 12
    assert sorted(path.name for path in (work / "cross-domain" / "games").glob("*.npy")) == [
        "test.a-llmrec-q.npy",
        "test.a-llmrec.npy",
        "test.llm-only.npy",
    ]
    page = (work / "report.html").read_text()
    assert "Another data set, nothing trained there" in page
    assert (
        cli.main(
            ["evaluate", "--workdir", str(work), "--scenario", "cross-domain", "--on", str(other), "--wording", "x"]
        )
        == 1
    )
    assert "there is no wording 'x'; choose movies, games, shopping, none" in capsys.readouterr().err


def test_the_whole_catalogue_and_answers_in_words(trained, tmp_path, capsys):
    work = tmp_path / "work"
    shutil.copytree(trained[0], work)
    asked = ["--scenario", "full-catalogue", "generated", "--models", "cf", "a-llmrec", "--evaluation.new-tokens", "8"]
    assert cli.main(["evaluate", "--workdir", str(work), *asked]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "among all 55 items" in shown
    assert "Hit@1, substring" in shown
    results = json.loads((work / "metrics.json").read_text())
    everything, words = results["scenarios"]["full-catalogue"], results["scenarios"]["generated"]
    assert set(everything) == {"popularity", "cf", "a-llmrec", "mean-rank"}
    for of in everything.values():
        assert {"hit@10", "ndcg@10", "new:hit@10"} <= set(of)
        assert of["hit@10"]["n"] == 12
    # Beyond the CF model's first 5 nothing changes: so many are found by both.
    assert everything["cf"]["hit@5"] == everything["a-llmrec"]["hit@5"]
    assert set(words) == {"popularity", "repeat", "markov", "leak-check", "cf", "a-llmrec"}
    assert {"hit@1", "substring:hit@1", "valid"} <= set(words["a-llmrec"])
    assert words["a-llmrec"]["hit@1"]["value"] <= words["a-llmrec"]["substring:hit@1"]["value"]
    assert words["a-llmrec"]["hit@1"]["value"] <= words["a-llmrec"]["valid"]["value"]
    texts = json.loads((work / "evaluation" / "test.a-llmrec.texts.json").read_text())["texts"]
    assert len(texts) == 12
    assert "Answers in words" in (work / "report.html").read_text()


def test_on_its_own_data_cross_domain_does_not_apply(trained, capsys):
    work = trained[0]
    asked = ["--scenario", "cross-domain", "--models", "cf", "--on", str(work / "data")]
    assert cli.main(["evaluate", "--workdir", str(work), *asked]) == 0
    assert "is the data set that the models were trained on" in " ".join(capsys.readouterr().out.split())


def test_categories_are_those_that_tell_items_apart():
    categories = [["all", "war"], ["all", "war", "war"], ["all", "love"], ["all"], ["all", "art"]]
    names = genres.choose(categories, most=2)
    assert names == ["war", "art"]  # equal ones by name
    assert genres.membership(categories, names).tolist() == [[1, 0], [1, 0], [0, 0], [0, 0], [0, 1]]
    right = np.array([[True, False, True], [False, True, False]])
    assert genres.first_right(np.array([[0.1, 0.9, 0.5], [0.5, 0.5, 0.5]]), right).tolist() == [1, 1]


# --------------------------------------------------------------------------------------------- the paper's tables


@pytest.mark.parametrize("number", table_numbers())
def test_every_cell_of_a_table_is_one_of_the_paper_s_and_every_run_a_valid_experiment(number):
    table = paper_runs.load_table(number)
    rows, columns = paper.rows_and_columns(table.key)
    runs = {run.name: run for run in table.runs}
    assert len(runs) == len(table.runs)
    for name in table.sets:
        base = load_config(f"paper/{name}")
        for run in table.runs:
            assert run.experiment(base, lambda x: x).data == base.data
        for (row, column), cell in table.cells(paper.WORDS[name]).items():
            assert row in rows
            assert column in columns
            assert paper.cell(table.key, row, column) is not None
            run = runs[cell.run]
            assert cell.scenario in run.scenarios
            assert cell.model in run.models


def test_runs_differ_in_what_they_vary():
    base = load_config("paper/beauty")
    runs = [run for number in table_numbers() for run in paper_runs.load_table(number).runs]
    experiments = {run.name: run.experiment(base, lambda x: x) for run in runs}
    assert len({dataclasses.replace(x, name="") for x in experiments.values()}) == len(experiments) == 12
    assert experiments["mlp-llm"].llm.model == "mlp-llm"
    few = paper_runs.CF_MODELS["NCF"].experiment(
        base, lambda x: dataclasses.replace(x, cf=dataclasses.replace(x.cf, epochs=2))
    )
    assert (few.cf.model, few.cf.epochs) == ("ncf", 2)
    with pytest.raises(UserError, match="what the run mlp-llm varies"):
        paper_runs.MLP.experiment(base, paper_runs.with_(llm={"item_vectors": "random"}))


def test_a_table_is_run_resumed_and_printed_beside_the_paper_s(trained, tmp_path, capsys, monkeypatch):
    run = [
        "--sets",
        "beauty",
        "--workdir",
        str(tmp_path),
        "--data.recipe",
        "clean",
        "--llm.dtype",
        "float32",
        *trained[1],
    ]
    assert cli.main(["tables", "4", *run]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Table 4: cold and warm items, Hit@1" in shown
    found = json.loads((tmp_path / "table4.json").read_text())
    cells = {(c["row"], c["column"]): c for c in found["cells"]}
    own = json.loads((tmp_path / "beauty" / "a-llmrec" / "metrics.json").read_text())["scenarios"]
    for row, model in (("SASRec", "cf"), ("A-LLMRec", "a-llmrec"), ("A-LLMRec (SBERT)", "a-llmrec-q")):
        cell = cells[row, "Beauty cold"]
        assert cell["ours"] == own["cold-items"][model]["hit@1"]
        assert cell["difference"] == pytest.approx(cell["ours"]["value"] - cell["paper"])
        assert cells[row, "Movies cold"]["ours"] is None
    assert cells["TALLRec", "Beauty cold"] | {"ours": None} == cells["TALLRec", "Beauty cold"]
    lines = (tmp_path / "table4.csv").read_text().splitlines()
    assert lines[0] == "row,column,paper,ours,low,high,n,difference"
    assert len(lines) == 1 + len(found["cells"])

    def never(*_, **__):
        raise AssertionError("what has been trained must not be again")

    # Again, and a run that shares the stages of the first.
    monkeypatch.setattr(loop, "run", never)
    assert cli.main(["tables", "4", *run]) == 0
    assert json.loads((tmp_path / "table4.json").read_text()) == found


@pytest.mark.slow
def test_runs_share_stages_and_the_llm(trained, tmp_path, capsys):
    run = [
        "--sets",
        "beauty",
        "--workdir",
        str(tmp_path),
        "--data.recipe",
        "clean",
        "--llm.dtype",
        "float32",
        *trained[1],
    ]
    assert cli.main(["tables", "1", "9", *run]) == 0
    shown = capsys.readouterr().out
    assert shown.count("stage 0: SASRec 4/4") == 1
    assert shown.count("stage 1: alignment 6/6") == 1
    cells = {(c["row"], c["column"]): c for c in json.loads((tmp_path / "table1.json").read_text())["cells"]}
    have = {column for (row, column), cell in cells.items() if row == "Beauty" and cell["ours"]}
    assert have == {"NCF", "NextItNet", "GRU4Rec", "SASRec", "LLM-Only", "MLP-LLM", "A-LLMRec"}
    assert not (tmp_path / "beauty" / "ncf" / "llm").exists()
    cells = json.loads((tmp_path / "table9.json").read_text())["cells"]
    assert len([c for c in cells if c["ours"]]) == 4


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["2"], "there is no table 2; choose among 1, 4, 5, 6, 7, 8, 9, 11"),
        (["5", "--sets", "toys"], "these tables are not about 'toys'; choose among movies, games, beauty"),
        (["1", "--llm.item-vectors", "random"], "a field on the command line is what the run mlp-llm varies"),
        (["1", "--cf.epohs", "3"], "did you mean --cf.epochs?"),
    ],
)
def test_mistakes_with_tables_are_said_before_anything_is_trained(arguments, hint, tmp_path, capsys):
    options = ["--llm.llm", "smollm2-135m-instruct", "--align.encoder", "all-minilm-l6-v2"]
    assert cli.main(["tables", *arguments, "--workdir", str(tmp_path / "w"), *options]) == 1
    said = capsys.readouterr().err
    assert hint in said
    assert said.count("\n") == 1
    assert not (tmp_path / "w").exists()
