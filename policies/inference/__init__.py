"""Policies made ready to act: laid out, warmed up, timed, and fitted to the control period."""
