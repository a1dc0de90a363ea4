"""World models: policies that also say what will be seen."""
