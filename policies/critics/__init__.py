"""Critics: values of action chunks, learned beside a policy."""
