"""The SDK: typed clients for the six services, synchronous and asynchronous, with no protobuf in sight.

with EsperClient() as client:
    for run in client.tolaria.list_runs():
        print(run.state.run_id, run.state.control_loss)
"""

from esper.client._async.client import AsyncEsperClient
from esper.client._sync.client import EsperClient

__all__ = ["AsyncEsperClient", "EsperClient"]
