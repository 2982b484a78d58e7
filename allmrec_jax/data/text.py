"""Cleaning item texts: HTML, scrape junk, years in film titles."""

import html
import re

import polars as pl

_TAG = r"<!--.*?-->|</?[A-Za-z][^<>]*>"  # `I <3 you` is not a tag
_JUNK = re.compile(
    r"<(span|div|script|style|img|a|table)\b"  # cut off inside a tag by the scraper
    r"|\bvar\s+\w+\s*=|\bfunction\s*\(|getTime\(\)|^\s*\.[\w-]+\s*\{",
    re.IGNORECASE,
)
_YEAR = r"\s*\((?:18|19|20)\d\d\)(?:\s*\(T?V\))?\s*$"


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


def clean_titles(column: pl.Series) -> tuple[pl.Series, int]:
    """Cleaned titles, and how many were scrape junk: those are null, as if missing."""
    junk = column.map_elements(is_junk_title, return_dtype=pl.Boolean).fill_null(False)
    frame = pl.DataFrame({"title": column, "junk": junk})
    kept = frame.select(pl.when(~pl.col("junk")).then(pl.col("title"))).to_series()
    return clean_text(kept).rename(column.name), int(junk.sum())


def strip_years(column: pl.Series) -> pl.Series:
    """Removes the year a film title ends with; a title that is nothing else stays.

    >>> strip_years(pl.Series(["Toy Story (1995)", "2001: A Space Odyssey (1968) ", "(1995)", "1984"])).to_list()
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
