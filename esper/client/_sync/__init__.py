# Generated from ../_async by esper.client.generate; edit that.
"""The clients, written once; ``esper.client.generate`` makes ``_sync`` from this folder."""
