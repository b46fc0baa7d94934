"""`python -m specdistill`."""

from specdistill.cli import main

main()
