"""The ledger's tables as SQLAlchemy sees them; `migrations` makes them. Times are text, see `canonical.time_text`."""

from sqlalchemy import Boolean, Column, ForeignKey, Integer, MetaData, String, Table, Text

METADATA = MetaData()

LEDGER = Table(
    "ledger",
    METADATA,
    Column("id", Integer, primary_key=True),  # always 1: the row that every writer locks
    Column("ledger_id", String(32), nullable=False),
    Column("salt", String(32), nullable=False),
    Column("created_at", String(27), nullable=False),
    Column("head_seq", Integer, nullable=False),
    Column("head_hash", String(64), nullable=False),
    Column("current_round", Integer),
)
LEASES = Table(
    "leases",
    METADATA,
    Column("name", String(32), primary_key=True),
    Column("token", Integer, nullable=False),  # grows with every acquisition and never shrinks
    Column("holder", String(200)),  # null: released
    Column("renewed_at", String(27), nullable=False),
    Column("seconds", Integer, nullable=False),
)
ROUNDS = Table(
    "rounds",
    METADATA,
    Column("id", Integer, primary_key=True),  # an attempt: a rolled back one keeps its number
    Column("state", String(16), nullable=False),
    Column("parent", Integer, ForeignKey("rounds.id")),
    Column("token", Integer, nullable=False),
    Column("started_at", String(27), nullable=False),
    Column("ended_at", String(27)),
    Column("reason", Text),
    Column("folder", Text),  # relative to the service's folder; null once the state was purged
    Column("record_sha256", String(64)),
    Column("files_sha256", Text),  # canonical JSON: path in the folder -> SHA-256
)
REQUESTS = Table(
    "requests",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("external_id", String(200)),  # null once it was purged
    Column("external_id_hash", String(64), unique=True),
    Column("state", String(16), nullable=False),
    Column("reason", String(32)),
    Column("policy", String(16), nullable=False),
    Column("received_at", String(27), nullable=False),
    Column("not_before", String(27), nullable=False),
    Column("due_at", String(27), nullable=False),
    Column("moved_at", String(27), nullable=False),
    Column("duplicate_of", Integer, ForeignKey("requests.id")),
    Column("round_id", Integer, ForeignKey("rounds.id")),
    Column("warned", Boolean, nullable=False, default=False),
)
NAMES = Table(
    "request_names",
    METADATA,
    Column("request_id", Integer, ForeignKey("requests.id"), primary_key=True),
    Column("name_hash", String(64), primary_key=True, index=True),
    Column("kind", String(8), nullable=False),
    Column("name", Text),  # null once it was purged
)
ERASED = Table(
    "erased_records",
    METADATA,
    Column("request_id", Integer, ForeignKey("requests.id"), primary_key=True),
    Column("record_hash", String(64), primary_key=True, index=True),
    Column("round_id", Integer, ForeignKey("rounds.id"), nullable=False, index=True),
    Column("record_id", Text),  # null once it was purged
)
AUDIT = Table(
    "audit",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", String(27), nullable=False),
    Column("event", String(32), nullable=False),
    Column("body", Text, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
)
SIGNATURES = Table(
    "head_signatures",
    METADATA,
    Column("seq", Integer, ForeignKey("audit.seq"), primary_key=True),
    Column("key_id", String(64), primary_key=True),
    Column("signature", Text, nullable=False),
)
WEBHOOKS = Table(
    "webhooks",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("request_id", Integer, ForeignKey("requests.id"), nullable=False),
    Column("body", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", String(27)),  # null: delivered or given up
    Column("delivered", Boolean, nullable=False),
)
CERTIFICATES = Table(
    "certificates",
    METADATA,
    Column("request_id", Integer, ForeignKey("requests.id"), primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("path", Text, nullable=False),
)
