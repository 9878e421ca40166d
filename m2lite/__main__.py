"""`python -m m2lite`: the command line."""

from m2lite.cli import main

if __name__ == "__main__":
    main()
