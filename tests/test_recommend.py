"""Recommendations, retrieval and written answers on tiny models: who is recommended what, why, and bad input."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console

from allmrec_jax.config import Evaluation, Experiment
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import lists, metrics
from allmrec_jax.evaluation.decode import Decoding
from allmrec_jax.evaluation.generate import generate_answers, judge
from allmrec_jax.evaluation.recommend import leave_one_out, recommend, table
from allmrec_jax.evaluation.retrieve import figures, retrieve, top_of_catalogue
from allmrec_jax.evaluation.titles import doubts, find_items
from allmrec_jax.models import ncf
from allmrec_jax.models.cf_model import CFModel
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.training.inject import init_heads
from allmrec_jax.training.mesh import make_mesh


class Trained(Pipeline):
    """A pipeline whose stages are there already: random ones."""

    @property
    def scores_folder(self):
        folder = self.workdir / "evaluation"
        folder.mkdir(exist_ok=True, parents=True)
        return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Trained:
    root = tmp_path_factory.mktemp("work")
    evaluation = Evaluation(candidates=4, batch=2, resamples=50)
    x = Experiment(cf=tiny.STAGE_0, align=tiny.STAGE_1, llm=tiny.STAGE_2, evaluation=evaluation)
    made, mesh, e = Trained(x, root, console=Console(file=io.StringIO())), make_mesh(1, 1), tiny.joint_embeddings()
    llm = tiny.frozen_llm(mesh)
    embed = jnp.asarray(jax.device_get(llm.weights["weights"]["embed"]))
    x_u = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    made.__dict__ |= {
        "dataset": tiny.dataset(root / "data"),
        "_cf": (tiny.cf_model(), {}),
        "mesh": mesh,
        "llm": llm,
        "item_table": e,
        "_heads": (init_heads(jax.random.key(0), jnp.asarray(x_u), jnp.asarray(e[1:]), embed), {}),
    }
    return made


# ------------------------------------------------------------------------------------------------ recommendations


def test_new_items_in_the_order_of_both_ranks(pipeline):
    answer = recommend(pipeline, user="u3", k=3, candidates=6)
    rows, titles = answer["recommendations"], [row["title"] for row in answer["recommendations"]]
    assert len(set(titles)) == 3
    had = pipeline.dataset.sequence(3)
    assert not {pipeline.dataset.item_keys[i] for i in had} & {row["item"] for row in rows}
    assert [row["mean_rank"] for row in rows] == sorted((row["cf_rank"] + row["llm_rank"]) / 2 for row in rows)
    assert answer["candidates"] == 6
    assert "reasons" not in rows[0]


def test_somebody_new_is_told_how_titles_were_taken(pipeline):
    answer = recommend(pipeline, titles=["film 7", "Film  12", "ilm 39"], k=2, candidates=5)
    assert answer["history"] == ["Film 7", "Film 12", "Film 39"]
    assert answer["notes"] == ["'ilm 39' was taken for 'Film 39'"]
    out = io.StringIO()
    Console(file=out, width=100).print(table(answer))
    assert "'ilm 39' was taken for 'Film 39'." in " ".join(out.getvalue().split())


def test_a_list_of_one_s_own_is_ranked_and_repeats_count_once(pipeline):
    named = ["Film 1", "Film 2", "film 1", "Film 30"]
    answer = recommend(pipeline, user="u3", k=9, among=named)
    assert {row["title"] for row in answer["recommendations"]} == {"Film 1", "Film 2", "Film 30"}
    assert answer["notes"] == ["1 of the candidates were named before, and count once"]
    [only] = recommend(pipeline, user="u3", among=["Film 5"])["recommendations"]
    assert (only["title"], only["cf_rank"], only["llm_rank"]) == ("Film 5", 1, 1)


def test_any_title_may_be_written_but_those_of_the_history(pipeline):
    answer = recommend(pipeline, user="u3", k=4, candidates=5, everything=True)
    rows = answer["recommendations"]
    assert len({row["item"] for row in rows}) == 4
    likelihoods = [row["log_likelihood"] for row in rows]
    assert likelihoods == sorted(likelihoods, reverse=True)
    assert not {pipeline.dataset.item_keys[i] for i in pipeline.dataset.sequence(3)} & {row["item"] for row in rows}
    assert answer["source"] == "all"


def test_reasons_are_differences_of_likelihoods_without_each_item(pipeline):
    """Against rankings of the histories without it, one at a time."""
    answer = recommend(pipeline, titles=["Film 7", "Film 12", "Film 39"], k=2, candidates=5, reasons=True)
    by_title = {f"Film {i}": i for i in range(1, 40)}
    pool = np.array([3, 9, 20])
    moved = leave_one_out(pipeline, [7, 12, 39], pool, pool[:2])
    ranker = pipeline.ranker(pipeline.heads, candidates=3)

    def likelihood(history):
        window = np.zeros((1, 10), np.int32)
        window[0, 10 - len(history) :] = history
        return ranker([history], pool[None], pipeline.cf.x_u(window))[0]

    whole = likelihood([7, 12, 39])
    for column, reasons in enumerate(moved):
        assert len(reasons) == 3
        sizes = [abs(change) for _, change, _ in reasons]
        assert sizes == sorted(sizes, reverse=True)
        for item, change, _ in reasons:
            without = likelihood([i for i in (7, 12, 39) if i != item])
            np.testing.assert_allclose(change, whole[column] - without[column], rtol=1e-3, atol=1e-4)
    for row in answer["recommendations"]:
        assert {by_title[reason["title"]] for reason in row["reasons"]} == {7, 12, 39}
    out = io.StringIO()
    Console(file=out, width=120).print(table(answer))
    assert "what moved the LLM" in out.getvalue()


def test_fewer_items_than_candidates_are_ranked_all_the_same(pipeline):
    titles = [f"Film {i}" for i in range(1, 38)]
    answer = recommend(pipeline, titles=titles, k=9, candidates=20)
    assert len(answer["recommendations"]) == 3
    assert answer["notes"] == ["there are only 3 items beside the history"]


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ({"titles": []}, "the history is empty"),
        ({"titles": [" "]}, "a title is empty"),
        ({"titles": ["Casablanca"]}, "no title like 'Casablanca'"),
        ({"titles": ["Film"]}, "fits several titles"),
        ({"user": "nobody"}, "there is no user 'nobody'"),
        ({"user": "u3", "k": 0}, "-k and --candidates must be at least 1"),
        ({"user": "u3", "among": ["Film 1"], "everything": True}, "either --among or --all"),
        ({"user": "u3", "among": ["Film 1", "nothing"]}, "no title like 'nothing'"),
    ],
)
def test_what_makes_no_sense_is_said(pipeline, asked, hint):
    with pytest.raises(UserError, match=hint):
        recommend(pipeline, **asked)


def test_titles_are_found_by_parts_and_by_likeness_and_doubts_are_kept(tmp_path):
    titles = ["Alien", "Aliens", "Heat", "Heat", "The Big Heat", "Toy Story 2", "Toy Story", None]
    dataset = tiny.of_sequences(tmp_path, [[1, 4, 4, 4, 2], [4, 6, 7, 5, 1]], 8, titles=titles)
    found = find_items(dataset, ["ALIEN", "heat", "big heat", "story", "Toy Strory"])
    assert [match.item for match in found] == [1, 4, 5, 7, 7]
    assert [match.how for match in found] == ["equal", "equal", "within", "within", "near"]
    assert found[1].others == ("Heat (i3)",)
    said = doubts(found)
    assert said[0] == "'heat' was taken for 'Heat'; it could also be Heat (i3)"
    assert said[2] == "'story' was taken for 'Toy Story'; it could also be Toy Story 2"
    assert len(said) == 4


# ------------------------------------------------------------------------------------------------------ retrieval


@pytest.mark.parametrize("new_only", [False, True])
def test_the_llm_orders_the_top_of_the_catalogue_and_nothing_beyond(pipeline, new_only):
    users = np.flatnonzero(pipeline.dataset.has_target("test"))
    found = retrieve(pipeline, users, n=5, new_only=new_only, heads=pipeline.heads)
    cf, ours = found.ranks["cf"], found.ranks["a-llmrec"]
    np.testing.assert_array_equal(found.found, cf < 5)
    assert found.found.any()
    np.testing.assert_array_equal(ours[cf >= 5], cf[cf >= 5])
    assert (ours[cf < 5] < 5).all()
    assert (ours != cf).any()
    again = retrieve(pipeline, users, n=5, new_only=new_only, heads=pipeline.heads)
    np.testing.assert_array_equal(again.ranks["a-llmrec"], ours)
    made = figures(found, seed=0, resamples=50)
    assert made["found"] == made["models"]["cf"]["hit@5"]["value"] == made["models"]["a-llmrec"]["hit@5"]["value"]
    expected = metrics.metrics_of(ours)["ndcg@10"].mean() - metrics.metrics_of(cf)["ndcg@10"].mean()
    np.testing.assert_allclose(made["differences"]["a-llmrec"]["cf"]["ndcg@10"]["value"], expected)


@pytest.mark.parametrize("model", ["a product", "a network"])
def test_the_top_is_that_of_all_scores_sorted(model):
    random = np.random.default_rng(0)
    if model == "a product":
        cf = tiny.cf_model()
    else:
        config = ncf.NCFConfig(n_items=tiny.N_ITEMS, n_users=9, width=8)
        cf = CFModel(config, jax.tree.map(jnp.asarray, ncf_weights(config)), np.eye(8, dtype=np.float32))
    x_u = random.normal(size=(6, 8)).astype(np.float32)
    targets = random.integers(1, 41, 6)
    without = np.stack([random.permutation(40)[:9] + 1 for _ in range(6)])
    without[0, 4:] = 0
    items, ranks = top_of_catalogue(cf, x_u, targets, 7, without)
    scores = cf.scores(x_u, np.tile(np.arange(41), (6, 1)))
    for user in range(6):
        left = [i for i in range(1, 41) if i == targets[user] or i not in without[user]]
        order = sorted(left, key=lambda i: -scores[user, i])
        np.testing.assert_array_equal(items[user], order[:7])
        assert ranks[user] == order.index(targets[user])


def ncf_weights(config):
    from allmrec_jax.models import params

    return params.init(jax.random.key(0), ncf.describe(config))


def test_more_than_there_is_cannot_be_retrieved(pipeline):
    users = np.flatnonzero(pipeline.dataset.has_target("test"))
    with pytest.raises(UserError, match="n is 41, but there are 40 items"):
        retrieve(pipeline, users, n=41, heads=pipeline.heads)


# ------------------------------------------------------------------------------------------------ written answers


def test_written_answers_are_kept_and_judged(pipeline, tmp_path):
    asked = lists.draw(pipeline.dataset, "test", seed=0, most=5, candidates=4)
    options = {"heads": pipeline.heads, "decoding": Decoding(new=5), "saved": tmp_path / "answers.json"}
    written = generate_answers(pipeline, asked, **options)
    assert len(written.texts) == len(written.answers) == len(written.valid) == 5
    assert set(written.hits) == {"exact", "substring"}
    saved = json.loads((tmp_path / "answers.json").read_text())
    saved["texts"][:2] = ["kept", None]
    (tmp_path / "answers.json").write_text(json.dumps(saved))
    assert generate_answers(pipeline, asked, **options).texts == ["kept", *written.texts[1:]]
    (tmp_path / "answers.json").write_text("{")
    assert generate_answers(pipeline, asked, **options).texts == written.texts
    other = generate_answers(pipeline, asked, **options | {"decoding": Decoding(new=3)})
    assert all(len(a) <= len(b) for a, b in zip(other.texts, written.texts, strict=True))


def test_a_written_title_is_a_hit_and_an_answer_among_the_candidates_valid(pipeline):
    asked = lists.draw(pipeline.dataset, "test", seed=0, most=3, candidates=4)
    titles = ["No Title" if title is None else title for title in pipeline.dataset.titles()]
    right, wrong = titles[asked.targets[0]], titles[next(i for i in asked.candidates[1] if i != asked.targets[1])]
    found = judge([f' "{right.upper()}"\nmore', f'"{wrong}"', "nothing of the kind"], asked, pipeline.dataset.titles())
    assert found.hits["exact"].tolist() == [True, False, False]
    assert found.valid.tolist() == [True, True, False]
