"""The one exception that command-line tools turn into a one-line message."""


class UserError(Exception):
    """A mistake in what the user asked for; the message says what was wrong and what to do.

    Tools print it as ``error: <message>`` and exit with status 2, without a traceback.
    """
