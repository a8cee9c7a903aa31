"""Contract suites that every adapter of a port has to pass; for tests, not for use at run time."""
