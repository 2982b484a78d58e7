"""`allmrec plan`: whether a config fits hardware that is not there, the largest pass, the least time of a step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from allmrec_jax.config import Experiment
from allmrec_jax.errors import UserError
from allmrec_jax.models.llm import load, quantize, sizes
from allmrec_jax.planning import memory, roofline
from allmrec_jax.planning.chips import GIB, Hardware
from allmrec_jax.planning.lengths import lengths_of
from allmrec_jax.planning.programs import Compiled, Programs, TooLarge
from allmrec_jax.training.inject import rows_of_a_pass
from allmrec_jax.training.mesh import data_parallel, make_mesh

PARTS = ("weights", "state", "activations", "temporaries")


@dataclass
class Plan:
    """Everything that was found out; bytes are a chip's."""

    experiment: Experiment
    hardware: Hardware
    programs: Programs
    users: int
    """Of a pass."""
    parts: dict[str, float] = field(default_factory=dict)
    rank: float | None = None
    """Bytes a chip while ranking; None where nothing could be compiled or it did not fit."""
    fits: bool = False
    compiled: bool = False
    compile_seconds: float | None = None
    largest: int | None = None
    confirmed: bool = False
    tried: list[str] = field(default_factory=list)
    advice: list[tuple[str, float]] = field(default_factory=list)
    """(change, predicted bytes a chip)."""

    @property
    def ranked(self) -> int:
        """Users of a pass of the ranker (`evaluation.rank.Ranker`)."""
        on_cpu = self.hardware.platform == "cpu"
        return self.programs.mesh.shape["data"] if on_cpu else self.experiment.evaluation.batch

    @property
    def used(self) -> float:
        return sum(self.parts.values())

    @property
    def step_seconds(self) -> float | None:
        """By the roofline, of one optimiser step."""
        if self.hardware.chip is None:
            return None
        passes = self.experiment.llm.batch / self.users
        return passes * roofline.train_work(self.programs, self.users).seconds(self.hardware.chip)

    @property
    def rank_seconds(self) -> float | None:
        """By the roofline, of ranking one user's candidates."""
        if self.hardware.chip is None:
            return None
        return roofline.rank_work(self.programs, self.ranked).seconds(self.hardware.chip) / self.ranked

    def as_json(self) -> dict[str, Any]:
        """What `--json` writes. Unknown is null."""
        return {
            "fits": self.fits,
            "chips": self.programs.mesh.size,
            "bytes_per_chip": {name: round(self.parts[name]) for name in PARTS},
            "hbm_per_chip": self.hardware.memory,
            "compile_seconds": self.compile_seconds,
            "largest_batch": self.largest,
            "step_seconds_roofline": self.step_seconds,
        }


def precision_on(dtype: str, platform: str) -> quantize.Precision:
    """What `quantize.precision` gives where JAX runs on that platform."""
    fast = "float32" if platform == "cpu" else "bfloat16"
    name = fast if dtype == "auto" else dtype
    return quantize.Precision(name, fast if name in quantize.QUANTISED else name)


def programs_of(experiment: Experiment, hardware: Hardware, length: int | None = None) -> Programs:
    """The programs of an experiment on a mesh over this hardware, as `Pipeline.mesh` lays it out.

    Raises:
      UserError: if there are too few chips for `devices.model`, or the LLM's heads cannot be cut over them.
    """
    x, config = experiment, sizes.config_of(experiment.llm.llm)
    model = x.devices.model
    data = data_parallel(hardware.count, model, x.llm.batch, x.evaluation.batch)
    if hardware.devices:
        mesh = make_mesh(data, model, hardware.devices)
    elif model > hardware.count:
        raise UserError(f"devices.model {model} needs more chips than the {hardware.count} of {hardware.name}")
    else:
        mesh = jax.sharding.AbstractMesh((data, model), ("data", "model"))
    load.check_mesh(config, mesh, x.llm.llm)
    precision = precision_on(x.llm.dtype, hardware.platform)
    return Programs(x, config, precision, mesh, lengths_of(x, config, length))


def pass_of(experiment: Experiment, data: int, platform: str) -> int:
    """Users of a pass on that platform (`inject.rows_of_a_pass`)."""
    config = experiment.llm
    if config.micro is None:
        rows_of_a_pass(config, data)  # its complaints
        return data if platform == "cpu" else config.batch
    return rows_of_a_pass(config, data)


def plan(
    experiment: Experiment,
    hardware: Hardware,
    *,
    length: int | None = None,
    largest: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Plans stage 2 and the ranker of `experiment`.

    Args:
      length: tokens of a prompt (see `lengths_of`).
      largest: look for the largest pass, which takes two compiles more; without it activations and temporaries are
        told apart by the traced shapes.
      report: told after each compile.
    """
    programs = programs_of(experiment, hardware, length)
    users = pass_of(experiment, programs.mesh.shape["data"], hardware.platform)
    found = Plan(experiment, hardware, programs, users)
    if hardware.devices:
        with _compiled_anew() if hardware.platform == "tpu" else contextlib.nullcontext():
            _compile(found, largest, report)
    else:
        _estimate(found)
    if not found.fits:
        found.advice = advice(found)
    return found


@contextlib.contextmanager
def _compiled_anew() -> Iterator[None]:
    """Without the cache of compiled programs: JAX cannot read an entry for chips that are not there."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether it is used is asked once otherwise
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _estimate(found: Plan) -> None:
    """Everything by shapes and formulas."""
    programs, multiple = found.programs, found.programs.mesh.shape["data"]
    resident = programs.weight_bytes + programs.state_bytes
    a_user = memory.activations(programs, 1) + memory.temporaries(programs, 1)
    found.parts = {
        "weights": programs.weight_bytes,
        "state": programs.state_bytes,
        "activations": memory.activations(programs, found.users),
        "temporaries": memory.temporaries(programs, found.users),
    }
    found.fits = found.used <= found.hardware.usable
    most = min((found.hardware.usable - resident) / a_user, programs.lengths.users)
    found.largest = max(0, int(most) // multiple * multiple)


def _compile(found: Plan, largest: bool, report: Callable[[str], None]) -> None:
    programs, usable, multiple = found.programs, found.hardware.usable, found.programs.mesh.shape["data"]
    resident = programs.weight_bytes + programs.state_bytes
    memories: dict[int, Compiled] = {}

    def note(what: str, used: float | None, fits: bool, seconds: float = 0.0) -> None:
        size = "more than there is" if used is None else f"{used / GIB:.2f} GiB a chip"
        found.tried.append(f"{what}: {size}{'' if fits else ', does not fit'}")
        report(found.tried[-1] + (f" (compiled in {seconds:.0f} s)" if seconds else ""))

    def padding(memory_: Compiled, users: int) -> float:
        """What the arguments take beyond their plain sizes, in the layouts of the chip."""
        passed = resident - programs.moments_bytes + programs.part_bytes(users)
        return max(0, memory_.arguments - passed)

    def measure(users: int) -> tuple[int | None, bool]:
        try:
            memories[users] = m = programs.compile_step(users)
        except TooLarge as error:
            used = None if error.used is None else error.used + programs.moments_bytes
            note(f"stage 2, {users} users a pass", used, False)
            return used, False
        used = int(resident + programs.part_bytes(users) + padding(m, users) + m.new + m.temporaries)
        note(f"stage 2, {users} users a pass", used, used <= usable, m.seconds)
        return used, used <= usable

    ends = programs.compile_ends()
    if largest:
        line = memory.survey(measure, found.users, multiple, usable, programs.lengths.users)
        found.largest, found.confirmed, (used, fits) = line.largest, line.confirmed, line.seen[found.users]
    else:
        line, (used, fits) = None, measure(found.users)
    rest = (usable if used is None else used) - resident
    if line is not None and line.slope > 0:
        kept = min(line.slope * found.users, rest)
    else:
        kept = min(memory.activations(programs, found.users), rest)
    found.parts = {
        "weights": programs.weight_bytes,
        "state": programs.state_bytes,
        "activations": kept,
        "temporaries": max(0.0, rest - kept),
    }
    for m in ends:
        fits = fits and resident + m.new + m.temporaries <= usable
    seconds = [m.seconds for m in ends]
    if found.users in memories:
        seconds.append(memories[found.users].seconds)
    try:
        m = programs.compile_scorer(found.ranked)
        found.rank = m.arguments + m.new + m.temporaries
        ranks = found.rank <= usable
        note(f"ranking, {found.ranked} users a pass", found.rank, ranks, m.seconds)
        seconds.append(m.seconds)
    except TooLarge as error:
        ranks = False
        note(f"ranking, {found.ranked} users a pass", error.used, False)
    found.fits, found.compiled, found.compile_seconds = bool(fits and ranks), True, sum(seconds)


def advice(found: Plan) -> list[tuple[str, float]]:
    """What to change, each with the bytes a chip that are predicted: weights and state counted anew, the rest scaled
    as the traced shapes and the formula change."""
    base = memory.activations(found.programs, found.users), memory.temporaries(found.programs, found.users)

    def predicted(users: int, programs: Programs) -> float:
        now = memory.activations(programs, users), memory.temporaries(programs, users)
        scaled = found.parts["activations"] * now[0] / base[0] + found.parts["temporaries"] * now[1] / base[1]
        return programs.weight_bytes + programs.state_bytes + scaled

    def changed(**fields: Any) -> Programs:
        x = dataclasses.replace(found.experiment, llm=dataclasses.replace(found.experiment.llm, **fields))
        return dataclasses.replace(found.programs, experiment=x)

    options, config, mesh = [], found.experiment.llm, found.programs.mesh
    data, model = mesh.shape["data"], mesh.shape["model"]
    for remat in ("products", "layers")[{"none": 0, "products": 1, "layers": 2}[config.remat] :]:
        options.append((f"--llm.remat {remat}", predicted(found.users, changed(remat=remat))))
    if found.programs.precision.weights not in quantize.QUANTISED:
        for name in quantize.QUANTISED:
            how = quantize.Precision(name, found.programs.precision.compute)
            options.append(
                (f"--llm.dtype {name}", predicted(found.users, dataclasses.replace(changed(), precision=how)))
            )
    micro = found.users // 2
    while micro >= data and micro % data == 0 and config.batch % micro == 0:
        options.append((f"--llm.micro {micro}", predicted(micro, found.programs)))
        micro //= 2
    heads = found.programs.layer.heads
    if data % 2 == 0 and heads % (2 * model) == 0:
        wider = jax.sharding.AbstractMesh((data // 2, 2 * model), ("data", "model"))
        more = predicted(found.users, dataclasses.replace(found.programs, mesh=wider))
        options.append((f"--devices.model {2 * model}", more))
    if data > 1 and not found.experiment.devices.shard_weights:
        x = dataclasses.replace(found.experiment.devices, shard_weights=True)
        programs = dataclasses.replace(found.programs, experiment=dataclasses.replace(found.experiment, devices=x))
        options.append(("--devices.shard-weights", predicted(found.users, programs)))
    return sorted(options, key=lambda option: option[1])
