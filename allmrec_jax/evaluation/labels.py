"""What people read: names of models, scenarios and metrics, and text from outside made safe to show."""

from collections.abc import Mapping
from typing import Any

NEW = "new:"  # in front of a metric: of test items that are not in the history, as no other candidate ever is
METRIC_LABELS = {
    "hit@1": "Hit@1",
    "hit@5": "Hit@5",
    "hit@10": "Hit@10",
    "ndcg@5": "NDCG@5",
    "ndcg@10": "NDCG@10",
    "mrr": "MRR",
    "substring:hit@1": "Hit@1, substring",
    "valid": "Valid",
    "new:hit@1": "Hit@1, new",
    "new:hit@10": "Hit@10, new",
    "new:ndcg@10": "NDCG@10, new",
}

SHOWN = ("hit@1", "hit@5", "ndcg@5", "mrr", "new:hit@1")  # in tables; metrics.json has them all
COMPARED = ("hit@1", "ndcg@5", "mrr")  # in tables of differences

MODEL_LABELS = {
    "a-llmrec": "A-LLMRec",
    "a-llmrec-q": "A-LLMRec, items from text",
    "a-llmrec-mixed": "A-LLMRec, cold items from text",
    "fused": "{cf} + A-LLMRec",
    "cf": "{cf}",
    "llm-only": "LLM only (titles)",
    "mlp-llm": "MLP-LLM",
    "popularity": "Popularity",
    "mean-rank": "{cf} + LLM, mean rank",
    "repeat": "Repeats",
    "markov": "Markov chain",
    "leak-check": "Copying",
}

SCENARIO_LABELS = {
    "overall": "All test users",
    "cold-items": "Cold items",
    "cold-items-by-rule": "Cold items, by the rule",
    "warm-items": "Warm items",
    "warm-items-by-rule": "Warm items, by the rule",
    "cold-users": "Cold users",
    "few-shot-256": "Trained on 256 users",
    "few-shot-128": "Trained on 128 users",
    "cross-domain": "Another data set, nothing trained there",
    "genres": "Genres",
    "full-catalogue": "All items",
    "generated": "Answers in words",
}

TRIVIAL = ("popularity", "repeat", "markov", "leak-check")
ORDER = (*TRIVIAL, "cf", "llm-only", "mlp-llm", "a-llmrec", "a-llmrec-q", "a-llmrec-mixed", "fused")
PAIRS = (  # that are compared
    ("a-llmrec", "llm-only"),
    ("a-llmrec", "mlp-llm"),
    ("a-llmrec", "cf"),
    ("a-llmrec", "popularity"),
    ("mlp-llm", "llm-only"),
    ("mlp-llm", "cf"),
    ("mlp-llm", "popularity"),
    ("a-llmrec-q", "a-llmrec"),
    ("a-llmrec-mixed", "a-llmrec"),
    ("fused", "cf"),
    ("fused", "a-llmrec"),
    ("fused", "mlp-llm"),
    ("cf", "leak-check"),
)

OURS = (
    "a-llmrec",
    "a-llmrec-q",
    "a-llmrec-mixed",
    "fused",
)  # drawn in the accent colour, all others in grey


def model_labels(about: Mapping[str, Any]) -> dict[str, str]:
    """Key -> label of the known models. `about["cf"]` names the CF model, `about["labels"]` adds or replaces labels."""
    cf = clean(about.get("cf") or "CF model")
    known = {key: label.replace("{cf}", cf) for key, label in MODEL_LABELS.items()}
    return known | {key: clean(label) for key, label in (about.get("labels") or {}).items()}


def scenario_title(name: str, facts: Mapping[str, Any], candidates: int | None) -> str:
    """What a scenario's figures are of, from `{"users", "repeats", and what bounds its items}`."""
    parts = [f"{name}: {facts['users']:,} users"]
    if "rule" in facts:
        parts.append(f"test items with {facts['rule']} ({facts['items']:,} items)")
    elif "least" in facts:
        end = "fewest" if name.startswith("cold") else "most"
        parts.append(
            f"test items among the 35 % of the catalogue with the {end} training interactions ({facts['items']:,} "
            f"items of {facts['least']:,} to {facts['most']:,})"
        )
    parts += [facts["told"]] if facts.get("told") else []
    parts += [f"{facts['repeats']:,} whose item is in their history"] if facts.get("repeats") else []
    parts += [f"{candidates} candidates each"] if candidates else []
    return ", ".join(parts)


def clean(text: object) -> str:
    """One line of printable text: titles come from strangers and may hold line breaks, terminal or bidi controls.

    Joiners (U+200C, U+200D) stay, since scripts and emoji need them. Escaping for HTML is the page's own business.

    >>> clean("Seven\\x1b[31m\\n Samurai")
    'Seven\ufffd[31m Samurai'
    """
    spaced = " ".join(str(text).split())
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else "\ufffd" for c in spaced)


def hits(example: Mapping[str, Any], model: str) -> bool:
    """Whether the model chose the example user's target.

    `example["hits"][model]` decides where given (two items may share a title), else the titles are compared.
    """
    given = example.get("hits") or {}
    return bool(given[model]) if model in given else example["choices"].get(model) == example["target"]


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(3.21), duration(75), duration(4000)
    ('3.2 s', '1 min 15 s', '1 h 6 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def signed(value: float) -> str:
    """Three decimals with a sign; what rounds to 0 has none.

    >>> signed(0.0214), signed(-0.0001)
    ('+0.021', '0.000')
    """
    rounded = f"{value:+.3f}"
    return "0.000" if rounded in ("+0.000", "-0.000") else rounded.replace("-", "\u2212")


def p_text(p: float) -> str:
    """A p-value to the digits that 10,000 sampled permutations can tell.

    >>> p_text(0.0001), p_text(0.0312), p_text(0.46)
    ('p < 0.001', 'p = 0.031', 'p = 0.46')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
