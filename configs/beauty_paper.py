"""The paper's Beauty (Amazon 2018, Luxury_Beauty) by the paper's recipe, with MiniLM and a small LLM.

    allmrec train align --config beauty_paper --workdir runs/beauty_paper

Hardware: 2 CPU cores. Time and expected metrics: docs/results.md. The two files are fetched by hand: `allmrec data
list` says where from. The paper's own sizes: --align.encoder nq-distilbert-base-v1 --llm.llm facebook/opt-6.7b.
"""

from allmrec_jax.config import CF, Alignment, Data, Experiment


def config() -> Experiment:
    return Experiment(
        name="beauty_paper",
        data=Data(name="amazon-2018-luxury-beauty", recipe="reference"),
        cf=CF(evaluate_every=20),
        align=Alignment(beta=0.2, save_every=1),
    )
