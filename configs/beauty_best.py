"""SASRec on the paper's Beauty with the `best` recipe: chosen on validation items, then trained on them, too.

    allmrec train cf --config beauty_best --workdir runs/beauty_best

Hardware: 2 CPU cores. Time and expected metrics: docs/results.md. The two files are fetched by hand: `allmrec data
list` says where from.
"""

import dataclasses

from allmrec_jax.config import BEST_CF, Data, Experiment


def config() -> Experiment:
    return Experiment(
        name="beauty_best",
        data=Data(name="amazon-2018-luxury-beauty", recipe="reference"),
        cf=dataclasses.replace(BEST_CF, epochs=60),
    )
