"""The one exception that means "you, the user, can fix this"."""


class UserError(Exception):
    """A mistake in what the user gave us, or something only the user can put right.

    The message is one clear line that says what to do. The command line prints it on stderr and exits
    with status 1, without a traceback.
    """
