"""Joining the ranks of a run: the data plane's group and the control channel."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import mlx.core as mx

from lockstep.errors import LockstepError, LostPeer
from lockstep.model.precision import computes_on_cpu
from lockstep.runtime import channel, libmpi
from lockstep.runtime.environment import RankEnvironment
from lockstep.runtime.leaving import leave_after
from lockstep.runtime.messages import Message
from lockstep.runtime.place import Place
from lockstep.runtime.progress import JOINING
from lockstep.runtime.threads import ring_in_order, take_turns
from lockstep.runtime.watchdog import alarm

MPI_HINT = f"set {libmpi.VARIABLE}=<prefix>/lib/libmpi.so.40 for mlx to find libmpi, or install the mpi extra"

_CARD = 128
"""Bytes that each rank contributes to the introduction: its address, port and public key."""


@dataclass(frozen=True)
class World:
    """This rank and how it reaches the others.

    `group` is None when there is only one rank. Where it `takes_threads`, several may use it at once.
    """

    rank: int
    size: int
    backend: str
    group: mx.distributed.Group | None
    leader: channel.Leader | None
    follower: channel.Follower | None
    takes_threads: bool = False

    def collect(self, own: Message, timeout_s: float, what: str) -> list[Message]:
        """Everybody's message on rank 0, in rank order; this rank's own elsewhere.

        `what` completes "rank 1 did not ...". Raises what `Leader.gather` raises.
        """
        if self.leader is not None:
            return [own, *self.leader.gather(type(own), self.size, timeout_s, what)]
        if self.follower is not None:
            self.follower.report(own)
        return [own]

    def close(self) -> None:
        for end in (self.leader, self.follower):
            if end is not None:
                end.close()


def join(place: Place) -> World:
    """Form the group, check its size, and open the control channel over one all_gather.

    The process is ended by SIGALRM when the backend does not come back in time: it holds the GIL.

    Raises LockstepError when the backend does not bring the ranks together.
    """
    end_together()
    env, watchdog = place.env, place.watchdog
    if computes_on_cpu():
        take_turns()
    if env.size == 1:
        return World(0, 1, env.backend, None, None, None)
    watchdog.progress.enter(JOINING, watchdog.deadlines.join_s)
    with alarm(watchdog.deadlines.join_s):
        group = _form_group(env)
    # Of mlx's other backends it is not known.
    takes_threads = libmpi.takes_threads() if env.backend == "mpi" else env.backend == "ring"
    keys = channel.KeyPair.make()
    if env.rank == 0:
        address = _control_address(env)
        leader = channel.Leader(address, keys)
        ports = f"{leader.port} {leader.watch_port}"
        cards = _introduce(group, f"{address} {ports} {keys.public.decode()}")
        leader.admit(card.split()[-1].encode() for card in cards[1:])
        watchdog.attach(leader.watch)
        return World(0, env.size, env.backend, group, leader, None, takes_threads)
    card = _introduce(group, f"- - - {keys.public.decode()}")[0]
    theirs, *numbers, server_key = card.split()
    steps, watch = map(int, numbers)
    follower = channel.Follower(env.rank, theirs, (steps, watch), server_key.encode(), keys)
    watchdog.attach(follower.watch)
    return World(env.rank, env.size, env.backend, group, None, follower, takes_threads)


def _form_group(env: RankEnvironment) -> mx.distributed.Group:
    backend = "jaccl" if env.backend == "jaccl-ring" else env.backend
    if backend == "mpi":
        libmpi.prepare(os.environ)
    shares_cores = backend == "ring" and computes_on_cpu()
    threads = ring_in_order(env.local_size) if shares_cores else contextlib.nullcontext()
    try:
        with threads:
            group = mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as error:
        hint = MPI_HINT if env.backend == "mpi" else "look at the other ranks' output"
        raise LockstepError(f"rank {env.rank} cannot join over {env.backend}: {error}: {hint}") from error
    if group.size() != env.size:
        hint = (
            MPI_HINT
            if env.backend == "mpi" and group.size() == 1
            else "start every rank with the same host list"
        )
        raise LockstepError(f"{env.backend} joined {group.size()} ranks, but {env.size} were started: {hint}")
    return group


def _control_address(env: RankEnvironment) -> str:
    """Where rank 0 listens: the data plane's own address, loopback when all ranks are here."""
    if env.local_size >= env.size:
        return "127.0.0.1"
    if env.addresses:
        return env.addresses[0]
    return _own_address()


def _own_address() -> str:
    """Where other machines reach this one, as far as it knows. Raises LockstepError when it does not."""
    for find in (_named_address, _routed_address):
        with contextlib.suppress(OSError):  # No name server, or no route that leads away from here.
            address = find()
            if not ipaddress.ip_address(address).is_loopback:
                return address
    raise LockstepError(
        f"rank 0 does not know at which address of {socket.gethostname()} the other machines reach it: "
        "set LOCKSTEP_ADDRESS to rank 0's address"
    )


def _named_address() -> str:
    """The address of the host's name; Debian and Ubuntu make that a loopback one."""
    return socket.gethostbyname(socket.gethostname())


def _routed_address() -> str:
    """The address that packets to elsewhere would come from. None is sent: 192.0.2.1 is for documentation."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        address: str = probe.getsockname()[0]
        return address


def _introduce(group: mx.distributed.Group, card: str) -> list[str]:
    """Show `card` to every rank; returns everybody's, in rank order."""
    mine = card.encode().ljust(_CARD)
    assert len(mine) == _CARD, f"introduction too long: {card}"
    gathered = mx.distributed.all_gather(mx.array(list(mine), dtype=mx.uint8), group=group)
    cards = bytes(gathered.tolist())  # type: ignore[arg-type]
    return [cards[i : i + _CARD].decode().strip() for i in range(0, len(cards), _CARD)]


def end_together() -> None:
    """End this process at once on an uncaught error: a rank that lingers would hang the others."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        def show() -> None:
            with contextlib.suppress(OSError):  # Nobody reads it any more, or there is no room for it.
                traceback.print_exception(kind, error, trace)
                sys.stderr.flush()
            sys.stdout.flush()

        # Neither other threads nor the backend's finalizer are waited for.
        leave_after(show, 1)

    sys.excepthook = hook


@contextlib.contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Turn mlx's word for a broken connection into LostPeer."""
    try:
        yield
    except RuntimeError as error:
        if "connection to a peer was lost" not in str(error):
            raise
        raise LostPeer("the connection to a neighbouring rank was lost") from error
