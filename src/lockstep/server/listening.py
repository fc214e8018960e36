"""What a server needs of the machine before it can be reached: its address, and its certificate."""

from __future__ import annotations

import errno
import socket
import ssl

from lockstep.errors import UsageError
from lockstep.server.settings import ServerSettings


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `UsageError` if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        # create_server adds to the system's text.
        reason = str(getattr(error, "strerror", None) or error).partition(" (while ")[0]
        if getattr(error, "errno", 0) in (errno.EADDRINUSE, errno.EACCES):
            problem = f"{host} port {port}: {reason}: choose another with --port"
        else:
            problem = f"{host}: {reason}: give an address of this machine with --host"
        raise UsageError(f"cannot listen on {problem}") from error


def check_certificate(settings: ServerSettings) -> None:
    """Raises `UsageError` for a certificate or key that TLS would not take."""
    if settings.ssl_keyfile and not settings.ssl_certfile:
        raise UsageError(f"--ssl-keyfile {settings.ssl_keyfile} has no certificate: give --ssl-certfile, too")
    if settings.ssl_certfile:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile or None, _no_password)
        except (OSError, ValueError) as error:
            files = f"{settings.ssl_certfile} {settings.ssl_keyfile}".strip()
            raise UsageError(f"cannot use the certificate {files}: {error}") from error


def _no_password() -> str:
    """Asked for where the key has one; OpenSSL would ask at the terminal, and uvicorn later again."""
    raise ValueError("its key has a password: give a key without one")
