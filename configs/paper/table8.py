"""Table 8: ablations of stage 1, Hit@1.

allmrec tables 8 --workdir runs/tables
"""

from allmrec_jax.evaluation.paper_runs import MAIN, PaperTable, Run, with_


def table() -> PaperTable:
    rows = {
        "full": MAIN,
        "without matching": Run("no-matching", with_(align={"match": False})),
        "without reconstructions": Run("no-reconstructions", with_(align={"reconstruction": False})),
        "without recommendation": Run("no-recommendation", with_(align={"recommendation": False})),
        "frozen sentence encoder": Run("frozen-encoder", with_(align={"train_encoder": False})),
    }
    runs = {row: run.asked(models=("a-llmrec",)) for row, run in rows.items()}
    return PaperTable(
        title="ablations of stage 1, Hit@1",
        key="ablation_stage1",
        sets=("movies", "beauty", "toys"),
        runs=list(runs.values()),
        cells=lambda known: {(row, known): run.cell("overall", "a-llmrec") for row, run in runs.items()},
    )
