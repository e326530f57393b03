"""The one family of exceptions for mistakes that a user can mend.

A message names the knob as it is typed, what was given, what is allowed and
what to do. A verb prints it as one line and exits with status 2; any other
exception is a fault of ours and keeps its traceback.
"""


class UserError(ValueError):
  """A mistake in what the user typed or pointed at."""


class BadFileError(UserError):
  """A file is missing, cut off, damaged or not what its name says."""


class ConfigError(UserError):
  """A configuration value is unknown, illegal or contradicts another."""
