"""Buckets in memory that the sender shares with the engines' workers on its own host.

The sender listens on a Unix socket with a name that cannot be guessed. A worker that reaches it is on the same host,
and is handed the memory as an open file. So nothing has a name in a file system that a killed process could leave
behind, and the end of one side is at once the end of the other's connection. Over the connection go single bytes: a
bucket is there; it has been read.
"""

import mmap
import os
import secrets
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Self

import torch

# One is written while another is read, and the sender may get ahead of workers that still stop sampling.
SLOTS = 4

_BYTE = b"\0"
SENDER, WORKER = "the trainer", "an engine's worker"


class Buffers:
    """`SLOTS` buckets side by side in memory, taken in turns.

    Each may be as large as the largest; memory is taken where a bucket is written, so that smaller ones take less.
    """

    def __init__(self, memory: mmap.mmap | bytearray) -> None:
        self._slots = torch.frombuffer(memory, dtype=torch.uint8).view(SLOTS, -1)

    @classmethod
    def private(cls, slot_bytes: int) -> Self:
        """Of this process alone."""
        return cls(bytearray(SLOTS * slot_bytes))

    def of(self, index: int) -> torch.Tensor:
        """The memory of the bucket of this number."""
        return self._slots[index % SLOTS]


class SharingSender:
    """The sender's side, for any number of workers."""

    def __init__(self, slot_bytes: int, timeout_s: float) -> None:
        self.name = f"rlhf-ray-weights-{secrets.token_hex(16)}"
        self._timeout_s = timeout_s
        self._file = os.memfd_create("rlhf-ray-weights")
        os.ftruncate(self._file, SLOTS * slot_bytes)
        self.buffers = Buffers(mmap.mmap(self._file, SLOTS * slot_bytes))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"\0{self.name}")  # a name of the kernel's own, gone with the socket
        self._listener.listen(socket.SOMAXCONN)
        self._listener.settimeout(timeout_s)
        self._workers: list[socket.socket] = []

    def admit(self, count: int) -> None:
        """Hand the memory to `count` workers, which have called; nobody else may call after that.

        Raises:
            TimeoutError: fewer have called.
        """
        while len(self._workers) < count:
            worker, _ = self._listener.accept()
            worker.settimeout(self._timeout_s)
            _, user, _ = struct.unpack("3i", worker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if user != os.getuid():  # anybody on this host can read the socket's name once it is there
                worker.close()
                continue
            socket.send_fds(worker, [_BYTE], [self._file])
            self._workers.append(worker)
        self._listener.close()
        os.close(self._file)

    def offer(self) -> None:
        """Tell the workers that the next bucket is there.

        Raises:
            RuntimeError: a worker has gone, or failed.
        """
        for worker in self._workers:
            _send_byte(worker, WORKER)

    def wait_until_read(self) -> None:
        """Wait until all workers have read the oldest bucket that was offered and not waited for.

        Raises:
            RuntimeError: a worker has gone, or failed.
        """
        for worker in self._workers:
            _expect_byte(worker, WORKER)

    def interrupt(self) -> None:
        """From another thread: whoever waits for a worker fails at once."""
        for worker in self._workers:
            with suppress(OSError):  # it is closed already
                worker.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connections; workers that wait for a bucket fail at once."""
        for worker in self._workers:
            worker.close()


class SharingWorker:
    """A worker's side."""

    def __init__(self, name: str, timeout_s: float) -> None:
        """Call the sender.

        Raises:
            OSError: it is on another host, or its container sees another network.
        """
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sender.settimeout(timeout_s)
        try:
            self._sender.connect(f"\0{name}")
        except OSError:
            self._sender.close()
            raise

    def open(self) -> None:
        """Wait until the sender hands over the memory.

        Raises:
            RuntimeError: it is run by another user.
        """
        _, files, _, _ = socket.recv_fds(self._sender, 1, 1)
        if not files:
            raise RuntimeError("weight transfer: the trainer on this host is run by another user")
        (file,) = files
        self._buffers = Buffers(mmap.mmap(file, os.fstat(file).st_size))
        os.close(file)

    def buckets(self, count: int) -> Iterator[torch.Tensor]:
        """The memory of each bucket, as it comes; it is written again once the next one is asked for.

        Raises:
            RuntimeError: the trainer has gone, or failed.
        """
        for index in range(count):
            _expect_byte(self._sender, SENDER)
            yield self._buffers.of(index)
            _send_byte(self._sender, SENDER)

    def close(self) -> None:
        """End the connection."""
        self._sender.close()


def _expect_byte(connection: socket.socket, who: str) -> None:
    try:
        if connection.recv(1):
            return
    except ConnectionError:
        pass
    raise _gone(who)


def _send_byte(connection: socket.socket, who: str) -> None:
    try:
        connection.sendall(_BYTE)
    except ConnectionError:
        raise _gone(who) from None


def _gone(who: str) -> RuntimeError:
    return RuntimeError(f"weight transfer: {who} has gone, or its part failed")
