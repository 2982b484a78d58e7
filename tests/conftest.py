"""What every test stands on: eight CPU devices, strict numerics, checked types, real data and weights if to be had."""

import os
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")

# All of this is read when JAX is first imported, by the commands that tests start as well as here.
os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# JAX writes a cache entry in place: a folder for each worker, so that none reads what another is writing.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROJECT / ".jax_cache" / WORKER))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Annotations are checked at every call, shapes included, in this process only.
install_import_hook("allmrec_jax", "strict_types.check")


@pytest.fixture(scope="session")
def test_data() -> Callable[[str], Path]:
    """`test_data(name)`: the folder of a real data set kept beside the project, or a skip that says where to put it."""
    root = Path(os.environ.get("ALLMREC_TEST_DATA", PROJECT / ".." / "shared" / "data")).resolve()

    def find(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            pytest.skip(f"real data {name!r} is not there; set ALLMREC_TEST_DATA to the folder that holds it")
        return folder

    return find


@pytest.fixture(scope="session")
def weights() -> Callable[[str], Path]:
    """`weights(name)`: the folder of a named source, fetched if need be, or a skip that says why."""
    found: dict[str, Path | str] = {}

    def fetch(name: str) -> Path:
        from allmrec_jax.data import sources
        from allmrec_jax.errors import UserError

        if name not in found:
            try:
                found[name] = Path(sources.fetch(name))
            except UserError as error:
                found[name] = str(error)
        place = found[name]
        if isinstance(place, str):
            pytest.skip(f"{name} cannot be obtained: {place}")
        return place

    return fetch
