"""Table 9: ablations of stage 2, Hit@1.

allmrec tables 9 --workdir runs/tables
"""

from allmrec_jax.evaluation.paper_runs import MAIN, PaperTable, Run, with_


def table() -> PaperTable:
    rows = {
        "full": MAIN,
        "without user representation": Run("no-user", with_(llm={"user_vector": False})),
        "without joint embedding": Run("no-items", with_(llm={"item_vectors": "none"})),
        "random joint embedding": Run("random-items", with_(llm={"item_vectors": "random"})),
    }
    runs = {row: run.asked(models=("a-llmrec",)) for row, run in rows.items()}
    return PaperTable(
        title="ablations of stage 2, Hit@1",
        key="ablation_stage2",
        sets=("movies", "games", "beauty", "toys"),
        runs=list(runs.values()),
        cells=lambda known: {(row, known): run.cell("overall", "a-llmrec") for row, run in runs.items()},
    )
