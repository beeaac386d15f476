"""The command ``kdpo``, and the demo."""

from .. import testbed as testbed  # it brings the shipped model
