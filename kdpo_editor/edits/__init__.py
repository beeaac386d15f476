"""Edits as objects: a change of weights on disk, a ledger of them, and what they are stored in."""
