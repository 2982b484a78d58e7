"""SASRec on MovieLens 100K with the `best` recipe: chosen on validation items, then trained on them, too.

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
