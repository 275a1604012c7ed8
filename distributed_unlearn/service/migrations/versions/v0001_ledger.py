"""The first ledger; its audit trail is append-only by triggers where the database has them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_TIME, _HASH = sa.String(27), sa.String(64)


def upgrade() -> None:
    """Make all tables."""
    _ledger_and_lease()
    _rounds_and_requests()
    _audit()
    _papers()
    _protect_audit(op.get_bind().dialect.name)


def _ledger_and_lease() -> None:
    op.create_table(
        "ledger",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("ledger_id", sa.String(32), nullable=False),
        sa.Column("salt", sa.String(32), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("head_seq", sa.Integer, nullable=False),
        sa.Column("head_hash", _HASH, nullable=False),
        sa.Column("current_round", sa.Integer),
        sa.CheckConstraint("id = 1", name="one_ledger"),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("token", sa.Integer, nullable=False),
        sa.Column("holder", sa.String(200)),
        sa.Column("renewed_at", _TIME, nullable=False),
        sa.Column("seconds", sa.Integer, nullable=False),
    )


def _rounds_and_requests() -> None:
    op.create_table(
        "rounds",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("parent", sa.Integer, sa.ForeignKey("rounds.id")),
        sa.Column("token", sa.Integer, nullable=False),
        sa.Column("started_at", _TIME, nullable=False),
        sa.Column("ended_at", _TIME),
        sa.Column("reason", sa.Text),
        sa.Column("folder", sa.Text),
        sa.Column("record_sha256", _HASH),
        sa.Column("files_sha256", sa.Text),
    )
    op.create_table(
        "requests",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("external_id", sa.String(200)),
        sa.Column("external_id_hash", _HASH, unique=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(32)),
        sa.Column("policy", sa.String(16), nullable=False),
        sa.Column("received_at", _TIME, nullable=False),
        sa.Column("not_before", _TIME, nullable=False),
        sa.Column("due_at", _TIME, nullable=False),
        sa.Column("moved_at", _TIME, nullable=False),
        sa.Column("duplicate_of", sa.Integer, sa.ForeignKey("requests.id")),
        sa.Column("round_id", sa.Integer, sa.ForeignKey("rounds.id")),
        sa.Column("warned", sa.Boolean, nullable=False),
    )
    op.create_table(
        "request_names",
        sa.Column("request_id", sa.Integer, sa.ForeignKey("requests.id"), primary_key=True),
        sa.Column("name_hash", _HASH, primary_key=True, index=True),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("name", sa.Text),
    )
    op.create_table(
        "erased_records",
        sa.Column("request_id", sa.Integer, sa.ForeignKey("requests.id"), primary_key=True),
        sa.Column("record_hash", _HASH, primary_key=True, index=True),
        sa.Column("round_id", sa.Integer, sa.ForeignKey("rounds.id"), nullable=False, index=True),
        sa.Column("record_id", sa.Text),
    )


def _audit() -> None:
    op.create_table(
        "audit",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("event", sa.String(32), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("previous", _HASH, nullable=False),
        sa.Column("hash", _HASH, nullable=False),
    )
    op.create_table(
        "head_signatures",
        sa.Column("seq", sa.Integer, sa.ForeignKey("audit.seq"), primary_key=True),
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("signature", sa.Text, nullable=False),
    )


def _papers() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("request_id", sa.Integer, sa.ForeignKey("requests.id"), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_at", _TIME),
        sa.Column("delivered", sa.Boolean, nullable=False),
    )
    op.create_table(
        "certificates",
        sa.Column("request_id", sa.Integer, sa.ForeignKey("requests.id"), primary_key=True),
        sa.Column("sha256", _HASH, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
    )


def _protect_audit(dialect: str) -> None:
    """Refuse every change of a written entry: that is for accidents; for the database's owner there is the chain."""
    if dialect == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_no_{verb.lower()} BEFORE {verb} ON audit "
                "BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END"
            )
    elif dialect == "postgresql":
        op.execute(
            "CREATE FUNCTION refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the audit trail is append-only'; END $$"
        )
        op.execute(
            "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change()"
        )
