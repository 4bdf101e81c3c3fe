"""`doctor`: what this machine has for a run, what is missing and what that costs, and whether the parts agree."""
