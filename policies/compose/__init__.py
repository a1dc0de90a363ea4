"""Several policies as one, at test time: scores combined, or proposals ranked."""
