"""Benchmarks of the data layer.

data.prepare   a raw gzip file of reviews and its metadata -> prepared data set, against a straightforward loop over
               `json.loads` of the same recipe. Each run is a process of its own, so that its memory can be told.
data.batches   windows and negatives of users drawn with replacement, against a loop as the public code's sampler
"""

from __future__ import annotations

import gzip
import html
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console

from allmrec_jax.comparison.bench import Row, interleave, peak_memory, row

SEED = 0
MAXLEN = 50
REVIEWS, METADATA = "Bench.json.gz", "meta_Bench.json.gz"
_WORDS = (
    "the a and it is was for this my that not very have with but so as you on they great good love product use used "
    "like would one just really skin hair game play bought price quality works well little time color size smell nice "
    "recommend buy again gift easy fun months day after because than fit small perfect old kids happy bit dry"
)


# ------------------------------------------------------------------------------------------------------ generator


def generate(folder: Path, rows: int, seed: int = SEED) -> None:
    """Writes `rows` reviews, as Amazon's of 2018 look, and the metadata of their items.

    Most users have one or two reviews, some have many; items follow a power law; one row in 200 is an exact repeat;
    some titles hold entities, some items have no description or two rows.
    """
    rng = np.random.default_rng(seed)
    n_users, n_items = max(rows // 4, 20), max(rows // 40, 10)
    users = np.minimum(rng.pareto(1.1, rows) * n_users / 60, n_users - 1).astype(int)
    casual = rng.random(rows) < 0.4
    users[casual] = rng.integers(0, n_users, int(casual.sum()))
    items = np.minimum(rng.pareto(0.9, rows) * n_items / 50, n_items - 1).astype(int)
    times = rng.integers(1_100_000_000, 1_538_000_000, rows)
    ratings = rng.choice(5, rows, p=[0.07, 0.05, 0.09, 0.17, 0.62]) + 1
    repeated = np.flatnonzero(rng.random(rows) < 0.005)[1:]
    for column in (users, items, times, ratings):
        column[repeated] = column[repeated - 1]
    stream = " ".join(rng.choice(_WORDS.split(), 400_000))
    lengths = np.clip(rng.lognormal(5, 1.1, rows), 8, 8000).astype(int)
    starts = rng.integers(0, len(stream) - 8000, rows)
    names = rng.permutation(n_users)
    with gzip.open(folder / REVIEWS, "wt", compresslevel=6, encoding="utf-8") as file:
        columns = (users, items, times, ratings, lengths, starts)
        for user, item, when, rating, length, start in zip(*(c.tolist() for c in columns), strict=True):
            text = stream[start : start + length]
            file.write(
                f'{{"overall": {rating}.0, "verified": true, "reviewTime": "09 1, 2016", "reviewerID": '
                f'"A{names[user]:013X}", "asin": "B{item:09X}", "style": {{"Size:": " 7.0 oz"}}, "reviewerName": '
                f'"{text[:9]}", "reviewText": "{text}", "summary": "{text[:24]}", "unixReviewTime": {when}}}\n'
            )
    with gzip.open(folder / METADATA, "wt", compresslevel=6, encoding="utf-8") as file:
        for item in range(n_items):
            start = int(rng.integers(0, len(stream) - 8000))
            title = stream[start : start + 60] + (" &amp; more" if item % 7 == 0 else "")
            paragraphs = [stream[start + 100 : start + 600], "<p>" + stream[start + 600 : start + 900] + "</p>"]
            record = {
                "category": ["Bench", "Kind " + str(item % 20)],
                "description": [] if item % 11 == 0 else paragraphs,
                "title": title,
                "also_buy": [f"B{other:09X}" for other in rng.integers(0, n_items, 40).tolist()],
                "brand": f"Brand {item % 300}",
                "asin": f"B{item:09X}",
            }
            line = json.dumps(record) + "\n"
            file.write(line * (1 + (item % 50 == 0)))


# ------------------------------------------------------------------------------------------------ the straight loop


def straight_loop(folder: Path, out: Path) -> None:
    """The clean recipe (5-core, exact repeats out, texts cleaned) in plain Python, the metadata in a dictionary."""
    rows = []
    with gzip.open(folder / REVIEWS, "rb") as file:
        for line in file:
            review = json.loads(line)
            rows.append((review["reviewerID"], review["asin"], review["unixReviewTime"], review["overall"]))
    seen, unique = set(), []
    for entry in rows:
        if entry[:3] not in seen:
            seen.add(entry[:3])
            unique.append(entry)
    rows = unique
    while True:
        users = Counter(entry[0] for entry in rows)
        kept = [entry for entry in rows if users[entry[0]] >= 5]
        items = Counter(entry[1] for entry in kept)
        kept = [entry for entry in kept if items[entry[1]] >= 5]
        if len(kept) == len(rows):
            break
        rows = kept
    user_ids: dict[str, int] = {}
    item_ids: dict[str, int] = {}
    sequences: dict[int, list] = {}
    for user, item, when, rating in rows:
        u, i = user_ids.setdefault(user, len(user_ids) + 1), item_ids.setdefault(item, len(item_ids) + 1)
        sequences.setdefault(u, []).append((when, i, rating))
    texts = {}
    with gzip.open(folder / METADATA, "rb") as file:
        for line in file:
            item = json.loads(line)
            if item["asin"] in item_ids:
                words = " ".join(item["description"])
                clean = [re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", html.unescape(t))) for t in (item["title"], words)]
                texts[item_ids[item["asin"]]] = [*clean, item["category"], item["brand"]]
    flat, offsets = [], [0, 0]
    for user in range(1, len(user_ids) + 1):
        flat += [entry[1] for entry in sorted(sequences[user], key=lambda entry: entry[0])]
        offsets.append(len(flat))
    out.mkdir()
    np.save(out / "items.npy", np.array(flat, np.int32))
    np.save(out / "offsets.npy", np.array(offsets, np.int64))
    (out / "items.json").write_text(json.dumps({"ids": item_ids, "texts": texts}))
    (out / "users.json").write_text(json.dumps(user_ids))


def _ours(folder: Path, out: Path) -> None:
    from allmrec_jax.data.prepare import Files, prepare

    prepare(Files(reviews=folder / REVIEWS, metadata=folder / METADATA), out)


def _child(kind: str, folder: Path, out: Path) -> None:
    """Runs one of the two in this process; prints its seconds and its peak memory in bytes."""
    if kind == "ours":
        from allmrec_jax.data import prepare  # noqa: F401, imports are not what is measured
    start = time.perf_counter()
    {"ours": _ours, "loop": straight_loop}[kind](folder, out)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, peak_memory()]))


# ------------------------------------------------------------------------------------------------------- the rows


def bench_prepare(rows: int, repeats: int, console: Console) -> Row:
    """`data.prepare`; raises AssertionError unless both give the same sequences."""
    with tempfile.TemporaryDirectory(prefix="allmrec-bench-") as scratch:
        folder = Path(scratch)
        console.print(f"writing {rows:,} reviews (seed {SEED})")
        generate(folder, rows)
        peaks: dict[str, list[int]] = {"ours": [], "loop": []}
        count = 0

        def run(kind: str) -> float:
            nonlocal count
            count += 1
            code = (
                f"from allmrec_jax.comparison.bench_data import _child, Path; _child({kind!r}, Path({str(folder)!r}), "
            )
            code += f"Path({str(folder / f'{kind}{count}')!r}))"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the run failed: {done.stderr[-2000:]}")
            seconds, peak = json.loads(done.stdout.splitlines()[-1])
            peaks[kind].append(peak)
            return seconds

        seconds = interleave([(kind, lambda kind=kind: run(kind)) for kind in ("ours", "loop")], repeats, console)
        for name in ("items", "offsets"):
            ours, theirs = (np.load(folder / f"{kind}/{name}.npy") for kind in ("ours1", "loop2"))
            if not np.array_equal(ours, theirs):
                raise AssertionError(f"data.prepare: the two disagree in {name}")
        kept = len(np.load(folder / "ours1/items.npy"))
        beside = {**_floors(folder), "reviews kept by the 5-core": f"{kept:,}"}
        for kind, name in (("ours", "our"), ("loop", "the loop's")):
            beside[f"{name} peak memory (MiB)"] = statistics.median(peaks[kind]) / 2**20
        beside["our seconds"] = statistics.median(seconds["ours"])
    return row(
        "data.prepare",
        "reviews/s",
        rows,
        seconds["ours"],
        seconds["loop"],
        what=f"{rows:,} generated reviews and metadata, gzip, clean recipe; against a loop over json.loads",
        beside=beside,
    )


def _floors(folder: Path) -> dict[str, float]:
    """Seconds for what nobody can leave out: decompressing the reviews, and parsing them from memory."""
    from allmrec_jax.data.amazon import REVIEWS as COLUMNS
    from allmrec_jax.data.formats import json_lines

    lines, gunzip, parse = json_lines(COLUMNS[0]), 0.0, 0.0
    with gzip.open(folder / REVIEWS) as file:
        while True:
            start = time.perf_counter()
            data = file.read(8 << 20) + file.readline()
            read = time.perf_counter()
            gunzip += read - start
            if not data:
                return {"gunzip floor (s)": gunzip, "parse floor (s)": parse}
            lines.parse(data)
            parse += time.perf_counter() - read


def bench_batches(repeats: int, console: Console, users: int = 20_000, batch: int = 8192) -> Row:
    """`data.batches`: sequences a second of maxlen 50, with one negative a position, drawn as in stage 0."""
    import jax

    from allmrec_jax.comparison.sampling import draw_row, owned_items, popular_items, training_arrays
    from allmrec_jax.data import batches

    rng = np.random.default_rng(SEED)
    n_items = 10_000
    lengths = np.clip(rng.lognormal(2, 0.8, users), 5, 400).astype(int)
    offsets = np.concatenate([[0, 0], np.cumsum(lengths)])
    items = popular_items(rng, int(offsets[-1]), n_items)
    data = training_arrays(items, offsets[1:-1], offsets[2:], n_items)
    owned = owned_items(items, offsets[1:-1], offsets[2:])
    key, steps, loop_rows = jax.random.key(SEED), max(1, 65_536 // batch), 2000

    @jax.jit
    def draw(first, data):
        def one(carry, step):
            rows = batches.training_rows(key, step, jax.numpy.arange(batch), data, MAXLEN)
            return carry, [part.sum() for part in rows[1:]]  # summed, so that nothing can be left out

        return jax.lax.scan(one, 0, first + jax.numpy.arange(steps))[1]

    jax.block_until_ready(draw(0, data))

    def ours() -> float:
        start = time.perf_counter()
        jax.block_until_ready(draw(steps, data))
        return (time.perf_counter() - start) / (steps * batch)

    sequences = [[], *(items[a:b].tolist() for a, b in itertools.pairwise(offsets[1:]))]

    def loop() -> float:
        start = time.perf_counter()
        for _ in range(loop_rows):
            user = int(rng.integers(1, users + 1))
            draw_row(rng, sequences[user], owned[user], n_items, MAXLEN)
        return (time.perf_counter() - start) / loop_rows

    seconds = interleave([("ours", ours), ("loop", loop)], repeats, console)
    return row(
        "data.batches",
        "sequences/s",
        1,
        seconds["ours"],
        seconds["loop"],
        what=f"windows of {MAXLEN}, positives and a negative for each of the {MAXLEN} positions, batches of {batch:,}, "
        f"{users:,} users of {lengths.mean():.1f} items; against one process of a sampler in a Python loop",
    )


def bench_data(rows: int, repeats: int, console: Console) -> list[Row]:
    """Both rows of this file."""
    return [bench_prepare(rows, repeats, console), bench_batches(repeats, console)]
