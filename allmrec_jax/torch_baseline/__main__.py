"""`python -m allmrec_jax.torch_baseline`: A-LLMRec in PyTorch, by itself."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from allmrec_jax import cli_fields
from allmrec_jax.config import config_names, load_config
from allmrec_jax.errors import UserError


def main(argv: list[str]) -> int:
    """Trains what is missing and evaluates. 0: done; 1: a user's mistake, in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m allmrec_jax.torch_baseline",
        description="A-LLMRec in PyTorch: trains SASRec, the alignment and the injection into the frozen LLM, and "
        "evaluates them on the users and candidates of `allmrec evaluate`. Files lie where the public code has them: "
        "`allmrec import` reads them.",
        epilog="Any field of the config may be overridden: --cf.epochs 50. "
        "Example: python -m allmrec_jax.torch_baseline --config demo --root runs/torch --evaluation.users 32",
    )
    parser.add_argument("--config", required=True, help=f"a Python config file, or one of: {', '.join(config_names())}")
    parser.add_argument("--root", type=Path, required=True, help="folder of the files, laid out as the public code's")
    parser.add_argument("--generate", action="store_true", help="let the LLM write its answer, too (slow)")
    arguments, rest = parser.parse_known_args(argv)
    try:
        experiment = cli_fields.override(load_config(arguments.config), rest, prog=parser.prog)
        from allmrec_jax.torch_baseline.run import Stages

        print(json.dumps(Stages(experiment, arguments.root).evaluate(generate=arguments.generate), indent=1))
    except UserError as error:
        print(f"allmrec: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
