"""What all tests share."""

from importlib.util import find_spec

if find_spec("hypothesis"):  # tests/gpu runs without
    from hypothesis import settings

    # How long an example takes says something of the machine and its other load only.
    settings.register_profile("keel", deadline=None)
    settings.load_profile("keel")
