"""A policy on a server, with the same `act` as a local policy. Needs no torch."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from rynnvla_jax.columns import Columns
from rynnvla_jax.config import ConfigError, from_dict
from rynnvla_jax.deploy import msgpack_numpy
from rynnvla_jax.deploy.export_format import ConnectionLost, PolicyError
from rynnvla_jax.deploy.observation import NO_VIEWS, Observation, to_message
from rynnvla_jax.recording import Recording

_TOO_BIG, _GOING_AWAY, _TRY_AGAIN_LATER = 1009, 1001, 1013  # close codes of RFC 6455
_CLOSED: dict[int | None, str] = {
    _TOO_BIG: "the observation is larger than the server accepts; send smaller frames or raise its --max-message-mb",
    _GOING_AWAY: "the server is shutting down; start it again",
    _TRY_AGAIN_LATER: "the server is busy with other clients' large observations; send smaller frames, or try again",
}


class RemotePolicy:
    """Client of `rynnvla serve`, or of any server that speaks openpi's protocol with our keys.

    Connects at the first use and again after a failure. Not thread-safe: one call at a time.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 30.0):
        """`url`: ws://host:port. `timeout`: seconds to wait for a connection and for each answer."""
        self.url, self.timeout = url, timeout
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._connection: ClientConnection | None = None
        self._metadata: dict[str, Any] = {}

    @property
    def metadata(self) -> dict[str, Any]:
        """The server's metadata of its policy: columns, chunk, keys. Raises PolicyError when it cannot be reached."""
        self._connected()
        return self._metadata

    @property
    def recording(self) -> Recording:
        """How the policy's data were recorded; nothing where the server does not say. Raises PolicyError."""
        metadata = self.metadata
        try:
            return from_dict(Recording, {key: metadata[key] for key in ("rates", "frames") if key in metadata})
        except ConfigError as error:
            raise PolicyError(f"{self.url}: {error}") from None

    def act(
        self,
        front: np.ndarray,
        wrist: np.ndarray | None,
        state: np.ndarray | None,
        instruction: str,
        columns: Columns | None = None,
        extra_views: Mapping[str, np.ndarray] = NO_VIEWS,
    ) -> np.ndarray:
        """As `policy.Policy.act`: absolute float[C, A].

        Raises:
          PolicyError: the server refused the observation; as ConnectionLost, when it cannot be reached or did not
            answer in time.
        """
        given = None if state is None else np.asarray(state)
        message = to_message(Observation(front, wrist, given, instruction, columns, extra_views))
        try:
            request = msgpack_numpy.pack(message)
        except TypeError as error:
            raise PolicyError(f"the observation cannot be sent: {error}") from error
        connection = self._connected()
        try:
            connection.send(request)
            answer = self._receive(connection)
        except BaseException as error:
            self.close()  # else the answer to this observation could be taken for the next one's
            if isinstance(error, ConnectionClosed | OSError):
                raise ConnectionLost(self._failure(error)) from error
            raise
        if not isinstance(answer, dict) or not isinstance(answer.get("actions"), np.ndarray):
            self.close()  # whatever it was an answer to, it was not this observation
            raise PolicyError(f"{self.url} answered without 'actions'; is it a policy server?")
        return np.array(answer["actions"])

    def close(self) -> None:
        """Closes the connection, if there is one."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()

    def _connected(self) -> ClientConnection:
        if self._connection is None:
            connection = None
            try:
                connection = connect(
                    self.url,
                    compression=None,
                    max_size=None,
                    additional_headers=self._headers,
                    open_timeout=self.timeout,
                    close_timeout=1,  # a server that hangs does not hold up the robot
                )
                self._metadata = self._receive(connection)
            except BaseException as error:
                if connection is not None:
                    connection.close()  # else the metadata, unread, could be taken for the first answer
                if isinstance(error, OSError | InvalidHandshake | InvalidURI | ConnectionClosed):
                    raise ConnectionLost(self._failure(error)) from error
                raise
            self._connection = connection
        return self._connection

    def _receive(self, connection: ClientConnection) -> Any:
        answer = connection.recv(timeout=self.timeout)
        if isinstance(answer, str):
            raise PolicyError(f"{self.url}: {answer}")
        return msgpack_numpy.unpack(answer)

    def _failure(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"{self.url} did not answer within {self.timeout:g} s; check that the server runs (/healthz)"
        if isinstance(error, InvalidStatus) and error.response.status_code == HTTPStatus.UNAUTHORIZED:
            return f"{self.url} needs its API key (401); for `rynnvla evaluate` set RYNNVLA_API_KEY"
        code = error.rcvd.code if isinstance(error, ConnectionClosed) and error.rcvd else None
        reason = _CLOSED.get(code, f"{error or type(error).__name__}; check that the server runs (/healthz)")
        return f"{self.url}: {reason}"
