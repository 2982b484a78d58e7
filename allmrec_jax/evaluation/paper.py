"""The paper's own figures (`paper_numbers.json`, which names its source), beside ours."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DATASETS = ("Movies and TV", "Video Games", "Beauty", "Toys")
WORDS = {"movies": "Movies and TV", "games": "Video Games", "beauty": "Beauty", "toys": "Toys"}
# Ours -> the paper's, where a table has a row or a column for it.
MODELS = {
    "llm-only": "LLM-Only",
    "mlp-llm": "MLP-LLM",
    "a-llmrec": "A-LLMRec",
    "a-llmrec-q": "A-LLMRec (SBERT)",
}
CROSS_DOMAIN = "Movies to Games"
CF = {"SASRec", "NextItNet", "GRU4Rec", "NCF"}


@functools.cache
def numbers() -> dict[str, Any]:
    """All of them, with `source`."""
    return json.loads(Path(__file__).with_name("paper_numbers.json").read_text("utf-8"))


def dataset_of(name: str) -> str | None:
    """Which of the paper's data sets one of this name is, by the word in it."""
    return next((known for word, known in WORDS.items() if word in name.lower()), None)


def rows_and_columns(key: str) -> tuple[list[str], list[str]]:
    """Of one table, as it calls them; the one without columns has a single row."""
    table = numbers()[key]
    if "columns" not in table:
        return [CROSS_DOMAIN], list(table)
    return [name for name in table if name != "columns"], table["columns"]


def cell(key: str, row: str, column: str) -> float | None:
    """One figure of one table, None where the paper has none."""
    table = numbers()[key]
    if "columns" not in table:
        return table.get(column)
    if row not in table or column not in table["columns"]:
        return None
    return table[row][table["columns"].index(column)]


def beside(scenario: str, model: str, *, cf: str, dataset: str) -> float | None:
    """The paper's Hit@1 of our model in our scenario on one of its data sets.

    Args:
      cf: the CF model's name, such as SASRec.
    """
    name = cf if model == "cf" else MODELS.get(model)
    if name is None or (model == "cf" and cf not in CF):
        return None
    if scenario == "overall":
        return cell("overall", dataset, name)
    if scenario in ("cold-items", "warm-items"):
        short = {"Movies and TV": "Movies", "Video Games": "Games"}.get(dataset, dataset)
        return cell("cold_warm_items", name, f"{short} {scenario.removesuffix('-items')}")
    if scenario == "cold-users":
        return cell("cold_users", name, dataset)
    if scenario.startswith("few-shot-"):
        short = {"Movies and TV": "Movies", "Video Games": "Games"}.get(dataset, dataset)
        table = numbers()["few_shot"]
        row = f"{short} {scenario.removeprefix('few-shot-')}"
        return cell("few_shot", row, name) if row in table else None
    return None


def table(scenarios: Mapping[str, Any], *, cf: str, data_name: str) -> dict[str, Any] | None:
    """Our Hit@1 beside the paper's; None if the paper has no figure of any.

    Returns `{"same": the paper's data set that ours is, or None, "columns": its data sets, "rows": [{"scenario",
    "model", "ours", "paper": [a figure or None of each data set]}]}`.
    """
    rows = []
    for scenario, models in scenarios.items():
        for model, figures in models.items():
            theirs = [beside(scenario, model, cf=cf, dataset=name) for name in DATASETS]
            if any(figure is not None for figure in theirs):
                rows.append({"scenario": scenario, "model": model, "ours": figures["hit@1"], "paper": theirs})
    return {"same": dataset_of(data_name), "columns": DATASETS, "rows": rows} if rows else None
