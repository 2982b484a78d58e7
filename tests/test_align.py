"""Stage 1: both recipes, groups of texts, the frozen encoder, the tables and what is said of them."""

import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from rich.console import Console

from allmrec_jax.data import batches, text_groups
from allmrec_jax.data.candidates import draw_for_test
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import alignment as quality
from allmrec_jax.evaluation import embedding_only
from allmrec_jax.models import alignment, bert, params, text_encoder
from allmrec_jax.training import align, align_batches, align_step

STILL = dataclasses.replace(tiny.STAGE_1, train_encoder=False, epochs=2, save_every=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def fewer_shapes(monkeypatch):
    """Fewer to compile, where they are not what is tested."""
    monkeypatch.setattr(text_groups, "MOST_SIZES", 1)


def train(config, data, folder, *, devices: int = 1, encoder=None, **options):
    said = io.StringIO()
    aligned, curves = align.train_align(
        config,
        data,
        tiny.cf_model(),
        encoder or tiny.encoder(),
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
def test_every_text_stands_in_one_row_that_holds_it(lengths, texts, devices):
    random = np.random.default_rng(1)
    batches = [random.choice(len(lengths), texts, replace=False) for _ in range(8)]
    samples = [lengths[b][text_groups.deal(lengths[b], devices)[0]] for b in batches]
    shapes = text_groups.choose_shapes(samples, int(lengths.max()), most_tokens=1024, span=768, compiling=6)
    assert len({width for _, width in shapes}) <= 2
    assert len(shapes) <= 2 * text_groups.MOST_SIZES
    assert all(rows == 1 or rows * width <= 1024 for rows, width in shapes)
    for batch in batches:
        shares = random.random(texts).astype(np.float32)
        groups = text_groups.group(batch, shares, lengths, shapes, most=-(-texts // devices), devices=devices)
        assert len(groups.shape) % devices == 0
        there = groups.starts < text_groups.ABSENT
        assert sorted(groups.texts[there]) == sorted(batch)
        assert dict(zip(groups.texts[there], groups.shares[there], strict=True)) == dict(
            zip(batch, shares, strict=True)
        )
        assert (groups.shares[~there] == 0).all()
        for shape, rows, starts, kept in zip(groups.shape, groups.texts, groups.starts, there, strict=True):
            assert (shape >= 0) == kept.any()
            most, width = shapes[shape]
            assert not kept[most:].any()
            for row, start, of_row in zip(rows, starts, kept, strict=True):
                ends = start[of_row] + lengths[row[of_row]]
                assert (start[of_row] == np.append(0, ends)[: len(ends)]).all()  # one after the other
                assert (ends <= width).all()
        assert groups.tokens[0] == lengths[batch].sum()
        assert groups.tokens[1] == sum(np.prod(shapes[shape]) for shape in groups.shape if shape >= 0)


def _padding(lengths, texts: int, steps: int, **options) -> tuple[float, tuple]:
    random = np.random.default_rng(2)

    def batch():
        return random.choice(len(lengths), random.integers(texts - 4, texts + 1), replace=False)

    options = {"most_tokens": 1024, "span": 768, "compiling": 6000 / steps} | options
    shapes = text_groups.choose_shapes([lengths[batch()] for _ in range(32)], int(lengths.max()), **options)
    tokens = np.zeros(2)
    for _ in range(50):
        b = batch()
        tokens += text_groups.group(b, np.ones(len(b), np.float32), lengths, shapes, most=texts).tokens
    return 1 - tokens[0] / tokens[1], shapes


@pytest.mark.parametrize("texts", [58, 30])
def test_under_a_tenth_is_padding(lengths, texts):
    padding, shapes = _padding(lengths, texts, steps=3000)
    assert padding < 0.10
    _, few = _padding(lengths, texts, steps=30)
    assert len(few) < len(shapes)  # short training does not pay for many compilations


def test_under_a_tenth_is_padding_of_short_texts_too():
    """As long as titles of films: 10 to 32 tokens. Ten epochs of ml-100k are 300 steps."""
    lengths = np.clip(np.random.default_rng(0).gamma(14, 1, 1400).astype(int), 8, 32)
    padding, shapes = _padding(lengths, 32, steps=300)
    assert padding < 0.10
    assert len(shapes) <= 3


def test_large_batches_are_sampled(monkeypatch):
    """The search looks at about as many texts, whatever the batch."""
    random, seen = np.random.default_rng(0), []
    monkeypatch.setattr(text_groups, "choose_shapes", lambda samples, *_, **__: seen.append(samples) or ((1, 40),))
    for rows in (32, 1024):
        drawing = _drawing(np.arange(1, 2049), random.integers(1, 500, 2048), 5000)
        steps = align_batches.Steps(
            align_step.spans(2048, rows, None), rows, drawing, align_batches.in_file_order(2048), jax.random.key(0)
        )
        align_batches.TextBatches(steps, random.integers(3, 40, 5001), both=False, devices=1, training=100, width=8)
    assert [len(samples) for samples in seen] == [62, 4]
    assert max(len(sample) for sample in seen[0]) == 32


@pytest.mark.parametrize("devices", [1, 4])
def test_shapes_and_devices_change_nothing_but_rounding(data, tmp_path, monkeypatch, devices):
    """With the encoder's dropout, whose masks know neither of rows nor of widths."""
    config = dataclasses.replace(tiny.STAGE_1, epochs=1, items="both", score="mean")
    found = []
    longest = max(len(text.encode()) for text in align.item_texts(data, config.text)) + 2  # tokens are bytes here
    for number, shapes in enumerate((((1, longest),), ((2, 40), (1, 96), (2, 96)))):
        monkeypatch.setattr(text_groups, "choose_shapes", lambda *_, shapes=shapes, **__: shapes)
        on = devices if number else 1
        aligned, curves, _ = train(config, data, tmp_path / str(number), devices=on)
        found.append((aligned.parameters, aligned.e, aligned.q, curves))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), *found)
    plain, *_ = train(dataclasses.replace(config, encoder_dropout=False), data, tmp_path / "plain")
    assert np.abs(plain.q - found[0][2]).max() > 1e-4


@pytest.mark.usefixtures("fewer_shapes")
def test_less_memory_changes_nothing_but_rounding(data, tmp_path):
    config = dataclasses.replace(tiny.STAGE_1, epochs=1)
    usual, *_ = train(config, data, tmp_path / "usual")
    less, _, said = train(dataclasses.replace(config, remat=True, group_tokens=64), data, tmp_path / "less")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), usual.parameters, less.parameters)
    assert "text shapes in one compiled program" in said


@pytest.mark.parametrize("architecture", bert.ARCHITECTURES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_text_among_others_in_a_row_is_encoded_as_if_alone(architecture, pooling):
    """Value and gradient, under dropout; absent texts and empty rows give no NaN."""
    c = dataclasses.replace(tiny.ENCODER, architecture=architecture, pooling=pooling, normalize=True)
    tree = params.init(jax.random.key(1), bert.describe(c))
    encoder = text_encoder.build(
        c, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(2), x.shape), tree), None
    )
    random = np.random.default_rng(0)
    texts = [random.integers(2, 280, n).astype(np.int32) for n in (9, 5, 3, 12)]
    keys, towards = jax.random.split(jax.random.key(3), 4), random.normal(size=(4, c.hidden_size)).astype(np.float32)

    def alone(weights):
        module = nnx.merge(encoder.graph, weights)
        rows = [
            module(jnp.asarray(t)[None], jnp.ones((1, len(t)), bool), keys[i][None])[0] for i, t in enumerate(texts)
        ]
        return jnp.stack(rows)

    def packed(weights):
        tokens = np.full((3, 20), 7, np.int32)
        tokens[0, :17], tokens[1, :12] = np.concatenate(texts[:3]), texts[3]
        none = text_groups.ABSENT
        starts = np.array([[0, 9, 14], [0, none, none], [none] * 3])
        lengths, of_row = np.array([[9, 5, 3], [12, 0, 0], [0, 0, 0]]), np.array([[0, 1, 2], [3, 0, 0], [0, 0, 0]])
        arrays = map(jnp.asarray, (tokens, starts, lengths))
        Q = nnx.merge(encoder.graph, weights).packed(*arrays, keys[of_row], remat=True)
        return jnp.concatenate([Q[0], Q[1, :1]])

    found = [
        jax.jit(jax.value_and_grad(lambda w, Q=Q: (jnp.sum(Q(w) * towards), Q(w)), has_aux=True))(encoder.weights)
        for Q in (alone, packed)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), *found)


def test_dropout_keeps_its_share_whatever_the_text_site_and_place():
    words = jax.random.bits(jax.random.key(0), (64, 1, 1, 2), jnp.uint32)
    place = jnp.arange(64 * 64, dtype=jnp.uint32).reshape(1, 64, 64)
    kept = np.stack([bert.kept(words, site, place, 0.1) for site in range(4)])  # site, text, place, place
    error = np.sqrt(0.09 / 64**2)
    assert abs(kept.mean() - 0.9) < 4 * error / 16
    assert np.abs(kept.mean((2, 3)) - 0.9).max() < 5 * error
    assert np.abs(kept.mean((0, 1)) - 0.9).max() < 5.5 * np.sqrt(0.09 / 256)
    centred = kept - 0.9
    for axis in range(4):  # neighbours of each kind have nothing to do with each other
        together = (centred * np.roll(centred, 1, axis)).mean() / 0.09
        assert abs(together) < 4 / np.sqrt(kept.size)


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
    drawing = {
        "users": users.astype(np.int32),
        "positives": data.targets("train")[users],
        "seen": batches.seen_items(*data.distinct("train"), data.n_items),
    }
    n = len(users)
    return align_batches.Steps(
        align_step.spans(n, n, None), n, drawing, align_batches.in_file_order(n), jax.random.key(0)
    )(0)


def test_an_empty_text_is_not_a_missing_one(tmp_path):
    texts = {"titles": ["A", "", None, "D"], "descriptions": ["", "b", "c", None]}
    data = tiny.of_sequences(tmp_path / "d", [[1, 2, 3, 4]], 4, **texts)
    assert align.item_texts(data, "{title}|{description}")[1:] == ["A|", "|b", "No Title|c", "D|No Description"]


def _drawing(users, positives, n_items):
    seen = batches.seen_items(positives, np.append(0, np.arange(len(users) + 1)), n_items)
    return {"users": users.astype(np.int32), "positives": positives.astype(np.int32), "seen": seen}


def test_steps_are_drawn_on_the_host_wherever_training_runs():
    """What is fetched from the device in training waits for the step in flight."""
    n = 20
    drawing = _drawing(np.arange(1, n + 1), np.random.default_rng(0).integers(1, 9, n), 9)
    spans, expected = align_step.spans(n, 8, None), []
    for device in (jax.devices()[0], jax.devices()[3]):  # the latter in place of an accelerator
        with jax.default_device(device):
            key = jax.random.key(1)
            steps = align_batches.Steps(spans, 8, drawing, align_batches.shuffled(key, n), key)
            expected.append([steps(i) for i in range(6)])
            made = steps._draw(steps._given, steps.order(0), spans[0], 0)
            assert {leaf.device for leaf in jax.tree.leaves(made)} == {jax.devices()[0]}
    jax.tree.map(np.testing.assert_array_equal, *expected)
    assert sorted(np.concatenate([step["who"][step["real"]] for step in expected[0][:3]])) == list(range(n))


def test_chunks_cut_batches_and_not_the_epoch():
    assert align_step.spans(150, 128, 60).tolist() == [[0, 60], [60, 120], [120, 128], [128, 150]]
    assert align_step.spans(64, 32, None).tolist() == [[0, 32], [32, 64]]


@pytest.mark.usefixtures("fewer_shapes")
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


@pytest.mark.usefixtures("fewer_shapes")
def test_half_precision_and_pmap_train_as_well(data, tmp_path):
    config = dataclasses.replace(tiny.STAGE_1, epochs=1, encoder_dropout=False)
    whole, curves, _ = train(config, data, tmp_path / "float32")
    half, others, _ = train(
        dataclasses.replace(config, dtype="bfloat16"), data, tmp_path / "half", devices=2, how="pmap"
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(half.parameters)} == {np.dtype("float32")}
    assert others["loss"][-1][1] == pytest.approx(curves["loss"][-1][1], rel=1e-3)
    np.testing.assert_allclose(half.q, whole.q, atol=2e-3)
    one, two = (train(STILL, data, tmp_path / how, devices=2, how=how)[0] for how in ("shard_map", "pmap"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one.parameters, two.parameters)


def test_an_encoder_of_another_width_than_the_checkpoint_s_is_named(data, tmp_path):
    train(STILL, data, tmp_path)
    wider = dataclasses.replace(tiny.ENCODER, hidden_size=12)
    weights = params.init(jax.random.key(0), bert.describe(wider))
    with pytest.raises(UserError, match=r"f_T.*\(8,") as error:
        train(STILL, data, tmp_path, encoder=text_encoder.build(wider, weights, tiny.encoder().backend))
    assert "\n" not in str(error.value)


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
    # Trained again over them, as where a checkpoint was damaged: they are those of the parameters, not what was there.
    shutil.rmtree(tmp_path / "checkpoints")
    other, _, _ = train(dataclasses.replace(STILL, learning_rate=0.1), data, tmp_path)
    np.testing.assert_allclose(other.e, alignment.encode(other.parameters["f_I"], tiny.cf_model().E), rtol=1e-5)
    assert np.abs(other.e - aligned.e).max() > 1e-3


@pytest.mark.usefixtures("fewer_shapes")
def test_the_last_encoding_is_shown_and_made_by_one_device(data, tmp_path, monkeypatch):
    encode, seen = align.encode_items, []
    monkeypatch.setattr(
        align, "encode_items", lambda *a, console, **k: seen.append((a[1], console)) or encode(*a, console=console, **k)
    )
    train(dataclasses.replace(tiny.STAGE_1, epochs=1), data, tmp_path, devices=4)
    [(weights, console)] = seen
    assert console is not None
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(weights)} == {1}


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
    terminal = Console(file=io.StringIO(), width=80)
    terminal.print(quality.table(found))
    assert "…" not in terminal.file.getvalue()
    every = quality.figures(_aligned(e, e + 1e-4, cf.config.width), data, seed=0, targets="all")
    assert every["retrieval"]["n"] < found["retrieval"]["n"]
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
