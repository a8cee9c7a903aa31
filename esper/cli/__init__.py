"""The ``esper`` command line."""
