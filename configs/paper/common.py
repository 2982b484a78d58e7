"""What all the paper's experiments share: its recipe, with OPT-6.7B and nq-distilbert-base-v1 on one H100.

`paper/beauty`, `paper/movies`, `paper/games` and `paper/toys` derive from it; `table1.py` and so on say what the
paper's tables vary. With a small LLM and encoder on a laptop:

    allmrec tables 1 --sets beauty --workdir runs/tables --llm.llm smollm2-135m-instruct
        --align.encoder all-minilm-l6-v2 --llm.epochs 0.1 --evaluation.users 100 --evaluation.validation-users 0
"""

from allmrec_jax.config import CF, Alignment, Data, Evaluation, Experiment, Injection


def config() -> Experiment:
    return Experiment(
        name="paper",
        data=Data(recipe="reference"),
        cf=CF(evaluate_every=20),
        align=Alignment(encoder="nq-distilbert-base-v1"),
        llm=Injection(llm="facebook/opt-6.7b", dtype="bfloat16", remat="products", save_every=200),
        evaluation=Evaluation(users=10_000, validation_users=2000),
    )
