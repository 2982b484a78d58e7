"""metrics.json, the terminal tables and report.html, made from small invented figures (they measure nothing)."""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from allmrec_jax.evaluation import figures, labels, metrics, paper, report

MODELS = ("fused", "a-llmrec", "cf", "llm-only", "popularity")
HOSTILE = "<script>alert('x')</script>\"><img src=https://evil.example/x onerror=alert(1)>"
VOID = {"meta", "link", "br", "img", "hr", "input"}


def invented(users=40, candidates=20):
    rng = np.random.default_rng(0)
    target = rng.integers(0, candidates, users)
    scores = {model: rng.normal(size=(users, candidates)) for model in MODELS}
    summary = metrics.summarise(scores, target, seed=1, resamples=200)
    pairs = metrics.differences(scores, target, [("a-llmrec", "llm-only"), ("fused", "cf")], seed=1, resamples=200)
    return summary, pairs


@pytest.fixture(scope="module")
def run():
    """The arguments of `write_report`."""
    summary, pairs = invented()
    examples = [
        {
            "user": f"u{i}",
            "history": ["Fargo", HOSTILE, "Alien [bold]"],
            "target": "Fargo & Sons",
            "choices": {model: "Fargo & Sons" if model == "cf" else HOSTILE for model in MODELS},
        }
        for i in range(5)
    ]
    steps = np.arange(2000)
    return {
        "title": f"A run {HOSTILE}",
        "conclusion": f"Nothing may be concluded. {HOSTILE}\n\nSecond paragraph.",
        "scenarios": {"overall": summary},
        "differences": {"overall": pairs},
        "examples": examples,
        "curves": {
            f"stage {HOSTILE}": {"loss": (steps, np.exp(-steps / 300)), "one": ([0], [2.0]), "none": ([1], [np.nan])}
        },
        "about": {
            "cf": "SASRec",
            "candidates": 20,
            "seeds": {"data": 3},
            "durations": {"stage 1": 75.0},
            "config": {"cf": {"width": 50, "betas": (0.9, 0.98)}, "note": HOSTILE},
        },
        "warnings": [f"few users {HOSTILE}"],
        "not_applicable": {"cold-users": "every user has 20 ratings"},
        "alignment": {
            "sentences": [f"e and q {HOSTILE}"],
            "columns": {"cf": "CF model", "a-llmrec": "by e"},
            "ranking": {"overall": summary},
            "picture": b"\x89PNG",
        },
        "by_popularity": {
            "bins": [{"least": 0, "most": 0, "users": 15}, {"least": 1, "most": 99, "users": 25}],
            "models": {model: [of["hit@1"], of["hit@1"]] for model, of in summary.items()},
        },
        "calibration": {model: {"bins": [{"p": 0.2, "hit": 0.1, "n": 800}], "error": 0.1} for model in MODELS},
        "paper": paper.table({"overall": summary}, cf="SASRec", data_name=f"Beauty {HOSTILE}"),
    }


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write_report(path, **run)
    return path.read_text("utf-8")


class Elements(HTMLParser):
    """Every element with its attributes, the visible text, and whether the tags nest."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def shown(renderable, width=160):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(renderable)
    return console.export_text()


def test_metrics_json_has_the_documented_shape(tmp_path):
    class Colour(Enum):
        RED = "red"

    @dataclass
    class Config:
        place: Path
        rates: tuple = (0.9, np.float32(0.5))
        clip: float = float("inf")
        colour: Colour = Colour.RED

    summary, pairs = invented()
    path = tmp_path / "metrics.json"
    report.write_metrics(
        path, {"overall": summary}, differences={"overall": pairs}, about={"config": Config(Path("x"))}
    )
    read = json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)
    assert set(read) == {"scenarios", "differences", "about"}
    assert read["scenarios"] == {"overall": summary}
    for figures_of in read["scenarios"]["overall"].values():
        assert set(figures_of) == set(metrics.METRICS)
        for one in figures_of.values():
            assert set(one) == {"value", "low", "high", "n"}
    assert read["about"]["config"] == {"place": "x", "rates": [0.9, 0.5], "clip": "inf", "colour": "red"}
    assert os.listdir(tmp_path) == ["metrics.json"]


@pytest.mark.parametrize("broken", [{"value": float("nan")}, {"low": None}, {"n": "40"}])
def test_a_figure_that_is_none_is_named_and_the_old_file_stays(tmp_path, broken):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    whole = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 40}
    with pytest.raises(ValueError, match=f"overall, cf, mrr: no finite {next(iter(broken))}"):
        report.write_metrics(path, {"overall": {"cf": {"hit@1": whole, "mrr": whole | broken}}})
    assert path.read_text() == "old"


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        report.write_metrics(path, {})
    assert os.listdir(tmp_path) == ["metrics.json"]
    assert path.read_text() == "old"


def test_tables_hold_every_figure(run):
    summary, about = run["scenarios"]["overall"], run["about"]
    text = shown(report.metrics_table(summary, [*MODELS, "absent"], about=about, candidates=20, title="[overall]"))
    assert "[overall]" in text
    assert "absent" not in text
    assert text.index("SASRec + A-LLMRec") < text.index("LLM only (titles)") < text.index("Popularity")
    for model in MODELS:
        for metric in ("hit@1", "hit@5", "ndcg@5", "mrr"):
            one = summary[model][metric]
            assert f"{one['value']:.3f}" in text
            assert f"({one['low']:.3f}–{one['high']:.3f})" in text
    assert re.search(r"Random order\s+0.050\s+0.250\s+0.147\s+0.180", text)

    pairs = run["differences"]["overall"]
    text = shown(report.differences_table(pairs, about=about))
    assert "A-LLMRec minus LLM only (titles)" in text
    assert labels.signed(pairs["fused"]["cf"]["mrr"]["low"]) in text
    assert labels.p_text(pairs["fused"]["cf"]["mrr"]["p_value"]) in text


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_a_terminal(run, width):
    summary = run["scenarios"]["overall"]
    for table in (report.metrics_table(summary, MODELS), report.differences_table(run["differences"]["overall"])):
        text = shown(table, width)
        assert "…" not in text
        assert all(len(line) <= width for line in text.splitlines())


def test_examples_show_markup_and_control_characters_as_text(run):
    example = run["examples"][0] | {"user": "[red]9\x1b[31m", "history": []}
    text = shown(report.examples_table([example], MODELS, about=run["about"]))
    assert "[red]9\ufffd[31m" in text
    assert "\x1b" not in text
    assert "nothing yet" in text
    assert text.count("✓") == 1
    assert re.search(r"SASRec\s+Fargo & Sons ✓", text)


def test_hits_can_be_given_where_two_items_share_a_title():
    example = {"target": "Ran", "choices": {"cf": "Ran", "llm-only": "Ran"}, "hits": {"cf": False}}
    assert not labels.hits(example, "cf")
    assert labels.hits(example, "llm-only")


def test_page_loads_nothing(page):
    elements = Elements(page)
    for tag, attributes in elements.found:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name != "style"
            if name in {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}:
                assert value == "data:," or (tag == "img" and value.startswith("data:image/png;base64,"))
    style = re.search(r"<style>(.*?)</style>", page, re.S).group(1)
    assert not re.search(r"url\(|@import|https?:|//", style)
    policy = next(a["content"] for t, a in elements.found if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_page_escapes_what_strangers_wrote(page):
    elements = Elements(page)
    assert "<script" not in page
    assert HOSTILE in elements.text
    assert elements.text.count(HOSTILE) > 10
    assert page.count("<img") == 1  # the picture of stage 1


def test_page_escapes_names_too(run, tmp_path):
    path = tmp_path / "report.html"
    scenario = run["scenarios"]["overall"] | {HOSTILE: run["scenarios"]["overall"]["cf"]}
    about = run["about"] | {"labels": {"popularity": f"P {HOSTILE}"}, HOSTILE: {HOSTILE: 1}}
    report.write_report(path, **run | {"scenarios": {HOSTILE: scenario}, "about": about})
    page = path.read_text("utf-8")
    assert "<script" not in page
    assert page.count("<img") == 1  # the picture of stage 1
    assert Elements(page).open == []


def test_page_is_well_formed_and_accessible(page):
    elements = Elements(page)
    assert elements.open == []
    tags = Counter(tag for tag, _ in elements.found)
    assert tags["h1"] == tags["main"] == 1
    ids = [a["id"] for _, a in elements.found if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in elements.found:
        if tag == "svg" and attributes.get("aria-hidden") != "true":
            assert attributes["role"] == "img"
            assert attributes.get("aria-label") or all(i in ids for i in attributes["aria-labelledby"].split())
        if tag == "th":
            assert attributes["scope"] in {"row", "col"}
        if tag == "html":
            assert attributes["lang"] == "en"
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


def test_page_holds_the_whole_run(run, page):
    text = Elements(page).text
    names = labels.model_labels(run["about"])
    for model in MODELS:
        assert text.count(names[model]) >= 1 + 1 + 5  # chart, table, examples
        for one in (run["scenarios"]["overall"][model][m] for m in ("hit@1", "hit@5", "ndcg@5", "mrr")):
            assert f"{one['value']:.3f} ({one['low']:.3f}–{one['high']:.3f})" in text
    assert "40 users, 20 candidates each" in text
    assert "chance 0.05" in text
    assert "A-LLMRec minus LLM only (titles)" in text
    assert "Not applicable: every user has 20 ratings" in text
    assert "Second paragraph." in text
    assert "few users" in text
    assert text.count("✓ hit") == 5
    for fact in ("cf.width 50", "cf.betas 0.9, 0.98", "1 min 15 s", "no finite value", "log scale"):
        assert fact in text


def test_same_input_same_page_and_no_examples_or_curves_is_fine(run, page, tmp_path):
    path = tmp_path / "report.html"
    report.write_report(path, **run)
    assert path.read_text("utf-8") == page
    bare = run | {"examples": [], "curves": {}, "warnings": [], "differences": {}, "about": {}, "not_applicable": None}
    report.write_report(path, **bare)
    assert Elements(path.read_text("utf-8")).open == []
    assert "chance" not in Elements(path.read_text("utf-8")).text.lower()


def bar_geometry(svg):
    bars = re.findall(r'<rect class="bar[^"]*" x="0" y="\d+" width="([\d.]+)%"', svg)
    whiskers = re.findall(r'<line class="whisker" x1="([\d.]+)%" x2="([\d.]+)%" y1="(\d+)" y2="\3"', svg)
    chance = re.search(r'<line class="chance" x1="([\d.]+)%"', svg)
    return [float(b) for b in bars], [(float(a), float(b)) for a, b, _ in whiskers], chance and float(chance.group(1))


def test_bars_whiskers_and_chance_stand_where_the_figures_say():
    rows = [
        ("A", {"value": 0.3, "low": 0.2, "high": 0.38}, True),
        ("B", {"value": 0.0, "low": 0.0, "high": 0.1}, False),
    ]
    bars, whiskers, chance = bar_geometry(figures.bar_chart(rows, name="x", metric="Hit@1", chance=0.05))
    assert bars == [75, 0]  # the axis ends at 0.4
    assert whiskers == [(50, 95), (0, 25)]
    assert chance == 12.5


@pytest.mark.parametrize("high", [0.0, 0.04, 0.1, 0.33, 0.55, 0.7, 0.79, 0.99, 1.0])
def test_every_axis_has_ticks_that_end_with_it(high):
    svg = figures.bar_chart([("A", {"value": high / 2, "low": 0.0, "high": high}, False)], name="x", metric="Hit@1")
    ticks = [float(t) for t in re.findall(r'<text class="tick"[^>]*>([\d.]+)<', svg)]
    assert 3 <= len(ticks) <= 6
    assert ticks[0] == 0
    assert high <= ticks[-1] <= 1
    assert "100.00%" in svg


def test_curves_shrink_but_keep_their_course():
    steps = np.arange(10_000)
    panel = figures.curve_panel("stage", "loss", steps, steps / 100 + 1e6)
    points = re.search(r'points="([^"]*)"', panel).group(1).split()
    heights = [float(p.split(",")[1]) for p in points]
    assert len(points) == figures.MOST_POINTS
    assert heights == sorted(heights, reverse=True)
    with pytest.raises(ValueError, match="steps for"):
        figures.curve_panel("stage", "loss", [1, 2], [1.0])
