"""Contenders that go on from noisy demonstrations by acting themselves."""
