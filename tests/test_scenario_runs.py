"""Scenarios whose models are trained otherwise, or on other data, in folders of the work directory."""

import json

import numpy as np
import pytest
import tiny

from allmrec_jax import cli

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
