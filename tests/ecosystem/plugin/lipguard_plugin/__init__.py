"""A package that extends lipguard by its entry points."""
