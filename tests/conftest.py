"""What all tests share."""

from hypothesis import settings

# How long an example takes says something of the machine and its other load only.
settings.register_profile("keel", deadline=None)
settings.load_profile("keel")
