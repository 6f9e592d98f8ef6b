"""Errors that are the user's to mend. Drivers print them as one sentence, without a traceback."""


class UserError(Exception):
    """Base of everything a user can mend by changing a recipe, a file or a reward."""


class RecipeError(UserError, ValueError):
    """A recipe that cannot be run: an unknown key, a wrong value, a path that does not exist."""


class DataError(UserError, ValueError):
    """A prompt, demonstration or checkpoint file that cannot be used; names the file and the line or tensor."""


class RunStopped(UserError, RuntimeError):
    """A run that must not go on: weights that differ after a sync, losses that stay non-finite, no group that scores."""
