"""Requests: what people hand over, the token ids that it becomes, and when a text gives an answer."""
