"""A plan as people read it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from allmrec_jax.config import Experiment
from allmrec_jax.planning import roofline
from allmrec_jax.planning.chips import GIB, hardware
from allmrec_jax.planning.plan import PARTS, Plan, plan
from allmrec_jax.progress import say
from allmrec_jax.training.checkpoint import write_json


def run(experiment: Experiment, topology: str, *, length: int | None = None, file: Path | None = None) -> Plan:
    """The command: plans, prints, and writes `file`."""
    console = Console()
    found = plan(experiment, hardware(topology), length=length, report=lambda line: say(console, line))
    show(found, console)
    if file is not None:
        write_json(file, found.as_json())
    return found


def show(found: Plan, console: Console) -> None:
    """Prints a plan: what was assumed, memory a chip, whether it fits, and what to change where it does not."""
    hardware, programs, x = found.hardware, found.programs, found.experiment
    how, room = programs.precision, programs.lengths.train
    data, model = programs.mesh.shape["data"], programs.mesh.shape["model"]
    say(console, f"{x.llm.llm}: weights {how.weights}, products {how.compute}, remat {x.llm.remat}")
    say(console, f"Lengths: {programs.lengths.source}.")
    say(console, f"{hardware.name}: {data} data-parallel x {model} model-parallel chips.")
    if idle := hardware.count - data * model:
        say(
            console,
            f"{idle} chips are IDLE: llm.batch {x.llm.batch} and evaluation.batch {x.evaluation.batch} must both be "
            "multiples of the data-parallel chips.",
        )
    console.print(_table(found, f"stage 2, {found.users} users a pass, {room.time} tokens each"))
    if not found.compiled:
        say(
            console,
            "Estimated, not compiled: there is no compiler for these chips here. Activations are what the traced "
            "backward pass keeps; temporaries are a formula.",
        )
    say(console, "It fits." if found.fits else "It does NOT fit.")
    if found.compile_seconds is not None:
        say(console, f"Compiling the programs of a step and of ranking took {found.compile_seconds:.0f} s here.")
    if found.largest is not None:
        word = "" if not found.compiled else " (confirmed)" if found.confirmed else " (of those tried)"
        say(console, f"Largest pass{word}: {found.largest} users.")
    if found.step_seconds is not None:
        counted = roofline.counted_flops(programs, found.users) * x.llm.batch / found.users
        utilisation = counted / (hardware.chip.flops * programs.mesh.size) / found.step_seconds
        say(
            console,
            f"By the roofline a step of {x.llm.batch} users takes {found.step_seconds:.3g} s at best "
            f"({utilisation:.0%} model FLOP utilisation), ranking {found.rank_seconds:.2g} s a user.",
        )
    if found.advice:
        enough = [option for option in found.advice if option[1] <= hardware.usable]
        say(console, "What would fit:" if enough else "No single change will do; the nearest, to be combined:")
        for change, used in enough or found.advice[:4]:
            say(console, f"  {change}: {used / GIB:.2f} GiB a chip predicted")


def _table(found: Plan, title: str) -> Table:
    table = Table("a chip", "GiB", title=title)
    table.columns[1].justify = "right"
    for name in PARTS:
        table.add_row(name, f"{found.parts[name] / GIB:.2f}")
    table.add_section()
    table.add_row("all", f"{found.used / GIB:.2f}")
    if found.rank is not None:
        table.add_row("all, while ranking", f"{found.rank / GIB:.2f}")
    table.add_row("there is", f"{found.hardware.memory / GIB:.2f}")
    table.add_row("for arrays", f"{found.hardware.usable / GIB:.2f}")
    return table
