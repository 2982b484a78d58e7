"""The true path through every command, on the demo's own config shrunk to tiny models: files in, figures out."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from allmrec_jax import cli
from allmrec_jax.config import config_names
from allmrec_jax.data import sources
from allmrec_jax.evaluation import scores
from allmrec_jax.training import loop

MODELS = {"popularity", "repeat", "markov", "leak-check", "cf", "llm-only", "a-llmrec", "fused"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """`run`'s arguments: the demo's config, tiny inputs."""
    return ["run", "--config", "demo", *tiny.options(tmp_path_factory.mktemp("inputs"))]


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory) -> Path:
    """A work directory after one uninterrupted run."""
    workdir = tmp_path_factory.mktemp("run") / "work"
    assert cli.main([*inputs, "--workdir", str(workdir)]) == 0
    return workdir


def figures(workdir: Path) -> dict:
    """What a run found, without its dates and durations."""
    found = json.loads((workdir / "metrics.json").read_text())
    return {
        key: found[key] for key in ("scenarios", "differences", "facts", "fusion", "examples", "curves", "conclusion")
    }


def test_every_stage_leaves_a_checkpoint_and_the_evaluation_its_files(done):
    for stage in ("cf", "align", "llm"):
        assert any((done / stage / "checkpoints").glob("[0-9]*")), stage
        assert any((done / stage / "logs").glob("events*")), stage
    results = json.loads((done / "metrics.json").read_text())
    overall = results["scenarios"]["overall"]
    assert set(overall) == MODELS
    for model, metrics in overall.items():
        assert {"hit@1", "hit@5", "ndcg@5", "mrr"} <= set(metrics), model
        for figure in metrics.values():
            assert figure["n"] == 12
            assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    assert set(results["differences"]["overall"]["a-llmrec"]) == {"llm-only", "cf", "popularity"}
    assert len(results["examples"]) == 5
    assert set(results["examples"][0]["choices"]) == MODELS - {"repeat", "markov", "leak-check"}
    assert all(curve for stage in results["curves"].values() for curve in stage.values())
    page = (done / "report.html").read_text()
    assert "A-LLMRec" in page
    assert [h for h in ("From cold to warm", "Beside the paper", "Calibration", "Joint embed") if h not in page] == []
    assert (done / "metrics.csv").read_text().startswith("scenario,model,metric,value,low,high,n\noverall,popularity,")
    assert r"\begin{tabular}" in (done / "metrics.tex").read_text()
    assert not re.search(r'(?:src|href)="?https?:', page)


def test_no_weight_of_the_frozen_models_is_in_stage_2s_checkpoint(done):
    newest = max((done / "llm" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    names = json.loads((newest / "state" / "_METADATA").read_text())["tree_metadata"]
    assert all(any(head in name for name in names) for head in ("F_U", "F_I"))
    assert not [name for name in names if "embed" in name or "layers" in name]


def test_run_again_reads_its_results_and_trains_nothing(done, inputs, monkeypatch, capsys):
    def never(*_, **__):
        raise AssertionError("a finished run must not train")

    monkeypatch.setattr(loop, "run", never)
    before = (done / "metrics.json").read_bytes()
    assert cli.main([*inputs, "--workdir", str(done)]) == 0
    assert "SASRec" in capsys.readouterr().out
    assert (done / "metrics.json").read_bytes() == before
    assert cli.main(["evaluate", "--workdir", str(done)]) == 0


@pytest.mark.parametrize("fail_at", ["stage 0", "stage 1", "stage 2"])
def test_an_interrupted_run_goes_on_to_the_same_figures(fail_at, done, inputs, tmp_path, monkeypatch):
    original = loop.run

    def interrupted(step, state, **options):
        def stopping(state, i):
            if options["label"].startswith(fail_at) and i == options["steps"] - 1:
                raise KeyboardInterrupt
            return step(state, i)

        return original(stopping, state, **options)

    monkeypatch.setattr(loop, "run", interrupted)
    assert cli.main([*inputs, "--workdir", str(tmp_path / "work")]) == 130
    assert not (tmp_path / "work" / "metrics.json").exists()
    monkeypatch.setattr(loop, "run", original)
    assert cli.main([*inputs, "--workdir", str(tmp_path / "work")]) == 0
    assert figures(tmp_path / "work") == figures(done)


def test_an_interrupted_evaluation_goes_on(done, inputs, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(done, work)
    (work / "metrics.json").unlink()
    scores = np.load(work / "evaluation" / "test.a-llmrec.npy")
    scores[8:] = np.nan
    np.save(work / "evaluation" / "test.a-llmrec.npy", scores)
    assert cli.main([*inputs, "--workdir", str(work)]) == 0
    assert figures(work) == figures(done)


def test_the_paper_s_baseline_has_its_own_name(done, inputs, tmp_path, capsys):
    """MLP-LLM: stages 0 and 1 are read, stage 2 is trained on E; O_u and O_i stand elsewhere."""
    work = tmp_path / "work"
    shutil.copytree(done, work, ignore=shutil.ignore_patterns("llm", "evaluation", "metrics.json"))
    options = ["--llm.item-vectors", "E", "--llm.item-place", "before", "--llm.user-place", "last"]
    assert cli.main([*inputs, *options, "--workdir", str(work)]) == 0
    assert "MLP-LLM" in capsys.readouterr().out
    results, before = (json.loads((folder / "metrics.json").read_text()) for folder in (work, done))
    assert set(results["scenarios"]["overall"]) == MODELS - {"a-llmrec"} | {"mlp-llm"}
    assert set(results["differences"]["overall"]) == {"mlp-llm", "fused", "cf"}
    assert "A-LLMRec" not in results["conclusion"]
    for name in ("cf", "popularity", "llm-only"):
        assert results["scenarios"]["overall"][name] == before["scenarios"]["overall"][name]
    # In the tables of the other one, compared user by user.
    full = tmp_path / "full"
    shutil.copytree(done, full)
    assert cli.main(["evaluate", "--workdir", str(full), "--beside", str(work)]) == 0
    after = json.loads((full / "metrics.json").read_text())
    assert set(after["scenarios"]["overall"]) == MODELS | {"mlp-llm"}
    assert after["scenarios"]["overall"]["mlp-llm"] == results["scenarios"]["overall"]["mlp-llm"]
    assert after["differences"]["overall"]["a-llmrec"]["mlp-llm"]["mrr"]["n"] == 12
    assert after["scenarios"]["overall"]["fused"] == before["scenarios"]["overall"]["fused"]
    capsys.readouterr()
    more = ["--beside", str(work), "--evaluation.users", "20", "--scenario", "overall"]
    assert cli.main(["evaluate", "--workdir", str(full), *more]) == 1
    assert "was evaluated on 12 of the 20 users (test); run `allmrec evaluate" in capsys.readouterr().err
    assert cli.main(["recommend", "--workdir", str(work), "--user", "1"]) == 0


def test_further_scenarios_and_models_are_added_and_nothing_is_scored_twice(done, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    shutil.copytree(done, work)
    asked = []
    original = scores.score_users
    monkeypatch.setattr(scores, "score_users", lambda *a, **k: asked.append(k["label"]) or original(*a, **k))
    before = json.loads((work / "metrics.json").read_text())
    more = ["--scenario", "cold-items", "cold-users", "--models", "cf", "a-llmrec-q"]
    assert cli.main(["evaluate", "--workdir", str(work), *more]) == 0
    assert asked == ["evaluation: test, a-llmrec-q"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "cold-users: not applicable: " in shown
    assert re.search(
        r"cold-items: \d+ users, test items among the 35 % of the catalogue with the fewest training", shown
    )
    after = json.loads((work / "metrics.json").read_text())
    for name, models in before["scenarios"].items():
        assert set(after["scenarios"][name]) == MODELS | {"a-llmrec-q"}
        assert {model: after["scenarios"][name][model] for model in models} == models
    assert set(after["not_applicable"]) == {"cold-users"}
    assert set(after["facts"]) == {f"{what}-items{rule}" for what in ("cold", "warm") for rule in ("", "-by-rule")} | {
        "overall"
    }
    # More users: the scores of the first ones stay as they are.
    old = np.load(work / "evaluation" / "test.a-llmrec.npy")
    assert cli.main(["evaluate", "--workdir", str(work), "--scenario", "overall", "--evaluation.users", "20"]) == 0
    new = np.load(work / "evaluation" / "test.a-llmrec.npy")
    assert (len(old), len(new)) == (12, 20)
    np.testing.assert_array_equal(new[:12], old)
    assert json.loads((work / "metrics.json").read_text())["scenarios"]["overall"]["fused"]["mrr"]["n"] == 20
    del asked[:]
    assert cli.main(["evaluate", "--workdir", str(work), "--scenario", "overall", "--evaluation.users", "5"]) == 0
    assert asked == []


def test_scores_of_other_candidates_are_not_used(done, tmp_path, capsys):
    work = tmp_path / "work"
    shutil.copytree(done, work)
    (work / "metrics.json").unlink()
    saved = work / "evaluation" / "test.lists.npz"
    content = dict(np.load(saved))
    np.savez(saved, **content | {"candidates": content["candidates"][:, ::-1]})
    assert cli.main(["evaluate", "--workdir", str(work)]) == 0
    assert "scores of test are of other candidates; scoring again" in " ".join(capsys.readouterr().out.split())
    assert figures(work) == figures(done)


def test_a_work_directory_of_other_data_is_refused(inputs, tmp_path, capsys):
    work, data, other = tmp_path / "work", tmp_path / "data", tmp_path / "other"
    raw = inputs[inputs.index("--data.name") + 1]
    assert cli.main(["data", "prepare", raw, "--out", str(data), "--strip-years"]) == 0
    rest = [*inputs[1:], "--data.name", str(data), "--workdir", str(work), "--cf.epochs", "2"]
    assert cli.main(["train", "cf", *rest]) == 0
    assert cli.main(["evaluate", "--workdir", str(work), "--models", "cf", "--scenario", "overall"]) == 0
    assert set(json.loads((work / "metrics.json").read_text())["scenarios"]["overall"]) == MODELS - {
        "llm-only",
        "a-llmrec",
        "fused",
    }
    with (Path(shutil.copytree(raw, tmp_path / "raw")) / "u.data").open("a") as file:
        file.write("1\t60\t3\t999999999\n")
    assert cli.main(["data", "prepare", str(tmp_path / "raw"), "--out", str(other), "--strip-years"]) == 0
    shutil.rmtree(data)
    other.rename(data)
    capsys.readouterr()
    assert cli.main(["evaluate", "--workdir", str(work), "--models", "cf"]) == 1
    said = capsys.readouterr().err
    assert "data.fingerprint" in said
    assert said.count("\n") == 1


def test_another_config_in_the_same_work_directory_is_refused(done, inputs, capsys):
    assert cli.main([*inputs, "--workdir", str(done), "--llm.learning-rate", "0.5"]) == 1
    said = capsys.readouterr().err
    assert [word in said for word in ("llm.learning_rate", "--workdir")] == [True, True]
    assert said.count("\n") == 1
    assert json.loads((done / "config.json").read_text())["llm"]["learning_rate"] != 0.5


@pytest.mark.parametrize("who", [["--user", "7"], ["--history", "Film 3", "film 4", "Film 12"]])
def test_recommend_names_new_items(done, who, capsys):
    assert cli.main(["recommend", "--workdir", str(done), *who, "-k", "3", "--candidates", "6", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    titles = [row["title"] for row in answer["recommendations"]]
    assert len(titles) == len(set(titles)) == 3
    assert not set(titles) & set(answer["history"])
    means = [row["mean_rank"] for row in answer["recommendations"]]
    assert means == sorted(means)
    assert means == [(row["cf_rank"] + row["llm_rank"]) / 2 for row in answer["recommendations"]]
    assert cli.main(["recommend", "--workdir", str(done), *who, "-k", "3", "--candidates", "6"]) == 0
    shown = capsys.readouterr().out
    assert all(title in shown for title in titles)
    assert "In order of the mean of both ranks among the CF model's top 6" in " ".join(shown.split())


TRAIN = ["train", "cf", "--config", "demo", "--workdir", "x"]
MISTAKES = {
    "unknown data set": (["data", "prepare", "ml-100", "--out", "x"], "ml-100k"),
    "not a prepared data set": (["data", "describe", "nowhere"], "nowhere"),
    "unknown config": (["run", "--config", "demoo", "--workdir", "x"], "one of: beauty, beauty_best,"),
    "unknown field": (["run", "--config", "demo", "--workdir", "x", "--cf.epohs", "3"], "--cf.epochs"),
    "no value": ([*TRAIN, "--cf.width"], "--cf.width needs a value: a whole number"),
    "value of another type": ([*TRAIN, "--cf.width", "abc"], "--cf.width: 'abc' is not a whole number"),
    "value of neither type": ([*TRAIN, "--llm.clip=x"], "--llm.clip: 'x' is not a number or None"),
    "unknown choice": ([*TRAIN, "--cf.loss", "nosuch"], "'nosuch' is not one of bce, softmax"),
    "value of a switch": ([*TRAIN, "--cf.refit", "yes"], "--cf.refit takes no value; say --cf.refit or --cf.no-refit"),
    "value without a field": ([*TRAIN, "--cf.width", "8", "9"], "9: there is no config field in front of it"),
    "unknown encoder": (
        ["train", "align", *TRAIN[2:], "--align.encoder", "all-minilm"],
        "align.encoder: there is no sentence encoder called 'all-minilm': did you mean all-minilm-l6-v2? known are "
        "all-minilm-l6-v2, all-minilm-l12-v2, nq-distilbert-base-v1, all-mpnet-base-v2, bge-small-en-v1.5, "
        "bge-base-en-v1.5; or give a folder",
    ),
    "unknown LLM": (
        ["train", "llm", *TRAIN[2:], "--llm.llm", "all-minilm-l6-v2"],
        "there is no LLM called 'all-minilm-l6-v2': known are smollm2-135m-instruct, ",
    ),
    "no stage": (["train", "--config", "demo", "--workdir", "x"], "required: stage; `allmrec train --help`"),
    "value out of range": (["run", "--config", "demo", "--workdir", "x", "--cf.dropout", "1.5"], "cf.dropout"),
    "too few candidates": ([*TRAIN, "--evaluation.candidates", "1"], "must be at least 2"),
    "not a work directory": (["evaluate", "--workdir", "nowhere"], "nowhere"),
    "unknown argument": (["demo", "--fast"], "--fast"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line_and_status_1(mistake, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, hint = MISTAKES[mistake]
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert hint in said
    assert said.startswith("allmrec: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [TRAIN[:-1], ["evaluate", "--workdir"], ["demo", "--workdir"]])
def test_a_file_is_no_work_directory(arguments, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert cli.main([*arguments, str(tmp_path / "mine.txt")]) == 1
    said = capsys.readouterr().err
    assert said == f"allmrec: --workdir {tmp_path / 'mine.txt'} is a file; give a folder, which need not exist yet\n"
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        (["--scenario", "cold"], "there is no scenario 'cold'; choose among overall, cold-items"),
        (["--models", "gpt"], "there is no model 'gpt' here (no such name is known); choose among cf, llm-only"),
        (["--cf.epochs", "3"], "--cf.epochs: the models are trained; only fields of the evaluation may change"),
        (["--evaluation.candidates", "1000"], "1000 candidates were asked for, but raw has 55 items"),
        (["--evaluation.candidates", "6"], "evaluation.candidates=5, but now it is 6"),
    ],
)
def test_what_cannot_be_evaluated_is_said(asked, hint, done, capsys):
    assert cli.main(["evaluate", "--workdir", str(done), *asked]) == 1
    said = capsys.readouterr().err
    assert hint in said
    assert said.count("\n") == 1


def test_unknown_user_and_title_say_what_there_is(done, capsys):
    assert cli.main(["recommend", "--workdir", str(done), "--user", "nobody"]) == 1
    assert "no user 'nobody'" in capsys.readouterr().err
    assert cli.main(["recommend", "--workdir", str(done), "--history", "Film"]) == 1
    assert "several" in capsys.readouterr().err


def test_help_teaches(capsys):
    assert cli.main(["--help"]) == 0
    assert "allmrec demo" in capsys.readouterr().out
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "stage 1" in shown
    assert all(name in shown for name in config_names())
    assert "`allmrec train cf --help`" in shown


@pytest.mark.parametrize(
    ("arguments", "there", "absent"),
    [
        (["train", "cf", "--config", "demo"], ["--cf.epochs", "(default: 250)", "--data.name", "--devices"], "--llm."),
        (["train", "align"], ["--align.encoder", "(default: 10)", "--seed"], "--cf."),
        (["run"], ["--cf.epochs", "--align.epochs", "--llm.epochs", "--evaluation.users"], "--nosuch"),
    ],
)
def test_help_lists_the_fields_that_matter_to_a_stage(arguments, there, absent, capsys):
    assert cli.main([*arguments, "--help"]) == 0
    shown = capsys.readouterr().out.partition("Config fields")[2]
    assert [word for word in there if word not in shown] == []
    assert absent not in shown


def test_train_cf_names_its_checkpoint_and_compares_with_trivial_models(inputs, tmp_path, capsys):
    arguments = ["train", "cf", *inputs[1:], "--workdir", str(tmp_path / "work")]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"stage 0: SASRec, epoch [24] of 4 .*, {tmp_path / 'work' / 'cf' / 'checkpoints'}/[24]\n", shown)
    assert "popularity" in shown
    found = json.loads((tmp_path / "work" / "cf" / "metrics.json").read_text())
    assert set(found) == {"reference", "full", "new", "baselines"}


def test_data_commands(inputs, tmp_path, capsys):
    raw = inputs[inputs.index("--data.name") + 1]
    assert cli.main(["data", "prepare", raw, "--out", str(tmp_path / "data"), "--strip-years"]) == 0
    assert cli.main(["data", "describe", str(tmp_path / "data")]) == 0
    assert "40" in capsys.readouterr().out
    assert cli.main(["data", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in sources.KNOWN)
