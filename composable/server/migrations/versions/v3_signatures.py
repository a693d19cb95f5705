"""Add what signed registries store, and who signed each release."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "signatures"
down_revision = "proposals"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the tables to this version."""
    op.create_table(
        "signed_files",
        sa.Column("path", sa.String(length=400), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("path"),
    )
    for name in ("signer", "signer_key"):
        op.add_column("releases", sa.Column(name, sa.Text(), nullable=False, server_default=""))
