import numpy as np
import pytest

from embodied.core import config
from embodied.core.errors import ConfigError, EmbodiedError, MissingDependencyError
from embodied.core.protocols import Renders, SimulatedDriver
from hal.device import Device
from hal.drivers.gymnasium import Gymnasium, GymnasiumConfig
from hal.health import DeviceInfo

gymnasium = pytest.importorskip("gymnasium")
Box, Dict = gymnasium.spaces.Box, gymnasium.spaces.Dict


class Reach(gymnasium.Env):
    """A point that must come near 1; its observations are of every kind."""

    metadata = {}
    action_space = Box(-np.inf, np.inf, (2, 1), np.float64)
    observation_space = Dict(
        {
            "agent_pos": Box(-10.0, 10.0, (2,), np.float64),
            "goal": Dict({"distance": Box(0.0, np.inf, (), np.float32)}),
            "pixels": Dict({"front": Box(0, 255, (8, 8, 3), np.uint8)}),
        }
    )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1, 0, 2)
        return self._observe(), {}

    def step(self, action):
        assert action.shape == (2, 1) and action.dtype == np.float64
        self.place = self.place + action[:, 0]
        distance = np.abs(self.place - 1).max()
        return self._observe(), -distance, distance > 5, False, {"is_success": distance < 0.1}

    def _observe(self):
        distance = np.float32(np.abs(self.place - 1).max())
        pixels = {"front": np.full((8, 8, 3), 7, np.uint8)}
        return {"agent_pos": self.place, "goal": {"distance": distance}, "pixels": pixels}


class Twice(Reach):
    observation_space = Dict({"state": Box(0, 1, (1,)), "agent_pos": Box(0, 1, (1,))})


gymnasium.register("EmbodiedReach-v0", Reach, max_episode_steps=3)
gymnasium.register("EmbodiedTwice-v0", Twice)


def make(name, **options):
    return Gymnasium(GymnasiumConfig(id=name, **options))


def test_runs_as_a_simulated_device():
    cls, options = config.component("drivers", {"name": "gymnasium", "id": "Pendulum-v1"}, "driver")
    driver = cls(options)
    assert isinstance(driver, SimulatedDriver) and isinstance(driver, Renders)
    assert driver.spec.tick_hz == 30.0 and driver.spec.action.low == (-2.0,)
    with Device(driver, info=DeviceInfo("pendulum:0", "gymnasium", "here")) as device:
        starts = [device.reset(5), device.reset(6), device.reset(5)]
        frames = [device.frames(tick)[0] for tick in starts[-1:]]
        device.advance(starts[-1] + 300)
        assert device.latest().signals["reward"] < 0
    first, second = make("Pendulum-v1"), make("Pendulum-v1")
    for other in (first, second):
        other.open()
        other.reset(5)
        np.testing.assert_array_equal(
            other.sense()["observation.state"], frames[0].observation["observation.state"]
        )
        other.close()
        other.close()
    with pytest.raises(EmbodiedError, match="not open"):
        first.sense()


def test_a_dictionary_becomes_state_pictures_and_others():
    driver = make("EmbodiedReach-v0", tick_hz=5.0)
    assert driver.spec.tick_hz == 5.0 and driver.spec.action.shape == (2,)
    assert driver.spec.action.low is None
    driver.open()
    found = driver.sense()
    driver.spec.check(found)
    assert {key: value.shape for key, value in found.items()} == {
        "observation.state": (2,),
        "observation.goal_distance": (1,),
        "observation.images.front": (8, 8, 3),
    }
    assert found["observation.images.front"].dtype == np.uint8
    driver.close()


def test_success_is_what_the_environment_says_and_it_stops_when_it_has_terminated():
    driver = make("EmbodiedReach-v0")
    driver.open()
    driver.hold()
    for _ in range(5):
        driver.step_time()
    place = driver.sense()["observation.state"]
    assert driver.signals()["success"] == 0.0
    driver.drive((1 - place).astype(np.float32))
    driver.step_time()
    assert driver.signals() == {
        "reward": pytest.approx(0.0, abs=1e-6),
        "success": 1.0,
        "terminated": 0.0,
    }
    driver.drive(np.array([9.0, 0.0], np.float32))
    driver.step_time()
    assert driver.signals()["terminated"] == 1.0 and driver.signals()["success"] == 0.0
    driver.step_time()
    assert driver.signals()["reward"] == 0.0
    driver.reset(1)
    assert driver.signals()["terminated"] == 0.0
    with pytest.raises(EmbodiedError, match="does not draw itself"):
        driver.render(32, 32)
    driver.close()


def test_draws_itself_in_the_size_asked_for():
    pytest.importorskip("pygame")
    driver = make("Pendulum-v1")
    driver.open()
    found = driver.render(40, 30)
    assert found.shape == (30, 40, 3) and found.dtype == np.uint8 and found.std() > 0
    driver.close()


@pytest.mark.parametrize(
    "name, kind, said",
    [
        ("CartPole-v1", ConfigError, "only Box is supported"),
        ("EmbodiedTwice-v0", ConfigError, "both observation.state"),
        ("EmbodiedRech-v0", ConfigError, "EmbodiedReach"),
        ("no_such_package:Thing-v0", MissingDependencyError, "no_such_package"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(name, kind, said):
    with pytest.raises(kind, match=said):
        make(name)


def test_wrong_options_are_refused():
    with pytest.raises(ConfigError, match="colour"):
        make("Pendulum-v1", kwargs={"colour": 1})
    with pytest.raises(ConfigError, match="tick_hz"):
        make("Pendulum-v1", tick_hz=0.0)
