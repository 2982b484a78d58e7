"""Table 7: Hit@1 on Video Games of models that were trained on Movies and TV.

    allmrec tables 7 --workdir runs/tables

`--on DATA` takes another prepared data set in the place of Video Games.
"""

from allmrec_jax.evaluation.paper_runs import MAIN, PaperTable


def table() -> PaperTable:
    main = MAIN.asked(scenarios=("cross-domain",), models=("cf", "a-llmrec", "a-llmrec-q"), on="games")
    columns = {"SASRec": "cf", "A-LLMRec": "a-llmrec", "A-LLMRec (SBERT)": "a-llmrec-q"}
    return PaperTable(
        title="Movies and TV to Video Games, Hit@1",
        key="cross_domain_movies_to_games",
        sets=("movies",),
        runs=[main],
        cells=lambda known: {
            ("Movies to Games", column): main.cell("cross-domain", model) for column, model in columns.items()
        },
    )
