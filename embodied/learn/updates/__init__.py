"""What algorithms do with a batch; the learner keeps their optimisers and averages."""
