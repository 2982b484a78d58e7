"""The commands about data and speed: `allmrec data ...` and `allmrec bench`."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allmrec_jax.errors import UserError

BENCHES = ("align", "cf", "data", "llm", "rank")
DEFAULTS = {
    "recipe": "clean",
    "strip_years": False,
    "k_core": None,
    "min_positive_rating": None,
    "seed": 0,
    "max_bad_lines": 100,
}


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `data` and `bench`; `command(name, help, more, group=)` makes a parser."""
    data = command("data", "List, prepare and describe data sets.").add_subparsers(
        dest="action", metavar="ACTION", required=True
    )
    command("list", "The known data sets and weights, and where they come from.", group=data)
    prepare = command(
        "prepare",
        "Turn raw files into a prepared data set.",
        "\nExamples:"
        "\n  allmrec data prepare ml-100k --out data/ml-100k --strip-years"
        "\n  allmrec data prepare --reviews Gift_Cards.json.gz --metadata meta_Gift_Cards.json.gz --out data/cards"
        "\n  allmrec data prepare --interactions mine.csv --items items.csv --columns user=customer --out data/mine"
        "\nTables (.csv .tsv .jsonl .parquet, and .txt of `user item item ...`; plain or .gz) need a user and an item"
        "\nin each row; time (seconds or milliseconds since 1970) and rating are used where they are.",
        group=data,
    )
    prepare.add_argument("name", nargs="?", help="a named data set (`allmrec data list`), or a folder of raw files")
    prepare.add_argument("--reviews", type=Path, help="an Amazon review file of 2014, 2018 or 2023, plain or gzip")
    prepare.add_argument("--metadata", type=Path, help="its metadata, with titles and descriptions")
    prepare.add_argument("--interactions", type=Path, help="a table of your own")
    prepare.add_argument("--items", type=Path, help="a table of its items: titles, descriptions, categories")
    prepare.add_argument(
        "--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="what your tables call a column"
    )
    prepare.add_argument("--tfds", type=Path, help="a TFDS folder that `allmrec data export` wrote")
    prepare.set_defaults(**DEFAULTS)
    prepare.add_argument("--out", type=Path, required=True, help="folder of the prepared data set")
    prepare.add_argument(
        "--as",
        dest="called",
        metavar="NAME",
        help="its name (default: the source's); with --tfds, which",
    )
    prepare.add_argument(
        "--recipe",
        choices=("clean", "reference", "as-is"),
        help="how rows are filtered: repeats, low ratings and k-core; as the public code does it; or not at all",
    )
    prepare.add_argument("--strip-years", action="store_true", help='"Heat (1995)" becomes "Heat": shorter prompts')
    prepare.add_argument(
        "--k-core", type=int, help="least interactions of a user or item (clean; 5, Beauty and Toys 4)"
    )
    prepare.add_argument(
        "--min-positive-rating", type=float, help="drop interactions rated lower (clean; none, Beauty and Toys 4)"
    )
    prepare.add_argument("--seed", type=int, help="of the few-shot users (default 0)")
    prepare.add_argument(
        "--max-bad-lines",
        type=int,
        help="unusable lines left out before it is an error (default 100)",
    )
    export = command(
        "export",
        "Write a prepared data set in a form that others read.",
        "\n  tfds    a TensorFlow Datasets folder (array_record), which needs no TensorFlow"
        "\n  public  the files of the public A-LLMRec code: NAME.txt and NAME_text_name_dict.json.gz"
        "\nExample: allmrec data export data/ml-100k --to tfds --out exported",
        group=data,
    )
    export.add_argument("folder", type=Path, help="a prepared data set")
    export.add_argument("--to", choices=("tfds", "public"), required=True, help="which form")
    export.add_argument("--out", type=Path, required=True, help="folder to write into")
    describe = command("describe", "Counts, lengths, texts, repeats, and what was dropped and why.", group=data)
    describe.add_argument("folder", type=Path, help="a prepared data set")

    bench = command(
        "bench",
        "Measure speed against a baseline, interleaved in one run.",
        "\n  align  stage 1 against PyTorch: the encoder trained and frozen (needs the extra torch)"
        "\n  cf     stage 0 against PyTorch: training and evaluation (needs the extra torch)"
        "\n  data   raw files to a prepared data set, and batches"
        "\n  llm    stage 2 against PyTorch: a step through the frozen LLM (needs the extra torch)"
        "\n  rank   20 candidates of a user against PyTorch: as 20 sequences, and generating (needs the extra torch)"
        "\n  all    each of them in a process of its own"
        "\nRun it on an otherwise idle machine. Examples: allmrec bench data --json bench.json"
        "\n  allmrec bench all --json bench.json --plot bench.png"
        "\n  allmrec bench --scale --plot scale.png",
    )
    bench.add_argument("what", nargs="*", metavar="|".join((*BENCHES, "all")), help="what to measure (default: all)")
    bench.add_argument("--scale", action="store_true", help="how cost grows with batch, length, catalogue, candidates")
    bench.add_argument(
        "--rows", type=int, default=1_000_000, help="reviews in the generated raw file (default a million)"
    )
    bench.add_argument("--repeats", type=int, default=3, help="runs of each, of which the median counts (default 3)")
    bench.add_argument("--json", type=Path, help="also write the results here, for machines")
    bench.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw them")


def run_data(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    console = Console()
    if arguments.action == "list":
        from allmrec_jax.data.describe import sources_table

        console.print(sources_table())
    elif arguments.action == "prepare":
        from allmrec_jax.data.describe import describe

        console.print(describe(prepare(arguments, console)))
    elif arguments.action == "export":
        from allmrec_jax.data.dataset import open_dataset

        dataset = open_dataset(arguments.folder)
        if arguments.to == "tfds":
            from allmrec_jax.data.builder import write_tfds

            written = write_tfds(dataset, arguments.out, console)
        else:
            from allmrec_jax.data.public_files import write_public

            written = " and ".join(map(str, write_public(dataset, arguments.out)))
        console.print(f"Written: {written}", soft_wrap=True, markup=False, highlight=False)
    else:
        from allmrec_jax.data.dataset import open_dataset
        from allmrec_jax.data.describe import describe

        console.print(describe(open_dataset(arguments.folder)))


def prepare(arguments: argparse.Namespace, console: Any) -> Any:
    """The data set that `allmrec data prepare` was asked for."""
    ways = ("name", "reviews", "interactions", "tfds")
    given = [way for way in ways if getattr(arguments, way) is not None]
    if len(given) != 1:
        raise UserError("say one of: the name of a data set or folder, --reviews, --interactions, --tfds")
    for first, second in (("reviews", "metadata"), ("interactions", "items")):
        if getattr(arguments, second) is not None and given != [first]:
            raise UserError(f"--{second} goes with --{first}")
    columns = dict(part.partition("=")[::2] for part in arguments.columns)
    if columns and given != ["interactions"]:
        raise UserError("--columns goes with --interactions")
    if wrong := [ours for ours, theirs in columns.items() if not theirs]:
        raise UserError(f"--columns {wrong[0]}: say OURS=THEIRS, such as user=customer")
    if given == ["tfds"]:
        recipe = ("recipe", "strip_years", "k_core", "min_positive_rating", "seed", "max_bad_lines")
        if changed := [option for option in recipe if getattr(arguments, option) != DEFAULTS[option]]:
            raise UserError(
                f"--{changed[0].replace('_', '-')} does not go with --tfds: that data set is prepared already"
            )
        from allmrec_jax.data.builder import read_tfds

        return read_tfds(arguments.tfds, arguments.out, name=arguments.called)
    from allmrec_jax.data.prepare import Files, prepare

    source = arguments.name
    if source is None:
        source = Files(arguments.reviews, arguments.metadata, arguments.interactions, arguments.items, columns)
    return prepare(
        source,
        arguments.out,
        name=arguments.called,
        recipe=arguments.recipe,
        strip_years=arguments.strip_years,
        k_core=arguments.k_core,
        min_positive_rating=arguments.min_positive_rating,
        seed=arguments.seed,
        max_bad_lines=arguments.max_bad_lines,
        console=console,
    )


def run_bench(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    if wrong := [what for what in arguments.what if what not in (*BENCHES, "all")]:
        raise UserError(f"there is no benchmark {wrong[0]!r}: choose among {', '.join(BENCHES)}")
    if arguments.rows < 1000 or arguments.repeats < 1:
        raise UserError("--rows must be at least 1000 and --repeats at least 1")
    from allmrec_jax.comparison import bench

    for option, path in (("--json", arguments.json), ("--plot", arguments.plot)):
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"{option} {path}: there is no such folder")
    if arguments.scale and arguments.what:
        raise UserError("--scale is a measurement of its own; leave out what else to measure")
    console = Console()
    wanted, rows = set(arguments.what or ["all"]), []
    everything = "all" in wanted
    needing = ["scale"] if arguments.scale else [name for name in BENCHES if name != "data" and {name, "all"} & wanted]
    if needing and importlib.util.find_spec("torch") is None:
        raise UserError(f"bench {needing[0]} compares with PyTorch, which is not installed: `make env` brings it")
    if arguments.scale:
        from allmrec_jax.comparison import bench_scale

        rows += bench_scale.bench_scale(arguments.repeats, console)
        wanted = set()
    elif everything:
        rows += bench.apart(BENCHES, rows=arguments.rows, repeats=arguments.repeats, console=console)
        wanted = set()
    if "align" in wanted:
        from allmrec_jax.comparison.bench_align import bench_align

        rows += bench_align(arguments.repeats, console)
    if "cf" in wanted:
        from allmrec_jax.comparison.bench_cf import bench_cf

        rows += bench_cf(arguments.repeats, console)
    if "data" in wanted:
        from allmrec_jax.comparison.bench_data import bench_data

        rows += bench_data(arguments.rows, arguments.repeats, console)
    if "llm" in wanted:
        from allmrec_jax.comparison.bench_llm import bench_llm

        rows += bench_llm(arguments.repeats, console)
    if "rank" in wanted:
        from allmrec_jax.comparison.bench_rank import bench_rank

        rows += bench_rank(arguments.repeats, console)
    bench.show(rows, console)
    if arguments.json:
        bench.write(rows, arguments.json)
    if arguments.plot:
        draw = bench_scale.plot if arguments.scale else bench.plot
        draw(rows, arguments.plot)
