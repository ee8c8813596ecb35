"""Errors by whose fault they are. Policy authors' errors are in `policies.interface`."""


class InputError(ValueError):
    """The user's input is wrong: one line naming file, key or row, and the repair.

    The command line prints it and exits with status 2.
    """
