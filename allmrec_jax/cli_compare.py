"""The commands about PyTorch: `allmrec import`, `allmrec export`, `allmrec compare`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allmrec_jax import cli_fields
from allmrec_jax.errors import UserError

STAGES = ("cf", "align", "llm")
FORMS = ("public", "safetensors", "prompt-embeds")


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `import`, `export` and `compare`; `command(name, help, more)` makes a parser."""
    taken = command(
        "import",
        "Make a work directory of the public A-LLMRec code's files; it evaluates at once.",
        "\nReads SASRec's .pth, the .pt files of stages 1 and 2, NAME.txt and the table of texts; needs no PyTorch,"
        "\nand runs nothing that is in the files."
        "\nExample: allmrec import A-LLMRec --name Luxury_Beauty --workdir runs/beauty"
        "\nThe encoder and the LLM are the public code's; others by --align.encoder and --llm.llm, as any field.",
    )
    taken.add_argument("folder", type=Path, help="the public code's folder, which holds data, pre_train and models")
    taken.add_argument("--workdir", type=Path, required=True, help="the work directory to make")
    taken.add_argument("--name", help="the data set's name in the files (default: the only one there)")
    given = command(
        "export",
        "Write a work directory's weights for others.",
        "\n  public         the public A-LLMRec code's files, which it loads unchanged (default)"
        "\n  safetensors    cf, f_I, f_T, sentence_encoder, F_U and F_I, tensors by their PyTorch names"
        "\n  prompt-embeds  the prompts of --users as embeddings with O_u and O_i, for transformers or vLLM"
        "\nExample: allmrec export --workdir runs/beauty --out A-LLMRec --name Luxury_Beauty",
    )
    given.add_argument("--workdir", type=Path, required=True, help="a work directory that was trained")
    given.add_argument("--out", type=Path, required=True, help="folder to write into")
    given.add_argument("--to", choices=FORMS, default="public", help="which form")
    given.add_argument("--name", help="the data set's name in the public code's files (default: its own)")
    given.add_argument("--users", nargs="+", default=[], metavar="ID", help="for prompt-embeds: ids in the raw data")
    compared = command(
        "compare",
        "This program against PyTorch, number by number, with the same weights and batches.",
        "\nFor every stage the largest difference of outputs, losses, gradients, parameters after some steps,"
        "\nrankings and metrics, against stated tolerances; where one fails, the first layer at which the two part."
        "\nWrites compare.md and compare.html into the work directory; status 1 if anything differs. Stages that are"
        "\nnot trained are compared with their initial weights. Needs the extra torch."
        "\nExamples: allmrec compare --workdir runs/demo"
        "\n          allmrec compare --config ml100k --workdir runs/compare --train --cf.epochs 20 --llm.epochs 0.5",
    )
    compared.add_argument("--workdir", type=Path, required=True, help="a work directory, trained or to be made")
    compared.add_argument("--config", help="a Python config file, or the name of one (default: the work directory's)")
    compared.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES, help="which (default: all three)")
    compared.add_argument("--steps", type=int, default=5, help="optimiser steps of each stage (default 5)")
    compared.add_argument("--users", type=int, help="users whose candidates the LLM ranks on both sides (default 8)")
    compared.add_argument("--train", action="store_true", help="train all three stages in both, from the same weights")
    compared.add_argument("--json", type=Path, metavar="FILE", help="write what machines read")


def run_compare(arguments: argparse.Namespace, pipeline: Any) -> None:
    import json

    from allmrec_jax.comparison import checks, compare, compare_report
    from allmrec_jax.evaluation.present import hardware

    if arguments.train and tuple(arguments.stage) != STAGES:
        raise UserError("--train trains all stages, since each builds on the one before; leave --stage out")
    if arguments.steps < 1 or (arguments.users or 1) < 1:
        raise UserError("--steps and --users must be at least 1")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"--json {arguments.json}: there is no such folder")
    if arguments.train:
        from allmrec_jax.comparison.parity_run import train_both

        found = train_both(pipeline, users=arguments.users or 32)
    else:
        stages = tuple(stage for stage in STAGES if stage in arguments.stage)
        found = compare.compare(pipeline, steps=arguments.steps, users=arguments.users or 8, stages=stages)
    x = pipeline.experiment
    about = {"config": x.name, "data": pipeline.dataset.name, "model": x.cf.model, "encoder": x.align.encoder}
    about |= {"LLM": x.llm.llm, **compare.versions(), **hardware()}
    pipeline.console.print(compare_report.console_table(found))
    for path in compare_report.write(found, about, arguments.workdir):
        pipeline.console.print(f"Written: {path}", soft_wrap=True, markup=False, highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps(checks.as_json(found.checks), indent=1) + "\n", encoding="utf-8")
    if not found.passed:
        raise UserError(compare_report.conclusion(found))
    pipeline.console.print(compare_report.conclusion(found))


def run_import(arguments: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from allmrec_jax.comparison import importing, public_checkpoints

    files = public_checkpoints.find(arguments.folder, arguments.name)
    experiment = cli_fields.override(importing.experiment_of(files), rest, prog="allmrec import")
    console = Console()
    stages = importing.import_public(files, arguments.workdir, experiment, console=console)
    missing = [stage for stage in ("cf", "align", "llm") if stage not in stages]
    console.print(f"Written: {arguments.workdir}, with {', '.join(stages)} of {files.name}", soft_wrap=True)
    if missing:
        console.print(f"There were no files of {' and '.join(missing)}; `allmrec run` trains what is missing")


def run_export(arguments: argparse.Namespace, pipeline: Any) -> None:
    from allmrec_jax.comparison import exporting

    if bool(arguments.users) != (arguments.to == "prompt-embeds"):
        raise UserError("--to prompt-embeds goes with --users ID ..., and --users with it alone")
    if arguments.name is not None and arguments.to != "public":
        raise UserError("--name goes with --to public")
    notes: list[str] = []
    if arguments.to == "public":
        written, notes = exporting.export_public(pipeline, arguments.out, name=arguments.name)
    elif arguments.to == "safetensors":
        written = exporting.export_safetensors(pipeline, arguments.out)
    else:
        from allmrec_jax.comparison.prompt_embeds import export_prompts

        written = export_prompts(pipeline, arguments.out, arguments.users)
    for line in [*(f"Written: {path}" for path in written), *(f"Note: {note}" for note in notes)]:
        pipeline.console.print(line, soft_wrap=True, markup=False, highlight=False)
