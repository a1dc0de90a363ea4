"""Classifiers of success: whether an observed state is one in which the task is done."""
