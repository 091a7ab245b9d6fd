"""The tables of the service's database.

A change here needs a migration in serving/migrations/versions/, and a test compares the two. Times are whole
seconds since 1970 (UTC).
"""

from sqlalchemy import CheckConstraint, Column, Index, Integer, MetaData, Table, Text, text

METADATA = MetaData()

KEYS = Table(
    "keys",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("owner", Text, nullable=False),  # whose keys, files and jobs these are
    Column("digest", Text, nullable=False, unique=True),  # SHA-256 of the key, 64 hexadecimal digits
    Column("prefix", Text, nullable=False),  # the first characters of the key, to recognise it by
    Column("scopes", Text, nullable=False),  # separated by commas
    Column("requests_per_minute", Integer, nullable=False),
    Column("created", Integer, nullable=False),
    Column("expires", Integer),  # never, if empty
    Column("revoked", Integer),
    CheckConstraint("length(digest) = 64", name="keys_digest"),
    CheckConstraint("requests_per_minute > 0", name="keys_requests"),
    # the name of a revoked key may be used again
    Index("keys_live_name", "name", unique=True, sqlite_where=text("revoked IS NULL")),
)

BLOBS = Table(
    "blobs",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("size", Integer, nullable=False),  # bytes
    Column("sha256", Text, nullable=False),  # of the content, 64 hexadecimal digits
    Column("created", Integer, nullable=False),
    Index("blobs_owner", "owner"),
)
