"""Stage 1: both recipes, groups of texts, the frozen encoder, the tables and what is said of them."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console

from allmrec_jax.data import text_groups
from allmrec_jax.data.candidates import draw_for_test
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import alignment as quality
from allmrec_jax.evaluation import embedding_only
from allmrec_jax.models import alignment, params
from allmrec_jax.training import align, align_step

STILL = dataclasses.replace(tiny.STAGE_1, train_encoder=False, epochs=2, save_every=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.dataset(tmp_path_factory.mktemp("data") / "tiny")


def train(config, data, folder, *, devices: int = 1, **options):
    said = io.StringIO()
    aligned, curves = align.train_align(
        config,
        data,
        tiny.cf_model(),
        tiny.encoder(),
        folder,
        seed=3,
        devices=jax.devices()[:devices],
        console=Console(file=said, width=200),
        **options,
    )
    return aligned, curves, said.getvalue()


# ------------------------------------------------------------------------------------------------- groups of texts


@pytest.fixture(scope="module")
def lengths():
    """As many tokens as texts of Luxury_Beauty have: lognormal, cut at 256."""
    return np.clip(np.random.default_rng(0).lognormal(4.43, 0.66, 6000).astype(int), 3, 256)


@pytest.mark.parametrize(("texts", "devices"), [(58, 1), (30, 1), (58, 4), (3, 8)])
def test_every_text_stands_in_one_group_that_holds_it(lengths, texts, devices):
    random = np.random.default_rng(1)
    batches = [random.choice(len(lengths), texts, replace=False) for _ in range(8)]
    shapes = text_groups.choose_shapes([lengths[b][::devices] for b in batches], lengths, 1024, 256, 1000)
    assert len(shapes) <= text_groups.MOST_SHAPES
    assert all(rows == 1 or rows * width <= 1024 for rows, width in shapes)
    for batch in batches:
        shares = random.random(texts).astype(np.float32)
        groups = text_groups.group(batch, shares, lengths, shapes, most=-(-texts // devices), devices=devices)
        found = groups.texts[groups.shares > 0]
        assert sorted(found) == sorted(batch)
        np.testing.assert_array_equal(groups.shares[groups.shares > 0], shares[[list(batch).index(t) for t in found]])
        for shape, row, share in zip(groups.shape, groups.texts, groups.shares, strict=True):
            kept = row[share > 0]
            assert len(kept) == 0 if shape < 0 else 0 < len(kept) <= shapes[shape][0]
            assert (lengths[kept] <= shapes[shape][1]).all()


@pytest.mark.parametrize("texts", [58, 30])
def test_under_a_tenth_is_padding_over_long_training(lengths, texts):
    random = np.random.default_rng(2)
    batches = [random.choice(len(lengths), texts, replace=False) for _ in range(align.SAMPLES)]
    shapes = text_groups.choose_shapes([lengths[b] for b in batches], lengths, 1024, 256, steps=3000)
    shares, tokens = np.ones(texts, np.float32), np.zeros(2)
    for _ in range(50):
        batch = random.choice(len(lengths), texts, replace=False)
        tokens += text_groups.group(batch, shares, lengths, shapes, most=texts).tokens
    assert 1 - tokens[0] / tokens[1] < 0.105
    few = text_groups.choose_shapes([lengths[b] for b in batches], lengths, 1024, 256, steps=30)
    assert len(few) < len(shapes)  # short training does not pay for many compilations


def test_shapes_change_nothing_without_dropout(data, tmp_path, monkeypatch):
    config = dataclasses.replace(tiny.STAGE_1, epochs=1, encoder_dropout=False, items="both", score="mean")
    found = []
    longest = max(len(text.encode()) for text in align.item_texts(data, config.text)) + 2  # tokens are bytes here
    for number, shapes in enumerate((((1, longest), (4, longest)), ((2, 40), (2, longest)))):
        monkeypatch.setattr(text_groups, "choose_shapes", lambda *_, shapes=shapes: shapes)
        aligned, curves, _ = train(config, data, tmp_path / str(number))
        found.append((aligned.parameters, aligned.e, aligned.q, curves))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), *found)


# ------------------------------------------------------------------------------------------------------- recipes


def test_the_public_code_s_fields_are_those_of_its_recipe():
    reference = tiny.STAGE_1.as_public_code()
    assert reference.text.format(title="A", description="B") == '"A, B"'
    changed = {f.name for f in dataclasses.fields(reference)}
    changed = {name for name in changed if getattr(reference, name) != getattr(tiny.STAGE_1, name)}
    assert changed == {"beta", "score", "items", "cf_dropout", "text", "single_items", "order", "chunk"}


def test_switches_take_terms_out_of_the_loss():
    config, model = tiny.STAGE_1, tiny.cf_model()

    def weights(**changes):
        return align.terms_of(dataclasses.replace(config, **changes), model).weights

    assert weights() == {"match": 1.0, "item": 0.5, "text": 0.5, "rec": 1.0}
    assert weights(match=False)["match"] == 0
    assert weights(reconstruction=False) == {"match": 1.0, "item": 0.0, "text": 0.0, "rec": 1.0}
    assert weights(recommendation=False)["rec"] == 0


def test_users_with_one_training_item_are_left_out_or_kept_with_item_0(data):
    single = np.flatnonzero(data.n_train == 1)
    assert len(single)
    assert not set(data.examples()[0]) & set(single)
    users = data.examples(single=True)[0]
    assert set(single) < set(users)
    assert (data.targets("train")[single] == 0).all()
    drawn = _drawn(data, users)
    kept = np.isin(users[drawn["who"]], single)
    assert (drawn["negative"][kept] == 0).all()
    assert (drawn["negative"][~kept] > 0).all()
    # x_u of an empty history is the last layer norm's bias.
    model = tiny.cf_model()
    empty = model.x_u(np.zeros((1, model.config.maxlen), np.int32))
    np.testing.assert_allclose(empty[0], model.params["last_norm"]["bias"], atol=1e-6)
    assert align.item_texts(data, '"{title}, {description}"')[0] == '"No Title, No Description"'


def _drawn(data, users):
    from allmrec_jax.data import batches

    drawing = {
        "users": jax.numpy.asarray(users, jax.numpy.int32),
        "positives": jax.numpy.asarray(data.targets("train")[users]),
        "seen": batches.seen_items(*data.distinct("train"), data.n_items),
    }
    order, rows = jax.numpy.arange(len(users)), jax.numpy.arange(len(users))
    span = jax.numpy.array([0, len(users)])
    return jax.device_get(align_step.draw(drawing, order, span, rows, 0, jax.random.key(0)))


def test_chunks_cut_batches_and_not_the_epoch():
    assert align_step.spans(150, 128, 60).tolist() == [[0, 60], [60, 120], [120, 128], [128, 150]]
    assert align_step.spans(64, 32, None).tolist() == [[0, 32], [32, 64]]


def test_the_public_code_s_recipe_trains_with_and_without_the_encoder(data, tmp_path):
    """Chunks, CF dropout, users of one item; frozen, on two devices as on one."""
    config = dataclasses.replace(tiny.STAGE_1.as_public_code(), chunk=6, epochs=1)
    _, curves, said = train(config, data, tmp_path / "trained")
    assert np.isfinite([value for points in curves.values() for _, value in points]).all()
    assert "of the encoder's tokens were padding" in said
    assert "text shapes in one compiled program" in said
    still = dataclasses.replace(config, train_encoder=False, epochs=2)
    one, two = (train(still, data, tmp_path / f"frozen{n}", devices=n)[0] for n in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one.parameters, two.parameters)
    without = train(dataclasses.replace(still, cf_dropout=False), data, tmp_path / "still")[0]
    assert np.abs(without.e - one.e).max() > 1e-6


def test_half_precision_and_pmap_train_as_well(data, tmp_path):
    config = dataclasses.replace(tiny.STAGE_1, epochs=1, encoder_dropout=False)
    whole, curves, _ = train(config, data, tmp_path / "float32")
    half, others, _ = train(
        dataclasses.replace(config, dtype="bfloat16"), data, tmp_path / "half", devices=2, how="pmap"
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(half.parameters)} == {np.dtype("float32")}
    assert others["loss"][-1][1] == pytest.approx(curves["loss"][-1][1], rel=0.02)
    np.testing.assert_allclose(half.q, whole.q, atol=0.02)
    one, two = (train(STILL, data, tmp_path / how, devices=2, how=how)[0] for how in ("shard_map", "pmap"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one.parameters, two.parameters)


# ------------------------------------------------------------------------------------------- tables and their check


def test_tables_are_kept_and_mixed_by_how_often_an_item_was_seen(data, tmp_path, monkeypatch):
    aligned, curves, _ = train(STILL, data, tmp_path)
    assert aligned.e.shape == aligned.q.shape == (data.n_items + 1, STILL.joint)
    cold = data.train_counts() <= align.COLD
    assert 0 < cold[1:].sum() < data.n_items
    np.testing.assert_array_equal(aligned.mixed, np.where(cold[:, None], aligned.q, aligned.e))
    encode, encoded = align.encode_items, []
    monkeypatch.setattr(align, "encode_items", lambda *a, **k: encoded.append(1) or encode(*a, **k))
    again, same, _ = train(STILL, data, tmp_path)
    assert not encoded  # they were read
    np.testing.assert_array_equal(again.q, aligned.q)
    assert same == curves
    (tmp_path / align.TABLES).write_bytes(b"PK half")
    mended, _, _ = train(STILL, data, tmp_path)
    assert encoded
    np.testing.assert_allclose(mended.q, aligned.q, rtol=1e-6)


def _aligned(e, q, d=8):
    f_I = params.init(jax.random.key(0), alignment.describe(d, e.shape[1]))
    return align.Aligned(e, q, e, {"f_I": f_I})


def test_retrieval_finds_an_item_s_own_e_and_a_collapse_is_said(data, tmp_path):
    random = np.random.default_rng(0)
    e = random.uniform(size=(data.n_items + 1, 6)).astype(np.float32)
    said = io.StringIO()
    cf, console = tiny.cf_model(), Console(file=said, width=300)
    found = quality.report(_aligned(e, e + 1e-4, cf.config.width), cf, data, tmp_path, seed=0, console=console)
    assert found["retrieval"]["R@1"] == 1.0
    assert found["retrieval"]["n"] < data.n_items  # those that were never the next item
    assert not found["collapsed"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == found
    assert (tmp_path / "embeddings.png").read_bytes().startswith(b"\x89PNG")
    assert "never the next item" in said.getvalue()
    other = quality.figures(_aligned(e, e[random.permutation(len(e))]), data, seed=0)
    assert other["retrieval"]["R@1"] < 0.5
    same = np.ones_like(e)
    collapsed = quality.figures(_aligned(e, same), data, seed=0)
    assert collapsed["collapsed"]
    assert collapsed["spread of q"] == 0
    assert collapsed["retrieval"]["R@1"] < 0.2  # one point for all is no retrieval


def test_ranking_by_e_is_the_cf_model_s_where_the_decoder_gives_back_e_i(data):
    cf, counts = tiny.cf_model(), data.train_counts()
    d, E = cf.config.width, np.asarray(cf.E)
    identity = {"encode": {}, "decode": {"kernel": jnp.eye(d), "bias": jnp.zeros(d)}}
    q = -E  # the very last is first
    aligned = align.Aligned(E, q, np.where((counts <= 5)[:, None], q, E), {"f_I": identity})
    found = embedding_only.figures(aligned, cf, data, seed=0, candidates=6)
    for models in found.values():
        assert models["e"] == models["cf"]
        assert models["q"]["mrr"] != models["e"]["mrr"]
    users = {name: models["cf"]["mrr"]["n"] for name, models in found.items()}
    seen = counts[data.targets("test")[data.has_target("test")]]
    assert users["overall"] == users["seen 5 times at most"] + users["seen more often"] == len(seen)
    assert users["seen more often"] == (seen > 5).sum()
    lists, column = draw_for_test(data, np.flatnonzero(data.has_target("test"))[:1], seed=0, count=6)
    x_u = np.asarray(E[lists[0, column[0]]])[None]  # nearest to its own target
    scores = embedding_only.score(aligned, cf, x_u, lists)
    np.testing.assert_allclose(scores["q"], -scores["cf"], rtol=1e-5)


def test_a_picture_is_coloured_by_categories_that_tell_items_apart():
    categories = [["Beauty", "Skin"], ["Beauty", "Hair"], ["Beauty", "Skin", "Face"], ["Beauty"], ["Beauty", "Hair"]]
    assert quality.main_categories(categories) == ["Skin", "Hair", "Face", "other", "Hair"]
    points = np.random.default_rng(0).normal(size=(50, 1)) * np.array([[3.0, 0.1, 0.0]]) + 7
    assert np.std(quality.plane(points)[:, 0]) > 2


def test_nobody_to_align_is_named(tmp_path):
    data = tiny.dataset(tmp_path / "d", n_users=1, seed=1)
    short = dataclasses.replace(data, offsets=np.array([0, 0, 1]), items=data.items[:1])
    with pytest.raises(UserError, match="nothing to train on"):
        short.examples()
