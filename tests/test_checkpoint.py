"""Checkpoints: damage is reported and survived, folders belong to one config, files are never half written."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from allmrec_jax.errors import UserError
from allmrec_jax.training.checkpoint import Checkpoints, claim_folder, write_json
from allmrec_jax.training.state import create


def state(value: float) -> dict:
    return {"step": jnp.asarray(int(value)), "params": {"w": jnp.full((64, 64), value), "b": jnp.arange(3.0)}}


def filled(folder: Path, steps=(1, 2), **options) -> None:
    """A folder of checkpoints, each saved with its step as value."""
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, state(step), {"curves": {"loss": [[step, 1 / step]]}})
    checkpoints.close()


def restored(folder: Path, **options):
    """(what `restore` gives, what it warns of), by a fresh process's eyes."""
    checkpoints, warnings = Checkpoints(folder), []
    try:
        return checkpoints.restore(state(0), warn=warnings.append, **options), warnings
    finally:
        checkpoints.close()


def truncate_all(folder: Path) -> int:
    """Cuts every file of a checkpoint in half, as a full disk may."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        os.truncate(path, path.stat().st_size // 2)
    return len(files)


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    filled(tmp_path)
    (step, found, meta), warnings = restored(tmp_path)
    assert step == 2
    assert warnings == []
    assert meta == {"curves": {"loss": [[2, 0.5]]}}
    jax.tree.map(np.testing.assert_array_equal, found, state(2))


def test_an_empty_folder_has_none(tmp_path):
    assert restored(tmp_path) == (None, [])


def test_a_state_given_away_after_saving_is_saved_as_it_was(tmp_path):
    """The next step reuses the buffers of the state (they are donated) while the checkpoint is still being written."""
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    big = {"w": jnp.arange(2.0**21)}
    checkpoints.save(1, big, {})
    for _ in range(3):
        big = overwrite(big)
    jax.block_until_ready(big)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    _, found, _ = checkpoints.restore({"w": jnp.zeros(2**21)})
    checkpoints.close()
    np.testing.assert_array_equal(found["w"], np.arange(2.0**21))


def test_curves_that_grow_after_saving_are_saved_as_they_were(tmp_path):
    checkpoints, meta = Checkpoints(tmp_path), {"curves": {"loss": [[k, 0.5] for k in range(20_000)]}}
    checkpoints.save(1, state(1), meta)
    meta["curves"]["loss"].append([20_000, 0.25])
    checkpoints.close()
    assert len(restored(tmp_path)[0][2]["curves"]["loss"]) == 20_000


# A read of tensorstore's that outlives the failed restore calls back into an event loop that Orbax has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "killed before it was recorded"])
@pytest.mark.parametrize("damage", ["truncated", "a file gone", "the arrays gone", "emptied"])
def test_a_damaged_checkpoint_is_reported_and_the_earlier_one_used(tmp_path, damage, recorded):
    filled(tmp_path)
    newest = tmp_path / "checkpoints" / "2"
    if not recorded:
        (newest / "files.json").unlink()
    if damage == "truncated":
        assert truncate_all(newest / "state") > 0
    elif damage == "a file gone":
        (newest / "state" / "manifest.ocdbt").unlink()
    elif damage == "the arrays gone":
        shutil.rmtree(newest / "state")
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    (step, found, _), warnings = restored(tmp_path)
    assert step == 1
    assert len(warnings) == 1
    assert "2 cannot be read" in warnings[0]
    jax.tree.map(np.testing.assert_array_equal, found, state(1))


def test_one_altered_bit_is_damage(tmp_path):
    random = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, random, {})
    checkpoints.close()
    largest = max((tmp_path / "checkpoints" / "2").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    checkpoints, warnings = Checkpoints(tmp_path), []
    step, found, _ = checkpoints.restore({"w": jnp.zeros((256, 256))}, warn=warnings.append)
    checkpoints.close()
    assert step == 1
    assert "was cut short or altered" in warnings[0]
    np.testing.assert_array_equal(found["w"], random["w"])


def test_one_half_written_is_as_if_it_were_not_there(tmp_path):
    filled(tmp_path)
    folder = tmp_path / "checkpoints"
    os.rename(folder / "2", folder / "2.orbax-checkpoint-tmp")
    truncate_all(folder / "2.orbax-checkpoint-tmp")
    (step, _, _), _ = restored(tmp_path)
    assert step == 1


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(tmp_path):
    filled(tmp_path)
    truncate_all(tmp_path / "checkpoints" / "2" / "state")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(state(0), warn=lambda text: None)[0] == 1
    checkpoints.save(2, state(20), {"curves": {}})
    checkpoints.close()
    (step, found, _), warnings = restored(tmp_path)
    assert (step, warnings) == (2, [])
    assert float(found["params"]["w"][0, 0]) == 20


def test_a_good_checkpoint_is_left_as_it_is(tmp_path):
    filled(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state(20), {"curves": {}})
    checkpoints.close()
    assert float(restored(tmp_path)[0][1]["params"]["w"][0, 0]) == 2


def test_if_all_are_damaged_one_line_says_what_to_do(tmp_path):
    filled(tmp_path)
    for step in (1, 2):
        truncate_all(tmp_path / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read; delete .* to train again") as error:
        restored(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": jnp.zeros((64, 32))}, r"params/w is \(64, 64\) there and \(64, 32\) in this run"),
        ({"b": jnp.zeros(())}, r"params/b is \(3,\) there and \(\) in this run"),
        ({"more": jnp.zeros(2)}, r"params/more is missing there and \(2,\) in this run"),
        ({"b": None}, r"params/b is \(3,\) there and missing in this run"),
        ({"w": {"deep": jnp.zeros((64, 64))}}, r"params/w/deep is missing there and \(64, 64\) in this run"),
    ],
)
def test_one_of_another_model_is_refused_by_the_first_parameter_that_differs(tmp_path, change, message):
    filled(tmp_path)
    checkpoints, warnings = Checkpoints(tmp_path), []
    like = state(0)
    with pytest.raises(UserError, match=f"2 holds another model: {message}; choose another --workdir") as error:
        checkpoints.restore(like | {"params": like["params"] | change}, warn=warnings.append)
    checkpoints.close()
    assert "\n" not in str(error.value)
    assert warnings == []
    assert restored(tmp_path)[0][0] == 2  # nothing was lost


def test_the_trained_parameters_are_named_before_the_optimiser_s(tmp_path):
    """What each stage saves: a named tuple, with the optimiser's own in it."""
    optimiser = optax.adamw(optax.linear_schedule(1e-3, 0, 10))
    whole = {"encoder": {"scale": jnp.ones(8)}, "G": [jnp.ones((8, 4)), jnp.ones(4)], "frozen": None}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, create(whole, optimiser), {})
    assert checkpoints.restore(create(whole, optimiser))[0] == 3
    wide = whole | {"encoder": {"scale": jnp.ones(16)}}
    with pytest.raises(UserError, match=r"params/encoder/scale is \(8,\) there and \(16,\) in this run"):
        checkpoints.restore(create(wide, optimiser))
    checkpoints.close()


def test_the_newest_two_are_kept_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, best_metric="ndcg@10")
    for step, value in enumerate([0.1, 0.5, 0.3, 0.2, 0.4], 1):
        checkpoints.save(step, state(step), {}, metrics={"ndcg@10": value})
    checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [2, 4, 5]
    checkpoints = Checkpoints(tmp_path, best_metric="ndcg@10")
    assert checkpoints.restore(state(0))[0] == 5
    best, found, _ = checkpoints.restore(state(0), best=True)
    checkpoints.close()
    assert best == 2
    assert float(found["params"]["w"][0, 0]) == 2


def test_a_damaged_best_falls_back_to_the_best_of_the_others(tmp_path):
    checkpoints = Checkpoints(tmp_path, best_metric="ndcg@10", keep=3)
    for step, value in enumerate([0.5, 0.1, 0.3, 0.2], 1):
        checkpoints.save(step, state(step), {}, metrics={"ndcg@10": value})
    checkpoints.close()
    truncate_all(tmp_path / "checkpoints" / "1")
    checkpoints, warnings = Checkpoints(tmp_path, best_metric="ndcg@10", keep=3), []
    assert checkpoints.restore(state(0), best=True, warn=warnings.append)[0] == 3
    assert len(warnings) == 1
    for step in (5, 6, 7):  # what is kept goes on being the best of what can be read
        checkpoints.save(step, state(step), {}, metrics={"ndcg@10": 0.01 * step})
    assert checkpoints.restore(state(0), best=True, warn=warnings.append)[0] == 3
    checkpoints.close()


# ---------------------------------------------------------------------------------------------------------- folders


def identity(**changes) -> dict:
    return {"seed": 0, "cf": {"width": 50, "epochs": 200}, "data": {"name": "ml-100k"}} | changes


def test_a_folder_of_another_config_is_refused_by_field(tmp_path):
    folder = tmp_path / "cf"
    claim_folder(folder, identity())
    claim_folder(folder, identity())
    before = (folder / "config.json").read_text()
    with pytest.raises(UserError, match=r"made with cf\.width=50, but now it is 64; choose another --workdir"):
        claim_folder(folder, identity(cf={"width": 64, "epochs": 200}))
    with pytest.raises(UserError, match=r"data\.of='\(absent\)', but now it is 128"):
        claim_folder(folder, identity(data={"name": "ml-100k", "of": 128}))
    with pytest.raises(UserError, match="seed=0, but now it is 1"):
        claim_folder(folder, identity(seed=1))
    assert (folder / "config.json").read_text() == before


def test_a_field_younger_than_the_folder_counts_as_its_default(tmp_path):
    folder, cf = tmp_path / "cf", {"width": 50, "epochs": 200}
    claim_folder(folder, identity())
    claim_folder(folder, identity(cf=cf | {"negatives": 1}))
    with pytest.raises(UserError, match=r"cf\.negatives=1, but now it is 2"):
        claim_folder(folder, identity(cf=cf | {"negatives": 2}))


@pytest.mark.parametrize("content", ['{"seed": ', "[1]", "", "\x00\xff"])
def test_a_damaged_config_file_is_named(tmp_path, content):
    claim_folder(tmp_path / "cf", identity())
    (tmp_path / "cf" / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json is damaged; delete"):
        claim_folder(tmp_path / "cf", identity())


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "metrics.json"
    write_json(path, {"b": 1, "a": [1.5, None]})
    assert json.loads(path.read_text()) == {"a": [1.5, None], "b": 1}
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"fine": 1, "not JSON": object()})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]
    write_json(path, {"c": 2})
    assert json.loads(path.read_text()) == {"c": 2}
