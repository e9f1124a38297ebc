"""Lowering rules, one small file per layer family; `registry` finds them."""
