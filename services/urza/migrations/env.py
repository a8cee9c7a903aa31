"""Alembic's entry point: runs the revisions on the connection that `migrate` hands over, inside its transaction."""

from __future__ import annotations

from alembic import context

from esper.services.urza.migrate import VERSION_TABLE
from esper.services.urza.models import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
    render_as_batch=connection.dialect.name == "sqlite",
)
context.run_migrations()
