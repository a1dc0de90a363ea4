"""Size, time and error of each codec on the pictures of a recording.

    .venv/bin/python benchmarks/picture_codecs.py BUFFER [--noise 2]

noise: standard deviation of what a camera's sensor would add, in grey levels; simulators have none.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from embodied.buffer.steps import codecs
from embodied.buffer.upkeep.contents import Contents

CODECS = ("raw", "zstd", "webp", "webp:90", "jpeg:95", "jpeg:90", "jpeg:80")
PICTURES = 64
REPEATS = 5


def pictures(path: Path) -> dict[str, list[np.ndarray]]:
    """Up to PICTURES pictures of each key, evenly from the first episodes."""
    contents = Contents(path)
    found: dict[str, list[np.ndarray]] = {}
    for episode in list(contents.episodes.values())[:4]:
        for stored in contents.of_episode(episode):
            for key, array in stored.step().observation.items():
                if array.dtype == np.uint8 and array.ndim == 3:
                    found.setdefault(key, []).append(array)
    return {key: images[:: max(1, len(images) // PICTURES)] for key, images in found.items()}


def milliseconds(work: Callable[[], object], count: int) -> float:
    """Least time of a repetition, for one picture."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * min(times) / count


def measure(images: list[np.ndarray], codec: str) -> str:
    """A row of the table."""
    shape = images[0].shape
    stored = [bytes(codecs.encode(image, codec)) for image in images]
    encode = milliseconds(lambda: [codecs.encode(image, codec) for image in images], len(images))

    def decode() -> list[np.ndarray]:
        return [codecs.decode(data, codec, np.uint8, shape) for data in stored]

    errors = [
        np.abs(found.astype(int) - image).mean()
        for found, image in zip(decode(), images, strict=True)
    ]
    size = np.mean([len(data) for data in stored])
    decoded = milliseconds(decode, len(images))
    share = 100 * size / images[0].nbytes
    return (
        f"| {codec} | {size / 1000:.1f} | {share:.0f} % | {encode:.2f} | {decoded:.2f} "
        f"| {np.mean(errors):.2f} |"
    )


def main() -> None:
    """Print a table for each key."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("buffer", type=Path)
    parser.add_argument("--noise", type=float, default=0.0)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    for key, images in pictures(options.buffer).items():
        if options.noise:
            noise = [rng.normal(0, options.noise, image.shape) for image in images]
            images = [
                (image + n).round().clip(0, 255).astype(np.uint8)
                for image, n in zip(images, noise, strict=True)
            ]
        print(f"{key} {images[0].shape}, noise {options.noise}")
        print("| codec | kB | of raw | encode ms | decode ms | mean error |")
        print("|---|---|---|---|---|---|")
        for codec in CODECS:
            print(measure(images, codec))


if __name__ == "__main__":
    main()
