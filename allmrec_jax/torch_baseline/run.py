"""The three stages one after the other in PyTorch, kept in the public code's files; side by side with `pipeline`.

Every field of the experiment that says what is computed counts, so both recipes are there; those of devices, precision
and memory do not. What was trained before is read from its files.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from allmrec_jax.comparison.public_checkpoints import STAGE_1, STAGE_2, PublicFiles
from allmrec_jax.comparison.stage_llm import transformer
from allmrec_jax.config import Experiment
from allmrec_jax.data.prompts import PromptBuilder, template_of
from allmrec_jax.data.public_files import SEQUENCES, write_public
from allmrec_jax.errors import UserError
from allmrec_jax.evaluation import lists, metrics
from allmrec_jax.models.llm.load import load_llm
from allmrec_jax.models.sasrec import SASRecConfig
from allmrec_jax.models.text_encoder import describe, tokenize
from allmrec_jax.pipeline import Pipeline
from allmrec_jax.progress import progress
from allmrec_jax.torch_baseline import alignment, data, projection, ranking, training
from allmrec_jax.torch_baseline.inject import Injector
from allmrec_jax.torch_baseline.sasrec import SASRec
from allmrec_jax.torch_baseline.weights import load
from allmrec_jax.training.align import item_texts


class Stages:
    """The stages of `experiment` in `root`, a folder laid out as the public code's. Each is trained when asked for.

    Raises:
      UserError: for what the baseline does not know: CF models other than SASRec, and item vectors other than e.
    """

    def __init__(self, experiment: Experiment, root: Path, console: Console | None = None):
        x = self.x = experiment
        if x.cf.model != "sasrec" or x.llm.item_vectors not in ("e", "none"):
            raise UserError("the PyTorch baseline runs SASRec and A-LLMRec's e: leave cf.model and llm.item_vectors")
        self.console = console or Console()
        self.sources = Pipeline(x, Path(root) / "prepared", console=self.console)
        self.dataset = self.sources.dataset
        self.files = PublicFiles(Path(root), self.dataset.name)
        if not (self.files.data / SEQUENCES.format(self.dataset.name)).is_file():
            write_public(self.dataset, self.files.data)
        self.rng = np.random.default_rng(x.seed)
        torch.manual_seed(x.seed)

    def _run(self, label: str, steps: int, losses: Any) -> None:
        with progress(label, steps, unit="steps", console=self.console) as bar:
            for done, loss in enumerate(losses, 1):
                bar.update(done, [f"loss {loss if isinstance(loss, float) else loss['loss']:.4g}"])

    # ---------------------------------------------------------------------------------------------------------- stage 0

    def sasrec(self) -> SASRec:
        config, dataset = self.x.cf, self.dataset
        c = SASRecConfig(dataset.n_items, config.width, config.blocks, config.heads, config.maxlen, config.dropout)
        model, epochs = SASRec(c), config.epochs
        sizes = f"layer={c.blocks}.head={c.heads}.hidden={c.width}.maxlen={c.maxlen}"
        path = self.files.sasrec / f"SASRec.epoch={epochs}.lr={config.learning_rate}.{sizes}.pth"
        if path.is_file():
            model.load_state_dict(torch.load(path, weights_only=False)[1])
            return model.eval()
        an_epoch, best = max(1, dataset.n_trained // config.batch), (-1.0, None)
        drawn = data.cf_batches(dataset, config, self.rng, an_epoch * epochs)
        losses = training.train_cf(model.train(), drawn, config, dataset.n_items)

        def watched():
            nonlocal best
            for step, loss in enumerate(losses, 1):
                yield loss
                at_end = step == an_epoch * epochs
                if (
                    config.select == "best"
                    and not config.refit
                    and (step % (an_epoch * config.evaluate_every) == 0 or at_end)
                ):
                    found = self.validation(model)
                    best = max(best, (found, copy.deepcopy(model.state_dict())), key=lambda pair: pair[0])
                    model.train()

        self._run("PyTorch, stage 0: SASRec", an_epoch * epochs, watched())
        if best[1] is not None:
            model.load_state_dict(best[1])
        arguments = argparse.Namespace(
            device="cpu",
            hidden_units=c.width,
            maxlen=c.maxlen,
            num_blocks=c.blocks,
            num_heads=c.heads,
            dropout_rate=c.dropout,
        )
        about = {"user_num": dataset.n_users, "item_num": dataset.n_items, "args": arguments}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save([about, model.state_dict()], path)
        return model.eval()

    @torch.no_grad()
    def validation(self, model: SASRec, most: int = 10_000) -> float:
        """NDCG@10 of the validation items, each among 100 random ones."""
        dataset = self.dataset
        users = np.flatnonzero(dataset.has_target("validation"))[:most]
        drawn = data.Negatives(dataset, np.random.default_rng(self.x.seed))(users, 100)
        windows = dataset.windows(dataset.history_end("validation")[users], self.x.cf.maxlen, users)
        items = torch.from_numpy(np.concatenate([dataset.targets("validation")[users][:, None], drawn], axis=1))
        scores = model.eval().scores(model.user_representation(torch.from_numpy(windows).long()), items)
        rank = (scores[:, 1:] >= scores[:, :1]).sum(1).numpy()
        return float(np.mean(metrics.metrics_of(rank)["ndcg@10"]))

    # ---------------------------------------------------------------------------------------------------------- stage 1

    def aligned(self, model: SASRec) -> tuple[alignment.AutoEncoder, alignment.AutoEncoder, alignment.SentenceEncoder]:
        config, dataset, encoder = self.x.align, self.dataset, self.sources.encoder
        c = encoder.config
        f_I, f_T = (alignment.AutoEncoder(width, config.joint) for width in (self.x.cf.width, c.hidden_size))
        transformer_ = load(alignment.in_transformers(c), describe(c), encoder.weights["weights"])
        sbert = alignment.SentenceEncoder(transformer_, normalize=c.normalize, pooling=c.pooling)
        paths = [self.files.part(part) for part in STAGE_1]
        if self.files.has(STAGE_1):
            for module, path in zip((f_I, f_T), paths, strict=False):
                module.load_state_dict(torch.load(path, weights_only=True))
            sbert.transformer.load_state_dict(_unwrapped(torch.load(paths[2], weights_only=True)))
            return f_I.eval(), f_T.eval(), sbert.eval()
        texts = tokenize(encoder.backend, item_texts(dataset, config.text), c.max_seq_length)
        sbert.train(config.encoder_dropout and config.train_encoder)
        represent = data.representer(model, dropout=config.cf_dropout)
        E = model.item_emb.weight.detach()
        drawn = data.align_batches(dataset, config, represent, E, texts, self.x.cf.maxlen, self.rng)
        users = len(dataset.examples(config.targets, single=config.single_items)[0])
        steps = config.epochs * sum(
            -(-min(config.batch, users - start) // (config.chunk or config.batch))
            for start in range(0, users, config.batch)
        )
        self._run("PyTorch, stage 1: alignment", steps, training.train_align(f_I, f_T, sbert, drawn, config))
        states = [f_I.state_dict(), f_T.state_dict()]
        states.append({f"0.auto_model.{name}": tensor for name, tensor in sbert.transformer.state_dict().items()})
        for path, state in zip(paths, states, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, path)
        model.eval()
        return f_I.eval(), f_T.eval(), sbert.eval()

    # ---------------------------------------------------------------------------------------------------------- stage 2

    def injector(self, model: SASRec, f_I: alignment.AutoEncoder) -> tuple[Injector, PromptBuilder, torch.Tensor]:
        """The heads around the frozen LLM, what makes prompts, and e of all items."""
        config, dataset = self.x.llm, self.dataset
        llm = load_llm(self.sources.llm_folder)
        builder = PromptBuilder(
            llm.tokenizer, dataset.titles(), template_of(config), context=llm.config.max_position_embeddings
        )
        with torch.no_grad():
            e = f_I.encode(model.item_emb.weight)
        causal = transformer(llm, self.sources.llm_folder)
        injector = Injector(causal, self.x.cf.width, self.x.align.joint, logit_rows=config.logit_rows)
        heads = {"log_proj": injector.log_proj, "item_proj": injector.item_proj}
        if self.files.has(STAGE_2):
            for part, head in heads.items():
                head.load_state_dict(torch.load(self.files.part(part), weights_only=True))
            return injector.eval(), builder, e
        represent = data.representer(model, dropout=config.cf_dropout)
        batches = data.InjectBatches(dataset, config, builder, represent, self.x.cf.maxlen, self.rng)
        still = data.representer(model, dropout=False)(batches.windows, batches.users)
        tokens, inputs = causal.get_input_embeddings().weight.float(), (still, e[1:])
        some = tuple(table[:: -(-len(table) // 2048)] for table in inputs)
        if config.init != "paper":
            for head, table, part in zip(heads.values(), inputs, some, strict=True):
                projection.standardise(head, table)
                projection.fold(head, part, tokens)
        if config.init == "held":
            injector.held = some
        steps = batches.steps
        self._run(
            "PyTorch, stage 2: injection", steps, training.train_inject(injector.train(), batches, e, config, steps)
        )
        if config.init == "held":
            injector.held = None
            for head, part in zip(heads.values(), some, strict=True):
                projection.fold(head, part, tokens)
        for part, head in heads.items():
            torch.save(head.state_dict(), self.files.part(part))
        model.eval()
        return injector.eval(), builder, e

    # ------------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, *, users: int | None = None, generate: bool = False) -> dict[str, Any]:
        """`{model: {metric: {"value", "low", "high", "n"}}}` of the scenario `overall`; trains what is missing.

        Args:
          generate: let the LLM write, too, and count by the public code's rule: `hit@1` of `generated`.
        """
        x, dataset = self.x, self.dataset
        model = self.sasrec()
        f_I, _, _ = self.aligned(model)
        injector, builder, e = self.injector(model, f_I)
        most, count = users or x.evaluation.users, x.evaluation.candidates
        asked = lists.draw(dataset, "test", seed=x.seed, most=most, candidates=count)
        chosen, candidates, column = asked.users, asked.candidates, asked.column
        ends = dataset.history_end("test")[chosen]
        x_u = data.representer(model, dropout=False)(dataset.windows(ends, x.cf.maxlen, chosen), chosen)
        prompts = builder.prompts([h[h != 0] for h in dataset.windows(ends, x.llm.history, chosen)], candidates)
        answers = [builder.answers(row.tolist()) for row in candidates]
        with torch.no_grad():
            scores = {"cf": model.scores(x_u, torch.tensor(candidates).long()).numpy()}
        mean = x.evaluation.score == "mean"
        scores["a-llmrec"] = ranking.likelihoods(injector, prompts, answers, x_u, e, mean=mean).numpy()
        found: dict[str, Any] = metrics.summarise(scores, column, seed=x.seed, resamples=x.evaluation.resamples)
        if generate:
            end, titles = builder.tokenizer.eos, builder.titles
            hits = []
            for row, prompt in enumerate(prompts):
                [written] = ranking.generate(injector, [prompt], x_u[row : row + 1], e, end=end)
                answer = ranking.answer_of(builder.tokenizer.decode(written))
                hits.append(ranking.hit(answer, titles[candidates[row, column[row]]]))
            found["generated"] = {"hit@1": {"value": float(np.mean(hits)), "n": len(hits)}}
        return found


def _unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("0.auto_model."): tensor for name, tensor in state.items()}
