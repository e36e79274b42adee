"""What clients of a policy server may take: sockets, bytes, frames and time. Nothing here knows the policy.

Three rules keep a small client's answers and GET /healthz fast, whatever other clients do:

- A `Door` counts a connection before it has said anything, and closes silent ones when many come.
- A `Connection` is read only as far as its share; for a larger message it needs one of few places, first come, first
  served. Until then its bytes stay in the kernel, and the sender waits.
- A connection that sends frames without end, sends a message too slowly or does not read its answers is closed.
"""

import asyncio
import contextlib
import errno
import os
import resource
import socket
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import DATA_OPCODES, CloseCode, Frame
from websockets.protocol import Event, State

from rynnvla_jax.deploy.export_format import PolicyError

CLOSE_SECONDS = 2.0  # that a client has to answer a close frame
_PIECE = 2**15  # bytes parsed at once; of empty frames, these are some thirty milliseconds of work
_MESSAGES = 2  # of a client, unanswered, until it is not read any more
_FRAMES = 1000  # in a second, of those that do not ask for an answer
_UNREAD = 2**20  # bytes sent to a client that it has not read
_SILENT_SECONDS = 0.1  # that a stranger has to say something, however many others come
_FILES = 64  # that the process has open beside its connections


@dataclass(frozen=True)
class Limits:
    """Every limit of a server. It holds about `clients * small_mb + large * message_mb` of messages at most."""

    clients: int = 64  # connected at once; a further one is refused with status 503
    strangers: int = 128  # connections that are no clients (yet), as GET /healthz; silent ones are closed for new ones
    message_mb: float = 16.0  # in 2^20 bytes; a larger message closes its connection
    small_mb: float = 2.0  # that each client may send at any time: two cameras' frames of 480 x 640
    large: int = 4  # clients with more than that, read and unanswered; further ones wait, unread
    wait_seconds: float = 30.0  # a client whose large message waited so long to be read is told to try again
    turn_seconds: float = 600.0  # a request that waited so long for others at the policy is refused
    message_seconds: float = 10.0  # a client that takes longer to send a large message or to read an answer is closed
    handshake_seconds: float = 5.0  # a connection that says nothing is closed after that
    inference_seconds: float = 60.0  # an inference that takes longer makes the server unhealthy
    grace_seconds: float = 30.0  # a shutdown waits so long for answers under way, then ends the process


def fit(limits: Limits) -> Limits:
    """Raises this process's limit of open files as far as it may; returns `limits` with as many connections as fit.

    Raises:
      PolicyError: there is no room for even a few.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY or limits.clients + limits.strangers <= hard - _FILES:
        return limits
    if (room := hard - _FILES) < 8:
        wanted = limits.clients + limits.strangers + _FILES
        raise PolicyError(f"this process may open {hard} files, too few to serve; allow {wanted} (ulimit -n)")
    strangers = min(limits.strangers, room // 2)
    return replace(limits, clients=min(limits.clients, room - strangers), strangers=strangers)


class Sockets:
    """The open connections of a server, counted from the moment they are accepted."""

    def __init__(self, strangers: int):
        self._most = strangers
        self._strangers: dict[socket.socket, float] = {}  # since when they have had nothing to say; oldest first
        self._leaving: list[socket.socket] = []  # strangers that were told to go
        self._clients: list[socket.socket] = []

    def make_room(self) -> None:
        """Where more than a quarter of the places are taken, tells the oldest silent strangers to go.

        Raises:
          BlockingIOError: there is no place until those have gone, or until others have been silent for long enough.
        """
        self._strangers = {s: since for s, since in self._strangers.items() if s.fileno() >= 0}
        self._leaving = _open(self._leaving)
        if (surplus := len(self._strangers) - self._most // 4) > 0:
            self._send_away(surplus, time.monotonic() - _SILENT_SECONDS)
        if len(self._strangers) + len(self._leaving) >= self._most:
            raise BlockingIOError(errno.EAGAIN, "as many strangers as there may be")

    def _send_away(self, most: int, before: float) -> None:
        """Ends at most so many of the connections that have been silent since `before`."""
        for stranger, since in list(self._strangers.items()):
            if since > before or not most:
                return
            with contextlib.suppress(OSError):  # silent
                if stranger.recv(1, socket.MSG_PEEK):  # the event loop has not come to it yet
                    continue
            del self._strangers[stranger]
            self._leaving.append(stranger)
            most -= 1
            with contextlib.suppress(OSError):  # the other side has gone
                stranger.shutdown(socket.SHUT_RDWR)  # the event loop sees the end, also in a TLS handshake

    def enter(self, stranger: socket.socket) -> None:
        """Counts an accepted socket."""
        stranger.setblocking(False)
        self._strangers[stranger] = time.monotonic()

    def heard(self, connection: ServerConnection) -> None:
        """A stranger began to speak: its request is on the way."""
        if (stranger := self._stranger(connection)) is not None:
            del self._strangers[stranger]
            self._strangers[stranger] = time.monotonic()

    def promote(self, connection: ServerConnection) -> None:
        """Makes a stranger a client: it stays until it closes."""
        if (stranger := self._stranger(connection)) is not None:
            del self._strangers[stranger]
            self._clients.append(stranger)

    def clients(self) -> int:
        """How many clients are connected."""
        self._clients = _open(self._clients)
        return len(self._clients)

    def _stranger(self, connection: ServerConnection) -> socket.socket | None:
        number = connection.transport.get_extra_info("socket").fileno()
        return next((s for s in self._strangers if s.fileno() == number), None) if number >= 0 else None


def _open(sockets: Iterable[socket.socket]) -> list[socket.socket]:
    return [s for s in sockets if s.fileno() >= 0]


class Door(socket.socket):
    """A listening socket that accepts only what `sockets` has room for; the rest waits in the kernel's queue."""

    sockets: Sockets

    def accept(self) -> tuple[socket.socket, Any]:
        """As of any socket that does not block."""
        try:
            self.sockets.make_room()
        except BlockingIOError:
            time.sleep(0.001)  # the event loop asks again at once, and would leave the policy's thread no time
            raise
        connection, address = super().accept()
        self.sockets.enter(connection)
        return connection, address


async def open_doors(host: str, port: int, sockets: Sockets) -> list[Door]:
    """A door for each address of `host`, bound but not listening yet. Raises OSError."""
    bound = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)
    doors = [Door(fileno=os.dup(s.fileno())) for s in bound.sockets]
    bound.close()
    for door in doors:
        door.sockets = sockets
    return doors


class Places:
    """Places for clients with a large message, first come, first served. One thread: the event loop's."""

    def __init__(self, count: int):
        self._free = count
        self._taken: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}  # in order

    def __contains__(self, connection: "Connection") -> bool:
        return connection in self._taken

    def ask(self, connection: "Connection") -> None:
        """Gives a place now, or later and then calls `connection.enter`."""
        if connection in self._taken or connection in self._waiting:
            return
        if self._free:
            self._free -= 1
            self._taken.add(connection)
        else:
            self._waiting[connection] = None

    def leave(self, connection: "Connection") -> None:
        """Gives the place back to the next one, or stops waiting."""
        self._waiting.pop(connection, None)
        if connection not in self._taken:
            return
        self._taken.discard(connection)
        if not self._waiting:
            self._free += 1
            return
        following = next(iter(self._waiting))
        del self._waiting[following]
        self._taken.add(following)
        following.enter()


class Connection(ServerConnection):
    """A connection that is read as far as the limits allow.

    websockets' own flow control counts frames, not bytes; it must be turned off (`max_queue=None`), since both would
    pause and resume one transport.
    """

    def __init__(
        self, limits: Limits, sockets: Sockets, places: Places, counts: Counter, *arguments: Any, **options: Any
    ):
        super().__init__(*arguments, **options)
        self._limits, self._sockets, self._places, self._counts = limits, sockets, places, counts
        self._small, self._large = (int(mb * 2**20) for mb in (limits.small_mb, limits.message_mb))
        self._sizes: deque[int] = deque()  # of whole messages without an answer
        self._begun = 0  # bytes of the fragments of a message that is not whole
        self._surplus, self._since = 0, self.loop.time()  # frames that ask for no answer, and since when
        self._timed, self._timer = "", self.loop.call_later(0, lambda: None)
        self._patience: asyncio.Timeout | None = None
        self._spoke = self._ending = False

    def data_received(self, data: bytes) -> None:
        """Parses piece by piece: one read may bring 40,000 empty frames."""
        if not self._spoke:
            self._spoke = True
            self._sockets.heard(self)
        for start in range(0, len(data), _PIECE):
            super().data_received(data[start : start + _PIECE])
            self._flow()

    def process_event(self, event: Event) -> None:
        if not isinstance(event, Frame):
            super().process_event(event)
            return
        whole = event.opcode in DATA_OPCODES and event.fin
        if event.opcode in DATA_OPCODES:
            self._begun += len(event.data)
        super().process_event(replace(event))
        event.data = b""  # the parser keeps its last frame until the next one: a client's whole message
        if whole:
            self._sizes.append(self._begun)
            self._begun = 0
        if not whole or len(self._sizes) > _MESSAGES:
            self._surplus += 1

    def answered(self) -> None:
        """The oldest message has its answer: its bytes are free, and it is others' turn."""
        self._sizes.popleft()
        self._places.leave(self)
        self._flow()

    def enter(self) -> None:
        """A place for a large message is this connection's now."""
        self._flow()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._ending = True
        self._timer.cancel()
        self._places.leave(self)
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(self.loop.time())

    @contextlib.asynccontextmanager
    async def patience(self, seconds: float | None) -> AsyncIterator[None]:
        """Raises TimeoutError after `seconds`, and at once when the client has gone."""
        async with asyncio.timeout(0 if self.state is State.CLOSED else seconds) as self._patience:
            try:
                yield
            finally:
                self._patience = None

    async def answer(self, message: bytes | str) -> None:
        """Sends it; a client that does not read is cut off. Raises ConnectionClosed."""
        try:
            async with asyncio.timeout(self._limits.message_seconds):
                await self.send(message)
        except TimeoutError:
            self._counts["cut_off"] += 1
            self.transport.abort()

    def _flow(self) -> None:
        """Reads on or stops reading, after something came or was answered."""
        if self._ending:
            return
        if self.state in (State.CLOSING, State.CLOSED):  # by either side, for example because of garbage
            self._end()
        elif self.transport.get_write_buffer_size() > _UNREAD:  # pongs; answers are waited for
            self._counts["cut_off"] += 1
            self._end()
            self.transport.abort()
        elif self._floods():
            self._refuse(CloseCode.POLICY_VIOLATION, f"more than {_FRAMES} frames in a second", "cut_off")
        else:
            self._take_turns(sum(self._sizes) + self._begun + len(self.protocol.reader.buffer))

    def _floods(self) -> bool:
        if self._surplus <= _FRAMES:
            return False
        began, self._since, self._surplus = self._since, self.loop.time(), 0
        return self._since - began < 1

    def _take_turns(self, held: int) -> None:
        """Reads while `held` bytes are within the share. A place allows the largest message beside it, but only one."""
        if held > self._small:
            self._places.ask(self)
        else:
            self._places.leave(self)
        placed = self in self._places
        if placed and not self._sizes:
            self._time("message", self._limits.message_seconds)
        elif held > self._small and not placed:
            self._time("place", self._limits.wait_seconds)
        else:
            self._time("", 0)
        beside = (self._sizes[0] if self._sizes else self._large) if placed else 0
        if held <= self._small + beside and len(self._sizes) <= _MESSAGES:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def _time(self, what: str, seconds: float) -> None:
        """Sets the alarm for what the connection waits for now, unless it is set."""
        if what == self._timed:
            return
        self._timer.cancel()
        self._timed = what
        if what == "place":
            reason = "the places for large messages are taken; try again later, or send smaller frames"
            self._timer = self.loop.call_later(seconds, self._refuse, CloseCode.TRY_AGAIN_LATER, reason, "busy")
        elif what == "message":
            reason = f"a message took longer than {seconds:g} s; send smaller frames"
            self._timer = self.loop.call_later(seconds, self._refuse, CloseCode.POLICY_VIOLATION, reason, "cut_off")

    def _refuse(self, code: CloseCode, reason: str, count: str) -> None:
        self._counts[count] += 1
        self.protocol.fail(code, reason)  # which also discards what comes
        self.send_data()
        self._end()

    def _end(self) -> None:
        """Lets the close frame arrive, but does not wait for the client's."""
        if self._ending:
            return
        self._ending = True
        self._timer.cancel()
        self._places.leave(self)
        self.transport.resume_reading()  # else its end would not be noticed
        self._timer = self.loop.call_later(CLOSE_SECONDS, self.transport.abort)
