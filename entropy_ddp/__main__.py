"""`python -m entropy_ddp` is the command line."""

from entropy_ddp.cli import main

if __name__ == "__main__":
    main()
