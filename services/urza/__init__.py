"""Urza: the library of blueprints and kernels, with versions, tags, genealogy and life cycle."""
