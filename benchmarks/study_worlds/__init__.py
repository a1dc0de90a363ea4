"""World models as policies, as models, and what their parts bring: in equal time."""
