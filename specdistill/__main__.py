"""`python -m specdistill`."""

from specdistill.cli import main

if __name__ == "__main__":
    main()
