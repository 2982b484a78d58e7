"""Stage 1 of both programs, from the same weights on the same batches, dropout off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from allmrec_jax.comparison.checks import Pairs, Run, Trace, recorded
from allmrec_jax.config import Alignment
from allmrec_jax.data.dataset import Dataset
from allmrec_jax.models import alignment, text_encoder
from allmrec_jax.models.text_encoder import LoadedEncoder
from allmrec_jax.training import align, mesh
from allmrec_jax.training.align_batches import TextBatches
from allmrec_jax.training.align_step import make_epoch, make_step
from allmrec_jax.training.cf import CFModel
from allmrec_jax.training.state import create


def plain(config: Alignment) -> Alignment:
    """The same stage in float32 and without dropout."""
    return dataclasses.replace(config, cf_dropout=False, encoder_dropout=False, dtype="float32")


def ours(
    config: Alignment,
    dataset: Dataset,
    cf: CFModel,
    encoder: LoadedEncoder,
    trained: Any,
    *,
    seed: int,
    steps: int,
) -> Run:
    """The steps of `training.align`, from these f_I, f_T (and encoder). Losses: all terms of all steps."""
    config = plain(config)
    begin = align.set_up(config, dataset, cf, encoder, seed=seed)
    spans, devices = begin.steps.spans, jax.devices()[:1]
    optimiser, data = recorded(align.make_optimiser(config, spans)), begin.data
    if config.train_encoder:
        texts = TextBatches(
            begin.steps,
            begin.lengths,
            both=begin.terms.both,
            devices=1,
            training=steps,
            width=encoder.config.hidden_size,
            group_tokens=config.group_tokens,
        )
        step = make_step(
            encoder.graph, optimiser, devices, terms=begin.terms, shapes=texts.shapes, dropout=False, remat=config.remat
        )
        data = mesh.replicated(data | {"tokens": begin.tokens, "lengths": begin.lengths}, devices)
        state, found = create(jax.tree.map(np.asarray, trained), optimiser), []
        for i in range(steps):
            state, terms = step(state, data, texts(i), begin.keys[1])
            found.append(terms)
    else:
        if steps > len(spans):
            raise ValueError(f"{steps} steps, but an epoch has {len(spans)}")
        Q = align.encode_items(encoder, encoder.weights, begin.tokens, begin.lengths)
        data = mesh.replicated(data | begin.drawing | {"Q": Q}, devices)
        rows, order = begin.steps.rows, begin.steps.order(0)
        epoch = make_epoch(optimiser, devices, terms=begin.terms, steps=spans[:steps], rows=rows)
        state, terms = epoch(create(jax.tree.map(np.asarray, trained), optimiser), data, order, begin.keys)
        found = [{name: values[i] for name, values in terms.items()} for i in range(steps)]
    kept = jax.device_get(state.opt_state[0])
    losses = [float(terms[name]) for terms in found for name in sorted(terms)]
    return Run(losses, kept["first"], jax.device_get(trained), jax.device_get(state.params), kept["squares"])


def baseline(c: text_encoder.EncoderConfig, trained: Any, encoder: Any) -> dict[str, Any]:
    """f_I, f_T and the encoder in PyTorch with these weights, in evaluation mode.

    Args:
      encoder: the weights where `trained` has none.
    """
    from allmrec_jax.torch_baseline.alignment import AutoEncoder, SentenceEncoder, in_transformers
    from allmrec_jax.torch_baseline.weights import load

    modules = {}
    for name in ("f_I", "f_T"):
        sizes = trained[name]["encode"]["kernel"].shape
        modules[name] = load(AutoEncoder(*sizes), alignment.describe(*sizes), trained[name])
    weights = trained["encoder"]["weights"] if "encoder" in trained else encoder
    transformer = load(in_transformers(c), text_encoder.describe(c), weights)
    modules["encoder"] = SentenceEncoder(transformer, normalize=c.normalize, pooling=c.pooling)
    return {name: module.eval() for name, module in modules.items()}


def batches_of(begin: align.SetUp, x_u: np.ndarray, E: np.ndarray, batch: int, steps: int) -> Iterator[Any]:
    """The same steps' batches for PyTorch, positives and negatives apart, each padded to its longest.

    Args:
      x_u: of the stage's users, and E, as PyTorch has them; batch: users of a batch, which may be cut into chunks.
    """
    import torch

    from allmrec_jax.torch_baseline.training import AlignBatch

    for step in range(steps):
        drawn = begin.steps(step)
        who, positive, negative = (drawn[name][drawn["real"]] for name in ("who", "positive", "negative"))
        yield AlignBatch(
            torch.tensor(x_u[who]),
            torch.tensor(E[positive]),
            torch.tensor(E[negative]),
            texts_of(begin, positive),
            texts_of(begin, negative),
            first=bool(begin.steps.spans[step % len(begin.steps.spans), 0] % batch == 0),
        )


def texts_of(begin: align.SetUp, items: np.ndarray) -> tuple[Any, Any]:
    """(tokens, mask) of the items' texts, padded to the longest."""
    import torch

    longest = int(begin.lengths[items].max())
    mask = np.arange(longest)[None] < begin.lengths[items][:, None]
    return torch.tensor(begin.tokens[items, :longest]).long(), torch.tensor(mask)


def theirs(
    config: Alignment,
    dataset: Dataset,
    cf: CFModel,
    encoder: LoadedEncoder,
    trained: Any,
    x_u: np.ndarray,
    *,
    seed: int,
    steps: int,
) -> Run:
    """The steps of `torch_baseline.training`.

    Args:
      cf: with the weights that PyTorch has; x_u: of the stage's users, by PyTorch.
    """
    from allmrec_jax.torch_baseline.training import train_align
    from allmrec_jax.torch_baseline.weights import gradients_of, weights_of

    config = plain(config)
    begin = align.set_up(config, dataset, cf, encoder, seed=seed)
    modules = baseline(encoder.config, trained, encoder.weights["weights"])
    described = {name: alignment.describe(*trained[name]["encode"]["kernel"].shape) for name in ("f_I", "f_T")}

    def of_all(read: Any) -> Any:
        found = {name: read(modules[name], description) for name, description in described.items()}
        if "encoder" in trained:
            description = text_encoder.describe(encoder.config)
            found["encoder"] = {"weights": read(modules["encoder"].transformer, description)}
        return found

    gradients: list[Any] = []

    def watch() -> None:
        if not gradients:
            gradients.append(of_all(gradients_of))

    drawn = batches_of(begin, x_u, np.asarray(cf.E), config.batch, steps)
    found = list(train_align(*modules.values(), drawn, config, watch))
    losses = [float(terms[name]) for terms in found for name in sorted(terms)]
    return Run(losses, gradients[0], jax.device_get(trained), of_all(weights_of))


def tables(begin: align.SetUp, modules: dict[str, Any], E: np.ndarray, items: np.ndarray) -> dict[str, np.ndarray]:
    """By PyTorch: e of all items; Q and q of the texts of `items`."""
    import torch

    with torch.no_grad():
        Q = modules["encoder"](*texts_of(begin, items))
        found = {"e": modules["f_I"].encode(torch.tensor(E)), "Q": Q, "q": modules["f_T"].encode(Q)}
    return {name: tensor.numpy() for name, tensor in found.items()}


def our_tables(
    begin: align.SetUp, encoder: LoadedEncoder, trained: Any, E: np.ndarray, items: np.ndarray
) -> dict[str, np.ndarray]:
    """The same by this program."""
    weights = trained.get("encoder", encoder.weights)
    Q = align.encode_items(encoder, weights, begin.tokens[items], begin.lengths[items])
    encode = jax.jit(alignment.encode)
    return {"e": np.asarray(encode(trained["f_I"], E)), "Q": Q, "q": np.asarray(encode(trained["f_T"], Q))}


def trace(begin: align.SetUp, encoder: LoadedEncoder, trained: Any, other: Any, items: np.ndarray) -> Trace:
    """The encoder's states after its embedding and after each layer, then Q. `other` are PyTorch's parameters."""
    import torch

    c, weights = encoder.config, jax.device_get(trained.get("encoder", encoder.weights))["weights"]
    modules = baseline(c, other, weights)
    tokens, mask = texts_of(begin, items)

    def after(layers: int, *, whole: bool = False):
        part = dataclasses.replace(c, num_hidden_layers=layers, normalize=c.normalize and whole)

        def pairs() -> Pairs:
            cut = {**weights, "layers": jax.tree.map(lambda leaf: leaf[:layers], weights["layers"])}
            made = text_encoder.build(part, jax.tree.map(jnp.asarray, cut), encoder.backend)
            found = nnx.merge(made.graph, made.weights)(
                jnp.asarray(tokens.numpy(), jnp.int32), jnp.asarray(mask.numpy())
            )
            model, theirs = modules["encoder"], None
            with shortened(model.transformer, layers), torch.no_grad():
                model.normalize = part.normalize
                theirs = model(tokens, mask).numpy()
                model.normalize = c.normalize
            name = f"the sentence encoder's layer {layers}" if layers else "the sentence encoder's embedding"
            return [("the sentence encoder's Q" if whole else name, found, theirs)]

        return pairs

    last = c.num_hidden_layers
    return [*(after(layers) for layers in range(last + 1)), after(last, whole=True)]


class shortened:
    """A transformers model that ends after its first layers, for as long as it is entered."""

    def __init__(self, model: Any, layers: int):
        from torch import nn

        self.owner, self.name = next(
            (owner, name)
            for owner in model.modules()
            for name, child in owner.named_children()
            if isinstance(child, nn.ModuleList)
        )
        self.whole = getattr(self.owner, self.name)
        self.part = nn.ModuleList(list(self.whole)[:layers])

    def __enter__(self) -> None:
        setattr(self.owner, self.name, self.part)

    def __exit__(self, *_: Any) -> None:
        setattr(self.owner, self.name, self.whole)
