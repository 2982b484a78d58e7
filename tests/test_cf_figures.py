"""What is printed and written about a trained CF model: beside it popularity and chance, on the same candidates."""

import dataclasses
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console

from allmrec_jax.evaluation import cf as evaluation
from allmrec_jax.evaluation.metrics import metrics_of
from allmrec_jax.training.cf import train_cf


@pytest.mark.parametrize("split", ["test", "validation"])
def test_popularity_counts_what_is_more_popular_among_the_same_candidates(split, tmp_path):
    random = np.random.default_rng(0)
    sequences = [random.choice(12, random.integers(3, 9), p=np.arange(1, 13) / 78) + 1 for _ in range(20)]  # repeats
    data = tiny.of_sequences(tmp_path / "d", [*sequences, [1, 2]], 12)
    ranks, rivals = evaluation.trivial_ranks(data, seed=0, split=split)
    counts = np.bincount(np.concatenate([s[:-2] for s in sequences] + [[1, 2]]), minlength=13)
    users, targets, drawn = evaluation._held_out(data, 0, split)
    assert len(users) == 20
    for row, (user, target) in enumerate(zip(users.tolist(), targets.tolist(), strict=True)):
        history = set(data.history(user, split).tolist())
        among = {"reference": drawn[row].tolist(), "full": list(range(1, 13))}
        among["new"] = [i for i in among["full"] if i not in history]
        for protocol, items in among.items():
            others = [i for i in items if i != target]
            if protocol == "new" and target in history:
                assert ranks[protocol][row] == rivals[protocol][row] == -1
                continue
            least = sum(counts[i] > counts[target] for i in others)
            most = sum(counts[i] >= counts[target] for i in others)
            assert least <= ranks[protocol][row] <= most
            assert rivals[protocol][row] == len(others)


def test_equally_popular_items_stand_in_a_random_order(tmp_path):
    """Whoever counts ties for the target, or against it, finds popularity perfect, or useless."""
    sequences = [[i % 10 + 1, (i + 1) % 10 + 1, (i + 2) % 10 + 1] for i in range(200)]
    data = tiny.of_sequences(tmp_path / "d", sequences, 10)  # every item equally often
    found = evaluation.baselines(data, seed=0)
    assert found["popularity"]["full"]["mrr"]["value"] == pytest.approx(found["random"]["full"]["mrr"]["value"])


def test_chance_is_what_random_scores_give(tmp_path):
    data = tiny.of_sequences(tmp_path / "d", [[1, 2, 3, 4], [5, 6, 7, 8, 5], [2, 2, 6]], 8)
    expected = evaluation.baselines(data, seed=0)["random"]
    _, targets, drawn = evaluation._held_out(data, 0, "test")
    scores, random = [], np.random.default_rng(0)
    for _ in range(4000):
        own, others = random.random((len(targets), 1)), random.random(drawn.shape)
        scores.append(((others > own) & (drawn != targets[:, None])).sum(1))
    for metric, of in expected["reference"].items():
        assert of["value"] == pytest.approx(metrics_of(np.concatenate(scores))[metric].mean(), abs=0.01)
    assert expected["full"]["mrr"]["value"] == pytest.approx(np.mean(1 / np.arange(1, 9)))
    # New to their users: user 1's item among 5, user 3's among 7; user 2's is not new.
    means = [np.mean(1 / np.arange(1, n + 1)) for n in (5, 7)]
    assert expected["new"]["mrr"]["value"] == pytest.approx(np.mean(means))


def report(tmp_path: Path, **changes) -> tuple[str, dict]:
    """What is printed while it trains and after, and what metrics.json holds."""
    data, folder = tiny.dataset(tmp_path / "d"), tmp_path / "cf"
    config = dataclasses.replace(tiny.STAGE_0, epochs=4, **changes)
    console = Console(file=io.StringIO(), width=80)
    model, curves = train_cf(config, data, folder, seed=0, devices=jax.devices()[:1], console=console)
    evaluation.report(model, curves, data, folder, config, seed=0, console=console)
    return console.file.getvalue(), json.loads((folder / "metrics.json").read_text())


def test_the_table_names_model_and_checkpoint_and_fits_a_terminal(tmp_path):
    shown, written = report(tmp_path)
    assert "validation, 100 negatives: hit@1 " in shown
    lines = shown.splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("stage 0: SASRec, epoch "))
    assert Path(lines[first].rpartition(" ")[2]).is_dir()  # the checkpoint, whole, however long its path
    assert max(map(len, lines[first + 1 :])) <= 80
    assert [shown.count(label) for label in ("20 candidates ", "all items ", "new items ", "popularity")] == [1] * 4
    assert written["full"]["hit@10"]["n"] == written["reference"]["hit@1"]["n"] == 30
    assert set(written["baselines"]["popularity"]["full"]) == set(written["full"])


def test_the_last_epoch_is_named_where_that_is_used(tmp_path):
    shown, _ = report(tmp_path, select="last")
    assert f"epoch 4 of 4 (the last), {tmp_path / 'cf' / 'checkpoints' / '4'}" in shown


def test_ncf_says_why_it_has_no_figures_among_all_items(tmp_path):
    shown, written = report(tmp_path, model="ncf")
    assert "Not among all items: that needs a score of the form x_u . E_i" in " ".join(shown.split())
    assert set(written) == {"reference", "baselines"}


def test_the_best_epoch_is_the_one_whose_checkpoint_is_used(tmp_path):
    curves = {"ndcg@10": [[10, 0.2], [20, 0.4], [30, 0.3]]}
    assert "epoch 20 of 40 (the best" in evaluation.heading(
        dataclasses.replace(tiny.STAGE_0, epochs=40), curves, tmp_path
    )
