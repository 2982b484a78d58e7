"""The commands: parse, call, print. No maths here.

Heavy imports happen inside the commands, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import importlib.util
import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from allmrec_jax import __version__, cli_compare, cli_data, cli_fields
from allmrec_jax.config import Experiment, config_names, load_config, opened, table_numbers
from allmrec_jax.errors import UserError

ACCELERATORS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd")


def choose_platform() -> None:
    """Keeps libtpu quiet where there is no accelerator: it is installed for ahead-of-time compilation, too."""
    if importlib.util.find_spec("libtpu") is None or "JAX_PLATFORMS" in os.environ:
        return
    if not any(glob.glob(pattern) for pattern in ACCELERATORS):
        os.environ["JAX_PLATFORMS"] = "cpu"


STAGES = {
    "cf": "stage 0: the collaborative filtering model: SASRec, GRU4Rec, NextItNet, NCF, or one of yours",
    "align": "stage 1: f_I, f_T and the sentence encoder",
    "llm": "stage 2: F_U and F_I through the frozen LLM",
}


class Parser(argparse.ArgumentParser):
    """One whose complaints are one line, as all of ours."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` explains")


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="allmrec",
        description="A-LLMRec in JAX: recommendation with collaborative filtering and a frozen large language model.",
        epilog="Begin with `allmrec demo`: data, training and evaluation end to end, in about 20 minutes on a laptop.",
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"allmrec-jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str, more: str = "", group: Any = commands) -> argparse.ArgumentParser:
        return group.add_parser(name, help=text, description=f"{text}\n{more}", formatter_class=raw)

    overrides = "\nAny field of the config may be overridden: --cf.epochs 50 --llm.learning-rate 1e-3"

    demo = command(
        "demo",
        "Everything, end to end, on MovieLens 100K with SmolLM2-135M.",
        "\nFetches data and weights, trains the three stages, evaluates, and writes metrics.json and report.html.\n"
        "Interrupted, it goes on from where it was; finished, it shows its results again.",
    )
    demo.add_argument("--full", action="store_true", help="train on and test all users (about an hour on 2 cores)")
    demo.add_argument("--workdir", type=Path, help="where everything is kept (default runs/demo or runs/demo-full)")

    cli_data.add_commands(command)
    cli_compare.add_commands(command)

    def with_config(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--config", required=True, help=f"a Python config file, or the name of one: {', '.join(config_names())}"
        )
        parser.add_argument("--workdir", type=Path, required=True, help="where checkpoints and results are kept")

    train = command(
        "train",
        "Train one stage, and what it builds on where that is missing.",
        "".join(f"\n  {stage:6} {what}" for stage, what in STAGES.items())
        + "\n"
        + overrides
        + "\n`allmrec train cf --help` lists those of a stage.\n",
    )
    train.add_argument("stage", choices=STAGES)
    with_config(train)
    run = command("run", "All stages and the evaluation; picks up where it stopped.", overrides)
    with_config(run)

    evaluate = command(
        "evaluate",
        "Evaluate a work directory: metrics.json and report.html.",
        "\nEvery model orders the same candidates of the same seeded users. What went through the LLM once is kept,\n"
        "and figures of further scenarios are added to those that are there."
        "\n  overall                  the test item among random items that the user never interacted with"
        "\n  cold-items, warm-items   those of overall whose item is among the 35 % seen least (most) in training"
        "\n  cold-users               users with three interactions, left out of all training"
        "\n  few-shot-256, -128       all stages are trained again on so many users, in a folder of the work directory"
        "\n  cross-domain             on the test users of another data set (--on), where nothing is trained"
        "\n  genres                   which categories would the user enjoy, against those of the test item"
        "\nand, not in `all`,"
        "\n  full-catalogue           no list: the LLM orders the CF model's first of all items"
        "\n  generated                the LLM writes its answer in words"
        "\nFields of the evaluation may be overridden: --evaluation.users 1000",
    )
    evaluate.add_argument("--workdir", type=Path, required=True, help="a work directory that was trained")
    evaluate.add_argument(
        "--scenario", nargs="+", metavar="NAME", help="which, or all (default: overall, cold-items and warm-items)"
    )
    evaluate.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help="cf, llm-only, a-llmrec, a-llmrec-q and a-llmrec-mixed (all items, or cold ones, carried by their texts), "
        "fused, or all (default: those that need no second pass); popularity, repeat and markov are always there",
    )

    evaluate.add_argument(
        "--beside", nargs="+", metavar="DIR", help="work directories, evaluated before, whose models join the tables"
    )
    evaluate.add_argument("--on", metavar="DATA", help="cross-domain: a prepared data set, or the name of one")
    evaluate.add_argument(
        "--wording", metavar="DOMAIN", help="cross-domain: movies, games, shopping or none (default: as in training)"
    )

    tables = command(
        "tables",
        "The paper's tables: trains what each needs, one work directory after the other, and prints it beside ours.",
        "\nTables 1 (overall), 4 (cold and warm items), 5 (cold users), 6 (few-shot), 7 (cross-domain), 8 and 9"
        "\n(ablations) and 11 (CF models). Interrupted, it goes on; what one table has trained, another finds."
        + overrides,
    )
    numbers = ", ".join(map(str, table_numbers()))
    tables.add_argument("numbers", nargs="+", type=int, metavar="N", help=f"of {numbers}")
    tables.add_argument("--workdir", type=Path, required=True, help="where all their work directories are kept")
    tables.add_argument(
        "--sets", nargs="+", metavar="SET", help="beauty, games, movies, toys (default: all of a table)"
    )
    tables.add_argument("--on", metavar="DATA", help="another data set than Video Games for table 7")

    plan = command(
        "plan",
        "What a config needs on hardware that you do not have: memory a chip, what fits, time.",
        "\nCompiles stage 2 and the ranker for a topology (v5e:2x4, v5p:2x2x1, cpu:4, local), or estimates (h100:8)."
        + overrides,
    )
    plan.add_argument("--config", required=True, help="a Python config file, or the name of one")
    plan.add_argument("--topology", required=True, help="v4, v5e, v5p, v6e, a100, h100, h200 or cpu, :SHAPE; or local")
    plan.add_argument(
        "--length", type=int, help="tokens of a prompt (default: the data's where it is prepared, or 1024)"
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="write what machines read")

    recommend = command(
        "recommend",
        "Recommend items to a known user, or to somebody new by titles.",
        "\nExamples: allmrec recommend --workdir runs/demo --user 42\n"
        '          allmrec recommend --workdir runs/demo --history "Fargo" "Heat" "Twelve Monkeys"'
        '\n          allmrec recommend --workdir runs/demo --user 42 --among "Alien" "Babe" "Casino" --reasons'
        "\nTitles may be parts of titles, in letters of either case; how they were taken is shown.",
    )
    recommend.add_argument("--workdir", type=Path, required=True, help="a work directory that was trained")
    who = recommend.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="the user's id in the raw data")
    who.add_argument("--history", nargs="+", metavar="TITLE", help="titles, oldest first")
    recommend.add_argument("-k", type=int, default=5, help="how many to recommend (default 5)")
    recommend.add_argument("--candidates", type=int, default=20, help="the CF model's top items that the LLM ranks")
    recommend.add_argument(
        "--among", nargs="+", metavar="TITLE", help="rank these in place of the CF model's top items"
    )
    recommend.add_argument(
        "--all", action="store_true", help="any title: the LLM writes them, its prompt naming the CF model's top items"
    )
    recommend.add_argument(
        "--reasons", action="store_true", help="which titles of the history moved the LLM most, by leaving each out"
    )
    recommend.add_argument("--json", action="store_true", help="print JSON")
    return parser


def check_names(experiment: Experiment, stage: str) -> None:
    """Raises `UserError` for weights that do not exist, before anything is trained that needs none."""
    from allmrec_jax.data.sources import check_weights

    if stage != "cf":
        check_weights("align.encoder", experiment.align.encoder, "encoder")
    if stage == "llm":
        check_weights("llm.llm", experiment.llm.llm, "llm")


def pipeline_of(experiment: Experiment, workdir: Path) -> Any:
    from rich.console import Console

    from allmrec_jax.pipeline import Pipeline

    return Pipeline(experiment, workdir, console=Console())


def run_all(experiment: Experiment, workdir: Path, **asked: Any) -> None:
    from allmrec_jax.evaluation.evaluate import evaluate
    from allmrec_jax.evaluation.present import show

    pipeline = pipeline_of(experiment, workdir)
    show(evaluate(pipeline, **asked), pipeline.console, workdir)


def run_tables(arguments: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from allmrec_jax.evaluation import paper_runs

    def override(experiment: Experiment) -> Experiment:
        return cli_fields.override(experiment, rest, prog="allmrec tables")

    check_names(override(load_config("paper/common")), "llm")
    console, options = Console(), {"sets": arguments.sets, "override": override, "on": arguments.on}
    for table in paper_runs.run_tables(arguments.numbers, arguments.workdir, **options, console=console):
        console.print(paper_runs.shown(*table))


def run_evaluate(arguments: argparse.Namespace, rest: list[str]) -> None:
    from allmrec_jax.evaluation import evaluate, scenarios

    experiment = opened(arguments.workdir)
    for flag in rest:
        if flag.startswith("--") and not flag.startswith("--evaluation."):
            raise UserError(f"{flag}: the models are trained; only fields of the evaluation may change")
    experiment = cli_fields.override(experiment, rest, prog="allmrec evaluate")
    asked = {"on": arguments.on, "wording": arguments.wording, "beside": tuple(arguments.beside or ())}
    if arguments.scenario:
        asked["names"] = scenarios.asked(arguments.scenario, experiment.data.few_shot)
    if arguments.models or "all" in (arguments.scenario or ()):
        asked["models"] = evaluate.chosen_models(arguments.models or ["all"], experiment.llm)
    run_all(experiment, arguments.workdir, **asked)


def run_recommend(arguments: argparse.Namespace) -> None:
    from allmrec_jax.evaluation.recommend import recommend, table

    pipeline = pipeline_of(opened(arguments.workdir), arguments.workdir)
    if arguments.json:
        pipeline.console.stderr = True
    answer = recommend(
        pipeline,
        user=arguments.user,
        titles=arguments.history,
        k=arguments.k,
        candidates=arguments.candidates,
        among=arguments.among,
        everything=arguments.all,
        reasons=arguments.reasons,
    )
    if arguments.json:
        print(json.dumps(answer, indent=1, ensure_ascii=False))
    else:
        pipeline.console.print(table(answer))


def run_plan(arguments: argparse.Namespace, rest: list[str]) -> None:
    from allmrec_jax.planning.report import run

    experiment = cli_fields.override(load_config(arguments.config), rest, prog="allmrec plan")
    run(experiment, arguments.topology, length=arguments.length, file=arguments.json)


def run_compare(arguments: argparse.Namespace, rest: list[str]) -> None:
    if importlib.util.find_spec("torch") is None:
        raise UserError("compare needs PyTorch, which is not installed: `make env` brings it")
    experiment = opened(arguments.workdir) if arguments.config is None else load_config(arguments.config)
    experiment = cli_fields.override(experiment, rest, prog="allmrec compare")
    cli_compare.run_compare(arguments, pipeline_of(experiment, arguments.workdir))


def dispatch(arguments: argparse.Namespace, rest: list[str]) -> None:
    workdir = getattr(arguments, "workdir", None)
    if workdir is not None and re.match(r"^[a-z0-9]+:/", str(workdir)):
        raise UserError(f"{workdir}: work directories in buckets are not supported yet; give a local or mounted folder")
    if workdir is not None and workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; give a folder, which need not exist yet")
    if arguments.command not in ("train", "run", "plan", "import", "evaluate", "tables", "compare") and rest:
        raise UserError(f"unknown argument {rest[0]!r}; see `allmrec {arguments.command} --help`")
    if arguments.command == "demo":
        name = "ml100k" if arguments.full else "demo"
        run_all(load_config(name), arguments.workdir or Path("runs") / ("demo-full" if arguments.full else "demo"))
    elif arguments.command == "data":
        cli_data.run_data(arguments)
    elif arguments.command == "bench":
        cli_data.run_bench(arguments)
    elif arguments.command == "plan":
        run_plan(arguments, rest)
    elif arguments.command == "import":
        cli_compare.run_import(arguments, rest)
    elif arguments.command == "compare":
        run_compare(arguments, rest)
    elif arguments.command == "export":
        cli_compare.run_export(arguments, pipeline_of(opened(arguments.workdir), arguments.workdir))
    elif arguments.command in ("train", "run"):
        stage = getattr(arguments, "stage", "llm")
        prog = " ".join(["allmrec", arguments.command, *[stage] * (arguments.command == "train")])
        experiment = cli_fields.override(load_config(arguments.config), rest, prog=prog)
        check_names(experiment, stage)
        if arguments.command == "run":
            run_all(experiment, arguments.workdir)
        else:
            from allmrec_jax.pipeline import train

            train(pipeline_of(experiment, arguments.workdir), arguments.stage)
    elif arguments.command == "evaluate":
        run_evaluate(arguments, rest)
    elif arguments.command == "tables":
        run_tables(arguments, rest)
    else:
        run_recommend(arguments)


def main(argv: list[str] | None = None) -> int:
    """Runs a command. 0: done; 1: a user's mistake, in one line on stderr; 130: interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    choose_platform()
    try:
        if argv[:1] and argv[0] in ("train", "run", "plan") and {"-h", "--help"} & set(argv):
            return _teach(argv)
        arguments, rest = build_parser().parse_known_args(argv)
        dispatch(arguments, rest)
    except UserError as error:
        print(f"allmrec: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nallmrec: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        print(f"allmrec: {error.filename or 'the system says'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except SystemExit as stop:  # argparse's --help and --version
        return 0 if stop.code in (0, None) else 1
    return 0


def _teach(argv: list[str]) -> int:
    """`--help` of a command that takes config fields: its own help, then the fields that matter to it."""
    with contextlib.suppress(SystemExit):
        build_parser().parse_args([argv[0], "--help"])
    stage = next((stage for stage in STAGES if stage in argv), None)
    parts = [field.name for field in dataclasses.fields(Experiment)]
    if argv[0] == "train":
        if stage is None:
            return 0
        parts = [part for part in parts if part in ("seed", "data", stage, "devices")]
    name = next((after for before, after in itertools.pairwise(argv) if before == "--config"), None)
    prog = " ".join(["allmrec", argv[0], *[stage] * (argv[0] == "train")])
    where = f"in {name}" if name else "in the paper's recipe (--config NAME shows those of another)"
    cli_fields.fields_help(load_config(name) if name else Experiment(), prog, parts, where)
    return 0
