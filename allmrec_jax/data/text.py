"""Item texts: which of several rows counts, and their cleaning (HTML, scrape junk, years in film titles)."""

import html
import re

import polars as pl

_TAG = r"<!--.*?-->|</?[A-Za-z][^<>]*>"  # `I <3 you` is not a tag
_JUNK = re.compile(
    r"<(span|div|script|style|img|a|table)\b"  # cut off inside a tag by the scraper
    r"|\bvar\s+\w+\s*=|\bfunction\s*\([\w\s,]*\)\s*\{|getTime\(\)|^\s*\.[\w-]+\s*\{",
    re.IGNORECASE,
)
_YEAR = r"\s*\((?:18|19|20)\d\d\)(?:\s*\(T?V\))?\s*$"


def item_texts(rows: pl.DataFrame, keys: pl.Series, *, recipe: str, strip_years: bool) -> tuple[pl.DataFrame, dict]:
    """The text of each item of `keys`: columns key, title, description, categories, brand; and what became of them.

    Args:
      rows: columns `raw.ITEMS`; several rows may be about one item.
      recipe: "reference": of several rows the last counts, whole. An item without a description (or without a row) has
        no title either; an empty description is called `Empty description`; of a list the first entry counts, even
        the empty string; of a string the first CHARACTER. All as the public code does it.
        "as-is": the last row, its paragraphs joined.
        "clean": of title, description and brand the last that is left after cleaning; paragraphs joined; HTML resolved;
        scrape junk is no title.
      strip_years: take " (1995)" off the end of titles.
    """
    repeated = rows.height - rows["item"].n_unique()
    first, count = pl.col("description").list.first(), pl.col("description").list.len()
    joined = pl.col("description").list.drop_nulls().list.join(" ")
    junk = 0
    if recipe == "reference":
        empty = (count == 0) | (pl.col("plain") & (first == ""))
        description = pl.when(empty).then(pl.lit("Empty description")).when("plain").then(first.str.head(1))
        title = pl.when(pl.col("description").is_not_null()).then("title")
        rows = rows.with_columns(title=title, description=description.otherwise(first))
        table = rows.unique("item", keep="last", maintain_order=True)
    elif recipe == "as-is":
        table = rows.with_columns(description=joined).unique("item", keep="last", maintain_order=True)
    else:
        titles, is_junk = clean_titles(rows["title"])
        junk = rows.filter(is_junk & rows["item"].is_in(keys.implode()))["item"].n_unique()
        rows = rows.with_columns(joined)
        rows = rows.with_columns(titles.alias("title"), *(clean_text(rows[name]) for name in ("description", "brand")))
        rows = rows.with_columns(_clean_lists(rows["categories"]))
        last = [pl.col(name).drop_nulls().last() for name in ("title", "description", "categories", "brand")]
        table = rows.group_by("item", maintain_order=True).agg(last)
    table = keys.alias("key").to_frame().join(table, left_on="key", right_on="item", how="left", maintain_order="left")
    table = table.select("key", "title", "description", pl.col("categories").fill_null([]), "brand")
    if strip_years:
        table = table.with_columns(without_years(table["title"]))
    return table, {
        "without_title": table["title"].null_count(),
        "junk_titles": junk,
        "without_description": table["description"].null_count(),
        "without_row": len(keys) - keys.is_in(rows["item"].implode()).sum(),
        "repeated_rows": repeated,
    }


def _clean_lists(column: pl.Series) -> pl.Series:
    flat = column.to_frame("entry").with_row_index("row").explode("entry").drop_nulls("entry")
    flat = flat.with_columns(clean_text(flat["entry"]).alias("entry")).drop_nulls("entry")
    lists = flat.unique(maintain_order=True).group_by("row", maintain_order=True).agg("entry")
    rows = pl.DataFrame({"row": pl.Series(range(len(column)), dtype=pl.UInt32)})
    return rows.join(lists, on="row", how="left", maintain_order="left")["entry"].rename(column.name)


def is_junk_title(title: str) -> bool:
    """Whether a title is a piece of a web page rather than a name.

    >>> is_junk_title('<span class="a-size-medium a-color-secondary"'), is_junk_title("I <3 you")
    (True, False)
    """
    return bool(_JUNK.search(title))


def clean_text(column: pl.Series) -> pl.Series:
    """HTML entities resolved, tags removed, white space collapsed; null where nothing is left.

    >>> clean_text(pl.Series(["<b>Salt &amp;amp; Light</b>\\n oil", " "])).to_list()
    ['Salt & Light oil', None]
    """
    has_entity = column.str.contains("&", literal=True).fill_null(False)
    if has_entity.any():
        changed = {text: _unescape(text) for text in column.filter(has_entity).unique()}
        column = column.replace(changed)
    stripped = column.str.replace_all(_TAG, " ").str.replace_all(r"\s+", " ").str.strip_chars()
    frame = stripped.to_frame("text")
    return frame.select(pl.when(pl.col("text") != "").then(pl.col("text"))).to_series().rename(column.name)


def clean_titles(column: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Cleaned titles, and which were scrape junk: those are null, as if missing."""
    junk = column.map_elements(is_junk_title, return_dtype=pl.Boolean).fill_null(False)
    frame = pl.DataFrame({"title": column, "junk": junk})
    kept = frame.select(pl.when(~pl.col("junk")).then(pl.col("title"))).to_series()
    return clean_text(kept).rename(column.name), junk


def without_years(column: pl.Series) -> pl.Series:
    """Removes the year a film title ends with; a title that is nothing else stays.

    >>> without_years(pl.Series(["Toy Story (1995)", "2001: A Space Odyssey (1968) ", "(1995)", "1984"])).to_list()
    ['Toy Story', '2001: A Space Odyssey', '(1995)', '1984']
    """
    frame = pl.DataFrame({"old": column, "new": column.str.replace(_YEAR, "")})
    return frame.select(pl.when(pl.col("new") != "").then("new").otherwise("old")).to_series().rename(column.name)


def _unescape(text: str) -> str:
    for _ in range(3):  # shops escape twice: &amp;amp;
        once = html.unescape(text)
        if once == text:
            break
        text = once
    return text
