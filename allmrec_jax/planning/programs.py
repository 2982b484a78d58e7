"""The real programs of stage 2 and of the ranker on shapes alone: lowered, compiled and traced, nothing allocated."""

from __future__ import annotations

import functools
import math
import re
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape

from allmrec_jax.config import Experiment
from allmrec_jax.data.packing import Room, pack
from allmrec_jax.data.prompts import Prompt
from allmrec_jax.models import params, projection
from allmrec_jax.models.llm import load
from allmrec_jax.models.llm.quantize import Precision
from allmrec_jax.planning.lengths import Lengths
from allmrec_jax.training import inject, inject_step
from allmrec_jax.training.state import create

STEPS = 1000  # of the optimiser's schedule; no shape depends on it
TRACED_ROWS = 13  # of a batch that is traced: a number that no dimension of a model has


class Compiled(NamedTuple):
    """Bytes on each chip of one compiled program, and the seconds that compiling it took."""

    arguments: int
    new: int
    """Outputs that do not take an argument's place."""
    temporaries: int
    seconds: float


class TooLarge(Exception):
    """The compiler finds that a program does not fit. `used`: the bytes a chip that it needs, where it says so."""

    def __init__(self, used: int | None):
        super().__init__(used)
        self.used = used


class Layer(NamedTuple):
    """The sizes of an LLM's layers, by its description."""

    layers: int
    heads: int
    head_dim: int
    mlp: int
    products: int
    """Scalars of all weights that products sum over, in all layers."""


@dataclass(frozen=True)
class Programs:
    """What is compiled for a config: its LLM on a mesh, rows of these lengths."""

    experiment: Experiment
    llm_config: Any
    precision: Precision
    mesh: params.AnyMesh
    lengths: Lengths

    @functools.cached_property
    def llm(self) -> load.FrozenLLM:
        rules = params.FULLY_SHARDED if self.experiment.devices.shard_weights else params.AXIS_RULES
        return load.abstract(self.llm_config, self.precision, rules)

    @functools.cached_property
    def layer(self) -> Layer:
        described = load.MODULES[type(self.llm_config)].describe(self.llm_config)
        leaves = {path.removesuffix("/kernel"): leaf for path, leaf in params.paths(described)}
        layers, _, heads, head_dim = leaves["layers/q"].shape
        products = sum(math.prod(p.shape) for p in leaves.values() if p.inputs)
        return Layer(layers, heads, head_dim, leaves["layers/up"].shape[-1], products)

    @property
    def weight_bytes(self) -> int:
        """Of the LLM, on each chip."""
        return params.bytes_per_device(self.llm.describe(), self.mesh, self.llm.rules)

    @property
    def item_width(self) -> int:
        """Of what F_I reads."""
        x = self.experiment
        return x.cf.width if x.llm.item_vectors == "E" else x.align.joint

    @functools.cached_property
    def heads(self) -> Any:
        h, x = self.llm.width, self.experiment
        return {
            "F_U": params.shapes(projection.describe(x.cf.width, h)),
            "F_I": params.shapes(projection.describe(self.item_width, h)),
        }

    @functools.cached_property
    def frozen(self) -> Any:
        """What `inject.freeze` gives."""
        x, embed = self.experiment, self.llm.weights["weights"]["embed"]
        return {
            "llm": self.llm.weights,
            "x_u": Shape((self.lengths.users, x.cf.width), jnp.float32),
            "e": Shape((self.lengths.items, self.item_width), jnp.float32),
            "tokens": jax.eval_shape(projection.token_statistics, embed),
        }

    @functools.cached_property
    def optimiser(self) -> Any:
        return inject.make_optimiser(self.experiment.llm, STEPS)

    @functools.cached_property
    def state(self) -> Any:
        return jax.eval_shape(lambda heads: create(heads, self.optimiser), self.heads)

    @property
    def state_bytes(self) -> int:
        """Whole on each chip: heads trained and in use, Adam's moments, the gradients' sums, x_u and e."""
        tables = {name: part for name, part in self.frozen.items() if name != "llm"}
        return size((self.state, self.heads, self.heads, tables))

    @property
    def moments_bytes(self) -> int:
        """Of the state, what a pass does not get: trained heads and moments (it gets the heads in use)."""
        return size(self.state)

    def part_bytes(self, rows: int) -> int:
        """Of a pass's rows, on each chip."""
        return size(self.train_part(rows)) // self.mesh.shape["data"]

    def part(self, rows: int, room: Room) -> dict[str, Shape]:
        """A batch of so many rows, as `pack` makes it."""
        one = pack([Prompt([], [], [], 0)], [[[0]]], rows=[0], tier=1, least=room)
        return {name: Shape((rows, *array.shape[1:]), array.dtype) for name, array in one.items()}

    def train_part(self, rows: int) -> dict[str, Shape]:
        x, part = self.experiment, self.part(rows, self.lengths.train)
        if x.llm.cf_dropout and x.cf.dropout > 0:
            part["x_u"] = Shape((rows, x.cf.width), jnp.float32)
        return part

    @functools.cached_property
    def step(self) -> Any:
        tables = [name for name in self.frozen if name not in ("llm", "tokens")]
        shardings = inject.frozen_shardings(self.llm, self.mesh, *tables)
        return inject_step.make_step(self.llm.graph, shardings, self.mesh, self.optimiser, self.experiment.llm)

    def compile_step(self, rows: int) -> Compiled:
        """The gradients of one pass of `rows` users.

        Raises:
          TooLarge: if the compiler says so.
        """
        start, add = self.step.programs["start"], self.step.programs["add"]
        heads, sums = jax.eval_shape(start, self.state.params, self.frozen)
        return compiled(add, sums, heads, self.frozen, self.train_part(rows))

    def compile_ends(self) -> list[Compiled]:
        """What stands before and after the passes of a step: the heads in use; the update."""
        start, finish = self.step.programs["start"], self.step.programs["finish"]
        return [
            compiled(start, self.state.params, self.frozen),
            compiled(finish, self.state, self.frozen, self.heads),
        ]

    def compile_scorer(self, rows: int) -> Compiled:
        """The ranker's pass of `rows` users with all their candidates.

        Raises:
          TooLarge: if the compiler says so.
        """
        x, h = self.experiment, self.llm.width
        scorer = inject_step.make_scorer(
            self.llm.graph,
            inject.frozen_shardings(self.llm, self.mesh),
            self.mesh,
            answers=x.evaluation.candidates,
            normalise=x.evaluation.score == "mean",
            logit_rows=x.llm.logit_rows,
        )
        tables = {"O_u": Shape((rows, h), jnp.float32), "O_i": Shape((self.lengths.items, h), jnp.float32)}
        return compiled(scorer, tables, {"llm": self.llm.weights}, self.part(rows, self.lengths.rank))

    @functools.cached_property
    def kept(self) -> list[tuple[tuple[int, ...], int]]:
        """What the backward pass of one user finds again: (shape without rows, bytes of it), traced.

        The stack of all layers has the layers in front.
        """

        def backward(heads: Any, frozen: Any, part: Any) -> list[Any]:
            config = self.experiment.llm
            loss = functools.partial(inject_step.losses, graph=self.llm.graph, frozen=frozen, batch=part, config=config)
            return jax.tree.leaves(jax.vjp(loss, heads, has_aux=True)[1])

        traced = jax.make_jaxpr(backward)(self.heads, self.frozen, self.train_part(TRACED_ROWS)).jaxpr
        found = {v for v in traced.outvars if not isinstance(v, jax.extend.core.Literal)} - set(traced.invars)
        shapes = [(v.aval.shape, v.aval.dtype.itemsize) for v in found if TRACED_ROWS in v.aval.shape]
        return [
            (tuple(n for n in shape if n != TRACED_ROWS), math.prod(shape) // TRACED_ROWS * itemsize)
            for shape, itemsize in shapes
        ]


def size(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def compiled(program: Any, *arguments: Any) -> Compiled:
    """The memory that a jitted function takes on each chip, as its compiler says.

    Raises:
      TooLarge: if the compiler finds that it does not fit.
    """
    start = time.perf_counter()
    try:
        memory = program.lower(*arguments).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLarge(used_of(str(error))) from error
    seconds = time.perf_counter() - start
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return Compiled(memory.argument_size_in_bytes, max(0, new), temporaries, seconds)


def used_of(message: str) -> int | None:
    """Bytes that a program needs, out of the TPU compiler's complaint.

    >>> used_of("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded ...") / 2**30
    20.5
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else None
