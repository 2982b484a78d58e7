"""SASRec on MovieLens 100K with the `best` recipe: settings beyond the paper's, chosen on validation.

    allmrec train cf --config ml100k_best --workdir runs/ml100k_best

Hardware: 2 CPU cores. Time and expected metrics: docs/results.md.
"""

import dataclasses

from allmrec_jax.config import BEST_CF, Data, Experiment


def config() -> Experiment:
    return Experiment(
        name="ml100k_best",
        data=Data(name="ml-100k", recipe="clean"),
        cf=dataclasses.replace(BEST_CF, epochs=140, dropout=0.3),
    )
