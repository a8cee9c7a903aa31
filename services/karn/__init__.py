"""Karn: generates blueprints within constraints and learns which of them pay."""
