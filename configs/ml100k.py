"""MovieLens 100K in full: every user is trained on and tested.

    allmrec run --config ml100k --workdir runs/demo-full        (or: make demo-full)

Hardware: 2 CPU cores, 8 GiB. Time and expected metrics: docs/results.md.
"""

from dataclasses import replace

from allmrec_jax.config import Experiment, load_config


def config() -> Experiment:
    demo = load_config("demo")
    return replace(
        demo,
        name="ml100k",
        llm=replace(demo.llm, epochs=2.5),
        evaluation=replace(demo.evaluation, users=None, validation_users=None),
    )
