"""What a recipe will need and how long a step will take, computed before anything is launched: docs/planning.md."""
