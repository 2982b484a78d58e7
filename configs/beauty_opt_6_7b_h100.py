"""The paper's Beauty (Amazon 2018, Luxury_Beauty) with OPT-6.7B on one H100.

    allmrec plan --config beauty_opt_6_7b_h100 --topology h100:1
    allmrec run --config beauty_opt_6_7b_h100 --workdir runs/beauty_opt_6_7b_h100

Hardware: one H100 of 80 GB (or an H200). Not run yet: time and metrics are the paper's to compare with (docs/plan.md
has what the plan says). The two files are fetched by hand: `allmrec data list` says where from.
"""

from allmrec_jax.config import CF, Alignment, Data, Experiment, Injection


def config() -> Experiment:
    return Experiment(
        name="beauty_opt_6_7b_h100",
        data=Data(name="amazon-2018-luxury-beauty", recipe="reference"),
        cf=CF(evaluate_every=20),
        align=Alignment(encoder="nq-distilbert-base-v1", beta=0.2),
        llm=Injection(llm="facebook/opt-6.7b", domain="shopping", dtype="bfloat16", remat="products", save_every=200),
    )
