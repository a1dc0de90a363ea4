"""PushT from the demonstrations by people: our policies beside LeRobot's, in equal budgets."""
