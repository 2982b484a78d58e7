"""The public code's files, in and out: to the bit, without PyTorch, at once of use; and nothing in them is run."""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from tiny import write_encoder, write_llm

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `torch`)")

from allmrec_jax import cli  # noqa: E402
from allmrec_jax.comparison import public_checkpoints as public  # noqa: E402
from allmrec_jax.comparison.prompt_embeds import left_padded, prompt_embeds  # noqa: E402
from allmrec_jax.config import from_dict  # noqa: E402
from allmrec_jax.models import params, text_encoder  # noqa: E402
from allmrec_jax.models.sasrec import SASRecConfig  # noqa: E402
from allmrec_jax.pipeline import Pipeline  # noqa: E402
from allmrec_jax.torch_baseline import projection  # noqa: E402
from allmrec_jax.torch_baseline.alignment import AutoEncoder  # noqa: E402
from allmrec_jax.torch_baseline.sasrec import SASRec  # noqa: E402

NAME, D, JOINT, TEXT, H = "Tiny_Movies", 8, 6, tiny.ENCODER.hidden_size, tiny.LLAMA.hidden_size
SASREC = SASRecConfig(tiny.N_ITEMS, width=D, blocks=2, heads=2, maxlen=10, dropout=0.5)
PTH = "SASRec.epoch=200.lr=0.001.layer=2.head=2.hidden=8.maxlen=10.pth"
TITLES = {item: f"Film “{item}”" for item in range(1, tiny.N_ITEMS)}  # the last item has none


@pytest.fixture(scope="module")
def modules() -> dict[str, torch.nn.Module]:
    """What the public code holds when it saves, by the part of the file's name."""
    torch.manual_seed(0)
    return {
        "sasrec": SASRec(SASREC),
        "mlp": AutoEncoder(D, JOINT),
        "mlp2": AutoEncoder(TEXT, JOINT),
        "log_proj": projection.F_U(D, H),
        "item_proj": projection.F_I(JOINT, H),
    }


@pytest.fixture(scope="module")
def sbert() -> OrderedDict:
    """A tiny encoder's weights as sentence-transformers names them, with what older versions of it saved beside."""
    description = text_encoder.describe(tiny.ENCODER)
    tensors = params.to_torch(description, jax.device_get(params.init(jax.random.key(9), description)))
    state = OrderedDict((f"0.auto_model.{name}", torch.tensor(tensor)) for name, tensor in tensors.items())
    state["0.auto_model.embeddings.position_ids"] = torch.arange(64)[None]
    return state


@pytest.fixture(scope="module")
def root(modules, sbert, tmp_path_factory) -> Path:
    """The public code's folder as it leaves it: written by PyTorch and pickle."""
    root = tmp_path_factory.mktemp("public") / "A-LLMRec"
    for folder in ("data/amazon", f"pre_train/sasrec/{NAME}", "models/saved_models"):
        (root / folder).mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = [f"{u} {i + 1}" for u in range(1, 31) for i in random.permutation(tiny.N_ITEMS)[: random.integers(2, 13)]]
    lines += [f"31 {item}" for item in range(1, 5)] + [f"32 {item}" for item in (40, 40, 39)]
    (root / f"data/amazon/{NAME}.txt").write_text("\n".join(lines) + "\n")
    with open(root / f"data/amazon/{NAME}_text_name_dict.json.gz", "wb") as file:
        pickle.dump({"title": TITLES, "description": {1: "One", 2: ""}}, file)
    args = argparse.Namespace(
        device="cuda:0", hidden_units=D, maxlen=10, num_blocks=2, num_heads=2, dropout_rate=0.5, state_dict_path=None
    )
    kwargs = {"user_num": 32, "item_num": tiny.N_ITEMS, "args": args}
    torch.save([kwargs, modules["sasrec"].state_dict()], root / f"pre_train/sasrec/{NAME}/{PTH}")
    for part in ("mlp", "mlp2", "log_proj", "item_proj"):
        middle = "sasrec_10_opt_5" if part.endswith("proj") else "sasrec_10"
        torch.save(modules[part].state_dict(), root / f"models/saved_models/{NAME}_{middle}_{part}.pt")
    torch.save(sbert, root / f"models/saved_models/{NAME}_sasrec_10_sbert.pt")
    return root


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> list[str]:
    """Options that name a tiny encoder and a tiny LLM, and keep the evaluation small."""
    folder = tmp_path_factory.mktemp("models")
    named = {
        "align.encoder": write_encoder(folder / "encoder"),
        "llm.llm": write_llm(folder / "llm"),
        "llm.history": 3,
        "evaluation.users": 6,
        "evaluation.candidates": 4,
        "evaluation.validation-users": 4,
        "evaluation.resamples": 50,
    }
    return [str(part) for name, value in named.items() for part in (f"--{name}", value)]


WITHOUT_TORCH = """
import json, sys

class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Refuse())
from allmrec_jax.cli import main

sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def there_and_back(root, others, tmp_path_factory) -> tuple[Path, Path]:
    """A work directory that was imported, and what was exported from it: both where there is no PyTorch."""
    folder = tmp_path_factory.mktemp("there and back")
    work, out = folder / "work", folder / "A-LLMRec"
    commands = [
        ["import", str(root), "--workdir", str(work), *others],
        ["export", "--workdir", str(work), "--out", str(out)],
    ]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return work, out


@pytest.fixture(scope="module")
def imported(there_and_back) -> Path:
    return there_and_back[0]


@pytest.fixture(scope="module")
def exported(there_and_back) -> Path:
    return there_and_back[1]


@pytest.fixture(scope="module")
def pipeline(imported) -> Pipeline:
    return Pipeline(from_dict(json.loads((imported / "config.json").read_text())), imported)


# ------------------------------------------------------------------------------------------------------------------ in


def test_what_is_imported_is_what_the_files_hold_to_the_bit(pipeline, modules, sbert):
    parts = {
        "sasrec": public.sasrec_state(pipeline.cf.config, jax.device_get(pipeline.cf.params)),
        "mlp": public.part_state("mlp", jax.device_get(pipeline.aligned.parameters["f_I"])),
        "mlp2": public.part_state("mlp2", jax.device_get(pipeline.aligned.parameters["f_T"])),
        "log_proj": public.part_state("log_proj", jax.device_get(pipeline.heads["F_U"])),
        "item_proj": public.part_state("item_proj", jax.device_get(pipeline.heads["F_I"])),
    }
    for part, tensors in parts.items():
        state = modules[part].state_dict()
        assert set(tensors) == set(state), part
        for name, tensor in state.items():  # row 0 of item_emb as well
            np.testing.assert_array_equal(tensors[name].view(np.int32), tensor.numpy().view(np.int32), err_msg=name)
    assert np.asarray(pipeline.cf.E)[0].any()
    description = text_encoder.describe(tiny.ENCODER)
    encoder = public.encoder_state(description, jax.device_get(pipeline.aligned.parameters["encoder"]["weights"]))
    assert set(sbert) - set(encoder) == {"0.auto_model.embeddings.position_ids"}
    assert all((tensor == sbert[name].numpy()).all() for name, tensor in encoder.items())


def test_the_data_are_those_of_the_files(pipeline, root):
    dataset = pipeline.dataset
    assert (dataset.n_users, dataset.n_items) == (32, tiny.N_ITEMS)
    assert dataset.sequence(32).tolist() == [40, 40, 39]
    assert dataset.titles()[3] == "Film “3”"
    assert dataset.titles()[-1] is None
    assert dataset.descriptions()[1:4] == ["One", "", None]


def test_its_recipe_is_the_public_code_s(pipeline):
    x = pipeline.experiment
    assert (x.cf.epochs, x.cf.heads, x.cf.select) == (200, 2, "last")
    assert (x.align.epochs, x.align.joint, x.align.text) == (10, JOINT, '"{title}, {description}"')
    assert (x.llm.epochs, x.llm.domain, x.llm.single_items) == (5, "movies", True)
    assert x.llm.logit_rows is None  # what is cut are OPT's rows alone


def test_the_models_are_those_of_the_public_code(pipeline, modules):
    dataset, sasrec = pipeline.dataset, modules["sasrec"].eval()
    users = np.flatnonzero(dataset.has_target("test"))
    windows = dataset.windows(dataset.history_end("test")[users], 10, users)
    with torch.no_grad():
        x_u = sasrec.user_representation(torch.tensor(windows))
        e = modules["mlp"].encode(sasrec.item_emb.weight)
        O_i = modules["item_proj"](e)
    np.testing.assert_allclose(pipeline.cf.x_u(windows, users), x_u.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pipeline.aligned.e, e.numpy(), rtol=1e-5, atol=1e-6)
    from allmrec_jax.models.projection import F_I

    np.testing.assert_allclose(
        F_I(pipeline.heads["F_I"], jax.numpy.asarray(e.numpy())), O_i.numpy(), rtol=1e-4, atol=1e-5
    )


def test_it_evaluates_at_once_and_trains_nothing(imported, tmp_path, monkeypatch):
    from allmrec_jax.training import align_step, cf, inject_step

    def never(*_, **__):
        raise AssertionError("nothing is left to train")

    work = tmp_path / "elsewhere"  # a work directory may be moved
    shutil.copytree(imported, work)
    monkeypatch.setattr(inject_step, "update", never)
    monkeypatch.setattr(align_step, "update", never)
    monkeypatch.setattr(cf, "update", never)
    assert cli.main(["evaluate", "--workdir", str(work)]) == 0
    found = json.loads((work / "metrics.json").read_text())["scenarios"]["overall"]
    assert found["a-llmrec"]["hit@1"]["n"] == found["cf"]["hit@1"]["n"] == 6


def test_stages_without_files_are_left_to_training(root, others, tmp_path, capsys):
    some = tmp_path / "some"
    shutil.copytree(root, some)
    shutil.rmtree(some / "models")
    assert cli.main(["import", str(some), "--workdir", str(tmp_path / "w"), *others]) == 0
    assert "no files of align and llm" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "w" / "align").exists()


def test_the_other_spelling_of_the_encoder_s_tensors(root, sbert, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({name.replace("0.auto_model.", "0.model."): tensor for name, tensor in sbert.items()}, path)
    from allmrec_jax.models.tensor_files import PickledTensors

    weights = text_encoder.read_weights(tiny.ENCODER, PickledTensors([path]), "x")
    found = public.encoder_state(text_encoder.describe(tiny.ENCODER), weights)
    assert all((tensor == sbert[name].numpy()).all() for name, tensor in found.items())


# ----------------------------------------------------------------------------------------------------------------- out


def test_the_files_come_out_as_they_went_in(exported, root):
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(exported) for path in exported.rglob("*") if path.is_file())
    for file in files:
        if file.suffix == ".txt":
            assert (exported / file).read_bytes() == (root / file).read_bytes()
        elif file.suffix == ".gz":
            with open(exported / file, "rb") as new, open(root / file, "rb") as old:
                assert pickle.load(new) == pickle.load(old)
        else:
            new, old = (torch.load(folder / file, weights_only=file.suffix == ".pt") for folder in (exported, root))
            if file.suffix == ".pth":
                (about, new), (expected, old) = new, old
                assert {k: about[k] for k in ("user_num", "item_num")} == {"user_num": 32, "item_num": 40}
                differing = ("device", "state_dict_path")
                same = {k: v for k, v in vars(expected["args"]).items() if k not in differing}
                assert same.items() <= vars(about["args"]).items()
            assert type(new) is OrderedDict
            assert set(old) - set(new) <= {"0.auto_model.embeddings.position_ids"}
            for name, tensor in new.items():
                assert tensor.dtype == torch.float32
                assert torch.equal(tensor.view(torch.int32), old[name].view(torch.int32)), name


def test_the_public_code_loads_it_strictly(exported, modules):
    """As that code does: a model of the arguments in the file, then `load_state_dict`."""
    files = public.PublicFiles(exported, NAME)
    about, state = torch.load(files.checkpoint(), weights_only=False)
    args = about["args"]
    sizes = args.hidden_units, args.num_blocks, args.num_heads, args.maxlen, args.dropout_rate
    assert args.device == "cpu"
    SASRec(SASRecConfig(about["item_num"], *sizes)).load_state_dict(state, strict=True)
    for part in ("mlp", "mlp2", "log_proj", "item_proj"):
        modules[part].load_state_dict(torch.load(files.part(part), weights_only=True, mmap=True), strict=True)


def test_what_is_exported_can_be_imported_again(exported, others, pipeline, tmp_path):
    assert cli.main(["import", str(exported), "--workdir", str(tmp_path / "w"), *others]) == 0
    again = Pipeline(pipeline.experiment, tmp_path / "w")
    for ours, theirs in ((again.cf.params, pipeline.cf.params), (again.heads, pipeline.heads)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_nothing_is_overwritten_and_another_name_is_another_file(exported, imported, capsys):
    before = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    assert cli.main(["export", "--workdir", str(imported), "--out", str(exported)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()} == before


def test_safetensors_have_the_documented_names(imported, modules, tmp_path):
    from safetensors import safe_open

    assert cli.main(["export", "--workdir", str(imported), "--out", str(tmp_path), "--to", "safetensors"]) == 0
    parts = {"cf": "sasrec", "f_I": "mlp", "f_T": "mlp2", "F_U": "log_proj", "F_I": "item_proj"}
    assert {path.stem for path in tmp_path.iterdir()} == {*parts, "sentence_encoder"}
    for ours, part in parts.items():
        with safe_open(tmp_path / f"{ours}.safetensors", "np") as file:
            state = modules[part].state_dict()
            assert set(file.keys()) == set(state)
            assert all((file.get_tensor(name) == tensor.numpy()).all() for name, tensor in state.items())
            assert json.loads(file.metadata()["config"])["width"] in (D, JOINT, TEXT)


# ------------------------------------------------------------------------------------------------------------ mistakes


class Hostile:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["sasrec", "arguments", "mlp", "texts"])
def test_nothing_that_stands_in_a_file_is_run(place, root, others, tmp_path, capsys):
    bad, trap = tmp_path / "bad", tmp_path / "was run"
    shutil.copytree(root, bad)
    files = public.PublicFiles(bad, NAME)
    if place == "texts":
        (files.data / f"{NAME}_text_name_dict.json.gz").write_bytes(pickle.dumps({"title": {1: Hostile(trap)}}))
    elif place == "mlp":
        torch.save({"fc1.weight": Hostile(trap)}, files.part("mlp"))
    else:
        about, state = torch.load(files.checkpoint(), weights_only=False)
        if place == "arguments":
            about["args"].device = Hostile(trap)
        else:
            state["item_emb.weight"] = Hostile(trap)
        torch.save([about, state], files.checkpoint())
    assert cli.main(["import", str(bad), "--workdir", str(tmp_path / "w"), *others]) == 1
    said = capsys.readouterr().err
    assert "asks for the global posix.mkdir" in said
    assert said.count("\n") == 1
    assert not trap.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def rewrite(path: Path, change) -> None:
    value = torch.load(path, weights_only=False)
    change(value)
    torch.save(value, path)


MISTAKES = {
    "two checkpoints": (lambda f: shutil.copy(f.checkpoint(), f.sasrec / "other.pth"), "holds 2 .pth files"),
    "no checkpoint": (lambda f: f.checkpoint().unlink(), "holds no .pth file"),
    "half a stage": (lambda f: f.part("mlp2").unlink(), "mlp2.pt is missing, but others of that stage are there"),
    "heads alone": (lambda f: [f.part(p).unlink() for p in public.STAGE_1], "log_proj.pt builds on it"),
    "no data": (lambda f: shutil.rmtree(f.data), "holds no NAME.txt"),
    "no texts": (lambda f: (f.data / f"{NAME}_text_name_dict.json.gz").unlink(), "is missing; it holds the items'"),
    "other texts": (
        lambda f: (f.data / f"{NAME}_text_name_dict.json.gz").write_bytes(pickle.dumps({"title": {"1": "x"}})),
        "holds no titles by item id",
    ),
    "no numbers": (lambda f: (f.data / f"{NAME}.txt").write_text("ann heat\n"), "is not one `user item` a line"),
    "one number": (lambda f: (f.data / f"{NAME}.txt").write_text("1\n2\n"), "is not one `user item` a line"),
    "a huge number": (lambda f: (f.data / f"{NAME}.txt").write_text("1 99999999\n"), "is not one `user item` a line"),
    "more items": (lambda f: (f.data / f"{NAME}.txt").write_text("1 41\n" * 9), "they are not of one data set"),
    "unknown tensor": (lambda f: rewrite(f.checkpoint(), lambda v: v[1].update(x=torch.ones(1))), "unknown tensor 'x'"),
    "missing tensor": (lambda f: rewrite(f.part("sbert"), lambda v: v.popitem(False)), "is missing; is this the right"),
    "other sizes": (
        lambda f: rewrite(f.checkpoint(), lambda v: setattr(v[0]["args"], "hidden_units", 16)),
        "which does not fit",
    ),
    "no sizes": (lambda f: rewrite(f.checkpoint(), lambda v: delattr(v[0]["args"], "maxlen")), "is not a SASRec"),
    "text as size": (
        lambda f: rewrite(f.checkpoint(), lambda v: setattr(v[0]["args"], "maxlen", "10")),
        "is not a SASRec",
    ),
    "other f_T": (lambda f: torch.save(AutoEncoder(TEXT + 1, JOINT).state_dict(), f.part("mlp2")), "mlp2.pt is (9, 6)"),
    "swapped": (lambda f: shutil.copy(f.part("log_proj"), f.part("item_proj")), "item_proj.pt does not take inputs"),
    "no part at all": (lambda f: torch.save({"a": torch.ones(1)}, f.part("log_proj")), "neither an auto-encoder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line_and_leaves_nothing(mistake, root, others, tmp_path, capsys):
    bad = tmp_path / "bad"
    shutil.copytree(root, bad)
    change, hint = MISTAKES[mistake]
    change(public.PublicFiles(bad, NAME))
    assert cli.main(["import", str(bad), "--workdir", str(tmp_path / "w"), *others]) == 1
    said = capsys.readouterr().err
    assert hint in said
    assert said.startswith("allmrec: ")
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["import", "nowhere", "--workdir", "w"], "holds no NAME.txt"),
        (["import", "{root}", "--workdir", "{work}"], "is in use; choose another --workdir"),
        (["import", "{root}", "--workdir", "w", "--name", "Other"], "there is Tiny_Movies"),
        (["import", "{root}", "--workdir", "w", "--cf.width", "16"], "are what the file says"),
        (["import", "{root}", "--workdir", "w", "--cf.wdth", "16"], "did you mean --cf.width"),
        (["export", "--workdir", "nowhere", "--out", "x"], "is not a work directory"),
        (["export", "--workdir", "{work}", "--out", "x", "--to", "prompt-embeds"], "goes with --users"),
        (["export", "--workdir", "{work}", "--out", "x", "--users", "1"], "goes with --users"),
        (
            ["export", "--workdir", "{work}", "--out", "x", "--to", "safetensors", "--name", "y"],
            "goes with --to public",
        ),
        (["export", "--workdir", "{work}", "--out", "x", "--to", "prompt-embeds", "--users", "99"], "no user '99'"),
    ],
)
def test_wrong_arguments_of_both(arguments, hint, root, imported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([part.format(root=root, work=imported) for part in arguments]) == 1
    said = capsys.readouterr().err
    assert hint in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ prompts as embeddings


@pytest.fixture(scope="module")
def served(imported, others) -> torch.nn.Module:
    """The LLM as transformers loads it."""
    import transformers

    folder = others[others.index("--llm.llm") + 1]
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_transformers_reads_the_exported_prompts_as_our_llm_does(imported, pipeline, served, tmp_path):
    from safetensors.torch import load_file

    users = ["1", "5", "31"]
    arguments = [
        "export",
        "--workdir",
        str(imported),
        "--out",
        str(tmp_path),
        "--to",
        "prompt-embeds",
        "--users",
        *users,
    ]
    assert cli.main(arguments) == 0
    found, rows = load_file(tmp_path / "prompts.safetensors"), json.loads((tmp_path / "prompts.json").read_text())
    embeds, mask = found["inputs_embeds"], found["attention_mask"]
    assert mask.sum(1).tolist() == found["lengths"].tolist()
    assert len(set(found["lengths"].tolist())) > 1  # something is padded
    assert [row["user"] for row in rows] == users
    assert all(row["target"] in row["candidates"] for row in rows)

    # Every candidate's likelihood behind the exported prompt, by transformers, is the score that our ranker gives.
    x, titles = pipeline.experiment, pipeline.dataset.titles()
    number = {title: item for item, title in enumerate(titles) if title}
    number["No Title"] = titles.index(None, 1)
    candidates = np.array([[number[title] for title in row["candidates"]] for row in rows])
    ids = np.array([int(user) for user in users])
    ends = pipeline.dataset.history_end("test")[ids]
    histories = [row[row != 0] for row in pipeline.dataset.windows(ends, x.llm.history, ids)]
    x_u = pipeline.cf.x_u(pipeline.dataset.windows(ends, x.cf.maxlen, ids), ids)
    ours = pipeline.ranker(pipeline.heads, candidates=4)(histories, candidates, x_u)
    builder, theirs = pipeline.builder(inject=True), np.zeros_like(ours)
    with torch.no_grad():
        for row, column in np.ndindex(theirs.shape):
            [answer] = builder.answers([int(candidates[row, column])])
            ahead = embeds[row, mask[row].bool()]
            x_in = torch.cat([ahead, served.get_input_embeddings()(torch.tensor(answer))])[None]
            logits = served(inputs_embeds=x_in, attention_mask=torch.ones(x_in.shape[:2])).logits[0]
            log_p = logits.log_softmax(-1)[len(ahead) - 1 : -1]
            theirs[row, column] = log_p[torch.arange(len(answer)), torch.tensor(answer)].mean()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_transformers_generates_from_a_padded_batch_as_each_prompt_alone(pipeline, served):
    """Greedy tokens on left-padded embeddings against our own LLM's, one prompt and one token at a time."""
    from flax import nnx

    builder = pipeline.builder(inject=True)
    prompts = builder.prompts([[1, 2, 3], [4]], [[5, 6], [7, 8]])
    x_u = np.random.default_rng(0).normal(size=(2, D)).astype(np.float32)
    matrices = prompt_embeds(pipeline.llm, pipeline.heads, prompts, x_u, pipeline.aligned.e)
    assert [matrix.shape for matrix in matrices] == [(len(prompt.tokens), H) for prompt in prompts]
    embeds, mask = left_padded(matrices)
    theirs = served.generate(
        inputs_embeds=torch.tensor(embeds),
        attention_mask=torch.tensor(mask),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )

    @jax.jit
    def following(weights, x, branch, at):
        model = nnx.merge(pipeline.llm.graph, weights)
        return model.logits(model(x, branch)[0, at])

    table = np.asarray(pipeline.llm.weights["weights"]["embed"])
    for matrix, generated in zip(matrices, theirs.tolist(), strict=True):
        x, ours = matrix, []
        for _ in range(6):
            padded, branch = np.zeros((1, 256, H), np.float32), np.full((1, 256), -1, np.int32)
            padded[0, : len(x)], branch[0, : len(x)] = x, 0
            ours.append(int(np.argmax(following(pipeline.llm.weights, padded, branch, len(x) - 1))))
            x = np.concatenate([x, table[ours[-1:]]])
        assert generated == ours
