"""What a benchmark is: ours and a baseline, interleaved A B A B in one run, compared by their medians."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from allmrec_jax.errors import UserError
from allmrec_jax.files import write_atomically
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
    spread: dict[str, list[float]] = field(default_factory=dict)
    """Of the rates, the least and the greatest: `ours`, `baseline`."""
    memory: dict[str, float] = field(default_factory=dict)
    """MiB that a run took at most beyond what was there before it, where the system says so (Linux)."""
    compile_seconds: float | None = None
    """Of the first run, before those that count: compilation, mostly."""


class Seconds(list[float]):
    """What the runs of one side took, and the MiB that one took at most."""

    memory: float | None = None


def resident_memory() -> int | None:
    """Of this process now, in bytes; None where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return None if found is None else 1024 * int(found[1])


def first_run(run: Callable[[], Any]) -> float:
    """Seconds that a run took by the clock on the wall."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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
    seconds: dict[str, list[float]] = {name: Seconds() for name, _ in runs}
    with progress("measuring", repeats * len(runs), unit="runs", console=console) as bar:
        for repeat in range(repeats):
            for position, (name, run) in enumerate(runs):
                reset_peak_memory()
                before = resident_memory()
                seconds[name].append(run())
                if before is not None:
                    most = max(0, peak_memory() - before) / 2**20
                    seconds[name].memory = max(most, seconds[name].memory or 0.0)
                bar.update(repeat * len(runs) + position + 1)
    return seconds


def row(name: str, unit: str, amount: float, ours: Sequence[float], baseline: Sequence[float], **more: Any) -> Row:
    """A result from the seconds that `amount` units took."""
    sides = {"ours": ours, "baseline": baseline}
    a, b = statistics.median(ours), statistics.median(baseline)
    more.setdefault("spread", {side: [amount / max(taken), amount / min(taken)] for side, taken in sides.items()})
    memory = {side: getattr(taken, "memory", None) for side, taken in sides.items()}
    more.setdefault("memory", {side: most for side, most in memory.items() if most is not None})
    return Row(name, unit, amount / a, amount / b, b / a, len(ours), **more)


def machine() -> dict[str, Any]:
    """What this runs on, and how busy it is with other things."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described = {"system": platform.system(), "machine": platform.machine(), "python": platform.python_version()}
    described |= {"cores": cores, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    with contextlib.suppress(OSError, AttributeError, ValueError):
        described["memory (GiB)"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
        described["load"] = round(os.getloadavg()[0], 2)
    with contextlib.suppress(OSError, AttributeError):
        described["processor"] = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    for name in ("jax", "torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            described[name] = metadata.version(name)
    if "jax" in sys.modules:
        import jax

        described["devices"] = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    return described


def show(rows: Sequence[Row], console: Console) -> None:
    """The results as a table, with what was measured beneath."""
    table = Table("benchmark", "unit", "ours", "baseline", "ratio", "of", "n")
    for column in table.columns[2:]:
        column.justify = "right"
    for entry in rows:
        table.add_row(
            entry.name,
            entry.unit,
            f"{entry.ours:,.4g}" if entry.ours < 1000 else f"{entry.ours:,.0f}",
            f"{entry.baseline:,.4g}" if entry.baseline < 1000 else f"{entry.baseline:,.0f}",
            f"{entry.ratio:.2f}",
            "" if entry.n < 2 else "{:.2f} to {:.2f}".format(*ratios(entry)),
            str(entry.n),
        )
    console.print(table)
    for entry in rows:
        told = dict(entry.beside)
        told |= {f"MiB more in a run, {side}": most for side, most in entry.memory.items()}
        if entry.compile_seconds is not None:
            told["first run with compilation (s)"] = entry.compile_seconds
        further = [f"{key} {x:.3g}" if isinstance(x, float) else f"{key} {x}" for key, x in told.items()]
        beside = f". Beside it: {'; '.join(further)}" if further else ""
        console.print(escape(f"{entry.name}: {entry.what}{beside}"), soft_wrap=True)


def ratios(entry: Row) -> tuple[float, float]:
    """The least and the greatest ratio that the spread of both sides allows."""
    ours, baseline = (entry.spread.get(side, [getattr(entry, side)] * 2) for side in ("ours", "baseline"))
    return ours[0] / baseline[1], ours[1] / baseline[0]


def write(rows: Sequence[Row], path: Path) -> None:
    """The results as JSON: a list of `{"name", "unit", "ours", "baseline", "ratio", "n", "what", "beside", "spread",
    "memory", "compile_seconds", "machine"}`."""
    here = machine()
    path.write_text(
        json.dumps([asdict(entry) | {"machine": here} for entry in rows], indent=1) + "\n", encoding="utf-8"
    )


def read(path: Path) -> list[Row]:
    """The results of `write`."""
    names = {entry.name for entry in fields(Row)}
    return [Row(**{k: v for k, v in entry.items() if k in names}) for entry in json.loads(path.read_text("utf-8"))]


def apart(names: Sequence[str], *, rows: int, repeats: int, console: Console) -> list[Row]:
    """The results of these benchmarks, each run in a process of its own: none finds the memory of another in its way.

    Raises:
      UserError: with what it said, if one fails.
    """
    found: list[Row] = []
    for name in names:
        console.print(f"bench {name}")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            options = ["--rows", str(rows), "--repeats", str(repeats), "--json", str(file)]
            command = [sys.executable, "-m", "allmrec_jax", "bench", name, *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(f"bench {name} failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
            found += read(file)
    return found


def plot(rows: Sequence[Row], path: Path) -> None:
    """The ratios as horizontal bars on a logarithmic axis, their spread as whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 0.45 * len(rows) + 1.2))
    names, values = [entry.name for entry in rows], [entry.ratio for entry in rows]
    ends = [ratios(entry) for entry in rows]
    whiskers = [
        [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
    ]
    axis.barh(names, values, xerr=whiskers, color="#7a9cc6", ecolor="#333333", capsize=3)
    axis.axvline(1.0, color="#a64b00", linestyle="--", linewidth=1)
    axis.set(xscale="log", xlabel="times as fast as the baseline")
    axis.invert_yaxis()
    figure.tight_layout()
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
