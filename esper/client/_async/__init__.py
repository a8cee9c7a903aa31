"""The clients, written once; ``esper.client.generate`` makes ``_sync`` from this folder."""
