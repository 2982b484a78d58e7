"""The public A-LLMRec code's files of weights: where each lies, what it is called, and what is in it.

    pre_train/sasrec/NAME/SASRec.epoch=200.lr=0.001.layer=2.head=1.hidden=50.maxlen=50.pth
                                               SASRec: [{"user_num", "item_num", "args": Namespace}, its state]
    models/saved_models/NAME_sasrec_10_mlp.pt               f_I, its state
    models/saved_models/NAME_sasrec_10_mlp2.pt              f_T
    models/saved_models/NAME_sasrec_10_sbert.pt             the sentence encoder, as sentence-transformers names it
    models/saved_models/NAME_sasrec_10_opt_5_log_proj.pt    F_U
    models/saved_models/NAME_sasrec_10_opt_5_item_proj.pt   F_I
    data/amazon/NAME.txt, NAME_text_name_dict.json.gz       the data (`data.public_files`)

It knows no other epochs than 10 and 5, whatever was trained. Its files of weights are read by `models.pickled`, which
runs nothing that stands in them.
"""

from __future__ import annotations

import argparse
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allmrec_jax.errors import UserError
from allmrec_jax.models import alignment, params, pickled, projection, sasrec, torch_file
from allmrec_jax.models.sasrec import SASRecConfig
from allmrec_jax.models.tensor_files import PickledTensors

EPOCHS = {"align": 10, "llm": 5}
"""In the names of the files of stages 1 and 2."""
STAGE_1, STAGE_2 = ("mlp", "mlp2", "sbert"), ("log_proj", "item_proj")
OURS = {"mlp": "f_I", "mlp2": "f_T", "log_proj": "F_U", "item_proj": "F_I"}


@dataclass(frozen=True)
class PublicFiles:
    """The files about the data set `name` in `root`, the folder of the public code."""

    root: Path
    name: str

    @property
    def data(self) -> Path:
        """The folder of the data's two files."""
        return self.root / "data" / "amazon"

    @property
    def sasrec(self) -> Path:
        """The folder of SASRec's file."""
        return self.root / "pre_train" / "sasrec" / self.name

    def part(self, part: str) -> Path:
        """The file of a part of stages 1 and 2: `STAGE_1`, `STAGE_2`."""
        llm = f"opt_{EPOCHS['llm']}_" if part in STAGE_2 else ""
        return self.root / "models" / "saved_models" / f"{self.name}_sasrec_{EPOCHS['align']}_{llm}{part}.pt"

    def checkpoint(self) -> Path:
        """SASRec's file, the only `.pth` of its folder, as the public code has it.

        Raises:
          UserError: if there is none, or more than one.
        """
        found = sorted(self.sasrec.glob("*.pth"))
        if len(found) != 1:
            what = f"holds {len(found)} .pth files" if found else "holds no .pth file"
            raise UserError(f"{self.sasrec} {what}; the public code has exactly one there, SASRec's")
        return found[0]

    def has(self, parts: tuple[str, ...]) -> bool:
        """Whether the files of a stage are there: all of them, or none.

        Raises:
          UserError: naming one that is missing, if others are there.
        """
        missing = [self.part(part) for part in parts if not self.part(part).is_file()]
        if missing and len(missing) < len(parts):
            raise UserError(f"{missing[0]} is missing, but others of that stage are there; put it beside them")
        return not missing


def find(root: Path, name: str | None) -> PublicFiles:
    """The files about a data set, by default the only one of `data/amazon`.

    Raises:
      UserError: if there is no such data set, or several to choose from.
    """
    folder = Path(root) / "data" / "amazon"
    names = sorted(path.stem for path in folder.glob("*.txt"))
    if not names:
        raise UserError(f"{folder} holds no NAME.txt; give the folder of the public code, with its data and weights")
    if name is None and len(names) > 1:
        raise UserError(f"{folder} holds several data sets ({', '.join(names)}); say --name")
    if name is not None and name not in names:
        raise UserError(f"{folder} holds no {name}.txt; there is {', '.join(names)}")
    return PublicFiles(Path(root), name or names[0])


# ------------------------------------------------------------------------------------------------------------- reading


def read_sasrec(path: Path) -> tuple[SASRecConfig, Any, int]:
    """(config, parameters, epochs) of a file of SASRec; the name says how many epochs, or else its arguments.

    Raises:
      UserError: if the file is damaged, asks for more than weights need, or does not fit its own arguments.
    """
    value = pickled.load(path, allowed=pickled.TORCH | pickled.NAMESPACE)
    try:
        about, state = value
        arguments = vars(about["args"])
        sizes = (
            about["item_num"],
            *(arguments[name] for name in ("hidden_units", "num_blocks", "num_heads", "maxlen")),
        )
        dropout = float(arguments["dropout_rate"])
        tensors = {name: np.asarray(tensor) for name, tensor in state.items() if isinstance(tensor, pickled.Tensor)}
        if not all(type(size) is int and 1 <= size < 2**31 for size in sizes) or not 0 <= dropout < 1:
            raise ValueError("sizes that no SASRec has")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a SASRec of the public code ({error!r})") from error
    items, width, blocks, heads, maxlen = sizes
    if width % heads or max(blocks, maxlen, width) > 100_000:
        raise UserError(f"{path}: {heads} heads of width {width}, {blocks} blocks, maxlen {maxlen} make no SASRec")
    config = SASRecConfig(items, width, blocks, heads, maxlen, dropout)
    named = re.search(r"epoch=(\d{1,6})\.", path.name)
    epochs = int(named[1]) if named else arguments.get("num_epochs")
    if type(epochs) is not int or epochs < 1:
        epochs = 1
    return config, params.from_torch(sasrec.describe(config), tensors, source=str(path)), epochs


def read_part(path: Path) -> Any:
    """The parameters of f_I, f_T, F_U or F_I, whose sizes its tensors tell.

    Raises:
      UserError: for a damaged file, or tensors of another model.
    """
    tensors = PickledTensors([path])
    first, describe = (
        ("fc1.weight", alignment.describe) if "fc1.weight" in tensors else ("0.weight", projection.describe)
    )
    shape = tensors[first].shape if first in tensors else ()
    if len(shape) != 2:
        raise UserError(f"{path} holds neither an auto-encoder (fc1.weight) nor a head (0.weight) of the public code")
    return params.from_torch(describe(shape[1], shape[0]), tensors, source=str(path))


# ------------------------------------------------------------------------------------------------------------- writing


def sasrec_state(config: SASRecConfig, parameters: Any) -> OrderedDict[str, np.ndarray]:
    """Its tensors by the public code's names."""
    return _as_float32(params.to_torch(sasrec.describe(config), parameters))


def write_sasrec(
    files: PublicFiles, config: SASRecConfig, parameters: Any, *, users: int, epochs: int, learning_rate: float
) -> Path:
    """Writes SASRec's file, named after what it is.

    Raises:
      UserError: if its folder holds a `.pth` already: the public code would not know which.
    """
    if there := sorted(files.sasrec.glob("*.pth")):
        raise UserError(f"{there[0]} exists already: choose another --out or delete it")
    arguments = argparse.Namespace(
        dataset=files.name,
        device="cpu",
        hidden_units=config.width,
        maxlen=config.maxlen,
        num_blocks=config.blocks,
        num_heads=config.heads,
        dropout_rate=config.dropout,
        num_epochs=epochs,
        lr=learning_rate,
        l2_emb=0.0,
    )
    about = {"user_num": users, "item_num": config.n_items, "args": arguments}
    sizes = f"layer={config.blocks}.head={config.heads}.hidden={config.width}.maxlen={config.maxlen}"
    path = files.sasrec / f"SASRec.epoch={epochs}.lr={learning_rate}.{sizes}.pth"
    torch_file.save([about, sasrec_state(config, parameters)], path)
    return path


def part_state(part: str, parameters: Any) -> OrderedDict[str, np.ndarray]:
    """The tensors of f_I, f_T, F_U or F_I by the public code's names."""
    if part in STAGE_1:
        description = alignment.describe(*parameters["encode"]["kernel"].shape)
    else:
        description = projection.describe(*parameters["dense1"]["kernel"].shape)
    return _as_float32(params.to_torch(description, parameters))


def write_part(files: PublicFiles, part: str, tensors: Mapping[str, np.ndarray]) -> Path:
    """Writes the file of one part. Raises `UserError` if it is there already."""
    path = files.part(part)
    if path.exists():
        raise UserError(f"{path} exists already: choose another --out or delete it")
    torch_file.save(OrderedDict(tensors), path)
    return path


def encoder_state(description: Any, weights: Any, prefix: str = "0.auto_model.") -> OrderedDict[str, np.ndarray]:
    """The sentence encoder's tensors as sentence-transformers names them."""
    found = params.to_torch(description, weights)
    return _as_float32({f"{prefix}{name}": tensor for name, tensor in found.items()})


def _as_float32(tensors: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
    return OrderedDict((name, np.ascontiguousarray(tensor, np.float32)) for name, tensor in tensors.items())
