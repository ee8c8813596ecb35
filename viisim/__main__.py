"""`python -m viisim`: the command line."""

from viisim.cli import main

if __name__ == "__main__":
    main()
