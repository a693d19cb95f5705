"""Run the migrations on the connection that `database.py` opened."""

from __future__ import annotations

from alembic import context

from composable.server.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
