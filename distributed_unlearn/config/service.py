"""The service file: where requests are kept, which job a round is, its gates, and what is kept for how long.

Paths that are not absolute are relative to the folder that the command is run in, as in a job file.
"""

from pathlib import Path
from typing import Literal
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator, model_validator

from distributed_unlearn.config.base import StrictModel
from distributed_unlearn.config.load import read_tree, validated


class RequestsConfig(StrictModel):
    """Due dates and delays of requests."""

    due_days: int = Field(default=30, ge=1, le=3650)
    """GDPR, article 12(3): one month."""
    due_days_california: int = Field(default=45, ge=1, le=3650)
    """CCPA, 1798.130(a)(2)."""
    delay_hours: float = Field(default=0.0, ge=0.0, le=8760.0)
    """A request can be withdrawn for at least this long: it is scheduled no sooner."""
    warn_days: int = Field(default=7, ge=0, le=3650)
    """A request that is due within so many days is warned of, and starts a round early."""


class GatesConfig(StrictModel):
    """What a round must meet to be committed; else it is rolled back, and its requests are pending again."""

    forgotten: Literal["forgotten", "partly forgotten", "not required"] = "forgotten"
    """The least that the verdict must find of the records to forget, against the holdout set."""
    earlier_forgotten: bool = True
    """Everything that earlier rounds erased must still count as forgotten."""
    retain_loss_nats: float | None = Field(default=0.25, ge=0.0)
    """Largest rise of the retain loss in the round, nats per token; null: no gate."""
    retain_memorisation: float | None = Field(default=0.05, ge=0.0, le=1.0)
    """Largest fall of the share memorised of the retain set in the round; null: no gate."""
    surviving_share: float | None = Field(default=0.9, gt=0.0, le=1.0)
    """Smallest share of the update that survives in the files; null: no gate."""
    drift_nats: float | None = Field(default=1.0, gt=0.0)
    """Budget of retain loss over all rounds together. Used up, retraining is recommended; no round is rolled back."""


class RetentionConfig(StrictModel):
    """What is kept, and for how long."""

    ids_days: int | None = Field(default=365, ge=0, le=36500)
    """Days after a request's end until its ids are replaced by salted hashes; null: never."""
    keep_states: int = Field(default=3, ge=1)
    """States kept: the current one and those before it."""
    superseded_days: float = Field(default=30.0, ge=0.0, le=36500.0)
    """An older state still knows what was erased since; it goes so many days after the round that superseded it."""


class ScheduleConfig(StrictModel):
    """When rounds begin by themselves."""

    cron: str = "0 3 * * *"
    """Minute, hour, day of month, month, day of week."""
    timezone: str = "UTC"
    """A name of the tz database, e.g. Europe/Berlin."""
    min_requests: int = Field(default=1, ge=1)
    """A tick with fewer requests starts no round, unless one of them is due within `requests.warn_days`."""
    watch_minutes: float | None = Field(default=60.0, gt=0.0)
    """How often due dates are looked at between the ticks; null: never."""

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (KeyError, ValueError, OSError):
            raise ValueError("no time zone of the tz database, e.g. UTC or Europe/Berlin") from None
        return name


class HttpConfig(StrictModel):
    """The endpoint for systems that forward requests."""

    host: str = "127.0.0.1"
    """Beyond this machine only behind a proxy that speaks TLS: the token travels in every request."""
    port: int = Field(default=8321, ge=0, le=65535)
    token_file: str
    """A file for its owner alone that holds the token, 32 characters at least."""


class WebhookConfig(StrictModel):
    """Where the outcome of a request is sent."""

    url: str
    secret_file: str
    """A file for its owner alone; its text is the key of the HMAC that signs every message."""
    attempts: int = Field(default=8, ge=1, le=100)
    """Tries in all; the pause doubles from `first_pause_seconds`."""
    first_pause_seconds: float = Field(default=30.0, gt=0.0)
    timeout_seconds: float = Field(default=10.0, gt=0.0)

    @field_validator("url")
    @classmethod
    def _protected(cls, url: str) -> str:
        local = ("http://127.0.0.1", "http://localhost", "http://[::1]")
        if not url.startswith("https://") and not any(url == p or url.startswith((p + ":", p + "/")) for p in local):
            raise ValueError("https:// (or http:// to this machine): the message names a request")
        return url


class ServiceConfig(StrictModel):
    """One service file."""

    folder: str
    """States, certificates and, unless `ledger` says otherwise, the ledger; on storage that every rank sees."""
    ledger: str | None = None
    """Path of an SQLite file on a local disk, or a database URL; null: `ledger.db` in `folder`."""
    job: str
    """Job file of a round: `model` is where the first round starts; it names neither forget nor rounds nor train."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` for the job file."""
    key: str
    """The operator's private key, made by `key generate`."""
    requests: RequestsConfig = RequestsConfig()
    gates: GatesConfig = GatesConfig()
    retention: RetentionConfig = RetentionConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    http: HttpConfig | None = None
    webhook: WebhookConfig | None = None
    lease_seconds: int = Field(default=60, ge=3, le=86400)
    """A scheduler that is silent for so long is given up."""

    @model_validator(mode="after")
    def _named(self) -> "ServiceConfig":
        if not self.folder.strip():
            raise ValueError("folder is empty")
        return self

    @property
    def root(self) -> Path:
        """`folder` as a path."""
        return Path(self.folder).expanduser()

    @property
    def ledger_url(self) -> str:
        """`ledger`, or its default."""
        return str(self.root / "ledger.db") if self.ledger is None else self.ledger


def load_service(path: Path, overrides: list[str]) -> ServiceConfig:
    """Read a service file, apply overrides, validate.

    Raises:
        ConfigError: a file that is missing or cannot be read, bad YAML, or a refused key or value.
    """
    tree = read_tree(path, overrides, "service file")
    return validated(ServiceConfig, tree, str(path), "service")
