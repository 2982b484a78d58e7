"""The PyTorch baseline by itself: trains, evaluates, keeps the public code's files, and follows either recipe."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import write_encoder, write_llm, write_movielens

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")

from allmrec_jax import cli, cli_fields  # noqa: E402
from allmrec_jax.comparison import public_checkpoints as public  # noqa: E402
from allmrec_jax.config import CF, Injection, from_dict, load_config  # noqa: E402
from allmrec_jax.data.prompts import Prompt  # noqa: E402
from allmrec_jax.evaluation import lists, metrics  # noqa: E402
from allmrec_jax.pipeline import Pipeline  # noqa: E402
from allmrec_jax.torch_baseline import data, projection, ranking, training  # noqa: E402
from allmrec_jax.torch_baseline.__main__ import main  # noqa: E402
from allmrec_jax.torch_baseline.inject import Injector  # noqa: E402
from allmrec_jax.torch_baseline.llm import in_transformers  # noqa: E402


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("inputs")
    small = {
        "data.name": write_movielens(root / "raw"),
        "align.encoder": write_encoder(root / "encoder"),
        "llm.llm": write_llm(root / "llm"),
        "cf.width": 8,
        "cf.maxlen": 10,
        "cf.batch": 16,
        "cf.epochs": 4,
        "cf.evaluate-every": 2,
        "align.joint": 6,
        "align.batch": 16,
        "align.epochs": 2,
        "llm.history": 2,
        "llm.candidates": 3,
        "llm.batch": 8,
        "evaluation.users": 6,
        "evaluation.candidates": 4,
        "evaluation.resamples": 100,
    }
    return [str(part) for name, value in small.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def done(options, tmp_path_factory) -> tuple[Path, dict]:
    """(root, figures) of a run of its command line, which writes JSON."""
    root = tmp_path_factory.mktemp("baseline") / "A-LLMRec"
    return root, run(root, options)


def run(root: Path, options: list[str], *more: str) -> dict:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["--config", "demo", "--root", str(root), *options, *more]) == 0
    return json.loads(out.getvalue()[out.getvalue().index("{") :])


def test_it_trains_and_evaluates_and_reads_again_what_it_has_trained(done, options):
    root, figures = done
    assert figures["a-llmrec"]["hit@1"]["n"] == 6
    assert run(root, options) == figures


def test_its_files_are_imported_and_are_the_same_model_here(done, options, tmp_path):
    root, figures = done
    name = public.find(root, None).name
    wanted = ("align.encoder", "llm.llm", "llm.history")
    some = [part for at in range(0, len(options), 2) if options[at][2:] in wanted for part in options[at : at + 2]]
    x = load_config("demo").llm  # its prompt is not the public code's
    demo = ["--llm.user-sentence", x.user_sentence, "--llm.no-strip-around-special"]
    demo += ["--llm.item-place", x.item_place, "--llm.user-place", x.user_place]
    work = tmp_path / "w"
    arguments = ["import", str(root), "--name", name, "--workdir", str(work), *some, *demo, "--llm.domain", x.domain]
    assert cli.main(arguments) == 0
    pipeline = Pipeline(from_dict(json.loads((work / "config.json").read_text())), work)
    files = public.PublicFiles(root, name)
    state = torch.load(files.checkpoint(), weights_only=False)[1]
    np.testing.assert_array_equal(np.asarray(pipeline.cf.E), state["item_emb.weight"].numpy())
    asked = lists.draw(pipeline.dataset, "test", seed=0, most=6, candidates=4)
    x_u = pipeline.cf.x_u(pipeline.dataset.histories(asked.users, 10, "test"), asked.users)
    histories = [row[row != 0] for row in pipeline.dataset.histories(asked.users, 2, "test")]
    scores = {"cf": pipeline.cf.scores(x_u, asked.candidates)}
    scores["a-llmrec"] = pipeline.ranker(pipeline.heads, candidates=4)(histories, asked.candidates, x_u)
    found = metrics.summarise(scores, asked.column, seed=0, resamples=100)
    for model in ("cf", "a-llmrec"):
        for metric in ("hit@1", "ndcg@5", "mrr"):
            np.testing.assert_allclose(found[model][metric]["value"], figures[model][metric]["value"], atol=1e-6)


def test_the_public_code_s_recipe(options, tmp_path):
    """Its dropout, its chunks, its texts, its prompt, and its way to count what is generated."""
    x = cli_fields.override(load_config("demo"), options, prog="test")
    reference = ["--align.score", "mean", "--align.items", "both", "--align.cf-dropout", "--align.single-items"]
    reference += ["--align.order", "file", "--align.chunk", "6", "--cf.select", "last", "--llm.init", "paper"]
    reference += ["--llm.single-items", "--llm.cf-dropout", "--llm.title-weight", "1", "--llm.choice-weight", "0"]
    assert x.llm.init == "held"
    figures = run(tmp_path / "A-LLMRec", [*options, *reference, "--evaluation.users", "2"], "--generate")
    assert 0 <= figures["generated"]["hit@1"]["value"] <= 1
    assert figures["generated"]["hit@1"]["n"] == 2


def test_what_it_does_not_know_is_said(tmp_path, capsys):
    assert main(["--config", "demo", "--root", str(tmp_path), "--cf.model", "gru4rec"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ its parts


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny.dataset(tmp_path_factory.mktemp("data") / "d")


def test_negatives_are_none_of_the_user_s_training_items_and_uniform(dataset):
    negatives = data.Negatives(dataset, np.random.default_rng(0))
    items, offsets = dataset.distinct("train")
    drawn = negatives(np.arange(1, dataset.n_users + 1), 400)
    for user, own in enumerate(drawn, 1):
        assert not set(own.tolist()) & set(items[offsets[user] : offsets[user + 1]].tolist())
        assert own.min() >= 1
        assert own.max() <= dataset.n_items
    left = int(dataset.n_items - (offsets[2] - offsets[1]))
    assert len(set(drawn[0].tolist())) == left  # everything else occurs
    distinct = negatives.distinct(1, left)
    assert len(set(distinct.tolist())) == left


@pytest.mark.parametrize("crop", [False, True])
def test_batches_of_stage_0_say_what_followed_each_item(dataset, crop):
    config = CF(batch=20, maxlen=4, crop=crop)
    for batch in data.cf_batches(dataset, config, np.random.default_rng(0), 3):
        for user, window, positive, negative in zip(*(part.numpy() for part in batch[:4]), strict=True):
            real = window > 0
            sequence = dataset.sequence(int(user))[: dataset.n_train[user]].tolist()
            at = [sequence.index(item) for item in window[real]]
            assert [sequence[k + 1] for k in at] == positive[real].tolist()
            assert at == list(range(at[0], at[0] + len(at)))
            assert crop or at[-1] == len(sequence) - 2
            assert not positive[~real].any()
            assert not set(negative.ravel().tolist()) & set(sequence)


def test_prompts_hold_the_target_among_distinct_others_once(dataset):
    from allmrec_jax.data.prompts import DOMAINS, PromptBuilder

    builder = PromptBuilder(tiny.byte_tokenizer(), dataset.titles(), DOMAINS["movies"], context=512)
    config = Injection(history=2, candidates=5, batch=4, epochs=2.0, choice_weight=1.0)
    batches = data.InjectBatches(
        dataset, config, builder, lambda windows, users: torch.zeros(len(users), 3), 10, np.random.default_rng(0)
    )
    seen = []
    for batch in batches:
        for prompt, answers, target, _ in zip(*batch, strict=True):
            candidates = prompt.slot_items[-5:]
            assert len(set(candidates)) == 5
            assert answers[target] == builder.answers([candidates[target]])[0]
        seen += [prompt.slot_items[-5:][target] for prompt, target in zip(batch.prompts, batch.targets, strict=True)]
    assert sorted(seen) == sorted(2 * batches.targets.tolist())  # everybody twice


def test_the_learning_rate_is_the_other_program_s():
    from allmrec_jax.training.inject import schedule

    for config in (Injection(), Injection(warmup=4, decay=True), Injection(warmup=3), Injection(decay=True)):
        ours = schedule(config, 20)
        expected = [training.learning_rate(config, step, 20) for step in range(20)]
        np.testing.assert_allclose([float(ours(step)) for step in range(20)], expected, rtol=1e-5)


def test_folding_gives_the_head_that_was_held():
    torch.manual_seed(0)
    head, inputs, tokens = projection.F_I(6, 16), torch.randn(50, 6), 0.05 * torch.randn(30, 16) + 1
    projection.standardise(head, inputs)
    held = projection.settled(head, inputs, tokens)(inputs).detach()
    projection.fold(head, inputs, tokens)
    torch.testing.assert_close(head(inputs), held, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(held.mean(0), tokens.mean(0), rtol=1e-4, atol=1e-5)


def test_generation_is_greedy_with_the_penalty_on_what_was_generated_and_the_end():
    llm = in_transformers(tiny.LLAMA, tiny.frozen_llm().weights["weights"])
    injector = Injector(llm, 3, 2).eval()
    prompts = [Prompt([5, 6, 7, 8], [1], [0], 0), Prompt([9, 3], [], [], None)]
    x_u, e, end = torch.randn(2, 3), torch.randn(1, 2), 1
    together = ranking.generate(injector, prompts, x_u, e, end=end, most=5)
    for prompt, x, expected in zip(prompts, x_u, together, strict=True):
        sequence, made = ranking.embedded(injector, prompt, x, e), []
        for _ in range(5):
            with torch.no_grad():
                logits = llm(inputs_embeds=sequence[None]).logits[0, -1]
            for token in {*made, end}:
                logits[token] = logits[token] * 1.5 if logits[token] < 0 else logits[token] / 1.5
            if (token := int(logits.argmax())) == end:
                break
            made.append(token)
            sequence = torch.cat([sequence, llm.get_input_embeddings()(torch.tensor([token]))])
        assert expected == made


@pytest.mark.parametrize(
    ("text", "answer"),
    [('"Heat"\nmore', "heat"), ("Heat", "heat"), ('say "The "Big" One" now', 'the "big" one'), ('"Heat', ""), ("", "")],
)
def test_the_answer_is_what_stands_between_the_quote_marks(text, answer):
    assert ranking.answer_of(text) == answer


def test_a_hit_is_a_title_contained_in_the_answer():
    assert ranking.hit("heat (1995)", "Heat")
    assert ranking.hit("anything", "")
    assert not ranking.hit("he", "Heat")
