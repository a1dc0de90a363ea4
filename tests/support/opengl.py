"""Tests that need pictures fail where OpenGL is missing, unless a person has given them up."""

import os

import pytest

needs_opengl = pytest.mark.skipif(
    os.environ.get("MUJOCO_GL") == "disable", reason="MUJOCO_GL=disable: no pictures wanted"
)
"""Imported by conftest before any simulator, which sets the variable where nothing is found."""
