"""What is asked, as observations: a task in words, or what shall be seen at its end.

L: bytes of an instruction.
"""

import numpy as np

from embodied.core.errors import SpecError

TASK = "task"
"""The observation key under which a policy reads the instruction, and its name in a batch."""

GOAL = "goal."
"""What the key of a goal begins with: goal.observation.state is the observation.state to reach."""


def encode_instruction(text: str, max_bytes: int) -> np.ndarray:
    """UTF-8 bytes of the text, zeros behind them: uint8 [L]; SpecError if it does not fit."""
    data = text.encode()
    if len(data) > max_bytes:
        raise SpecError(
            f"the instruction {text[:80]!r} has {len(data)} bytes, the policy reads {max_bytes}: "
            "shorten it, or train with a larger policy.language.max_bytes"
        )
    if b"\0" in data:
        raise SpecError(f"the instruction {text[:40]!r} holds a zero byte, which marks its end")
    return np.frombuffer(data.ljust(max_bytes, b"\0"), np.uint8)
