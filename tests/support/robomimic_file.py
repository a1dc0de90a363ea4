"""Writes HDF5 files in robomimic's layout."""

import json

import h5py
import numpy as np


def write(path, lengths=(4, 3), *, next_obs=True, outcome=True, demos=None):
    """A file in robomimic's layout; demos: numbers of the demonstrations."""
    arguments = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 50}}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(arguments)
        data.attrs["total"] = sum(lengths)
        for number, length in zip(demos or range(len(lengths)), lengths, strict=True):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = length
            demo["actions"] = np.arange(length * 7, dtype=np.float64).reshape(length, 7)
            at = np.arange(length + 1, dtype=np.float64)
            image = (
                np.zeros((length + 1, 8, 8, 3), np.uint8) + at.astype(np.uint8)[:, None, None, None]
            )
            for name, rows in (("obs", slice(0, -1)), ("next_obs", slice(1, None))):
                if name == "obs" or next_obs:
                    group = demo.create_group(name)
                    group["robot0_eef_pos"] = np.stack([at, at + number, at], 1)[rows]
                    group["object"] = np.stack([at * 2] * 10, 1)[rows]
                    group["agentview_image"] = image[rows]
            if outcome:
                demo["rewards"] = (np.arange(length) == length - 1).astype(np.float64)
                demo["dones"] = (np.arange(length) == length - 1).astype(np.int64)
            demo["states"] = np.zeros((length, 32))
        file["mask/train"] = np.array([b"demo_1"])
    return path
