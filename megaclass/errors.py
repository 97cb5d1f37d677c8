"""Errors a user can cause, each with the exit code of its kind.

Everything raised because of what a user gave (configuration, data, checkpoints) derives from `UserError` and is shown
as one line without a traceback. A message says what was wrong, the value, what is allowed, and what to do next. Errors
of our own making stay `AssertionError` and keep their traceback.
"""


class UserError(ValueError):
    """A mistake of the user's, shown as one line; `exit_code` says of which kind."""

    exit_code = 1
    is_repeated = False
    """Whether another rank has raised and reported the same."""


class ConfigError(UserError):
    """A wrong option, an impossible combination, or a run directory that cannot be used (exit code 2)."""

    exit_code = 2


class DataError(UserError):
    """A data set that is missing, damaged or inconsistent with its manifest (exit code 3)."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model (exit code 4)."""

    exit_code = 4


class NumericError(UserError):
    """The run's numbers stopped being finite (exit code 5)."""

    exit_code = 5


class PeerError(UserError):
    """Another rank died or did not answer in time (exit code 6); starting again may help."""

    exit_code = 6


class NoProgressError(UserError):
    """Starting again and again has not brought the run on (exit code 6); it must not be started once more."""

    exit_code = 6
