"""Learning classifiers of success from labelled episodes."""
