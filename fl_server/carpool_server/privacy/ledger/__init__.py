"""The privacy ledger: append-only, hash-chained, one per population."""

from carpool_server.privacy.ledger.entries import Charge, Charged, Promise, Released
from carpool_server.privacy.ledger.ledger import (
    LEDGER_NAME,
    Book,
    Ledger,
    read_ledger,
    read_promised,
)

__all__ = [
    "LEDGER_NAME",
    "Book",
    "Charge",
    "Charged",
    "Ledger",
    "Promise",
    "Released",
    "read_ledger",
    "read_promised",
]
