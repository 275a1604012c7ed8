"""Signed ends of the audit trail: whoever keeps one can prove later that nothing before it was changed or cut off."""

from dataclasses import dataclass

from securesystemslib.signer import CryptoSigner
from sqlalchemy import insert, select

from distributed_unlearn.service.keys import sign_text
from distributed_unlearn.service.ledger import Lease, Ledger
from distributed_unlearn.service.tables import LEDGER, SIGNATURES


@dataclass(frozen=True)
class Head:
    """The end of a trail: how many entries it had, and the hash of the last."""

    ledger_id: str
    seq: int
    hash: str

    @property
    def text(self) -> str:
        """What is signed."""
        return f"distributed-unlearn audit head\n{self.ledger_id}\n{self.seq}\n{self.hash}\n"


def read_head(ledger: Ledger) -> Head:
    """The present end of the trail."""
    with ledger.read() as connection:
        row = connection.execute(select(LEDGER)).one()
        return Head(row.ledger_id, row.head_seq, row.head_hash)


def sign_head(ledger: Ledger, lease: Lease, signer: CryptoSigner) -> Head:
    """Sign the present end of the trail, once."""
    with ledger.write(lease) as writing:
        row = writing.connection.execute(select(LEDGER)).one()
        head = Head(row.ledger_id, row.head_seq, row.head_hash)
        key_id = signer.public_key.keyid
        signed = select(SIGNATURES.c.seq).where(SIGNATURES.c.seq == head.seq, SIGNATURES.c.key_id == key_id)
        if writing.connection.execute(signed).one_or_none() is None:
            values = {"seq": head.seq, "key_id": key_id, "signature": sign_text(signer, head.text)}
            writing.connection.execute(insert(SIGNATURES).values(**values))
        return head
