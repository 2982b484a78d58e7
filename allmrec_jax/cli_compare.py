"""The commands about PyTorch: `allmrec import`, `allmrec export`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allmrec_jax import cli_fields
from allmrec_jax.errors import UserError

FORMS = ("public", "safetensors", "prompt-embeds")


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `import` and `export`; `command(name, help, more)` makes a parser."""
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
