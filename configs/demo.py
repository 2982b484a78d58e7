"""The demo: everything end to end on MovieLens 100K with all-MiniLM-L6-v2 and SmolLM2-135M-Instruct.

    allmrec demo        (or: make demo)

Hardware: 2 CPU cores, 8 GiB. Time, expected metrics, and what each choice below gave: docs/results.md.
"""

from allmrec_jax.config import CF, Alignment, Data, Evaluation, Experiment, Injection


def config() -> Experiment:
    return Experiment(
        name="demo",
        data=Data(name="ml-100k", strip_years=True),
        cf=CF(epochs=250),
        align=Alignment(epochs=10, learning_rate=1e-3, encoder_learning_rate=1e-4, save_every=1),
        llm=Injection(
            domain="movies",
            item_place="before",
            user_place="last",
            history=2,
            candidates=6,
            title_weight=0.0,
            choice_weight=1.0,
            sharpness=2.0,
            init="held",
            batch=4,
            epochs=0.53,
            learning_rate=1e-3,
            warmup=5,
            decay=True,
            save_every=10,
        ),
        evaluation=Evaluation(users=128, validation_users=128),
    )
