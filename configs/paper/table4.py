"""Table 4: Hit@1 on cold and on warm items, with e and with q (SBERT) in the prompt.

allmrec tables 4 --workdir runs/tables
"""

from allmrec_jax.evaluation.paper_runs import MAIN, PaperTable, short


def table() -> PaperTable:
    main = MAIN.asked(scenarios=("cold-items", "warm-items"), models=("cf", "a-llmrec", "a-llmrec-q"))
    rows = {"SASRec": "cf", "A-LLMRec": "a-llmrec", "A-LLMRec (SBERT)": "a-llmrec-q"}
    return PaperTable(
        title="cold and warm items, Hit@1",
        key="cold_warm_items",
        sets=("movies", "games", "beauty"),
        runs=[main],
        cells=lambda known: {
            (row, f"{short(known)} {what}"): main.cell(f"{what}-items", model)
            for row, model in rows.items()
            for what in ("cold", "warm")
        },
    )
