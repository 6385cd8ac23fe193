"""What a person is told: one exception for mistakes that they can mend, one warning for what is unusual."""


class UserError(ValueError):
    """Given, expected, what to do next; printed without a traceback, and the command line exits with status 2."""


class Note(UserWarning):
    """Something unusual that was done all the same."""
