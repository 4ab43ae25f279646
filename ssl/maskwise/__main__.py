"""`python -m maskwise`, and what `torchrun -m maskwise` starts on every rank."""

import sys

from maskwise.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
