"""The one exception for mistakes that a person can mend: given, expected, what to do next."""


class UserError(ValueError):
    """A message for the user, printed without a traceback; the command line exits with status 2."""
