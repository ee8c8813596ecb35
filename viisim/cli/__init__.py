"""The command line. `app` puts it together; every command has a file of its name.

Exit status: 0 success; 1 what was asked for failed or found a difference; 2 the user's input is
wrong, said in one line on stderr. Commands import what they need when they run, so that
`viisim --help` answers at once.
"""

from viisim.cli.app import app, main

__all__ = ["app", "main"]
