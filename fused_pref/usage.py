"""The error that a command reports to its user instead of a traceback."""


class UsageError(Exception):
    """A bad option, file or installation; the command line prints the message as one line and exits with status 2."""
