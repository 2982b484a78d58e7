"""A table of the paper as work directories: what each trains, is asked, and which cell of the table it fills.

The tables are `configs/paper/table1.py` and so on; the work directories of all of them lie in one folder,

    WORKDIR/SET/data/   the prepared data set of a data set of the paper (beauty, movies, games, toys)
    WORKDIR/SET/RUN/    the work directory of one run; runs that share a stage copy it from each other
    WORKDIR/table1.json, table1.csv

so that what one table has trained another finds. Each can be evaluated further by itself (`allmrec evaluate`).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from allmrec_jax.config import Experiment, check, load_config, table_numbers
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import paper
from allmrec_jax.files import write_atomically
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.progress import say
from allmrec_jax.training.checkpoint import write_json

Change = Callable[[Experiment], Experiment]
STAGES = ("cf", "align", "llm")


def as_it_is(x: Experiment) -> Experiment:
    """No change."""
    return x


def with_(**parts: Mapping[str, Any]) -> Change:
    """The change that sets fields of parts: `with_(cf={"model": "ncf"})`."""

    def change(x: Experiment) -> Experiment:
        return dataclasses.replace(
            x, **{part: dataclasses.replace(getattr(x, part), **fields) for part, fields in parts.items()}
        )

    return change


@dataclass(frozen=True)
class Cell:
    """Where a figure is found: Hit@1 of a model in a scenario of a run."""

    run: str
    scenario: str
    model: str


@dataclass(frozen=True)
class Run:
    """One work directory beside others.

    what: what makes it that run; the command line cannot change it.
    settings: what it starts from beyond the data set's config; the command line can.
    on: the data set that `cross-domain` is evaluated on.
    """

    name: str
    what: Change = as_it_is
    settings: Change = as_it_is
    scenarios: tuple[str, ...] = ("overall",)
    models: tuple[str, ...] = ("cf",)
    on: str | None = None

    def asked(self, **what: Any) -> Run:
        """The same run, asked for other scenarios or models."""
        return dataclasses.replace(self, **what)

    def cell(self, scenario: str, model: str) -> Cell:
        return Cell(self.name, scenario, model)

    def experiment(self, base: Experiment, override: Change) -> Experiment:
        """Its config, with the command line's fields.

        Raises:
          UserError: if those are what the run is about.
        """
        found = override(self.what(self.settings(base)))
        if self.what(found) != found:
            raise UserError(f"a field on the command line is what the run {self.name} varies; leave it to the table")
        return check(dataclasses.replace(found, name=f"{base.name}, {self.name}"))


MAIN = Run("a-llmrec")
MLP = Run("mlp-llm", with_(llm={"item_vectors": "E"}))
CF_MODELS = {
    "NCF": Run("ncf", with_(cf={"model": "ncf"}), with_(cf={"epochs": 100, "dropout": 0.0})),
    "NextItNet": Run("nextitnet", with_(cf={"model": "nextitnet"}), with_(cf={"epochs": 100})),
    "GRU4Rec": Run("gru4rec", with_(cf={"model": "gru4rec"}), with_(cf={"epochs": 100, "dropout": 0.25, "blocks": 1})),
}


@dataclass(frozen=True)
class PaperTable:
    """One table.

    key: of its figures in `paper_numbers.json`.
    sets: the data sets it is about, as configs of `configs/paper`.
    cells: for a data set, as the paper calls it, `{(row, column): where our figure is}`.
    """

    title: str
    key: str
    sets: tuple[str, ...]
    runs: Sequence[Run]
    cells: Callable[[str], Mapping[tuple[str, str], Cell]]


def short(known: str) -> str:
    """What some of the paper's tables call a data set."""
    return {"Movies and TV": "Movies", "Video Games": "Games"}.get(known, known)


def load_table(number: int) -> PaperTable:
    """A table of `configs/paper`. Raises `UserError` if there is none of that number."""
    if number not in table_numbers():
        raise UserError(f"there is no table {number}; choose among {', '.join(map(str, table_numbers()))}")
    return load_config(f"paper/table{number}", "table", PaperTable)


def run_tables(
    numbers: Sequence[int],
    workdir: Path,
    *,
    sets: Sequence[str] | None,
    override: Change,
    on: str | None = None,
    console: Console,
) -> Iterator[tuple[int, PaperTable, list[dict[str, Any]]]]:
    """Runs what the tables need, one work directory after the other, and gives each table with its cells.

    What is there is read; what was interrupted goes on.

    Args:
      sets: the data sets to run; None is all that a table is about.
      on: a prepared data set, or the name of one, in the place of the one that `cross-domain` is evaluated on.

    Raises:
      UserError: for a table or a data set that is not known, or from whatever a run needs.
    """
    tables = {number: load_table(number) for number in numbers}
    known = dict.fromkeys(name for table in tables.values() for name in table.sets)
    for name in sets or ():
        if name not in known:
            raise UserError(f"these tables are not about {name!r}; choose among {', '.join(known)}")
    bases = {name: load_config(f"paper/{name}") for name in sets or known}
    for table in tables.values():  # what cannot be is said before anything is trained
        for run in table.runs:
            [run.experiment(base, override) for base in bases.values()]
    for number, table in tables.items():
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for name in (name for name in table.sets if name in bases):
            base = Pipeline(override(bases[name]), workdir / name, console=console)
            results = {}
            for run in table.runs:
                pipeline = base.within(run.name)
                pipeline.experiment = run.experiment(bases[name], override)
                results[run.name] = _evaluate(run, pipeline, _target(run, workdir, on, console))
            for place, cell in table.cells(paper.WORDS[name]).items():
                found[place] = _figure(results[cell.run], cell) | {"run": f"{name}/{cell.run}"}
        cells = _cells(table, found)
        write_json(workdir / f"table{number}.json", {"number": number, "title": table.title, "cells": cells})
        with write_atomically(workdir / f"table{number}.csv") as file:
            file.write(to_csv(cells).encode())
        yield number, table, cells


def _evaluate(run: Run, pipeline: Pipeline, on: tuple[str, str] | None) -> dict[str, Any]:
    from allmrec_jax.evaluation.evaluate import evaluate

    say(pipeline.console, f"{pipeline.workdir}: {', '.join(run.scenarios)} of {', '.join(run.models)}")
    _share(pipeline, STAGES if set(run.models) - {"cf"} else ("cf",))
    target, wording = on or (None, None)
    return evaluate(pipeline, run.scenarios, run.models, on=target, wording=wording)


def _share(pipeline: Pipeline, stages: Sequence[str]) -> None:
    """Copies the stages that a finished run beside this one has trained with the same config, where this has none."""
    for stage in stages:
        own = pipeline.workdir / stage
        if own.exists():
            continue
        wanted = json.loads(json.dumps(pipeline.identity(stage)))
        for other in sorted(pipeline.workdir.parent.glob(f"*/{stage}/config.json")):
            finished = (other.parent.parent / "metrics.json").is_file()
            if finished and json.loads(other.read_text()) == wanted:
                half = own.with_name(f".{stage}.copy")
                shutil.rmtree(half, ignore_errors=True)
                shutil.copytree(other.parent, half)
                half.rename(own)
                break


def _target(run: Run, workdir: Path, on: str | None, console: Console) -> tuple[str, str] | None:
    """The data set that `cross-domain` goes to, prepared if it is one of the paper's, and the wording of its prompt."""
    if run.on is None:
        return None
    there = load_config(f"paper/{run.on}")
    return on or str(Pipeline(there, workdir / run.on, console=console).dataset.path), there.llm.domain


def _figure(results: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    reason = results["not_applicable"].get(cell.scenario)
    models = results["scenarios"].get(cell.scenario, {})
    return {"ours": models.get(cell.model, {}).get("hit@1"), "reason": reason}


def _cells(table: PaperTable, found: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every cell of the paper's table, `{"row", "column", "paper", "ours", "difference", "run", "reason"}`."""
    rows, columns = paper.rows_and_columns(table.key)
    cells = []
    for row in rows:
        for column in columns:
            own = found.get((row, column), {"ours": None, "reason": None, "run": None})
            theirs, ours = paper.cell(table.key, row, column), own["ours"]
            difference = None if ours is None or theirs is None else ours["value"] - theirs
            cells.append({"row": row, "column": column, "paper": theirs, "difference": difference, **own})
    return cells


def to_csv(cells: Sequence[Mapping[str, Any]]) -> str:
    """`row,column,paper,ours,low,high,n,difference`; what is not there is empty."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(("row", "column", "paper", "ours", "low", "high", "n", "difference"))
    for c in cells:
        ours = [(c["ours"] or {}).get(name) for name in ("value", "low", "high", "n")]
        rows.writerow((c["row"], c["column"], c["paper"], *ours, c["difference"]))
    return out.getvalue()


def shown(number: int, table: PaperTable, cells: Sequence[Mapping[str, Any]]) -> Any:
    """The table for the terminal: a line for each cell that we have, or could have."""
    from rich import box
    from rich.table import Table

    out = Table(title=f"Table {number}: {table.title}", box=box.SIMPLE_HEAD, title_justify="left")
    for name, side in (("", "left"), ("", "left"), ("paper", "right"), ("ours", "right"), ("difference", "right")):
        out.add_column(name, justify=side)
    before = None
    for c in cells:
        if before not in (None, c["row"]):
            out.add_section()
        ours = c["ours"]
        told = f"{ours['value']:.3f} ({ours['low']:.3f}-{ours['high']:.3f})" if ours else "–"
        told = f"not applicable: {c['reason']}" if c["reason"] else told
        theirs = "–" if c["paper"] is None else f"{c['paper']:.3f}"
        difference = "" if c["difference"] is None else f"{c['difference']:+.3f}"
        out.add_row(c["row"] if c["row"] != before else "", c["column"], theirs, told, difference)
        before = c["row"]
    return out
