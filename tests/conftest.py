"""What all tests share."""

from contextlib import suppress

with suppress(ImportError):  # tests/gpu runs without, or beside one that is made for another Python
    from hypothesis import settings

    # How long an example takes says something of the machine and its other load only.
    settings.register_profile("keel", deadline=None)
    settings.load_profile("keel")
