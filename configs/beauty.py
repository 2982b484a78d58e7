"""SASRec on the paper's Beauty (Amazon 2018, Luxury_Beauty), as the public code prepares, trains and evaluates it.

    allmrec train cf --config beauty --workdir runs/beauty

Hardware: 2 CPU cores. Time and expected metrics: docs/results.md. The two files are fetched by hand: `allmrec data
list` says where from. Other models: --cf.model gru4rec, --cf.model nextitnet.
"""

from allmrec_jax.config import CF, Data, Experiment


def config() -> Experiment:
    return Experiment(
        name="beauty",
        data=Data(name="amazon-2018-luxury-beauty", recipe="reference"),
        cf=CF(select="last", evaluate_every=20),
    )
