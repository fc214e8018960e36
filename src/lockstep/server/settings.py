"""Everything the front process is told by its starter, in one value."""

from __future__ import annotations

import ipaddress
import os

import msgspec

from lockstep.errors import UsageError

ENVIRONMENT = "LOCKSTEP_SERVER"


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Travels as JSON in the environment variable LOCKSTEP_SERVER, because it may hold API keys."""

    model: str = ""
    """Folder or Hub name of the model; empty means the built-in default."""
    served_name: str = ""
    """The id in /v1/models; empty means the name of the model's folder."""
    host: str = "127.0.0.1"
    port: int = 8080
    """0 takes any free port."""

    api_keys: list[str] = []
    api_key_file: str = ""
    no_auth: bool = False
    """Said when listening beyond loopback without a key is wanted."""
    ssl_certfile: str = ""
    ssl_keyfile: str = ""
    cors_origins: list[str] = []

    max_body_bytes: int = 8 * 2**20
    max_prompt_tokens: int | None = None
    max_context: int | None = None
    max_requests: int = 512
    """Most unfinished answers, running and waiting together; more are told to come back later."""
    requests_per_minute: int | None = None
    """For each API key, or each client address where there are no keys."""
    default_max_tokens: int = 2048
    """For a chat request that does not say; never more than the context has room for."""

    keepalive_s: float = 10.0
    load_timeout_s: float = 1800.0
    """To find or download the tokenizer, and to load it."""
    recovery_timeout_s: float = 120.0
    drain_timeout_s: float = 30.0

    log_format: str = "text"
    log_level: str = "info"
    log_prompts: bool = False

    def encode(self) -> str:
        return msgspec.json.encode(self).decode()

    @property
    def url(self) -> str:
        scheme = "https" if self.ssl_certfile else "http"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}"


def settings_from_environment() -> ServerSettings:
    """Raises `UsageError` for a value that is not what `ServerSettings.encode` writes."""
    try:
        return msgspec.json.decode(os.environ.get(ENVIRONMENT, "{}"), type=ServerSettings)
    except msgspec.DecodeError as error:
        raise UsageError(f"{ENVIRONMENT} does not hold server settings: {error}") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost is taken as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
