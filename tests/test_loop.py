"""The loop of every stage: resumed equals uninterrupted, NaN stops it, what is saved is sound."""

import dataclasses
import io
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console

from allmrec_jax.errors import UserError
from allmrec_jax.training import align, cf, inject, loop
from allmrec_jax.training.checkpoint import Checkpoints
from allmrec_jax.training.mesh import make_mesh


class Interrupted(Exception):
    """As Ctrl-C, or the machine going away."""


def quiet() -> Console:
    return Console(file=io.StringIO())


# ------------------------------------------------------------------------------------------------- the three stages


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.dataset(tmp_path_factory.mktemp("data") / "tiny")


def _stage_0(data, folder: Path):
    model, curves = cf.train_cf(tiny.STAGE_0, data, folder, seed=3, devices=jax.devices()[:1], console=quiet())
    return model.params, curves


def _stage_1(data, folder: Path):
    aligned, curves = align.train_align(
        tiny.STAGE_1, data, tiny.cf_model(), tiny.encoder(), folder, seed=3, devices=jax.devices()[:1], console=quiet()
    )
    return (aligned.parameters, aligned.e, aligned.q), curves


def _stage_2(data, folder: Path):
    mesh = make_mesh(1, 1)
    e, llm = tiny.joint_embeddings(), tiny.frozen_llm(mesh)
    return inject.train_llm(tiny.STAGE_2, data, tiny.cf_model(), e, llm, folder, seed=3, mesh=mesh, console=quiet())


# where it is interrupted: between two checkpoints, after at least one
STAGES = {"stage 0": (_stage_0, 3), "stage 1": (_stage_1, 5), "stage 2": (_stage_2, 3)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(stage, data, tmp_path, monkeypatch):
    train, stop_at = STAGES[stage]
    uninterrupted = train(data, tmp_path / "whole")

    made, run = [], loop.run

    def counted(step, *arguments, interrupt_at: int | None = None, **options):
        def one(state, i):
            if i == interrupt_at:
                raise Interrupted
            made.append(i)
            return step(state, i)

        return run(one, *arguments, **options)

    def interrupted(*arguments, **options):
        return counted(*arguments, interrupt_at=stop_at, **options)

    monkeypatch.setattr(loop, "run", interrupted)
    with pytest.raises(Interrupted):
        train(data, tmp_path / "resumed")
    assert made == list(range(stop_at))
    made.clear()
    monkeypatch.setattr(loop, "run", counted)
    resumed = train(data, tmp_path / "resumed")
    assert 0 < made[0] < stop_at, "it goes on from a checkpoint, not from the start"
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)

    if stage == "stage 0":
        made.clear()
        jax.tree.map(np.testing.assert_array_equal, train(data, tmp_path / "resumed"), uninterrupted)
        assert made == [], "a finished stage is not trained again"


def test_another_seed_gives_another_model(data, tmp_path):
    one, _ = cf.train_cf(tiny.STAGE_0, data, tmp_path / "3", seed=3, devices=jax.devices()[:1], console=quiet())
    other, _ = cf.train_cf(tiny.STAGE_0, data, tmp_path / "4", seed=4, devices=jax.devices()[:1], console=quiet())
    assert (np.asarray(one.E) != np.asarray(other.E)).all()


def test_the_selected_epoch_is_the_best_or_the_last(data, tmp_path, monkeypatch):
    figures = {2: 0.2, 4: 0.9, 6: 0.1}

    def trained(select: str, epochs: int):
        values = iter(figures.values())
        monkeypatch.setattr(cf, "make_validation", lambda *_: lambda weights: {"ndcg@10": next(values)})
        config, folder = (
            dataclasses.replace(tiny.STAGE_0, select=select, epochs=epochs),
            tmp_path / f"{select} {epochs}",
        )
        return cf.train_cf(config, data, folder, seed=0, devices=jax.devices()[:1], console=quiet())

    (best, curves), (last, _), (fourth, _) = trained("best", 6), trained("last", 6), trained("last", 4)
    assert curves["ndcg@10"] == [[epoch, value] for epoch, value in figures.items()]
    jax.tree.map(np.testing.assert_array_equal, best.params, fourth.params)
    assert (np.asarray(best.E) != np.asarray(last.E)).any()


def test_an_ill_fated_learning_rate_is_told_by_epoch_and_optimiser_step(data, tmp_path):
    config = dataclasses.replace(tiny.STAGE_0, learning_rate=1e30, batch=8, dropout=0.0)  # 3 steps an epoch
    with pytest.raises(UserError) as error:
        cf.train_cf(config, data, tmp_path, seed=0, devices=jax.devices()[:1], console=quiet())
    assert re.fullmatch(
        r"stage 0: SASRec: loss is (nan|inf) in epoch 1, optimiser step [23] of 3; nothing was saved yet; "
        r"lower the learning rate",
        str(error.value),
    )


# ------------------------------------------------------------------------------------------------ the loop by itself


def simple(folder: Path, steps: int = 20, *, bad: dict | None = None, console: Console | None = None, **options):
    """Counts up; step i reports `bad[i]` in place of its loss if there is such an entry."""
    bad = bad or {}

    def step(state, i):
        return {"n": state["n"] + 1}, {"loss": jnp.asarray(bad.get(i, 1.0 / (i + 1))), "other": jnp.asarray(float(i))}

    checkpoints = Checkpoints(folder, best_metric=options.pop("best_metric", None))
    options = {"log_every": 4, "save_every": 8, "step_name": "step"} | options
    try:
        return loop.run(
            options.pop("step", step),
            options.pop("state", {"n": jnp.asarray(0.0)}),
            steps=steps,
            checkpoints=checkpoints,
            label="stage",
            items_per_step=2,
            item_name="users",
            console=console or quiet(),
            **options,
        )
    finally:
        checkpoints.close()


def saved(folder: Path):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore({"n": jnp.asarray(0.0)})
    finally:
        checkpoints.close()


def test_curves_are_means_between_reports(tmp_path):
    state, curves = simple(tmp_path)
    assert float(state["n"]) == 20
    assert [at for at, _ in curves["loss"]] == [4, 8, 12, 16, 20]
    np.testing.assert_allclose([value for _, value in curves["other"]], [1.5, 5.5, 9.5, 13.5, 17.5])
    np.testing.assert_allclose(curves["loss"][0][1], np.mean([1, 1 / 2, 1 / 3, 1 / 4]), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_last_good_checkpoint(tmp_path, value):
    with pytest.raises(UserError) as error:
        simple(tmp_path, bad={13: value, 14: value})
    assert str(error.value) == (
        f"stage: loss is {value} in step 14; the checkpoint of step 8 is kept; lower the learning rate"
    )
    step, state, meta = saved(tmp_path)
    assert (step, float(state["n"])) == (8, 8.0)
    assert [at for at, _ in meta["curves"]["loss"]] == [4, 8]


def test_where_a_step_is_an_epoch_the_optimiser_step_inside_is_named(tmp_path):
    def epoch(state, i):
        loss = jnp.ones(77).at[16:].set(jnp.nan if i == 2 else 1.0)
        return {"n": state["n"] + 1}, {"loss": loss}

    with pytest.raises(UserError) as error:
        simple(tmp_path, 6, step=epoch, step_name="epoch", log_every=2, save_every=2)
    assert "loss is nan in epoch 3, optimiser step 17 of 77; the checkpoint of epoch 2 is kept" in str(error.value)


def test_nothing_saved_yet_is_said(tmp_path):
    with pytest.raises(UserError, match=r"loss is nan in step 1; nothing was saved yet"):
        simple(tmp_path, bad={0: np.nan})
    assert saved(tmp_path) is None


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    """The loss of a step is that of the weights before it: the last step before a save may have broken them."""

    def step(state, i):
        return {"n": state["n"] + (jnp.nan if i == 15 else 1)}, {"loss": jnp.asarray(1.0)}

    with pytest.raises(UserError, match=r"the weights are not finite after step 16; the checkpoint of step 8 is kept"):
        simple(tmp_path, step=step)
    assert saved(tmp_path)[0] == 8


def test_an_evaluation_that_is_not_finite_is_never_saved(tmp_path):
    def evaluate(state):
        return {"ndcg@10": float("nan") if float(state["n"]) > 8 else 0.5}

    with pytest.raises(UserError, match=r"ndcg@10 is nan after step 16; the checkpoint of step 8 is kept"):
        simple(tmp_path, evaluate=evaluate, best_metric="ndcg@10")
    assert saved(tmp_path)[0] == 8


def test_a_damaged_checkpoint_is_reported_on_the_console_and_trained_again(tmp_path):
    simple(tmp_path)
    for path in (tmp_path / "checkpoints" / "20" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    out = io.StringIO()
    state, curves = simple(tmp_path, console=Console(file=out, width=40))
    assert float(state["n"]) == 20
    assert len(curves["loss"]) == 5
    first, second = out.getvalue().splitlines()[:2]
    assert first.startswith("checkpoint ")
    assert "20 cannot be read" in first
    assert second == "stage: going on from step 16 of 20"
    again = io.StringIO()
    simple(tmp_path, console=Console(file=again))
    assert again.getvalue() == ""  # healed: nothing to report, nothing to do


def test_the_loop_runs_at_most_one_step_ahead(tmp_path):
    """So that the bar tells what is done, and no more batches are held in memory than two."""
    finished, started = [], []

    class Metric:
        shape, dtype = (), np.dtype(float)

        def __init__(self, i: int):
            self.i = i

        def block_until_ready(self):
            finished.append(self.i)
            return self

        def __array__(self, dtype=None, copy=None):
            return np.asarray(1.0)

    ahead = []

    def step(state, i):
        started.append(i)
        ahead.append(i - max(finished, default=-1))
        return state, {"loss": Metric(i)}

    simple(tmp_path, 12, step=step, log_every=12, save_every=12)
    assert started == list(range(12))
    assert finished == list(range(10))  # the last two are fetched with all the others
    assert max(ahead) == 2


def test_tensorboard_logs_are_written(tmp_path):
    simple(tmp_path, logs=tmp_path / "logs")
    [events] = (tmp_path / "logs").glob("events*")
    assert events.stat().st_size > 100
