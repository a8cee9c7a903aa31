"""Measures of Esper: each runs alone, times its reference in the same run, and prints figures against their goals.

python -m bench NAME [--quick] [--json]        from a checkout; ``esper bench NAME`` does the same
"""
