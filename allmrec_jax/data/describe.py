"""What a prepared data set is made of, as figures and as a table."""

from datetime import UTC, datetime

import numpy as np
from rich.markup import escape

from allmrec_jax.data.dataset import Dataset

_QUANTILES = {"shortest": 0, "5 %": 5, "median": 50, "95 %": 95, "longest": 100}


def summary(dataset: Dataset) -> dict:
    """The figures of `describe`, for machines. Shares are between 0 and 1; times are seconds since 1970."""
    lengths = dataset.lengths[1:]
    users = dataset.users_of_items().astype(np.int64)
    _, first = np.unique(users * (dataset.n_items + 1) + dataset.items, return_index=True)
    is_first = np.zeros(dataset.n_interactions, bool)
    is_first[first] = True
    tested = dataset.has_target("test")
    test_positions = dataset.history_end("test")[tested]
    titles = dataset.titles()[1:]
    named = [title for title in titles if title]
    figures = {
        "users": dataset.n_users,
        "cold_users": len(dataset.cold_items),
        "items": dataset.n_items,
        "interactions": dataset.n_interactions,
        "density": dataset.n_interactions / (dataset.n_users * dataset.n_items),
        "length": {"mean": float(lengths.mean())}
        | {name: float(np.percentile(lengths, q)) for name, q in _QUANTILES.items()},
        "test_users": int(tested.sum()),
        "users_with_training_only": int((~tested[1:]).sum()),
        "share_with_title": len(named) / dataset.n_items,
        "share_with_description": sum(bool(text) for text in dataset.descriptions()) / dataset.n_items,
        "items_sharing_a_title": len(named) - len(set(named)),
        "repeats": int((~is_first).sum()),
        "repeated_test_targets": int((~is_first[test_positions]).sum()),
        "items_without_training": int((dataset.train_counts()[1:] == 0).sum()),
    }
    if dataset.times is not None:
        ties = (dataset.times[1:] == dataset.times[:-1]) & (users[1:] == users[:-1])
        figures |= {"first_time": int(dataset.times.min()), "last_time": int(dataset.times.max())}
        figures["equal_times"] = int(ties.sum())
    return figures


def describe(dataset: Dataset):
    """A rich renderable: counts, lengths, texts, repeats, time span, and every row of the input accounted for."""
    from rich.console import Group
    from rich.table import Table

    figures = summary(dataset)
    length = figures["length"]
    table = Table("figure", "value", title=escape(f"{dataset.name} ({dataset.path})"), title_justify="left")
    rows = [
        ("users / items / interactions", " / ".join(f"{figures[k]:,}" for k in ("users", "items", "interactions"))),
        ("density", f"{figures['density']:.2%}"),
        ("mean length", f"{length['mean']:.2f}"),
        ("lengths: " + ", ".join(_QUANTILES), ", ".join(f"{length[name]:.0f}" for name in _QUANTILES)),
        ("users with a test and a validation item", f"{figures['test_users']:,}"),
        ("users with training items only", f"{figures['users_with_training_only']:,}"),
        ("items with a title", f"{figures['share_with_title']:.1%}"),
        ("items with a description", f"{figures['share_with_description']:.1%}"),
        ("items beyond the first of their title", f"{figures['items_sharing_a_title']:,}"),
        ("items without a training interaction", f"{figures['items_without_training']:,}"),
        ("interactions with an item the user had before", f"{figures['repeats']:,}"),
        ("test targets that the user had before", f"{figures['repeated_test_targets']:,}"),
    ]
    if "first_time" in figures:
        rows.append(("time span", f"{_day(figures['first_time'])} to {_day(figures['last_time'])}"))
        rows.append(("interactions at the same second as the user's one before", f"{figures['equal_times']:,}"))
    for key, what in (
        ("junk_titles", "titles that were scrape junk"),
        ("without_row", "items that the metadata do not have"),
        ("repeated_rows", "repeated rows in the metadata"),
        ("unusable_lines", "lines of the metadata that could not be used"),
    ):
        # Without any metadata every item lacks a row: "items with a title" has said so.
        if 0 < dataset.manifest.get("texts", {}).get(key, 0) < dataset.n_items:
            rows.append((what, f"{dataset.manifest['texts'][key]:,}"))
    settings = dataset.manifest.get("settings", {})
    rows.append(("settings", ", ".join(f"{key}={value}" for key, value in settings.items())))
    rows.append(("fingerprint", dataset.fingerprint[:16]))
    for row in rows:
        table.add_row(*map(escape, row))

    parts = [table, _scenario_table(dataset)]
    account = dataset.manifest.get("rows")
    if account is None:
        return Group(*parts)
    balance = Table("rows of the input", "count", title="what was dropped and why", title_justify="left")
    balance.columns[1].justify = "right"
    balance.add_row("read", f"{account['read']:,}")
    for entry in account["dropped"]:
        balance.add_row(escape(f"dropped: {entry['reason']}"), f"{-entry['rows']:,}")
    balance.add_row("kept", f"{account['kept']:,}")
    if cold := len(dataset.cold_items):
        balance.add_row(f"of those dropped: of {cold:,} cold users, kept apart", f"{3 * cold:,}")
    examples = [f"left out: {example}" for example in dataset.manifest.get("unusable_lines", ())]
    return Group(*parts, balance, *map(escape, examples))


def _day(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):  # no year of the calendar
        return f"second {seconds:,}"


def _scenario_table(dataset: Dataset):
    """Each scenario's users, and its bounds or the reason why it does not apply."""
    from rich.table import Table

    table = Table("scenario", "users", "what", title="scenarios", title_justify="left")
    table.columns[1].justify = "right"
    for name, entry in dataset.manifest["scenarios"].items():
        if entry["reason"] is not None:
            table.add_row(name, "", escape(f"not applicable: {entry['reason']}"))
        else:
            table.add_row(name, f"{entry['users']:,}", _facts(name, entry["facts"], dataset.manifest["seed"]))
    return table


def _facts(name: str, facts: dict, seed: int) -> str:
    if "rule" in facts:
        bounds = f"{facts['least']:,} to {facts['most']:,}"
        by_rule = f"{facts['items_by_rule']:,} items, {facts['users_by_rule']:,} users"
        return f"{facts['items']:,} items of {bounds} training interactions; by the rule {facts['rule']}: {by_rule}"
    if name == "cold-users":
        where = "removed by the k-core, kept apart" if facts["kept_apart"] else "in no training example"
        return f"three interactions each, {where}"
    if name.startswith("few-shot"):
        return f"trained on, drawn with seed {seed}; tested: the {facts['tested']:,} of overall"
    if name == "cross-domain":
        return f"as the target of another data set's model; {facts['items_with_text']:,} items have a text"
    if name == "genres":
        return f"{facts['items_with_category']:,} items have a category"
    return "with a test item"


def sources_table():
    """The known data sets and weights, for the terminal: what, on which terms, where from, and whether already here."""
    from rich.table import Table

    from allmrec_jax.data import sources

    table = Table(box=None, show_header=False, padding=(0, 2, 1, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for source in sources.KNOWN.values():
        cached = f"the local cache, {sources.cache_dir() / source.name}"
        cached += " (it is there)" if sources.is_cached(source.name) else ""
        where = "from " + ", else ".join([cached, *(place.label for place in source.places)])
        table.add_row(source.name, escape(f"{source.title}\n{source.home}\n{source.terms}\n{where}"))
    return table
