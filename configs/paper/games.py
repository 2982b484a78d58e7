"""The paper's Video Games (Amazon 2018), with OPT-6.7B on one H100.

    allmrec run --config paper/games --workdir runs/paper/games

Not run yet: time and metrics are the paper's to compare with. The two files are fetched by hand: `allmrec data list`
says where from.
"""

from dataclasses import replace

from allmrec_jax.config import Experiment, load_config


def config() -> Experiment:
    paper = load_config("paper/common")
    return replace(
        paper,
        name="games",
        data=replace(paper.data, name="amazon-2018-video-games"),
        align=replace(paper.align, beta=0.5),
        llm=replace(paper.llm, domain="games"),
    )
