"""Prompts: which tokens, where the slots are, and what is never cut."""

import numpy as np
import pytest
import tiny

from allmrec_jax.config import Injection
from allmrec_jax.data.packing import Tiers, pack, room_for, row_length
from allmrec_jax.data.prompts import DOMAINS, PLACEHOLDER, Prompt, PromptBuilder, template_of
from allmrec_jax.errors import UserError
from allmrec_jax.models.llm.tokenizer import Tokenizer, from_backend

TITLES = [None, "Up", "Heat", "Antz", "Big", None, 'The "Fog"']
HISTORY, CANDIDATES = [1, 2], [4, 3, 5]
BEFORE = " is a user representation. This user has watched "
MIDDLE = " in the previous. Recommend one next movie for this user to watch next from the following movie title set, "
AFTER = ". The recommendation is "
PIECES = [f'{BEFORE}"Up"', ',"Heat"', f'{MIDDLE}"Big"', ',"Antz"', ',"No Title"', AFTER]


def _builder(tokenizer: Tokenizer, context: int = 2000, **options) -> PromptBuilder:
    return PromptBuilder(tokenizer, TITLES, DOMAINS["movies"], context=context, **options)


def _strings(tokenizer: Tokenizer, tokens: list[int], slots: list[int], user_slot: int | None) -> list[str]:
    names = [tokenizer.backend.id_to_token(token) for token in tokens]
    for slot in slots:
        names[slot] = "[O_i]"
    if user_slot is not None:
        names[user_slot] = "[O_u]"
    return names


@pytest.mark.parametrize("bos", [False, True])
def test_each_piece_is_tokenised_as_a_whole_and_its_slot_follows(bos):
    tokenizer = tiny.byte_tokenizer(bos=bos)
    assert tokenizer.bos == (0 if bos else None)
    [prompt] = _builder(tokenizer).prompts([HISTORY], [CANDIDATES])
    expected: list[int | str] = ["[O_u]"] + [0] * bos
    for piece, item in zip(PIECES, [1, 2, 4, 3, 5, None], strict=True):
        expected += tokenizer.backend.encode(piece, add_special_tokens=False).ids
        expected += [] if item is None else [f"[O_{item}]"]
    assert prompt.user_slot == 0
    assert prompt.slot_items == [1, 2, 4, 3, 5]
    assert prompt.slots == [k for k, token in enumerate(expected) if isinstance(token, str)][1:]
    assert prompt.tokens == [PLACEHOLDER if isinstance(token, str) else token for token in expected]


def test_golden_tokens_around_the_slots():
    tokenizer = tiny.byte_tokenizer(bos=True)
    [prompt] = _builder(tokenizer).prompts([HISTORY], [CANDIDATES])
    names = _strings(tokenizer, prompt.tokens, prompt.slots, prompt.user_slot)
    assert names[:6] == ["[O_u]", "<b>", "Ġis", "Ġ", "a", "Ġ"]
    first, second = prompt.slots[:2]
    assert names[first - 4 : first + 1] == ['Ġ"', "U", "p", '"', "[O_i]"]
    assert names[first + 1 : second + 1] == [',"', "H", "e", "a", "t", '"', "[O_i]"]
    assert names[second + 1 : second + 4] == ["Ġi", "n", "Ġ"]
    assert names[prompt.slots[-1] + 1] == "."  # not the token `".`: the slot stands between the two
    assert names[-3:] == ["Ġ", "Ġis", "Ġ"] or names[-2:] == ["Ġis", "Ġ"]


def test_text_and_slots_read_as_one_sentence():
    tokenizer = tiny.byte_tokenizer()
    [prompt] = _builder(tokenizer).prompts([HISTORY], [CANDIDATES])
    text, start = "", 1
    for slot in [*prompt.slots, len(prompt.tokens)]:
        text += tokenizer.decode(prompt.tokens[start:slot])
        start = slot + 1
    assert text == "".join(PIECES)


def test_titles_only_for_the_llm_alone():
    tokenizer = tiny.byte_tokenizer(bos=True)
    [prompt] = _builder(tokenizer, inject=False).prompts([HISTORY], [CANDIDATES])
    assert prompt.slots == []
    assert prompt.user_slot is None
    assert prompt.tokens[0] == tokenizer.bos
    sentence = f'This user has watched "Up","Heat"{MIDDLE}"Big","Antz","No Title"{AFTER}'
    assert tokenizer.decode(prompt.tokens[1:]) == sentence


def test_an_empty_history_keeps_the_sentence():
    tokenizer = tiny.byte_tokenizer()
    [prompt] = _builder(tokenizer).prompts([[]], [CANDIDATES])
    assert prompt.slot_items == CANDIDATES
    assert tokenizer.decode(prompt.tokens[1 : prompt.slots[0]]) == f'{BEFORE}{MIDDLE}"Big"'


def test_a_title_may_hold_quotes_braces_and_what_looks_like_a_special_token():
    titles = [None, "{history} {0}", "<e> \0 </s>"]
    tokenizer = tiny.byte_tokenizer()
    [prompt] = PromptBuilder(tokenizer, titles, DOMAINS["games"], context=2000).prompts([[1]], [[2]])
    assert prompt.slot_items == [1, 2]
    assert "{history} {0}" in tokenizer.decode(prompt.tokens)


@pytest.mark.parametrize("bos", [False, True])
def test_answers_are_whole_with_both_quotes_and_the_end_token(bos):
    tokenizer = tiny.byte_tokenizer(bos=bos)
    answers = _builder(tokenizer).answers([4, 5, 6, 4])
    assert [tokenizer.backend.id_to_token(token) for token in answers[0]] == ['"', "B", "i", "g", '"', "<e>"]
    assert answers[3] == answers[0]
    for answer, title in zip(answers, ['"Big"', '"No Title"', '"The "Fog""', '"Big"'], strict=True):
        assert tokenizer.decode(answer[:-1]) == title
        assert answer[-1] == tokenizer.eos
        assert tokenizer.bos not in answer


def test_too_long_a_prompt_loses_its_oldest_history_first_then_is_refused():
    tokenizer = tiny.byte_tokenizer()
    whole = _builder(tokenizer).prompts([[3, 2, 1]], [CANDIDATES])[0]
    answer = max(len(a) for a in _builder(tokenizer).answers(CANDIDATES))
    needed = len(whole.tokens) + answer

    def items(context: int) -> list[int]:
        [prompt] = _builder(tokenizer, context).prompts([[3, 2, 1]], [CANDIDATES])
        assert len(prompt.tokens) + answer <= context
        # What is left is exactly the prompt of the shorter history.
        shorter = prompt.slot_items[: -len(CANDIDATES)]
        assert prompt == _builder(tokenizer).prompts([shorter], [CANDIDATES])[0]
        return shorter

    assert items(needed) == [3, 2, 1]
    assert items(needed - 1) == [2, 1]
    shortest = len(_builder(tokenizer).prompts([[]], [CANDIDATES])[0].tokens) + answer
    assert items(shortest) == []
    with pytest.raises(UserError, match=f"context of {shortest - 1}; use fewer candidates"):
        items(shortest - 1)


def test_numpy_rows_are_histories_too():
    builder = _builder(tiny.byte_tokenizer())
    [prompt] = builder.prompts([np.array(HISTORY, np.int32)], np.array([CANDIDATES]))
    assert prompt == builder.prompts([HISTORY], [CANDIDATES])[0]


def test_pack_by_hand():
    short = Prompt([0, 5, 6, 0, 7], [3], [2], 0)
    longer = Prompt([9, 8, 0, 0, 4, 3], [2, 3], [6, 1], None)
    answers = [[[20, 21, 1], [30, 1]], [[40, 41, 42, 1]]]
    out = pack([short, longer], answers, rows=[7, 3], targets=[1, 0], batch=3, tier=12)
    _ = -1
    assert out["tokens"].tolist() == [
        [0, 5, 6, 0, 7, 20, 21, 30, 0, 0, 0, 0],
        [9, 8, 0, 0, 4, 3, 40, 41, 42, 0, 0, 0],
        [0] * 12,
    ]
    assert out["branch"].tolist() == [
        [0, 0, 0, 0, 0, 1, 1, 2, _, _, _, _],
        [0, 0, 0, 0, 0, 0, 1, 1, 1, _, _, _],
        [_] * 12,
    ]
    nowhere = 12  # a slot beyond the row is dropped
    assert out["slots"].tolist() == [[3] + [nowhere] * 7, [2, 3] + [nowhere] * 6, [nowhere] * 8]
    assert out["slot_items"].tolist() == [[2] + [0] * 7, [6, 1] + [0] * 6, [0] * 8]
    assert out["user_slot"].tolist() == [0, nowhere, nowhere]
    assert out["rows"].tolist() == [7, 3, 0]
    assert out["target"].tolist() == [1, 0, 0]
    # The prompt's last token predicts each answer's first token; a branch's last token predicts the end token.
    assert out["answer_at"][:, :5].tolist() == [[4, 5, 6, 4, 7], [5, 6, 7, 8, 0], [0] * 5]
    assert out["answer_token"][:, :5].tolist() == [[20, 21, 1, 30, 1], [40, 41, 42, 1, 0], [0] * 5]
    assert out["answer_of"][:, :5].tolist() == [[0, 0, 0, 1, 1], [0] * 5, [0] * 5]
    assert out["answer_weight"][:, :5].tolist() == [[1] * 5, [1, 1, 1, 1, 0], [0] * 5]
    assert out["answer_weight"].shape == (3, 64)
    assert not out["answer_weight"][:, 5:].any()
    assert {array.dtype for array in out.values()} == {np.dtype(np.int32), np.dtype(np.float32)}


def test_packed_shapes_come_in_few_sizes():
    tokenizer = tiny.byte_tokenizer()
    builder = _builder(tokenizer)
    shapes = set()
    for history in ([], [1], [1, 2], [3, 2, 1]):
        prompts = builder.prompts([history], [CANDIDATES])
        out = pack(prompts, [builder.answers(CANDIDATES)], rows=[0], batch=4, tier=64)
        shapes.add(out["tokens"].shape)
        assert out["tokens"].shape[1] % 64 == 0
    assert len(shapes) <= 2


def test_parts_of_like_lengths_hold_every_row_once_and_share_the_whole_batch():
    random, tokens = np.random.default_rng(0), [[9] * 40]
    prompts = [Prompt([7] * n, [0], [int(n)], None) for n in random.integers(20, 300, 64)]
    answers = [[[5] * n] for n in random.integers(2, 12, 64)]
    lengths = np.array(list(map(row_length, prompts, answers)))
    tiers = Tiers(2, lengths, room_for(prompts, answers))
    shapes, padding = set(), []
    for start in range(0, 64, 4):
        here = slice(start, start + 4)
        parts = tiers.parts(prompts[here], answers[here], rows=range(start, start + 4))
        assert sorted(row for part in parts for row in part["rows"].tolist()) == list(range(start, start + 4))
        own = sum(
            part["answer_weight"] @ np.ones(part["answer_weight"].shape[1]) @ part["token_share"] for part in parts
        )
        np.testing.assert_allclose(own, 1, rtol=1e-6)  # a mean over all target tokens of the batch
        np.testing.assert_allclose(sum(part["row_share"].sum() for part in parts), 1, rtol=1e-6)
        shapes |= {tuple(array.shape for array in part.values()) for part in parts}
        padding += [(part["branch"] < 0).mean() for part in parts]
    assert len(shapes) <= 4
    whole = 1 - lengths.mean() / -(-lengths.max() // 32) / 32  # if all were as long as the longest
    share = 1 - tiers.real / tiers.computed
    assert abs(share - np.mean(padding)) < 0.05
    assert share < 0.6 * whole
    [odd] = tiers.parts([Prompt([7] * 900, [], [], None)], [tokens], rows=[0])  # longer than any before
    assert odd["tokens"].shape == (2, 960)
    assert odd["token_share"].tolist() == [np.float32(1 / 40), 0]


# ------------------------------------------------------------------------------------------------ a real tokenizer


@pytest.fixture(scope="module")
def opt(test_data) -> Tokenizer:
    """OPT's tokenizer, which puts `</s>` in front."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    folder = test_data("tokenizers/opt")
    backend = Backend(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return from_backend(backend, eos=2)


def test_opt_s_prompt_token_by_token(opt):
    assert opt.bos == opt.eos == 2
    builder = PromptBuilder(opt, [None, "Heat (1995)", "Up", "Big"], DOMAINS["shopping"], context=2048)
    [prompt] = builder.prompts([[1, 2]], [[3, 1]])
    names = _strings(opt, prompt.tokens, prompt.slots, prompt.user_slot)
    golden = (
        '[O_u] </s> Ġis Ġa Ġuser Ġrepresentation . ĠThis Ġuser Ġhas Ġbought Ġ" Heat Ġ( 1995 )" [O_i] ," Up " [O_i] '
        "Ġin Ġthe Ġprevious . ĠRecommend Ġone Ġnext Ġitem Ġfor Ġthis Ġuser Ġto Ġbuy Ġnext Ġfrom Ġthe Ġfollowing Ġitem "
        'Ġtitle Ġset , Ġ" Big " [O_i] ," Heat Ġ( 1995 )" [O_i] . ĠThe Ġrecommendation Ġis Ġ'
    )
    assert names == golden.split(" ")
    answers = builder.answers([1, 2])
    assert _strings(opt, answers[0], [], None) == ['"', "Heat", "Ġ(", "1995", ')"', "</s>"]
    assert _strings(opt, answers[1], [], None) == ['"', "Up", '"', "</s>"]


def test_the_public_code_s_prompt_id_by_id(opt):
    """No space after the first sentence, none behind an O_i, and the four tokens that it appends never read."""
    config = Injection(domain="movies").as_public_code()
    builder = PromptBuilder(opt, ["No Title", "Heat (1995)", "Up", "Big"], template_of(config), context=2048)
    [prompt] = builder.prompts([[1, 2]], [[3, 1]])
    names = _strings(opt, prompt.tokens, prompt.slots, prompt.user_slot)
    golden = (
        '[O_u] </s> Ġis Ġa Ġuser Ġrepresentation . This Ġuser Ġhas Ġwatched Ġ" Heat Ġ( 1995 )" [O_i] ," Up " [O_i] '
        "in Ġthe Ġprevious . ĠRecommend Ġone Ġnext Ġmovie Ġfor Ġthis Ġuser Ġto Ġwatch Ġnext Ġfrom Ġthe Ġfollowing "
        'Ġmovie Ġtitle Ġset , Ġ" Big " [O_i] ," Heat Ġ( 1995 )" [O_i] . ĠThe Ġrecommendation Ġis Ġ'
    )
    assert names == golden.split(" ")
    known = [token for i, token in enumerate(prompt.tokens) if i != prompt.user_slot and i not in prompt.slots]
    vocabulary = opt.backend.get_vocab()
    assert known == [vocabulary[name] for name in golden.split(" ") if not name.startswith("[O_")]
    assert known[:6] == [2, 16, 10, 3018, 8985, 4]
    assert max(known) < 50265  # below the appended [PAD], [UserRep], [HistoryEmb], [CandidateEmb]
    empty = builder.prompts([[]], [[3]])[0]  # a user with a single training item
    assert " ".join(_strings(opt, empty.tokens, empty.slots, 0)).startswith(
        "[O_u] </s> Ġis Ġa Ġuser Ġrepresentation . This Ġuser Ġhas Ġwatched Ġ Ġin Ġthe"
    )


PLACES = {
    "as the paper": (
        {},
        '[O_u] </s> Ġis Ġa Ġuser . ĠThey Ġbought Ġ" Up " [O_1] ," Big " [O_3] Ġof Ġ" Heat " [O_2] : Ġ',
    ),
    "items before": (
        {"item_place": "before"},
        '[O_u] </s> Ġis Ġa Ġuser . ĠThey Ġbought Ġ [O_1] " Up ", [O_3] " Big " Ġof Ġ [O_2] " Heat ": Ġ',
    ),
    "user last": (
        {"user_place": "last"},
        '</s> They Ġbought Ġ" Up " [O_1] ," Big " [O_3] Ġof Ġ" Heat " [O_2] : Ġ [O_u]',
    ),
    "both": (
        {"item_place": "before", "user_place": "last"},
        '</s> They Ġbought Ġ [O_1] " Up ", [O_3] " Big " Ġof Ġ [O_2] " Heat ": Ġ [O_u]',
    ),
    "without O_u": (
        {"user_vector": False},
        '</s> They Ġbought Ġ" Up " [O_1] ," Big " [O_3] Ġof Ġ" Heat " [O_2] : Ġ',
    ),
    "without O_i": (
        {"item_vectors": "none", "item_place": "before"},
        '[O_u] </s> Ġis Ġa Ġuser . ĠThey Ġbought Ġ" Up "," Big " Ġof Ġ" Heat ": Ġ',
    ),
    "stripped": (
        {"strip_around_special": True, "item_place": "before"},
        '[O_u] </s> Ġis Ġa Ġuser . ĠThey Ġbought Ġ [O_1] " Up ", [O_3] " Big " Ġof Ġ [O_2] " Heat ": Ġ',
    ),
}


@pytest.mark.parametrize(("options", "golden"), PLACES.values(), ids=PLACES.keys())
def test_where_the_vectors_stand(opt, options, golden):
    config = Injection(
        user_sentence=" is a user. ", sentence="They {done} {history} of {candidates}: ", domain="shopping", **options
    )
    builder = PromptBuilder(opt, [None, "Up", "Heat", "Big"], template_of(config), context=2048)
    [prompt] = builder.prompts([[1, 3]], [[2]])
    names = _strings(opt, prompt.tokens, [], prompt.user_slot)
    for slot, item in zip(prompt.slots, prompt.slot_items, strict=True):
        names[slot] = f"[O_{item}]"
    assert " ".join(names) == golden
    if prompt.user_slot is not None:  # the answer begins right behind O_u where that stands last
        out = pack([prompt], [builder.answers([2])], rows=[0])
        assert out["user_slot"].tolist() == [prompt.user_slot]
        assert out["answer_at"][0, 0] == len(prompt.tokens) - 1


def test_templates_are_data(opt):
    plain = Injection(domain="none", user_sentence=" who is a user representation.")
    builder = PromptBuilder(opt, TITLES, template_of(plain), context=2048)
    [prompt] = builder.prompts([[1]], [[4]])
    assert " ".join(_strings(opt, prompt.tokens, prompt.slots, 0)) == (
        '[O_u] </s> Ġwho Ġis Ġa Ġuser Ġrepresentation ." Up " [O_i] " Big " [O_i] . ĠThe Ġrecommendation Ġis Ġ'
    )
    own = Injection(domain="games", sentence="They {done} {history}; of {candidates} they {do} ")
    [prompt] = PromptBuilder(opt, TITLES, template_of(own), context=2048).prompts([[1]], [[4]])
    assert "They Ġplayed" in " ".join(_strings(opt, prompt.tokens, prompt.slots, 0))
    for wrong in ("{history} alone", "{candidates} {history}", "{history} {candidates} {user}"):
        with pytest.raises(UserError, match=r"llm\.sentence must hold"):
            template_of(Injection(sentence=wrong))
