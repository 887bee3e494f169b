"""Trajectories on their way from an engine to the driver."""

import pickle

import numpy as np

from rlhf_ray.trajectory import Trajectory, VersionSpan


def test_a_trajectory_arrives_as_it_was_sent_and_needs_no_memory_beside_itself():
    logprobs = np.array([-0.1, -1e-8, -30.0], np.float32)
    spans = [VersionSpan(3, 0, 1), VersionSpan(4, 1, 3)]
    prompt_ids, response_ids = np.array([7, 2**31 - 1], np.int32), np.array([1, 2, 3], np.int32)
    sent = Trajectory("u", 2, prompt_ids, response_ids, logprobs, "length", spans, {"answer": 5})
    beside: list[pickle.PickleBuffer] = []
    found = pickle.loads(pickle.dumps(sent, 5, buffer_callback=beside.append))
    assert not beside
    assert (found.uid, found.sample, found.finish_reason, found.row) == ("u", 2, "length", {"answer": 5})
    assert found.versions == spans
    for name in ("prompt_ids", "response_ids", "logprobs"):
        before, after = getattr(sent, name), getattr(found, name)
        assert after.dtype == before.dtype
        assert after.tolist() == before.tolist()
    assert found.token_ids.tolist() == [7, 2**31 - 1, 1, 2, 3]
    assert found.token_ids.dtype == np.int64
