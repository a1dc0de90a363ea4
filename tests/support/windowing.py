"""Episodes with random contents, and what a window of one is, written down in plain Python."""

import numpy as np

from embodied.core.episodes import Step

STATE = "observation.state"
IMAGE = "observation.image"


def make_steps(stream, episode, length, rng, task="", image_shape=(2, 3, 3)):
    """Steps of an episode of stream number `stream`, the last observation included; the state
    says which step it is."""
    name = f"s{stream}"
    terminated = rng.random() < 0.5

    def step(index):
        last = index == length - 1
        return Step(
            name,
            episode,
            index,
            {
                STATE: np.array([stream, episode, index], np.float32),
                IMAGE: rng.integers(0, 256, image_shape, dtype=np.uint8),
            },
            rng.normal(size=2).astype(np.float32),
            reward=float(np.float32(rng.normal())),
            terminated=bool((terminated and last) or rng.random() < 0.05),
            truncated=not terminated and last,
            success=bool(rng.random() < 0.1),
            intervention=bool(rng.random() < 0.6),
            held=bool(rng.random() < 0.2),
            policy_version=int(rng.integers(-1, 4)),
            task=task,
            t_ns=index * 50_000_000 + int(rng.integers(1000)),
            final=index == length,
        )

    return [step(index) for index in range(length + 1)]


def interleave(episodes, rng):
    """The steps of episodes (lists of steps) in an order in which they might arrive: each
    stream's in order, streams mixed."""
    queues = {}
    for steps in episodes:
        if steps:
            queues.setdefault(steps[0].stream, []).extend(steps)
    while any(queues.values()):
        queue = queues[rng.choice([name for name, left in queues.items() if left])]
        for _ in range(int(rng.integers(1, 4))):
            if queue:
                yield queue.pop(0)


def key_of(batch, b):
    """(stream, episode, index) of sample b of a batch."""
    number, episode, index = batch[STATE][b, -1].astype(int).tolist()
    return f"s{number}", episode, index


def history(steps, t, n_obs_steps, key):
    """Observations of steps t-To+1..t, the first one repeated before the episode's start."""
    return np.stack(
        [steps[max(0, t - back)].observation[key] for back in reversed(range(n_obs_steps))]
    )


def reward(step, spec):
    return {"recorded": step.reward, "sparse": step.success, "cost": step.success - 1}[spec.rewards]


def reference(steps, t, spec, is_selected):
    """One sample around step t of an episode, all of its arrays."""
    *acted, _ = steps
    last = acted[-1]
    future = [acted[k] if k < len(acted) else None for k in range(t, t + spec.horizon)]
    sample = {key: history(steps, t, spec.n_obs_steps, key) for key in spec.observation_keys}
    sample["action"] = np.stack([(s or last).action for s in future])
    sample["action_is_pad"] = np.array([s is None or s.held or not is_selected(s) for s in future])
    sample["reward"] = np.array([0 if s is None else reward(s, spec) for s in future], np.float32)
    sample["terminated"] = np.array([(s or last).terminated for s in future])
    sample["truncated"] = np.array([(s or last).truncated for s in future])
    if spec.n_step:
        taken = acted[t : t + spec.n_step]
        value = sum(spec.discount**k * reward(s, spec) for k, s in enumerate(taken))
        alive = not any(s.terminated for s in taken)
        if spec.rewards == "cost" and not alive and not any(s.success for s in taken):
            value -= spec.discount ** len(taken) / (1 - spec.discount)
        sample["return"] = np.float32(value)
        sample["discount"] = np.float32(spec.discount ** len(taken) if alive else 0)
        for key in spec.observation_keys:
            sample["next." + key] = history(steps, t + len(taken), spec.n_obs_steps, key)
    if spec.return_to_go:
        left = sum(spec.discount**k * reward(s, spec) for k, s in enumerate(acted[t:]))
        failed = spec.rewards == "cost" and not any(s.success for s in acted)
        sample["return_to_go"] = np.float32(-1 / (1 - spec.discount) if failed else left)
    if spec.episode_success:
        sample["episode_success"] = np.array(any(s.success for s in acted))
    if spec.future:
        ends = len(acted)
        for key in spec.future_keys:
            later = [steps[min(t + k, ends)].observation[key] for k in spec.future]
            sample["future." + key] = np.stack(later)
        sample["future_is_pad"] = np.array([t + k > ends for k in spec.future])
    dtypes = {"policy_version": np.int64, "t_ns": np.int64}
    for name in spec.metadata:
        sample[name] = np.array(getattr(steps[t], name), dtypes.get(name, np.bool_))
    return sample


def assert_batch_is(batch, episodes, spec, is_selected):
    """Every sample of the batch is as the reference says. episodes: key → steps."""
    for b in range(len(batch[STATE])):
        stream, episode, t = key_of(batch, b)
        wanted = reference(episodes[stream, episode], t, spec, is_selected)
        assert batch.keys() == wanted.keys()
        for name, value in wanted.items():
            found = batch[name][b]
            assert (found.dtype, found.shape) == (value.dtype, value.shape), name
            if name in ("return", "discount", "return_to_go"):
                np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6, err_msg=name)
            else:
                np.testing.assert_array_equal(found, value, name)
