"""Newer weights that a thread makes ready beside a policy that acts."""

import time

import numpy as np
import pytest
from served import make_policy

from embodied.core.errors import CorruptDataError
from embodied.run.renewal import Renewal
from embodied.weights.store import WeightStore, WeightWatcher
from policies.acting import InferenceConfig
from policies.checkpoint import policy_from_state, policy_state
from policies.inference.policy import ActingPolicy


@pytest.fixture
def published(tmp_path):
    """A store, and what publishes a policy with the weights of a seed."""
    store = WeightStore(tmp_path)

    def publish(seed):
        config, arrays = policy_state(make_policy(seed))
        return store.publish(arrays, config), arrays

    return store, publish


def made(manifest, arrays):
    return ActingPolicy(policy_from_state(manifest.config, arrays), InferenceConfig())


def taken(renewal, version):
    deadline_s = time.monotonic() + 20
    while True:
        manifest = renewal.take()
        if manifest is not None and manifest.version >= version:
            return manifest
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def acts_with(policy, arrays):
    own = policy_state(policy.source)[1]
    return all(np.array_equal(own[name], arrays[name]) for name in arrays)


def test_each_version_acts_once_it_is_taken_in_the_same_object(published):
    store, publish = published
    _, first = publish(1)
    renewal = Renewal(WeightWatcher(store), made)
    try:
        taken(renewal, 1)
        policy = renewal.policy
        assert acts_with(policy, first) and renewal.take() is None
        for version in (2, 3, 4):
            before = policy_state(policy.source)[1]
            _, arrays = publish(version)
            assert acts_with(policy, before)
            assert taken(renewal, version).version == version
            assert renewal.policy is policy and acts_with(policy, arrays)
    finally:
        renewal.close()


def test_weights_that_are_not_the_policys_end_it_with_their_error(published):
    store, publish = published
    manifest, arrays = publish(1)
    renewal = Renewal(WeightWatcher(store, 1), made(manifest, arrays))
    try:
        store.publish({"other": np.zeros(3, np.float32)}, manifest.config)
        with pytest.raises(CorruptDataError, match="not the policy's"):
            taken(renewal, 2)
        assert acts_with(renewal.policy, arrays)
    finally:
        renewal.close()
