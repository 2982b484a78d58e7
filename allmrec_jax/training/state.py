"""What a training step carries: nothing but the trained parameters and the optimiser."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class State(NamedTuple):
    """`step` counts optimiser steps; every random draw is a function of (seed, step, global row)."""

    step: jax.Array
    params: Any
    opt_state: Any


def create(params: Any, optimiser: optax.GradientTransformation) -> State:
    return State(jnp.zeros((), jnp.int32), params, optimiser.init(params))


def update(state: State, gradients: Any, optimiser: optax.GradientTransformation) -> State:
    """One optimiser step."""
    changes, opt_state = optimiser.update(gradients, state.opt_state, state.params)
    return State(state.step + 1, optax.apply_updates(state.params, changes), opt_state)
