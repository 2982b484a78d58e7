"""What a benchmark is: ours and a baseline, interleaved A B A B in one run, compared by their medians."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from allmrec_jax.progress import progress


@dataclass(frozen=True)
class Row:
    """One result. `ours` and `baseline` are rates, of medians; `ratio` above 1 means that ours is faster."""

    name: str
    unit: str
    ours: float
    baseline: float
    ratio: float
    n: int
    what: str = ""
    """In words: what was measured against what."""
    beside: dict[str, float | str] = field(default_factory=dict)
    """Further figures, such as floors and peak memory."""


def peak_memory() -> int:
    """Of this process, in bytes. On Linux not from `getrusage`: a child's figure there begins at its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> None:
    """Lets `peak_memory` begin again, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def interleave(
    runs: Sequence[tuple[str, Callable[[], float]]], repeats: int, console: Console
) -> dict[str, list[float]]:
    """Runs each function in turn, `repeats` times; gives the seconds that each says it took."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in runs}
    with progress("measuring", repeats * len(runs), unit="runs", console=console) as bar:
        for repeat in range(repeats):
            for position, (name, run) in enumerate(runs):
                seconds[name].append(run())
                bar.update(repeat * len(runs) + position + 1)
    return seconds


def row(name: str, unit: str, amount: float, ours: Sequence[float], baseline: Sequence[float], **more: Any) -> Row:
    """A result from the seconds that `amount` units took."""
    a, b = statistics.median(ours), statistics.median(baseline)
    return Row(name, unit, amount / a, amount / b, b / a, len(ours), **more)


def show(rows: Sequence[Row], console: Console) -> None:
    """The results as a table, with what was measured beneath."""
    table = Table("benchmark", "unit", "ours", "baseline", "ratio", "n")
    for column in table.columns[2:]:
        column.justify = "right"
    for entry in rows:
        table.add_row(
            entry.name,
            entry.unit,
            f"{entry.ours:,.4g}" if entry.ours < 1000 else f"{entry.ours:,.0f}",
            f"{entry.baseline:,.4g}" if entry.baseline < 1000 else f"{entry.baseline:,.0f}",
            f"{entry.ratio:.2f}",
            str(entry.n),
        )
    console.print(table)
    for entry in rows:
        further = [f"{key} {x:.3g}" if isinstance(x, float) else f"{key} {x}" for key, x in entry.beside.items()]
        beside = f". Beside it: {'; '.join(further)}" if further else ""
        console.print(escape(f"{entry.name}: {entry.what}{beside}"), soft_wrap=True)


def write(rows: Sequence[Row], path: Path) -> None:
    """The results as JSON: a list of `{"name", "unit", "ours", "baseline", "ratio", "n", "what", "beside"}`."""
    path.write_text(json.dumps([asdict(entry) for entry in rows], indent=1) + "\n", encoding="utf-8")
