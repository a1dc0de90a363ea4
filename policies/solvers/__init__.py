"""Solvers: they carry noise to a clean chunk by calling any denoiser at levels of their own."""
