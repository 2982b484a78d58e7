"""The paper's Beauty (Amazon 2018, Luxury_Beauty), as the public code prepares, trains and evaluates it.

    allmrec train cf --config beauty --workdir runs/beauty

Hardware: stage 0 needs 2 CPU cores, the later stages a GPU for OPT-6.7B. Time and expected metrics: docs/results.md.
The two files are fetched by hand: `allmrec data list` says where from. Other models: --cf.model gru4rec, --cf.model
nextitnet. With a small LLM: --llm.llm smollm2-135m-instruct --llm.logit_rows None.
"""

from allmrec_jax.config import CF, Alignment, Data, Experiment, Injection


def config() -> Experiment:
    return Experiment(
        name="beauty",
        data=Data(name="amazon-2018-luxury-beauty", recipe="reference"),
        cf=CF(select="last", evaluate_every=20),
        align=Alignment(encoder="nq-distilbert-base-v1", dtype="float32").as_public_code(),
        llm=Injection(llm="facebook/opt-6.7b", domain="shopping", logit_rows=50269).as_public_code(),
    )
