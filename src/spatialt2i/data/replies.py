"""What endpoints replied, in an SQLite file: whole or not there, whatever is killed when."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from spatialt2i.core.config import EndpointConfig
from spatialt2i.core.run import disk_errors, seed_of
from spatialt2i.core.store import CorruptData


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered.

    Attributes:
        text: the answer, or the name of the picture in its store.
        tokens_in, tokens_out, images: what it cost.
        kind: "" for an answer, else why there is none, see `AskError`.
    """

    text: str
    tokens_in: int
    tokens_out: int
    images: int = 0
    kind: str = ""


def reply_file(folder: Path, config: EndpointConfig) -> Path:
    """The file of an endpoint's replies, its own because what it cost is added up over it."""
    model = re.sub(r"\W+", "-", config.model).strip("-")
    return folder / f"{model}-{seed_of(config.base_url, config.model) % 16**6:06x}.sqlite"


class ReplyStore:
    """Replies by the hash of their request, for any number of threads and processes.

    Args:
        path: the file; made where there is none.

    Raises:
        CorruptData: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT NOT NULL, "
                             "tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, images INTEGER NOT NULL, "
                             "kind TEXT NOT NULL)")
            # totals are read before each request, from this index and not from the texts
            self._db.execute("CREATE INDEX IF NOT EXISTS cost ON replies (tokens_in, tokens_out, images)")

    def find(self, key: str) -> Reply | None:
        """The reply to a request, or None."""
        with self._errors():
            row = self._db.execute("SELECT text, tokens_in, tokens_out, images, kind FROM replies WHERE key = ?",
                                   (key,)).fetchone()
        return Reply(*row) if row else None

    def keep(self, key: str, reply: Reply) -> None:
        """Store a reply; one that is there already is replaced, and what it cost is kept."""
        with self._errors():
            self._db.execute(
                "INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET text = excluded.text, "
                "tokens_in = tokens_in + excluded.tokens_in, tokens_out = tokens_out + excluded.tokens_out, "
                "images = images + excluded.images, kind = excluded.kind", (key, *astuple(reply)))

    def totals(self) -> tuple[int, int, int, int]:
        """Requests, tokens read and written, and pictures, of all replies."""
        with self._errors():
            return self._db.execute("SELECT COUNT(*), COALESCE(SUM(tokens_in), 0), COALESCE(SUM(tokens_out), 0), "
                                    "COALESCE(SUM(images), 0) FROM replies").fetchone()

    def close(self) -> None:
        """Let go of the file."""
        with self._errors():
            self._db.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with self._lock, disk_errors(self._path):
            try:
                yield
            except sqlite3.OperationalError as error:
                raise OSError(f"{self._path}: {error}") from error
            except sqlite3.DatabaseError as error:
                raise CorruptData(f"{self._path}: not a whole SQLite file ({error}); delete it, and its replies are "
                                  "asked for again") from error
