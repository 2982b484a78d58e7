"""Answers written token by token: transformers' own, token for token; titles only; and what an answer is worth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from allmrec_jax.data.packing import pack
from allmrec_jax.data.prompts import DOMAINS, Prompt, PromptBuilder
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import answers, decode
from allmrec_jax.evaluation.constrained import TitleWriter, trie
from allmrec_jax.evaluation.decode import Decoding
from allmrec_jax.evaluation.generate import Writer
from allmrec_jax.evaluation.rank import Ranker
from allmrec_jax.models.llm.load import load_llm
from allmrec_jax.training.inject import freeze, init_heads
from allmrec_jax.training.mesh import make_mesh

# ------------------------------------------------------------------------------------------------ against transformers

NEW, LENGTHS, WIDTH = 9, (13, 4, 9), 13
FAMILIES = ["opt", "opt-350m", "llama 3", "smollm2", "mistral, a window", "qwen 2", "qwen 3"]


def spec_penalty(penalty: float, eos: int):
    """As SPEC has it, for transformers: over what was generated, and the end token from the first step."""

    def process(ids, scores):
        for row, own in zip(scores, ids.tolist(), strict=True):
            for token in {eos, *own}:
                row[token] = row[token] * penalty if row[token] < 0 else row[token] / penalty
        return scores

    return process


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(ours, theirs, prompts of embeddings)"""
    pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    parity = pytest.importorskip("test_llm_parity")
    theirs = parity._theirs(*parity.VARIANTS[request.param])
    folder = tmp_path_factory.mktemp("llm")
    theirs.save_pretrained(folder)
    tiny.byte_tokenizer().backend.save(str(folder / "tokenizer.json"))
    llm = load_llm(folder)
    x = np.random.default_rng(0).normal(size=(len(LENGTHS), WIDTH, llm.width)).astype(np.float32)
    return llm, theirs, x


def theirs_generate(family, eos: int, **options) -> np.ndarray:
    """transformers' answers, left-padded prompts; what lies behind the end token is the end token."""
    import torch
    from transformers import LogitsProcessorList

    _, model, x = family
    left = [np.concatenate([np.zeros_like(row[n:]), row[:n]]) for row, n in zip(x, LENGTHS, strict=True)]
    mask = torch.tensor([[0] * (WIDTH - n) + [1] * n for n in LENGTHS])
    penalty = options.pop("penalty", 1.0)
    processors = LogitsProcessorList([spec_penalty(penalty, eos)] if penalty != 1 else [])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": eos, "pad_token_id": eos} | options
    with torch.no_grad():
        found = model.generate(
            inputs_embeds=torch.tensor(np.stack(left)), attention_mask=mask, logits_processor=processors, **options
        ).numpy()
    return np.pad(found, ((0, 0), (0, NEW - found.shape[1])), constant_values=eos)


def ours_generate(family, eos: int, how: Decoding) -> np.ndarray:
    """Ours, right-padded: the prompts stand in the slots of O_i."""
    llm, _, x = family
    slots = [[row * WIDTH + i for i in range(n)] for row, n in enumerate(LENGTHS)]
    prompts = [Prompt([0] * len(own), list(range(len(own))), own, None) for own in slots]
    batch = pack(prompts, [[[eos]]] * len(prompts), rows=range(len(prompts)), tier=8)
    tables = {"O_u": jnp.zeros((len(prompts), llm.width)), "O_i": jnp.asarray(x.reshape(-1, llm.width))}
    mesh = make_mesh(1, 1)
    frozen, shardings = freeze(llm, mesh)
    keys = jax.vmap(lambda user: jax.random.fold_in(jax.random.key(0), user))(np.arange(len(prompts)))
    return np.asarray(decode.make_writer(llm.graph, shardings, mesh, how, eos=eos)(tables, frozen, batch, keys))


def an_end(tokens: np.ndarray) -> int:
    """A token that ends the first row's answer before the others, or nearly so."""
    return int(tokens[0, 3])


def test_greedy_answers_are_transformers_own(family):
    eos = an_end(theirs_generate(family, 287))
    expected = theirs_generate(family, eos, penalty=1.5)
    ours = ours_generate(family, eos, Decoding(new=NEW))
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("family", ["opt", "mistral, a window"], indirect=True)
def test_beam_search_is_transformers_own(family, penalty):
    eos = an_end(theirs_generate(family, 287, num_beams=3))
    expected = theirs_generate(family, eos, num_beams=3, penalty=penalty)
    ours = ours_generate(family, eos, Decoding(new=NEW, beams=3, repetition_penalty=penalty))
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
def test_the_real_llm_writes_what_transformers_writes(weights):
    """SmolLM2 from its own file, two prompts of different lengths, with the penalty of SPEC and without."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    transformers = pytest.importorskip("transformers")
    [path] = weights("smollm2-135m-instruct").glob("*.gguf")
    llm, new = load_llm(path), 24
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    texts = ['This user has watched "Heat","Alien" in the previous. The recommendation is ', "The capital of France is"]
    ids, eos = llm.tokenizer(texts), llm.tokenizer.eos
    batch = pack([Prompt(own, [], [], None) for own in ids], [[[eos]]] * 2, rows=range(2))
    frozen, shardings = freeze(llm, mesh := make_mesh(1, 1))
    keys = jax.random.split(jax.random.key(0), 2)
    for penalty in (1.0, 1.5):
        how = Decoding(new=new, repetition_penalty=penalty)
        ours = decode.make_writer(llm.graph, shardings, mesh, how, eos=eos)(None, frozen, batch, keys)
        for row, own in zip(np.asarray(ours), ids, strict=True):
            options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": eos, "pad_token_id": eos}
            with torch.no_grad():
                x = model.get_input_embeddings()(torch.tensor([own]))
                [found] = model.generate(
                    inputs_embeds=x,
                    attention_mask=torch.ones(x.shape[:2]).long(),
                    logits_processor=transformers.LogitsProcessorList([spec_penalty(penalty, eos)]),
                    **options,
                )
            np.testing.assert_array_equal(row[: len(found)], found)
            assert (row[len(found) :] == eos).all()


def test_sampling_leaves_in_what_transformers_leaves_in():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    for k, p in ((None, None), (7, None), (None, 0.6), (9, 0.8), (1, None), (None, 1e-6)):
        theirs = [TemperatureLogitsWarper(0.7)]
        theirs += [] if k is None else [TopKLogitsWarper(k)]
        theirs += [] if p is None else [TopPLogitsWarper(p)]
        expected = LogitsProcessorList(theirs)(None, torch.tensor(logits)).numpy()
        ours = decode.warp(jnp.asarray(logits), Decoding(temperature=0.7, top_k=k, top_p=p))
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- users with prompts

USERS, CANDIDATES = 5, 4
TITLES = [None, *(("Heat", "Alien 3", "M", "Heat of It", "Up", "Alien")[i % 6] + " !" * (i // 6) for i in range(40))]
X_U = np.random.default_rng(0).normal(size=(USERS, 8)).astype(np.float32)
HISTORIES = [np.arange(1, 1 + user) for user in range(USERS)]
LISTS = np.stack([np.random.default_rng(user).permutation(40)[:CANDIDATES] + 1 for user in range(USERS)])


@pytest.fixture(scope="module")
def world():
    """`world(kind, **options)`: a `Ranker`, `Writer` or `TitleWriter` of a tiny LLM."""
    e = tiny.joint_embeddings()

    def make(kind, *, inject: bool = True, data: int = 1, model: int = 1, **options):
        mesh = make_mesh(data, model)
        llm = tiny.frozen_llm(mesh)
        embed = jnp.asarray(jax.device_get(llm.weights["weights"]["embed"]))
        heads = init_heads(jax.random.key(0), jnp.asarray(X_U), jnp.asarray(e[1:]), embed) if inject else None
        builder = PromptBuilder(llm.tokenizer, TITLES, DOMAINS["movies"], context=512, inject=inject)
        options = {"batch": 2} | options
        return kind(llm, heads, builder=builder, e=e, mesh=mesh, **options)

    return make


@pytest.fixture(scope="module")
def ranked(world):
    return world(Ranker, candidates=CANDIDATES)(HISTORIES, LISTS, X_U)


def test_as_many_beams_as_candidates_give_the_whole_ranking(world, ranked):
    """The same titles, log-likelihoods and order as `rank`, by another way."""
    items, scores = world(TitleWriter, beams=CANDIDATES)(HISTORIES, LISTS, X_U)
    for user in range(USERS):
        order = np.argsort(-ranked[user])
        np.testing.assert_array_equal(items[user], LISTS[user][order])
        np.testing.assert_allclose(scores[user], ranked[user][order], rtol=1e-4)


def test_more_beams_than_titles_leave_places_empty(world):
    items, scores = world(TitleWriter, beams=CANDIDATES + 2)(HISTORIES[:1], LISTS[:1], X_U[:1])
    assert (items[0, -2:] == 0).all()
    assert np.isneginf(scores[0, -2:]).all()
    assert set(items[0, :-2]) == set(LISTS[0])


def test_one_beam_is_greedy_along_the_candidates_titles(world):
    """What it gives is a candidate, with the log-likelihood that `rank` gives to it alone."""
    items, scores = world(TitleWriter, beams=1, normalise=False)(HISTORIES, LISTS, X_U)
    ranker = world(Ranker, candidates=CANDIDATES, normalise=False)
    sums = ranker(HISTORIES, LISTS, X_U)
    for user in range(USERS):
        [column] = np.flatnonzero(LISTS[user] == items[user, 0])
        np.testing.assert_allclose(scores[user, 0], sums[user, column], rtol=1e-4)


def test_any_title_of_the_catalogue_may_be_written_but_not_those_left_out(world):
    writer = world(TitleWriter, beams=3, catalogue=np.arange(1, 41))
    items, scores = writer(HISTORIES, LISTS, X_U)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert len(set(items[0])) == 3
    without, lower = writer(HISTORIES, LISTS, X_U, without=list(items[:, :1]))
    assert not (without == items[:, :1]).any()
    assert (lower[:, 0] <= scores[:, 0] + 1e-5).all()


@pytest.mark.parametrize("decoding", [Decoding(new=6, beams=2), Decoding(new=6, temperature=1.0)])
def test_an_answer_depends_on_its_user_alone(world, decoding):
    """Not on who is in the batch, nor how the batch is laid over devices; what is sampled, on the seed as well."""
    users = np.arange(10, 10 + USERS)
    writer = world(Writer, decoding=decoding)
    whole = writer.tokens(HISTORIES, LISTS, X_U, users)
    np.testing.assert_array_equal(writer.tokens(HISTORIES[3:], LISTS[3:], X_U[3:], users[3:]), whole[3:])
    spread = world(Writer, decoding=decoding, data=2, model=2).tokens(HISTORIES, LISTS, X_U, users)
    np.testing.assert_array_equal(spread, whole)
    if decoding.temperature:
        again = world(Writer, decoding=decoding, seed=1).tokens(HISTORIES, LISTS, X_U, users)
        assert (again != whole).any()


def test_the_llm_alone_writes_without_vectors(world):
    writer = world(Writer, inject=False, decoding=Decoding(new=4))
    texts = writer(HISTORIES, LISTS, X_U, np.arange(USERS))
    assert len(texts) == USERS
    assert texts == writer(HISTORIES, LISTS, 5 * X_U, np.arange(USERS))


def test_new_tokens_that_cannot_fit_are_said_before(world):
    with pytest.raises(UserError, match="no room for 511 new ones in the LLM's context of 512"):
        world(Writer)(HISTORIES, LISTS, X_U, np.arange(USERS))


@pytest.mark.parametrize(
    "options",
    [{"new": 0}, {"beams": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": 0}, {"beams": 2, "temperature": 1.0}],
)
def test_senseless_decoding_is_refused(options):
    with pytest.raises(UserError, match=f"decoding: {next(iter(options))} is"):
        Decoding(**options)


# -------------------------------------------------------------------------------------------------------- the trie


def test_a_trie_is_that_of_a_plain_dictionary():
    random = np.random.default_rng(0)
    titles = [[*random.integers(0, 3, random.integers(1, 6)).tolist(), 9] for _ in range(60)]
    found = trie(titles)
    walked = {}
    for number, title in enumerate(titles):
        node = 0
        for token in title:
            children = found["first"][node] + np.arange(found["count"][node])
            [node] = [child for child in children if found["token"][child] == token]
        walked.setdefault(tuple(title), number)
        assert found["leaf"][node] == walked[tuple(title)]  # the first of equal ones
    prefixes = {tuple(title[:n]) for title in titles for n in range(1, len(title) + 1)}
    assert len(found["token"]) == len(prefixes) + 1
    assert (found["leaf"] >= 0).sum() == len(walked)


# ------------------------------------------------------------------------------------------- what an answer is worth


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('"Toy Story (1995)"', "toy story (1995)"),
        (' \n"Heat"\nand "Alien"', "heat"),
        ('I say "Heat" or "M"', 'heat" or "m'),
        ('"Heat', ""),
        ('Heat"', ""),
        ("Heat", "heat"),
        ('""', ""),
        ("", ""),
        (" \"It 's Alive , isn 't it ?\" ", "it's alive, isn 't it?"),
    ],
)
def test_the_answer_of_a_text(text, answer):
    assert answers.parse(text) == answer


def test_what_counts_as_a_hit():
    said = ["toy  story", "the toy story", "heat", "", "who's there?"]
    targets = ["Toy Story", "Toy Story", "Alien", "", "Who's There ?"]
    np.testing.assert_array_equal(answers.hits(said, targets), [True, False, False, False, True])
    np.testing.assert_array_equal(answers.hits(said, targets, "substring"), [False, True, False, True, False])
    assert answers.valid(["m", "n", ""], [["M", "Up"], ["M"], ["", "M"]]).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="choose exact or substring"):
        answers.hits(said, targets, "fuzzy")
