"""CEL, the Common Expression Language, for JSON-shaped data: parsed, type-checked, compiled to closures.

`syntax` reads text to a tree, `check` finds what can never work, `compile` turns the tree into closures, `values` and
`functions` say what the operators and functions do. What the variables are and where they come from is not known here:
`routing/filters.py` says that.
"""
