"""The served side of C3 as a process of its own: the library over some databases, and the bare server beside them.

``python -m bench.library_server TRUSTED_DIR URL...`` prints one JSON list of addresses, the bare server's last,
and serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

from bench.bare_grpc import BareServer
from esper.contracts.errors import UnavailableError
from esper.execution.keys import KeyRing
from esper.mesh import MeshServer
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.services.urza.store import StoreLimits

_MAX_BLUEPRINTS = 10_000_000


async def serve(urls: Sequence[str], trusted_dir: Path) -> None:
    """Serve the library over each database until standard input ends."""
    async with AsyncExitStack() as leaving:
        addresses = [await _open(leaving, url, KeyRing.from_dir(trusted_dir)) for url in urls]
        bare = BareServer()
        addresses.append(await bare.start())
        leaving.push_async_callback(bare.stop)
        print(json.dumps(addresses), flush=True)
        await asyncio.to_thread(sys.stdin.read)


@contextmanager
def served(urls: Sequence[str], trusted_dir: Path) -> Iterator[list[str]]:
    """Start the process; gives the library's address for each database, and the bare server's.

    Raises:
        UnavailableError: It ended before it served.
    """
    line = [sys.executable, "-m", "bench.library_server", str(trusted_dir), *urls]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        answer = process.stdout.readline()
        if not answer:
            raise UnavailableError(f"the library must come up to be measured, it ended with code {process.wait()}")
        # Leaving the block closes its standard input, which ends it.
        yield json.loads(answer)


async def _open(leaving: AsyncExitStack, url: str, ring: KeyRing) -> str:
    config = UrzaConfig(database_url=url, seed_templates=False, limits=StoreLimits(max_blueprints=_MAX_BLUEPRINTS))
    library = await leaving.enter_async_context(UrzaService(config, key_ring=ring))
    server = MeshServer()
    library.add_to(server)
    await leaving.enter_async_context(server)
    return server.address


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[2:], Path(sys.argv[1])))
