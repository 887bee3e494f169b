"""Memory that the sender of a weight transfer shares with workers on its host."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread, Timer
from typing import Any

import pytest
import torch

from rlhf_ray.rollout.shared_buckets import SLOTS, SharingSender, SharingWorker

BYTES = 64
TIMEOUT_S = 20.0


def read(name: str, count: int, answers: Any, leaves_at: int | None = None) -> None:
    """A worker: reports what it finds in each bucket, as it finds it."""
    worker = SharingWorker(name, TIMEOUT_S)
    worker.open()
    try:
        for index, memory in enumerate(worker.buckets(count)):
            if index == leaves_at:
                break
            answers.put((memory[0].item(), memory[-1].item(), len(memory)))
    except RuntimeError as error:
        answers.put(str(error))
    worker.close()


@contextmanager
def workers(sender: SharingSender, number: int, *args: Any) -> Iterator[list[Any]]:
    """Threads that run `read`, admitted, and the queues of their answers."""
    queues: list[Any] = [SimpleQueue() for _ in range(number)]
    threads = [Thread(target=read, args=(sender.name, args[0], queue, *args[1:])) for queue in queues]
    for thread in threads:
        thread.start()
    try:
        sender.admit(number)
        yield queues
    finally:
        sender.close()
        for thread in threads:
            thread.join(TIMEOUT_S)


def send(sender: SharingSender, count: int) -> None:
    for index in range(count):
        if index >= SLOTS:
            sender.wait_until_read()
        sender.buffers.of(index).fill_(index)
        sender.offer()


def test_every_worker_reads_every_bucket_though_their_memory_is_used_again():
    count = 5 * SLOTS + 1
    sender = SharingSender(BYTES, TIMEOUT_S)
    with workers(sender, 2, count) as queues:
        send(sender, count)
        for queue in queues:
            found = [queue.get(timeout=TIMEOUT_S) for _ in range(count)]
            assert found == [(index, index, BYTES) for index in range(count)]


def test_a_worker_whose_sender_ends_fails_at_once():
    sender = SharingSender(BYTES, TIMEOUT_S)
    with workers(sender, 1, 3) as (queue,):
        send(sender, 2)
        assert [queue.get(timeout=TIMEOUT_S)[0] for _ in range(2)] == [0, 1]
        sender.close()
        assert "the trainer has gone" in queue.get(timeout=TIMEOUT_S / 2)


def test_the_sender_fails_at_once_where_a_worker_ends():
    sender = SharingSender(BYTES, TIMEOUT_S)
    with workers(sender, 1, 3, 1) as _:
        send(sender, 2)
        sender.wait_until_read()
        with pytest.raises(RuntimeError, match="worker has gone"):
            sender.wait_until_read()


def test_a_sender_that_waits_fails_at_once_when_it_is_interrupted():
    sender = SharingSender(BYTES, TIMEOUT_S)
    worker = SharingWorker(sender.name, TIMEOUT_S)  # which reads nothing
    sender.admit(1)
    sender.offer()
    started = time.monotonic()
    timer = Timer(0.2, sender.interrupt)
    timer.start()
    with pytest.raises(RuntimeError, match="has gone, or its part failed"):
        sender.wait_until_read()
    assert time.monotonic() - started < TIMEOUT_S / 2  # not by its own limit
    timer.join(TIMEOUT_S)
    sender.close()
    sender.interrupt()  # changes nothing any more
    worker.close()


def test_a_worker_that_cannot_reach_the_sender_learns_so():
    with pytest.raises(OSError, match="refused"):
        SharingWorker("rlhf-ray-weights-of-nobody", TIMEOUT_S)


def test_nothing_is_left_in_a_file_system_and_nobody_can_join_later():
    before = set(os.listdir("/dev/shm"))
    sender = SharingSender(BYTES, TIMEOUT_S)
    assert set(os.listdir("/dev/shm")) <= before
    sender.admit(0)
    with pytest.raises(OSError, match="refused"):
        SharingWorker(sender.name, TIMEOUT_S)
    sender.close()


def test_a_missing_worker_is_not_waited_for_without_end():
    sender = SharingSender(BYTES, timeout_s=0.1)
    with pytest.raises(TimeoutError):
        sender.admit(1)


def test_slots_are_apart():
    sender = SharingSender(BYTES, TIMEOUT_S)
    for index in range(SLOTS):
        sender.buffers.of(index).fill_(index)
    assert [sender.buffers.of(index).unique().tolist() for index in range(SLOTS)] == [[i] for i in range(SLOTS)]
    assert torch.equal(sender.buffers.of(SLOTS), sender.buffers.of(0))
