"""What a run gains by doing everything at once, and what its learner loses by it."""
