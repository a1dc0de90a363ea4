"""Bytes of a weight update while a policy learns, against pushing all of it as bfloat16.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.links.weight_bytes

The flow policy of experiment=pusht learns from the demonstrations by people: --warm-up steps at the
experiment's learning rate, then, from the same weights, --settle steps at each of LEARNING_RATES,
so that Adam's moments have settled; then come the steps that are measured. Each row is the update
after 1 or 8 of them, of the weights themselves (their average, which acts, changes less).

"best of three": the smallest, over the whole policy, of what the protocol is to be compared with:
sparse (varint gaps and new values), XOR with the base, and full, each tensor cut into byte planes
and compressed by zstd-3. Times are processor time of one thread.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from benchmarks.cloning import Arrays, Demonstrations
from embodied.core.config import component
from embodied.core.seeds import derive_seed, make_rng
from embodied.learn.learner import Learner, PolicyFormat
from embodied.run import build
from embodied.run.config import load_train
from embodied.weights.acting import Form, Precision, acting_form, digest, layout_of
from embodied.weights.changes import Change
from embodied.weights.patches import apply_patch, describe, encode_patch
from embodied.weights.planes import squeeze, squeeze_planes
from embodied.weights.varints import encode_varints
from policies.build import build_policy
from policies.checkpoint import policy_from_state, policy_state

LEARNING_RATES = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4)
MEASURED = (1, 8)
PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float32")
BATCH_SIZE = 64
REPEATS = 3


@dataclass(frozen=True)
class Measured:
    """One update. changed: share of elements. best_bytes: of sparse, XOR and full."""

    changed: float
    push_bytes: int
    patch_bytes: int
    best_bytes: int
    best: str
    kinds: Counter[str]
    encode_ms: float
    apply_ms: float


class Training:
    """The policy of experiment=pusht and the data it learns from."""

    def __init__(self, data: str, seed: int, warm_up: int) -> None:
        config = load_train(["experiment=pusht", f"demonstrations.dataset.path={data}"])
        cls, options = component("datasets", config.demonstrations.dataset, "dataset")
        self._data = Demonstrations.of(cls(options).episodes(None))
        self._keys = build.window_spec(config).observation_keys
        self._config = msgspec.structs.replace(
            config.learner, precision="float32", minutes=None, steps=1 << 40, warmup_steps=1
        )
        self._seed = seed
        options = {key: value for key, value in config.policy.items() if key != "name"}
        device, statistics = build.device_spec(config), self._data.statistics()
        policy = build_policy("flow", options, device, self._keys, statistics, seed=seed)
        self._start = policy_state(policy)
        [self._start] = self.states(config.learner.learning_rate, (warm_up,))

    def states(
        self, learning_rate: float, steps: tuple[int, ...]
    ) -> Iterator[tuple[dict[str, object], Arrays]]:
        """The policy after so many steps each from where it started."""
        keys = ("action", *self._keys)
        layout = PolicyFormat(keys, lambda _: None, policy_state, policy_from_state)
        config = msgspec.structs.replace(self._config, learning_rate=learning_rate)
        seed = derive_seed(self._seed, "training noise")
        policy = policy_from_state(*self._start)
        learner = Learner(policy, layout, config, seed=seed)
        rng = make_rng(self._seed, "batches")
        for step in range(1, max(steps) + 1):
            at_B = rng.integers(len(self._data.action), size=BATCH_SIZE)
            spec = policy.spec
            learner.update(
                self._data.batch(
                    at_B, self._keys, n_obs_steps=spec.n_obs_steps, horizon=spec.horizon
                )
            )
            if step in steps:
                yield policy_state(policy)


def measure(old: Arrays, new: Arrays, precision: Precision) -> Measured:
    """The update from old to new, which is checked bit for bit."""
    base, form = acting_form(old, precision), acting_form(new, precision)
    patch = b""
    encode_s, apply_s = [], []
    for _ in range(REPEATS):
        started_s = time.process_time()
        patch = encode_patch(form, base)
        encode_s.append(time.process_time() - started_s)
        started_s = time.process_time()
        found = apply_patch(patch, layout_of(form), base)
        apply_s.append(time.process_time() - started_s)
        assert digest(found) == digest(form)
    changes: tuple[Change, ...] = describe(patch)
    whole = reference(form, base)
    best = min(whole, key=whole.__getitem__)
    differing = sum(int((form[n].bits != base[n].bits).sum()) for n in form)
    return Measured(
        changed=differing / sum(tensor.bits.size for tensor in form.values()),
        push_bytes=sum(2 * tensor.bits.size for tensor in form.values()),
        patch_bytes=len(patch),
        best_bytes=whole[best],
        best=best,
        kinds=Counter(change.kind for change in changes),
        encode_ms=1e3 * min(encode_s),
        apply_ms=1e3 * min(apply_s),
    )


def reference(form: Form, base: Form) -> dict[str, int]:
    """Bytes of the whole update, every changed tensor coded alike."""
    total = {"sparse": 0, "XOR": 0, "full": 0}
    for name, tensor in form.items():
        new, old = tensor.bits, base[name].bits
        places = np.flatnonzero(new != old)
        if places.size:
            gaps = squeeze(encode_varints(np.diff(places, prepend=-1) - 1))
            total["sparse"] += len(gaps) + sum(map(len, squeeze_planes(new[places])))
            total["XOR"] += sum(map(len, squeeze_planes(new ^ old)))
            total["full"] += sum(map(len, squeeze_planes(new)))
    return total


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="../shared/data/pusht_cchi_v7_lowdim.npz")
    parser.add_argument("--warm-up", type=int, default=150, help="steps before all measurements")
    parser.add_argument("--settle", type=int, default=30, help="steps at each learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    training = Training(options.data, options.seed, options.warm_up)
    print(
        "| acting | learning rate | steps | changed | bytes | full bfloat16 ÷ bytes | codings | "
        "best of three | bytes ÷ best | encode, ms | apply, ms |\n|" + "---|" * 11
    )
    for rate in LEARNING_RATES:
        steps = (options.settle, *(options.settle + more for more in MEASURED))
        (_, old), *later = training.states(rate, steps)
        for precision in PRECISIONS:
            for more, (_, new) in zip(MEASURED, later, strict=True):
                row = measure(old, new, precision)
                kinds = ", ".join(f"{count} {kind}" for kind, count in row.kinds.most_common())
                print(
                    f"| {precision} | {rate:g} | {more} | {100 * row.changed:.1f} % | "
                    f"{row.patch_bytes:,} | {row.push_bytes / row.patch_bytes:.1f} | {kinds} | "
                    f"{row.best} | {row.patch_bytes / row.best_bytes:.2f} | "
                    f"{row.encode_ms:.0f} | {row.apply_ms:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
