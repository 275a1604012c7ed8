"""Opens what a service file names: folder, job, key, ledger and, for as long as the block lasts, the lease."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed_unlearn.config.service import ServiceConfig
from distributed_unlearn.service.driver import Service, service_job
from distributed_unlearn.service.keys import load_signer
from distributed_unlearn.service.lease import held
from distributed_unlearn.service.ledger import service_ledger
from distributed_unlearn.service.secrets_file import read_secret


@contextmanager
def opened(config: ServiceConfig) -> Iterator[Service]:
    """The service with its lease; every mistake in its files is refused before the lease is taken.

    Raises:
        ConfigError: job, key or secret are unfit.
        LedgerError: the ledger cannot be opened.
        LeaseError: another scheduler works.
    """
    job, signer = service_job(config), load_signer(Path(config.key).expanduser())
    if config.webhook is not None:
        read_secret(config.webhook.secret_file, "webhook.secret_file")
    ledger = service_ledger(config)
    with held(ledger, config.lease_seconds) as keeper:
        yield Service(config, job, ledger, keeper, signer)
