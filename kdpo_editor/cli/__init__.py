"""The command ``kdpo``, and the demo."""
