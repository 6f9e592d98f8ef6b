"""Errors that are the user's to mend. Drivers print them as one sentence, without a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Base of everything a user can mend by changing a recipe, a file or a reward."""


class RecipeError(UserError, ValueError):
    """A recipe that cannot be run: an unknown key, a wrong value, a path that does not exist."""


class DataError(UserError, ValueError):
    """A prompt, demonstration or checkpoint file that cannot be used; names the file and the line or tensor."""


class RunStopped(UserError, RuntimeError):
    """A run that must not go on: weights differ after a sync, losses stay non-finite, or no group can be scored."""


class LearnerFailed(RunStopped):
    """The learner's processes died, fell silent or failed; a checkpoint says what they knew."""


def first_line(error: BaseException) -> str:
    """Of what an error says, for a sentence that goes on with it; its kind when it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or the known ones when none is near."""
    names = sorted(known)
    nearest = get_close_matches(name, names, n=1, cutoff=0.5)
    if nearest:
        return f"did you mean '{nearest[0]}'?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"known: {shown}" if names else "none is known"
