"""Table 1: Hit@1 of the recommenders, of the LLM alone, of MLP-LLM and of A-LLMRec on four data sets.

    allmrec tables 1 --workdir runs/tables

MoRec, CTRL, RECFORMER and TALLRec are models of others; of them there are the paper's figures alone.
"""

from allmrec_jax.evaluation.paper_runs import CF_MODELS, MAIN, MLP, PaperTable


def table() -> PaperTable:
    main, mlp = MAIN.asked(models=("cf", "llm-only", "a-llmrec")), MLP.asked(models=("mlp-llm",))
    others = {name: run.asked(models=("cf",)) for name, run in CF_MODELS.items()}
    return PaperTable(
        title="overall, Hit@1",
        key="overall",
        sets=("movies", "games", "beauty", "toys"),
        runs=[main, mlp, *others.values()],
        cells=lambda known: {
            (known, "SASRec"): main.cell("overall", "cf"),
            (known, "LLM-Only"): main.cell("overall", "llm-only"),
            (known, "A-LLMRec"): main.cell("overall", "a-llmrec"),
            (known, "MLP-LLM"): mlp.cell("overall", "mlp-llm"),
            **{(known, name): run.cell("overall", "cf") for name, run in others.items()},
        },
    )
