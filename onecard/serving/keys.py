"""API keys: random texts that are shown once. The database has only their SHA-256 and their first characters.

Each request asks the database, so a key that another process has revoked ends with the next request.
"""

import contextlib
import dataclasses
import enum
import hashlib
import hmac
import secrets
import time
import unicodedata
from collections.abc import Callable, Collection, Iterator

import sqlalchemy
import sqlalchemy.exc

from onecard.config.serving import ADMIN, REQUESTS_PER_MINUTE, SCOPES
from onecard.errors import UserError
from onecard.serving.database import Database
from onecard.serving.tables import KEYS

BEGINNING = "oc-"
RANDOM_BYTES = 32  # 256 bits
SHOWN = 8  # characters of a key that stay readable, BEGINNING included
LONGEST = 200  # characters of what may be a key
LONGEST_NAME = 64  # characters
NOBODY = hashlib.sha256(b"").hexdigest()  # no key has this digest


@dataclasses.dataclass(frozen=True)
class Key:
    """What a valid key may do, and for whom. expires: seconds since 1970, None for never."""

    id: str
    name: str
    owner: str
    scopes: frozenset[str]
    requests_per_minute: int
    expires: int | None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A key as the list shows it, whether it is valid or not; times in seconds since 1970."""

    key: Key
    prefix: str
    created: int
    revoked: int | None


class Refusal(enum.Enum):
    """Why a text is no valid key. This is for the log: the caller is told the same in all cases."""

    UNKNOWN = enum.auto()
    EXPIRED = enum.auto()
    REVOKED = enum.auto()


class Keys:
    """The keys in a database."""

    def __init__(self, database: Database, now: Callable[[], float] = time.time):
        self.database, self.now = database, now

    def find(self, secret: str) -> Key | Refusal:
        """The key that a caller has sent, or why it is refused. Raises StoreUnavailableError.

        The database finds the row by the SHA-256 of the text, which tells nothing about keys that are almost
        right; the comparison that decides takes the same time for every text.
        """
        digest = digest_of(secret[: LONGEST + 1])
        with self.database.reading() as connection:
            row = connection.execute(sqlalchemy.select(KEYS).filter_by(digest=digest)).one_or_none()
        is_equal = hmac.compare_digest(digest, NOBODY if row is None else row.digest)
        if row is None or not is_equal or len(secret) > LONGEST:
            return Refusal.UNKNOWN
        if row.revoked is not None:
            return Refusal.REVOKED
        if row.expires is not None and row.expires <= self.now():
            return Refusal.EXPIRED
        return _key(row)

    def create(
        self,
        name: str,
        scopes: Collection[str],
        owner: str | None = None,
        seconds: int | None = None,
        requests_per_minute: int = REQUESTS_PER_MINUTE,
    ) -> tuple[Key, str]:
        """A new key, and the only copy of its text. Raises UserError, also where the name is taken.

        owner: to whom everything made with the key belongs, by default the name. seconds: until it expires.
        """
        with self.database.writing() as connection:
            return self._insert(connection, name, scopes, owner or name, seconds, requests_per_minute)

    def first_admin_key(self) -> tuple[Key, str] | None:
        """A key with all scopes where no key with the scope `admin` was ever made; else None.

        Only one of several processes that ask at the same time gets one.
        """
        with self.database.writing() as connection:
            rows = connection.execute(sqlalchemy.select(KEYS)).all()
            if any(ADMIN in _key(row).scopes for row in rows):
                return None
            taken = {row.name for row in rows}
            names = (f"{ADMIN}-{number}" if number else ADMIN for number in range(len(rows) + 1))
            name = next(name for name in names if name not in taken)
            return self._insert(connection, name, SCOPES, name, None, REQUESTS_PER_MINUTE)

    def entries(self, owner: str | None = None) -> list[Entry]:
        """All keys, or those of an owner; the oldest first."""
        query = sqlalchemy.select(KEYS).order_by(KEYS.c.created, KEYS.c.id)
        with self.database.reading() as connection:
            rows = connection.execute(query if owner is None else query.filter_by(owner=owner)).all()
        return [Entry(_key(row), row.prefix, row.created, row.revoked) for row in rows]

    def revoke(self, name: str, owner: str | None = None) -> Key:
        """Make a key invalid for good, for every request that begins later. Raises UserError without it.

        name: the name or the id; owner: only one of this owner's.
        """
        with self.database.writing() as connection:
            row = _valid(connection, name, owner)
            connection.execute(KEYS.update().filter_by(id=row.id).values(revoked=int(self.now())))
            return _key(row)

    def rotate(self, name: str, owner: str | None = None, seconds: int | None = None) -> tuple[Key, str]:
        """A new text for a key, which makes the old one invalid at once. Raises UserError without the key.

        seconds: until it expires; None: at the same time as before.
        """
        with self.database.writing() as connection:
            row = _valid(connection, name, owner)
            secret = new_secret()
            values = {"digest": digest_of(secret), "prefix": secret[:SHOWN]}
            expires = row.expires if seconds is None else int(self.now()) + seconds
            connection.execute(KEYS.update().filter_by(id=row.id).values(expires=expires, **values))
            return dataclasses.replace(_key(row), expires=expires), secret

    def _insert(
        self,
        connection: sqlalchemy.Connection,
        name: str,
        scopes: Collection[str],
        owner: str,
        seconds: int | None,
        requests_per_minute: int,
    ) -> tuple[Key, str]:
        now, secret = int(self.now()), new_secret()
        key = Key(
            id=f"key-{secrets.token_hex(8)}",
            name=checked_name(name),
            owner=checked_name(owner),
            scopes=frozenset(scopes),
            requests_per_minute=requests_per_minute,
            expires=None if seconds is None else now + seconds,
        )
        assert key.scopes
        assert key.scopes <= set(SCOPES)
        values = {**dataclasses.asdict(key), "scopes": ",".join(sorted(scopes)), "created": now}
        with _taken(key.name):
            connection.execute(
                KEYS.insert().values(digest=digest_of(secret), prefix=secret[:SHOWN], **values)
            )
        return key, secret


def new_secret() -> str:
    """The text of a new key."""
    return BEGINNING + secrets.token_urlsafe(RANDOM_BYTES)


def digest_of(secret: str) -> str:
    """The SHA-256 of a key, in hexadecimal digits. 256 random bits need no slow hash and no salt."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def checked_name(name: str) -> str:
    """A name in one Unicode form. Raises UserError unless it is one line of visible text."""
    name = unicodedata.normalize("NFC", name)
    if not (0 < len(name) <= LONGEST_NAME and name.isprintable() and name.strip() == name):
        problem = f"The name {name[:LONGEST_NAME]!a} cannot be used."
        raise UserError(problem, f"Use 1 to {LONGEST_NAME} visible characters, no space at the ends.")
    return name


@contextlib.contextmanager
def _taken(name: str) -> Iterator[None]:
    try:
        yield
    except sqlalchemy.exc.IntegrityError:
        fix = "Choose another name, or revoke or rotate that key."
        raise UserError(f"There is a valid key with the name {name!r} already.", fix) from None


def _valid(connection: sqlalchemy.Connection, name: str, owner: str | None) -> sqlalchemy.Row[tuple[object]]:
    """The row of a key that is not revoked, by its name or id."""
    query = sqlalchemy.select(KEYS).where(sqlalchemy.or_(KEYS.c.name == name, KEYS.c.id == name))
    query = query.where(KEYS.c.revoked.is_(None))
    rows = connection.execute(query if owner is None else query.filter_by(owner=owner)).all()
    if not rows:
        raise UserError(f"There is no valid key with the name {name[:LONGEST_NAME]!r}.", "List the keys.")
    return rows[0]


def _key(row: sqlalchemy.Row[tuple[object]]) -> Key:
    return Key(
        row.id,
        row.name,
        row.owner,
        frozenset(row.scopes.split(",")),
        row.requests_per_minute,
        row.expires,
    )
