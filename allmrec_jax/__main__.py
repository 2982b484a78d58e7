"""`python -m allmrec_jax` is the command `allmrec`."""

import sys

from allmrec_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
