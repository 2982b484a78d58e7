"""The type checker that the tests put on every function of the package (see conftest.py)."""

from beartype import BeartypeConf, beartype

# The numeric tower: where a float is asked for an int will do, as everywhere in Python.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
