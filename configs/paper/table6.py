"""Table 6: Hit@1 after training all stages on 256 or on 128 users.

allmrec tables 6 --workdir runs/tables
"""

from allmrec_jax.evaluation.paper_runs import MAIN, PaperTable, short


def table() -> PaperTable:
    main = MAIN.asked(scenarios=("few-shot-256", "few-shot-128"), models=("cf", "a-llmrec", "a-llmrec-q"))
    columns = {"SASRec": "cf", "A-LLMRec": "a-llmrec", "A-LLMRec (SBERT)": "a-llmrec-q"}
    return PaperTable(
        title="few-shot training, Hit@1",
        key="few_shot",
        sets=("movies", "games", "beauty"),
        runs=[main],
        cells=lambda known: {
            (f"{short(known)} {k}", column): main.cell(f"few-shot-{k}", model)
            for column, model in columns.items()
            for k in (256, 128)
        },
    )
