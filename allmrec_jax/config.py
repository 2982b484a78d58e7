"""One experiment is one tree of frozen dataclasses.

A config file is a Python file with `def config() -> Experiment`; fields are overridden on the command line
(`--cf.epochs 50`). The defaults are the `paper` recipe: what the paper says, with sound choices where it is silent.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from allmrec_jax.errors import UserError


@dataclass(frozen=True)
class Data:
    """Which interactions and texts."""

    name: str = "ml-100k"
    """A named data set (`allmrec data list`) or the folder of a prepared one."""
    recipe: Literal["clean", "reference"] = "clean"
    """How raw files are filtered (docs: data recipes)."""
    strip_years: bool = False
    """Take a year in brackets off the end of titles: "Heat (1995)" becomes "Heat", half the prompt's tokens."""


@dataclass(frozen=True)
class CF:
    """Stage 0, the collaborative filtering model (SASRec)."""

    width: int = 50
    """d, the width of item and user embeddings."""
    blocks: int = 2
    heads: int = 1
    maxlen: int = 50
    """Number of last items that x_u sees."""
    dropout: float = 0.5
    batch: int = 128
    epochs: int = 200
    """An epoch is n_users // batch steps."""
    learning_rate: float = 1e-3
    l2_emb: float = 0.0
    """Factor of the Frobenius norm of E in the loss."""
    select: Literal["best", "last"] = "best"
    """Which epoch is used: the best on validation NDCG@10 (paper), or the last (public code)."""
    evaluate_every: int = 10
    """Epochs between validations, each with a checkpoint."""


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
    """Factor of L_text; the paper uses 0.5 for Movies and Games, 0.2 for Beauty and Toys."""
    match: bool = True
    """Ablation switch of L_match."""
    recommendation: bool = True
    """Ablation switch of L_rec."""
    train_encoder: bool = True
    """With False the sentence encoder stays as it is."""
    text: str = "Title: {title}, Description: {description}"
    batch: int = 32
    epochs: int = 10
    learning_rate: float = 1e-4
    save_every: int = 5
    """Epochs between checkpoints."""


@dataclass(frozen=True)
class Injection:
    """Stage 2, F_U and F_I through the frozen LLM."""

    llm: str = "smollm2-135m-instruct"
    """A named LLM, or the folder (or .gguf file) of one."""
    domain: Literal["movies", "games", "shopping"] = "shopping"
    """Wording of the prompt: watched/movie, played/game or bought/item."""
    history: int = 10
    """Last items named in the prompt."""
    candidates: int = 20
    """Candidates in the prompt: the target and random items that the user has not."""
    gain: float = 1.0
    """Factor on the initial weights of the heads' last layer (1 in the paper)."""
    batch: int = 4
    epochs: float = 5.0
    """Passes over the users; a fraction trains on that share of them."""
    learning_rate: float = 1e-4
    warmup: int = 0
    """Steps over which the learning rate rises linearly."""
    decay: bool = False
    """Whether the learning rate falls to 0 along a cosine."""
    clip: float | None = None
    """Greatest norm of the gradient; None does not clip."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen weights; auto is float32 on CPU, else bfloat16."""
    remat: bool = False
    """Recompute each layer's activations in the backward pass: less memory, a third more time."""
    save_every: int = 25
    """Steps between checkpoints."""


@dataclass(frozen=True)
class Evaluation:
    """Who is tested, and how."""

    users: int | None = None
    """Number of seeded test users; None takes all."""
    candidates: int = 20
    """The target and so many less one items that the user never interacted with."""
    score: Literal["mean", "sum"] = "mean"
    """Log-likelihood of a candidate's title divided by its number of tokens, or not."""
    batch: int = 4
    resamples: int = 2000
    """Bootstrap resamples for the 95 % intervals."""
    examples: int = 5
    """Users shown with history, true next item and each model's choice."""


@dataclass(frozen=True)
class Devices:
    """How the work is laid over devices."""

    model: int = 1
    """Devices that share one copy of the LLM; the others are data parallel."""
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


def config_folder() -> Path:
    """The folder of the configs that come with the project: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def load_config(name: str) -> Experiment:
    """The experiment of a config file: a path, or the bare name of one that comes with the project.

    Raises:
      UserError: if there is no such file, or it does not define `config() -> Experiment`.
    """
    path = Path(name)
    if not path.is_file():
        path = config_folder() / f"{Path(name).stem}.py"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in config_folder().glob("*.py")))
        raise UserError(f"there is no config {name!r}; give a Python file, or one of: {known}")
    spec = importlib.util.spec_from_file_location(f"allmrec_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        experiment = module.config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the config {path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(experiment, Experiment):
        raise UserError(f"config() in {path} must return an Experiment, not {type(experiment).__name__}")
    return experiment
