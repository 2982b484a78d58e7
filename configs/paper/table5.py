"""Table 5: Hit@1 of users with exactly three interactions, who are in no training example.

allmrec tables 5 --workdir runs/tables
"""

from allmrec_jax.evaluation.paper_runs import MAIN, MLP, PaperTable


def table() -> PaperTable:
    main = MAIN.asked(scenarios=("cold-users",), models=("cf", "a-llmrec"))
    mlp = MLP.asked(scenarios=("cold-users",), models=("mlp-llm",))
    return PaperTable(
        title="cold users, Hit@1",
        key="cold_users",
        sets=("movies", "games", "beauty"),
        runs=[main, mlp],
        cells=lambda known: {
            ("SASRec", known): main.cell("cold-users", "cf"),
            ("A-LLMRec", known): main.cell("cold-users", "a-llmrec"),
            ("MLP-LLM", known): mlp.cell("cold-users", "mlp-llm"),
        },
    )
