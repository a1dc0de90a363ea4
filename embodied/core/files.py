"""Files that appear whole or not at all."""

import errno
import hashlib
import os
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from embodied.core.errors import CorruptDataError, StorageFullError


@contextmanager
def full_disk_named(path: Path) -> Generator[None]:
    """Turn ENOSPC and EDQUOT into StorageFullError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(
                f"no space left on the file system of {path}. Everything recorded before is "
                "intact; free some space, then resume."
            ) from error
        raise


def fsync_directory(path: Path) -> None:
    """Make renames and creations in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replace `path` by `data`: temporary file, fsync, rename, fsync of the directory.

    mode: the file's permissions from its first instant, less the process's umask.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with full_disk_named(path):
        try:
            with open(
                temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)
            ) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], header: bytes) -> None:
    """Write arrays and a header as one safetensors file with a digest, whole or not at all."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"header": header.decode(), "sha256": _digest(contiguous, header)}
    write_atomic(path, safetensors.numpy.save(contiguous, metadata))


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], bytes]:
    """Arrays and header written by `write_tensors`; CorruptDataError unless the digest matches."""
    try:
        handle: Any = safetensors.safe_open(path, framework="numpy")
        with handle as file:
            metadata: dict[str, str] = file.metadata() or {}
            names: list[str] = list(file.keys())
            arrays: dict[str, np.ndarray] = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise CorruptDataError(f"{path} does not exist") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CorruptDataError(f"{path} is damaged: {error}") from error
    header = metadata.get("header", "").encode()
    if metadata.get("sha256") != _digest(arrays, header):
        raise CorruptDataError(f"{path} is damaged: its contents do not match its digest")
    return arrays, header


def _digest(arrays: Mapping[str, np.ndarray], header: bytes) -> str:
    digest = hashlib.sha256(header)
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
