"""The paper's Movies and TV with OPT-6.7B on eight TPU v5e chips.

    allmrec plan --config movies_opt_6_7b_v5e8 --topology v5e:2x4
    allmrec run --config movies_opt_6_7b_v5e8 --workdir runs/movies_opt_6_7b_v5e8

Hardware: TPU v5e-8, four chips a copy of the LLM in bfloat16. Not run yet: time and metrics are the paper's to compare
with (docs/plan.md has what the plan says). The two files are fetched by hand: `allmrec data list` says where from.
"""

from allmrec_jax.config import CF, Alignment, Data, Devices, Evaluation, Experiment, Injection


def config() -> Experiment:
    return Experiment(
        name="movies_opt_6_7b_v5e8",
        data=Data(name="amazon-2018-movies-and-tv", recipe="reference"),
        cf=CF(),
        align=Alignment(encoder="nq-distilbert-base-v1"),
        llm=Injection(
            llm="facebook/opt-6.7b", domain="movies", batch=8, dtype="bfloat16", remat="layers", save_every=500
        ),
        evaluation=Evaluation(users=10_000),
        devices=Devices(model=4),
    )
