"""Table 11: A-LLMRec on other collaborative filtering models, Hit@1 of each alone and with the LLM.

allmrec tables 11 --workdir runs/tables
"""

from allmrec_jax.evaluation.paper_runs import CF_MODELS, MAIN, PaperTable


def table() -> PaperTable:
    both = ("cf", "a-llmrec")
    runs = {name: run.asked(models=both) for name, run in {"SASRec": MAIN, **CF_MODELS}.items()}
    return PaperTable(
        title="other CF models, Hit@1",
        key="cf_models",
        sets=("beauty", "toys"),
        runs=list(runs.values()),
        cells=lambda known: {
            (name, f"{known} {what}"): run.cell("overall", model)
            for name, run in runs.items()
            for what, model in (("alone", "cf"), ("A-LLMRec", "a-llmrec"))
        },
    )
