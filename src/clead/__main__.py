"""``python -m clead``: the command line."""

from clead.cli import main

if __name__ == "__main__":
    main()
