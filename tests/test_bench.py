"""The benchmarks measure what they say, and say it to people and machines."""

import gzip
import io
import json

import numpy as np
import pytest
from rich.console import Console

from allmrec_jax import cli_data
from allmrec_jax.cli import main
from allmrec_jax.comparison import bench, bench_data
from allmrec_jax.errors import UserError


def test_bench_data_says_its_figures_to_people_and_machines(tmp_path, capsys):
    """That both ways of preparing agree is checked inside, at every run."""
    assert main(["bench", "data", "--rows", "3000", "--repeats", "2", "--json", str(tmp_path / "b.json")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"] for row in rows] == ["data.prepare", "data.batches"]
    for row in rows:
        assert row["n"] == 2
        assert row["ratio"] == pytest.approx(row["ours"] / row["baseline"])
        assert row["ours"] > 0
        assert row["spread"]["ours"][0] <= row["ours"] <= row["spread"]["ours"][1]
        assert row["machine"]["cores"] >= 1
    assert {"gunzip floor (s)", "parse floor (s)", "our peak memory (MiB)"} <= set(rows[0]["beside"])
    shown = capsys.readouterr().out
    assert "gunzip floor" in shown
    assert "data.batches" in shown


def test_the_generated_file_is_seeded_and_has_what_real_ones_have(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        bench_data.generate(tmp_path / name, 2000)
    reviews, metadata = (
        [gzip.decompress((tmp_path / name / file).read_bytes()) for name in ("a", "b")]
        for file in (bench_data.REVIEWS, bench_data.METADATA)
    )
    assert reviews[0] == reviews[1]
    assert metadata[0] == metadata[1]
    rows = [json.loads(line) for line in reviews[0].splitlines()]
    keys = [(row["reviewerID"], row["asin"], row["unixReviewTime"]) for row in rows]
    assert len(rows) == 2000 > len(set(keys)) > 1900
    assert b"&amp;" in metadata[0]
    assert len(metadata[0].splitlines()) > len({json.loads(line)["asin"] for line in metadata[0].splitlines()})


def test_mistakes_are_answered_in_a_line(capsys):
    assert main(["bench", "nothing"]) == 1
    assert "there is no benchmark 'nothing': choose among align, cf, data, llm, rank" in capsys.readouterr().err
    assert main(["bench", "--rows", "5"]) == 1
    assert "--rows must be at least 1000" in capsys.readouterr().err
    assert main(["bench", "cf", "--scale"]) == 1
    assert "--scale is a measurement of its own" in capsys.readouterr().err
    assert main(["bench", "data", "--plot", "no/such/folder.png"]) == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_bench_cf_trains_and_scores_on_both_sides(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    from allmrec_jax.comparison import bench_cf

    monkeypatch.setattr(bench_cf, "USERS", 300)
    monkeypatch.setattr(bench_cf, "ITEMS", 100)
    monkeypatch.setattr(bench_cf, "SOME_ITEMS", 3000)  # 100 times as many are updated lazily
    monkeypatch.setattr(bench_cf, "STEPS", 2)
    assert main(["bench", "cf", "--repeats", "1", "--json", str(tmp_path / "b.json")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"] for row in rows] == [
        "cf.train",
        "cf.evaluate",
        "cf.users10",
        "cf.users100",
        "cf.items10",
        "cf.items100",
    ]
    assert all(row["ours"] > 0 and row["baseline"] > 0 for row in rows)


def test_bench_align_trains_both_sides_on_the_same_losses(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    from allmrec_jax.comparison import bench_align
    from allmrec_jax.data import text_groups
    from allmrec_jax.models.text_encoder import EncoderConfig

    small = EncoderConfig(300, 16, 32, 1, 2, dropout=0.0)
    sizes = {"USERS": 70, "ITEMS": 50, "MEDIAN": 20, "STEPS": 1, "TEXTS": 20, "ENCODER": small}
    for name, value in sizes.items():
        monkeypatch.setattr(bench_align, name, value)
    monkeypatch.setattr(text_groups, "MOST_SIZES", 1)
    assert main(["bench", "align", "--repeats", "1", "--json", str(tmp_path / "b.json")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"] for row in rows] == ["align.trained", "align.paper", "align.frozen"]
    assert all(row["ours"] > 0 and row["baseline"] > 0 for row in rows)
    beside = rows[0]["beside"]
    assert beside["loss of the first step"] == pytest.approx(beside["its loss of the first step"], rel=1e-4)
    assert all(row["beside"]["programs compiled"].endswith("later 0") for row in rows)


def test_bench_llm_takes_both_sides_through_the_same_steps(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    import tiny

    from allmrec_jax.comparison import bench_llm

    for name, value in {"SMOLLM2": tiny.LLAMA, "ITEMS": 30, "TITLE": 6, "SPREAD": 2, "STEPS": 2}.items():
        monkeypatch.setattr(bench_llm, name, value)
    monkeypatch.setattr(bench_llm, "_alone", lambda kind: 1.0)  # a process of its own would not be tiny
    assert main(["bench", "llm", "--repeats", "1", "--json", str(tmp_path / "b.json")]) == 0
    [row] = json.loads((tmp_path / "b.json").read_text())  # the losses were compared on the way
    assert row["name"] == "llm.train"
    assert row["ours"] > 0
    assert row["baseline"] > 0


def test_bench_rank_scores_alike_on_both_sides(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    import tiny

    from allmrec_jax.comparison import bench_llm, bench_rank

    monkeypatch.setattr(bench_llm, "SMOLLM2", tiny.LLAMA)
    for name, value in {"ITEMS": 60, "TITLE": 4, "SPREAD": 1, "USERS": 2, "NEW": 3}.items():
        monkeypatch.setattr(bench_rank, name, value)
    assert main(["bench", "rank", "--repeats", "1", "--json", str(tmp_path / "b.json")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())  # the scores were compared on the way
    assert [row["name"] for row in rows] == ["rank.score20", "rank.generate"]
    assert all(row["ours"] > 0 and row["baseline"] > 0 for row in rows)


def test_bench_all_runs_each_in_a_process_of_its_own_and_draws_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli_data, "BENCHES", ("data",))  # the others would not be tiny there
    file, picture = tmp_path / "b.json", tmp_path / "b.png"
    arguments = ["bench", "all", "--rows", "3000", "--repeats", "2", "--json", str(file), "--plot", str(picture)]
    assert main(arguments) == 0
    assert [row["name"] for row in json.loads(file.read_text())] == ["data.prepare", "data.batches"]
    assert [row.name for row in bench.read(file)] == ["data.prepare", "data.batches"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "data.batches" in capsys.readouterr().out


def test_a_benchmark_that_fails_in_its_process_says_why(monkeypatch):
    console = Console(file=io.StringIO())
    with pytest.raises(UserError, match="bench nothing failed: allmrec: there is no benchmark 'nothing'"):
        bench.apart(["nothing"], rows=3000, repeats=1, console=console)


def test_bench_scale_sweeps_and_draws_what_cost_depends_on(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    import tiny

    from allmrec_jax.comparison import bench_scale

    small = {"USERS": 60, "ITEMS": 50, "BATCH": 16, "LENGTH": 8, "STEPS": 2, "TITLE": 4, "SENTENCE": 8, "HISTORY": 2}
    sweeps = {"batch": (8,), "length": (12,), "catalogue": (40,), "candidates": (2, 3)}
    for name, value in (small | {"SWEEPS": sweeps, "LLM": tiny.LLAMA, "JOINT": 6}).items():
        monkeypatch.setattr(bench_scale, name, value)
    file, picture = tmp_path / "s.json", tmp_path / "s.png"
    assert main(["bench", "--scale", "--repeats", "1", "--json", str(file), "--plot", str(picture)]) == 0
    rows = json.loads(file.read_text())  # both sides' likelihoods were compared on the way
    assert [row["name"] for row in rows] == [f"scale.{what}={n}" for what, values in sweeps.items() for n in values]
    assert all(row["ours"] > 0 and row["baseline"] > 0 and row["compile_seconds"] > 0 for row in rows)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_result_knows_its_spread_and_what_a_run_took():
    runs = [("a", lambda: float(np.ones(1 << 24).sum() > 0) * 2.0), ("b", iter([1.0, 4.0, 2.0]).__next__)]
    seconds = bench.interleave(runs, 3, Console(file=io.StringIO()))
    entry = bench.row("x", "users/s", 8, seconds["a"], seconds["b"])
    assert (entry.ours, entry.baseline, entry.ratio, entry.n) == (4, 4, 1, 3)
    assert entry.spread == {"ours": [4, 4], "baseline": [2, 8]}
    assert bench.ratios(entry) == (0.5, 2)
    if entry.memory:  # where the system says
        assert entry.memory["ours"] > 100 > entry.memory["baseline"]


def test_peak_memory_begins_again():
    from allmrec_jax.comparison.bench import peak_memory, reset_peak_memory

    block = np.ones(1 << 25)
    high = peak_memory()
    del block
    reset_peak_memory()
    assert 0 < peak_memory() <= high
