"""One experiment is one tree of frozen dataclasses.

A config file is a Python file with `def config() -> Experiment`; fields are overridden on the command line
(`--cf.epochs 50`). The defaults are the `paper` recipe: what the paper says, with sound choices where it is silent.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from allmrec_jax.errors import UserError

FEW_SHOT = (256, 128)  # users of the few-shot scenarios


@dataclass(frozen=True)
class Data:
    """Which interactions and texts."""

    name: str = "ml-100k"
    """A named data set (`allmrec data list`) or the folder of a prepared one."""
    recipe: Literal["clean", "reference", "as-is"] = "clean"
    """How raw files are filtered (docs: data recipes)."""
    strip_years: bool = False
    """Take a year in brackets off the end of titles: "Heat (1995)" becomes "Heat", half the prompt's tokens."""
    few_shot: int | None = None
    """Train all stages on so many users alone, 256 or 128 (the data set's scenario); everybody is tested."""


@dataclass(frozen=True)
class CF:
    """Stage 0, the collaborative filtering model."""

    model: str = "sasrec"
    """sasrec, gru4rec, nextitnet, ncf, the Python file of a model of yours, or given, which trains nothing and reads
    `file` (docs/models.md)."""
    file: str | None = None
    """For `given`: .npz or .safetensors with E (items, width), in the order of the data set's ids; docs/models.md."""
    width: int = 50
    """d, the width of item and user embeddings."""
    blocks: int = 2
    """Blocks of SASRec and NextItNet, layers of GRU4Rec and of NCF's network."""
    heads: int = 1
    """Attention heads of SASRec."""
    maxlen: int = 50
    """Number of last items that x_u sees."""
    crop: bool = False
    """Train on windows that end anywhere in histories longer than `maxlen`, not on their last items alone (paper)."""
    dropout: float = 0.5
    batch: int = 128
    epochs: int = 200
    """An epoch is n_users // batch steps."""
    learning_rate: float = 1e-3
    loss: Literal["bce", "softmax"] = "bce"
    """bce: yes or no for each item (paper); softmax: the next item among others."""
    negatives: int = 1
    """Of each position (bce), or shared by all positions of a step (softmax, where 0 takes all items)."""
    calibration: float = 0.0
    """t of gSASRec's loss, in [0, 1]; 0 is plain BCE."""
    weight_decay: float = 0.0
    l2_emb: float = 0.0
    """Factor of the Frobenius norm of E in the loss."""
    table: Literal["auto", "dense", "lazy"] = "auto"
    """Rows of E that a step moves: all, as PyTorch's Adam does (dense), or only those that it reads (lazy), which costs
    the same however many items there are; auto is dense up to 20,000 items."""
    select: Literal["best", "last"] = "best"
    """Which epoch is used: the best on validation NDCG@10 (paper), or the last (public code)."""
    refit: bool = False
    """Train on the validation items, too, to the last epoch: with settings that were chosen on validation before."""
    evaluate_every: int = 10
    """Epochs between validations, each with a checkpoint."""


BEST_CF = CF(
    width=128, loss="softmax", negatives=1024, weight_decay=1.0, crop=True, refit=True, select="last", evaluate_every=20
)
"""The `best` recipe of stage 0: everything, epochs and dropout of a data set included, was chosen on validation items;
then these are trained on, too (docs/results.md)."""


@dataclass(frozen=True)
class Alignment:
    """Stage 1, f_I and f_T and the fine-tuned sentence encoder."""

    encoder: str = "all-minilm-l6-v2"
    """A named sentence encoder, or the folder of one."""
    joint: int = 128
    """d', the width of e and q."""
    alpha: float = 0.5
    """Factor of L_item."""
    beta: float = 0.5
    """Factor of L_text; the paper uses 0.5 for Movies and Games and 0.2 for Beauty and Toys, the public code 0.2."""
    score: Literal["dot", "mean"] = "dot"
    """s of L_rec: the sum of the d products of x_u and E' (paper), or their mean (public code)."""
    items: Literal["positive", "both"] = "positive"
    """What enters L_match, L_item and L_text: the user's next item (paper), or that and the random negative, two means
    added (public code). Each distinct text is encoded once a step, under one dropout mask; the public code draws a mask
    for each time that it occurs."""
    match: bool = True
    """Ablation switch of L_match."""
    reconstruction: bool = True
    """Ablation switch of L_item and L_text: without it alpha and beta are 0."""
    recommendation: bool = True
    """Ablation switch of L_rec."""
    train_encoder: bool = True
    """With False the sentence encoder stays as it is: every text is encoded once, before training."""
    cf_dropout: bool = False
    """Make x_u anew at each step with the CF model's dropout, as the public code does, which never turns it off."""
    encoder_dropout: bool = True
    """The sentence encoder's own dropout, while it is trained."""
    text: str = "Title: {title}, Description: {description}"
    """Of an item; the public code's is '"{title}, {description}"' with the quote marks."""
    single_items: bool = False
    """Keep users with a single training item, as the public code does: x_u of an empty history, item 0 as target and
    as negative, whose text is `No Title`, `No Description`."""
    targets: Literal["last", "all"] = "last"
    """Of each user: the last training item (paper), or each one that has another before it (A-LLMRec_all)."""
    order: Literal["shuffled", "file"] = "shuffled"
    """Of the users: shuffled anew in each epoch, or as in the data (public code)."""
    chunk: int | None = None
    """Users of an optimiser step, where a batch has more; the gradients of a batch's earlier chunks stay in those of
    the later ones. The public code has 60; None is one step a batch."""
    batch: int = 32
    epochs: int = 10
    learning_rate: float = 1e-4
    """Of f_I and f_T."""
    encoder_learning_rate: float | None = None
    """Of the sentence encoder; None is the same (paper)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the sentence encoder's products; auto is float32 on CPU, else bfloat16. Its weights are kept in float32."""
    group_tokens: int | None = None
    """Of the texts that go through the encoder at once; None is 1,024 on CPU and 16,384 elsewhere. Fewer take less
    memory."""
    remat: bool = False
    """Compute the encoder's layers again for the gradient in place of keeping their inner values: slower, and less
    memory."""
    save_every: int = 5
    """Epochs between checkpoints."""

    def as_public_code(self) -> Alignment:
        """The same with every field that the public code decides otherwise than the paper."""
        return dataclasses.replace(
            self,
            beta=0.2,
            score="mean",
            items="both",
            cf_dropout=True,
            text='"{title}, {description}"',
            single_items=True,
            order="file",
            chunk=60,
        )


@dataclass(frozen=True)
class Injection:
    """Stage 2, F_U and F_I through the frozen LLM."""

    llm: str = "smollm2-135m-instruct"
    """A named LLM, or the folder (or .gguf file) of one."""
    domain: Literal["movies", "games", "shopping", "none"] = "shopping"
    """Wording of the prompt: watched/movie, played/game or bought/item; none has neither verb nor instruction, as the
    public code for data sets that it does not know."""
    user_sentence: str = " is a user representation. "
    """What follows O_u in the prompt; the public code's has no space at its end."""
    sentence: str | None = None
    """The rest of the prompt, with {history} and {candidates}, and {done}, {noun}, {do} of the domain; None is the
    paper's."""
    strip_around_special: bool = False
    """Take white space behind an O_i away, as the public code's tokenizer did."""
    logit_rows: int | None = None
    """Predict tokens among the vocabulary's first rows alone; the public code cuts OPT's 50,272 to 50,269."""
    item_vectors: Literal["e", "E", "random", "none"] = "e"
    """What F_I reads of each item: stage 1's e (paper); E of the CF model itself, the paper's baseline MLP-LLM; a
    random vector that stays as it is; or nothing: no O_i in the prompt (ablations)."""
    item_place: Literal["after", "before"] = "after"
    """Of O_i: right behind its quoted title (paper), or right in front of it."""
    user_vector: bool = True
    """Whether O_u, with its sentence, is in the prompt (False: ablation)."""
    user_place: Literal["first", "last"] = "first"
    """Of O_u: at the very front (paper), or at the very end, in front of the answer, and then without its sentence."""
    targets: Literal["last", "all"] = "last"
    """Of each user: the last training item (paper), or each one that has another before it (the paper's A-LLMRec_all,
    with `align.targets all`)."""
    single_items: bool = False
    """Keep users with a single training item, as the public code does: an empty history and the target `No Title`."""
    cf_dropout: bool = False
    """Make x_u anew at each step with the CF model's dropout, as the public code does, which never turns it off."""
    history: int = 10
    """Last items named in the prompt."""
    candidates: int = 20
    """Candidates in the prompt: the target and random items that the user has not."""
    title_weight: float = 1.0
    """Factor of the paper's loss: cross-entropy of the target title's tokens."""
    choice_weight: float = 0.0
    """Factor of the choice loss (0 in the paper): cross-entropy of the target among the prompt's candidates, a softmax
    over `sharpness` times the mean log-likelihood of each title. It trains what ranking by likelihood asks for."""
    sharpness: float = 4.0
    """Of the choice loss's softmax."""
    init: Literal["paper", "matched", "held"] = "paper"
    """How F_U and F_I start, and whether they may drift: at random (paper); `matched`: inputs standardised, O_u and O_i
    with the mean and the spread of the LLM's token embeddings; `held`: kept so at every step, and folded into the
    heads' last layers at the end."""
    batch: int = 4
    micro: int | None = None
    """Users of one pass through the LLM; the gradients of a batch's passes are added up. None is one on CPU, where
    each prompt then has its own length, and the whole batch elsewhere."""
    epochs: float = 5.0
    """Passes over the users; a fraction trains on that share of them."""
    learning_rate: float = 1e-4
    warmup: int = 0
    """Steps over which the learning rate rises linearly."""
    decay: bool = False
    """Whether the learning rate falls to 0 along a cosine."""
    clip: float | None = None
    """Greatest norm of the gradient; None does not clip."""
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"
    """Of the frozen weights; auto is float32 on CPU, else bfloat16. Integers are made while the weights are read."""
    remat: Literal["none", "products", "layers"] = "none"
    """What the backward pass computes again to save memory: nothing, all but the products with weights, or each layer
    from its input (a third more time)."""
    save_every: int = 25
    """Steps between checkpoints."""

    @property
    def model(self) -> str:
        """What metrics.json calls the LLM with these vectors."""
        return "mlp-llm" if self.item_vectors == "E" else "a-llmrec"

    def as_public_code(self) -> Injection:
        """The same with every field that the public code decides otherwise than the paper.

        It trains 10 epochs and evaluates the fifth: the same as 5, since its learning rate is constant.
        """
        return dataclasses.replace(
            self,
            user_sentence=" is a user representation.",
            strip_around_special=True,
            single_items=True,
            cf_dropout=True,
            batch=2,
        )


@dataclass(frozen=True)
class Evaluation:
    """Who is tested, and how."""

    users: int | None = None
    """Number of seeded test users; None takes all. With more than before, only the new ones are scored."""
    validation_users: int | None = 1000
    """Users on whose validation items `fused` learns how far to trust each model; None takes all, 0 leaves it out."""
    candidates: int = 20
    """The target and so many less one items that the user never interacted with."""
    score: Literal["mean", "sum"] = "mean"
    """Log-likelihood of a candidate's title divided by its number of tokens, or not."""
    new_tokens: int = 511
    """At most, of an answer in words (the scenario `generated`; the public code's 511)."""
    batch: int = 4
    resamples: int = 2000
    """Bootstrap resamples for the 95 % intervals."""
    examples: int = 20
    """Users shown with history, true next item and each model's choice."""


@dataclass(frozen=True)
class Devices:
    """How the work is laid over devices."""

    model: int = 1
    """Devices that share one copy of the LLM; the others are data parallel."""
    shard_weights: bool = False
    """Cut the LLM's weights over the data-parallel devices, too; each layer is gathered where it is used."""
    items: int = 1
    """Devices that share one copy of the item table E in stage 0, each with its rows."""
    map: Literal["shard_map", "pmap"] = "shard_map"
    """How stages 0 and 1 are mapped over devices."""


@dataclass(frozen=True)
class Experiment:
    """Everything that determines a run."""

    name: str = "experiment"
    seed: int = 0
    data: Data = field(default_factory=Data)
    cf: CF = field(default_factory=CF)
    align: Alignment = field(default_factory=Alignment)
    llm: Injection = field(default_factory=Injection)
    evaluation: Evaluation = field(default_factory=Evaluation)
    devices: Devices = field(default_factory=Devices)


def as_dict(config: Any) -> dict[str, Any]:
    """The tree as plain dicts, for JSON."""
    return dataclasses.asdict(config)


def from_dict(tree: dict[str, Any]) -> Experiment:
    """The inverse of `as_dict`.

    Raises:
      UserError: naming a field that this version does not know.
    """

    def build(kind: type, values: dict[str, Any], where: str) -> Any:
        fields = {f.name: f for f in dataclasses.fields(kind)}
        for name in values:
            if name not in fields:
                raise UserError(f"the config has a field {where}{name} that this version does not know")
        parts = {}
        for name, value in values.items():
            factory = fields[name].default_factory
            nested = isinstance(factory, type) and dataclasses.is_dataclass(factory)
            parts[name] = build(factory, value, f"{where}{name}.") if nested else value
        return kind(**parts)

    return check(build(Experiment, tree, ""))


def opened(workdir: Path) -> Experiment:
    """The experiment that a work directory was made with."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(
            f"{workdir} is not a work directory (no config.json); make one with `allmrec run` or `allmrec demo`"
        )
    try:
        return from_dict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); restore it or train into another --workdir") from error


AT_LEAST_ONE = [
    "cf.width",
    "cf.blocks",
    "cf.heads",
    "cf.maxlen",
    "cf.batch",
    "cf.epochs",
    "cf.evaluate_every",
    "align.joint",
    "align.batch",
    "align.epochs",
    "align.save_every",
    "llm.history",
    "llm.batch",
    "llm.save_every",
    "evaluation.batch",
    "evaluation.new_tokens",
    "evaluation.resamples",
    "devices.model",
    "devices.items",
]


def check(experiment: Experiment) -> Experiment:
    """The same experiment, if its values make sense.

    Raises:
      UserError: naming the first field that does not.
    """
    values = {
        f"{part.name}.{f.name}": getattr(getattr(experiment, part.name), f.name)
        for part in dataclasses.fields(experiment)
        if dataclasses.is_dataclass(getattr(experiment, part.name))
        for f in dataclasses.fields(getattr(experiment, part.name))
    }
    values["seed"] = experiment.seed
    for part in dataclasses.fields(experiment):
        section = getattr(experiment, part.name)
        if not dataclasses.is_dataclass(section):
            continue
        for name, hint in typing.get_type_hints(type(section)).items():
            choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
            if choices and getattr(section, name) not in choices:
                raise UserError(f"{part.name}.{name} is {getattr(section, name)!r}; choose {', '.join(choices)}")
    try:
        rules = _rules(values)
        experiment.align.text.format(title="", description="")
    except TypeError as error:
        raise UserError(f"a field of the config has a value of the wrong type ({error})") from error
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"align.text may hold {{title}} and {{description}} only, not {error}") from error
    for name, fine, must_be in rules:
        if not fine:
            raise UserError(f"{name} is {values[name]}, but must be {must_be}")
    return experiment


def _rules(values: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """(field, whether its value is fine, what it must be)."""
    rules = [(name, values[name] >= 1, "at least 1") for name in AT_LEAST_ONE]
    rules.append(("seed", values["seed"] >= 0, "at least 0"))
    rules += [
        (name, value > 0, "above 0") for name, value in values.items() if "learning_rate" in name and value is not None
    ]
    rules += [
        (
            "cf.negatives",
            values["cf.negatives"] >= (values["cf.loss"] == "bce"),
            "at least 1 (0, all items, with cf.loss softmax only)",
        ),
        (
            "cf.calibration",
            0 <= values["cf.calibration"] <= (values["cf.loss"] == "bce"),
            "in [0, 1] (0 with cf.loss softmax)",
        ),
        ("cf.weight_decay", values["cf.weight_decay"] >= 0, "at least 0"),
        ("cf.l2_emb", values["cf.l2_emb"] >= 0, "at least 0"),
        ("cf.file", values["cf.model"] != "given" or bool(values["cf.file"]), "a file, with cf.model given"),
        ("cf.dropout", 0 <= values["cf.dropout"] < 1, "in [0, 1)"),
        (
            "cf.heads",
            values["cf.width"] % max(1, values["cf.heads"]) == 0,
            f"a divisor of cf.width {values['cf.width']}",
        ),
        ("data.few_shot", values["data.few_shot"] in (None, *FEW_SHOT), f"None, {' or '.join(map(str, FEW_SHOT))}"),
        ("align.chunk", values["align.chunk"] is None or values["align.chunk"] >= 1, "at least 1"),
        ("llm.candidates", values["llm.candidates"] >= 2, "at least 2"),
        (
            "llm.user_vector",
            values["llm.user_vector"] or values["llm.item_vectors"] != "none",
            "True with llm.item_vectors none, or there is nothing to train",
        ),
        (
            "llm.micro",
            values["llm.micro"] is None or (values["llm.micro"] >= 1 and not values["llm.batch"] % values["llm.micro"]),
            f"a divisor of llm.batch {values['llm.batch']}",
        ),
        ("llm.logit_rows", values["llm.logit_rows"] is None or values["llm.logit_rows"] >= 1, "at least 1"),
        ("llm.epochs", values["llm.epochs"] > 0, "above 0"),
        ("llm.warmup", values["llm.warmup"] >= 0, "at least 0"),
        ("evaluation.candidates", values["evaluation.candidates"] >= 2, "at least 2"),
        ("evaluation.users", values["evaluation.users"] is None or values["evaluation.users"] >= 1, "at least 1"),
        (
            "evaluation.validation_users",
            values["evaluation.validation_users"] is None or values["evaluation.validation_users"] >= 0,
            "at least 0",
        ),
    ]
    return rules


def config_folder() -> Path:
    """The folder of the configs that come with the project: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """Of the configs that come with the project."""
    folder = config_folder()
    found = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.py"))
    return sorted(name for name in found if not name.startswith("paper/table"))


def table_numbers() -> list[int]:
    """Of the paper's tables, `configs/paper/tableN.py`."""
    return sorted(int(path.stem.removeprefix("table")) for path in (config_folder() / "paper").glob("table*.py"))


def load_config(name: str, function: str = "config", kind: type = Experiment) -> Any:
    """The experiment of a config file: a path, or the bare name of one that comes with the project.

    Args:
      function, kind: what of the file is called, and what it must return.

    Raises:
      UserError: if there is no such file, or it does not define `config() -> Experiment`.
    """
    path = Path(name)
    if not path.is_file():
        path = config_folder() / f"{name.removesuffix('.py')}.py"
    if not path.is_file():
        raise UserError(f"there is no config {name!r}; give a Python file, or one of: {', '.join(config_names())}")
    spec = importlib.util.spec_from_file_location(f"allmrec_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = getattr(module, function)()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the config {path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        raise UserError(f"{function}() in {path} must return {kind.__name__}, not {type(found).__name__}")
    return check(found) if isinstance(found, Experiment) else found
