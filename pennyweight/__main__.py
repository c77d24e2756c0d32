"""``python -m pennyweight``: the command line."""

from pennyweight.cli import main

if __name__ == "__main__":
    main()
