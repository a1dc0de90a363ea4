import pytest
from weights import CONFIG, network

from embodied.weights.store import WeightStore


@pytest.fixture
def store(tmp_path):
    made = WeightStore(tmp_path)
    for seed in (1, 2):
        made.publish(network(seed), CONFIG, {"step": seed})
    return made
