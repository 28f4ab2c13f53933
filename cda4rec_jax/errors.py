"""The one error that is the user's to mend."""


class UserError(ValueError):
    """Bad input: the message says what came, what was expected, and what to do. The CLI prints it and exits with code 2."""
